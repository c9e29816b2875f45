"""Makes transformers' Auto classes know kanlm's, whichever of the two is imported first.

The Auto classes must be told of a model type before they meet it, and `import kanlm` is to stay
light, for `kanlm --help` imports it, too. So where transformers comes second, its module is
watched for, and told when it has been imported.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Module of transformers → module of ours that tells it when imported.
_TELLS = {
    "transformers.models.auto.configuration_auto": "kanlm.model.configuration",
    "transformers.models.auto.modeling_auto": "kanlm.model.decoder",
}


def register_with_transformers() -> None:
    """Register now what transformers has imported already, and the rest when it does."""
    for theirs, ours in _TELLS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        else:
            sys.meta_path.insert(0, _Watch(theirs, ours))


class _Watch(MetaPathFinder):
    """Imports `ours` as soon as `theirs` has been imported."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs = theirs
        self.ours = ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self.ours)

            spec.loader.exec_module = execute_and_tell
        return spec
