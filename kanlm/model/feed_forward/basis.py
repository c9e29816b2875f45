"""The basis that a feed-forward kind's options name."""

from collections.abc import Mapping
from typing import Any

from ...kan import BASES, Basis
from .options import complete


def make_basis(spec: Mapping[str, Any], channels: int) -> Basis:
    """Build the basis `{"kind": …, **options}` for a layer with `channels` inputs.

    Raises:
        ValueError: the kind or an option is unknown or impossible.
    """
    options = complete("basis", BASES, spec)
    return BASES[options.pop("kind")](channels, **options)
