"""The decoder as transformers classes. Nothing heavy is imported before it is asked for.

Using any name of this package makes `AutoModelForCausalLM` and the other Auto classes
know the model type `kanlm`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import KanLMConfig
    from .decoder import KanLMForCausalLM, KanLMModel, KanLMPreTrainedModel

__all__ = ["KanLMConfig", "KanLMForCausalLM", "KanLMModel", "KanLMPreTrainedModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import decoder

    return getattr(decoder, name)
