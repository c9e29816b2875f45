"""`python -m kanlm`, and so `accelerate launch -m kanlm` and `torchrun -m kanlm`."""

from kanlm.cli import main

main()
