"""Modules that are told when somebody wants them called by themselves."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Watchable(nn.Module):
    """A module that knows whether a forward hook was ever registered on it.

    A block computes several such modules at once where nobody would notice.
    """

    _was_hooked = False

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._was_hooked = True
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._was_hooked = True
        return super().register_forward_pre_hook(*args, **kwargs)


def is_unobserved(module: nn.Module, kind: type[Watchable]) -> bool:
    """Whether calling a module is calling `kind.forward` and nothing else.

    Not of subclasses and adapters that compute otherwise, nor where `forward` was replaced, as
    accelerate does, nor once a hook has been registered.
    """
    if not isinstance(module, kind) or module._was_hooked:
        return False
    return getattr(module.forward, "__func__", None) is kind.forward
