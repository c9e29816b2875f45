"""Settings must be readable without torch: the command answers --help with them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["kanlm.model.settings", "kanlm.model"])
def test_settings_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kan_imports_torch_and_nothing_else_of_ours_or_of_transformers() -> None:
    code = (
        "import sys, kanlm.kan; "
        # The package's own `__init__` brings one light module.
        "ours = {m for m in sys.modules if m.startswith('kanlm.') and m.split('.')[1] != 'kan'}; "
        "ours -= {'kanlm.registration'}; "
        "assert not ours, ours; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    import kanlm.model

    with pytest.raises(AttributeError, match="no attribute 'KanLMForEverything'"):
        _ = kanlm.model.KanLMForEverything
