"""Whether compiled code on this machine is what it should be."""

from collections.abc import Callable


def warn_of_scalar_code(device: str, report: Callable[[str], object]) -> None:
    """Report where torch.compile would use no vector instructions.

    It looks for them by compiling a small program with a time limit, and without a word takes
    none where that ran out.
    """
    # Importing the compiler takes seconds.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if device == "cpu" and not pick_vec_isa():
        report(
            "torch.compile finds no vector instructions, so compiled times will mean little: it "
            "gives up looking on a busy machine; try again on a quiet one"
        )
