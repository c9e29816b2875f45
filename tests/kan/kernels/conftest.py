"""Has Triton interpret kernels where there is no GPU to run them.

Triton asks when it is first imported, and never again, so this is said while tests are collected:
every file's conftest is read before the first test of any file runs. Interpreted, Triton still
leaves torch.compile on a CPU alone.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before it was told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"
