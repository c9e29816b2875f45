"""Language models with Kolmogorov-Arnold feed-forward blocks, beside MLP twins.

From Python: `load` a configuration and `train` it; the rest is transformers', whose Auto
classes know the model type `kanlm` from here on. Nothing heavy is imported before it is
asked for.
"""

from typing import TYPE_CHECKING, Any

from kanlm.registration import register_with_transformers

if TYPE_CHECKING:
    from kanlm.config import load
    from kanlm.experiments.single import train
    from kanlm.model import KanLMConfig, KanLMForCausalLM, KanLMModel

_HOMES = {
    "load": "kanlm.config",
    "train": "kanlm.experiments.single",
    "KanLMConfig": "kanlm.model",
    "KanLMForCausalLM": "kanlm.model",
    "KanLMModel": "kanlm.model",
}

__all__ = ["KanLMConfig", "KanLMForCausalLM", "KanLMModel", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kanlm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


register_with_transformers()
