"""Labels that cannot overlap: measured before they are drawn, numbered where they do not fit.

A label is written out if all fit; else each becomes a number, and the picture's key says
which is which. Where not even numbers fit, only as many stay as do.
"""

import itertools
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

#: Room between two labels, in pixels at 100 dots an inch.
_GAP = 4.0


def key(names: Sequence[str]) -> str:
    """Write what numbers stand for."""
    return ", ".join(f"{number}: {name}" for number, name in enumerate(names))


def fitting(
    axes: Axes,
    names: Sequence[str],
    draw: Callable[[list[str]], Sequence[Text]],
    *,
    within: bool,
    numbers: bool = True,
) -> bool:
    """Draw labels with `draw`, as names if they fit and as numbers if not.

    Args:
        axes: drawn on.
        names: all labels, in order.
        draw: draws labels in place of those it drew before, and returns them; "" is none.
        within: whether they must lie within the width of the axes, too.
        numbers: whether numbers may stand for names; else names are left out.

    Returns whether numbers stand for names, so that a key is needed.
    """
    if _fit(axes, draw(list(names)), within=within):
        return False
    shown = [str(i) for i in range(len(names))] if numbers else names
    every = 1
    while every <= len(names):
        # Every second or fourth is enough to count by.
        if _fit(
            axes, draw([n if i % every == 0 else "" for i, n in enumerate(shown)]), within=False
        ):
            break
        every *= 2
    return numbers


def extents(axes: Axes, texts: Sequence[Text]) -> list[Bbox]:
    """Measure where texts lie in pixels, once the figure is laid out."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


def _fit(axes: Axes, texts: Sequence[Text], *, within: bool) -> bool:
    boxes = sorted(extents(axes, texts), key=lambda box: box.x0)
    apart = all(a.x1 + _GAP <= b.x0 for a, b in itertools.pairwise(boxes))
    frame = axes.get_window_extent()
    inside = not boxes or (boxes[0].x0 >= frame.x0 - _GAP and boxes[-1].x1 <= frame.x1 + _GAP)
    return apart and (inside or not within)
