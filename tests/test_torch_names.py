"""Which private names of torch the package uses: they may go with any version of torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import kanlm

#: Each is justified in a line where it stands.
ALLOWED = {
    # Whether torch.func's transforms are at work in compiled code.
    "torch._C._functorch",
    # Running a step on tensors without memory, and looking at each of its operators.
    "torch._subclasses.fake_tensor",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
    "torch.ops.aten._to_copy",
    # Seconds spent in compiling, and deterministic compiling.
    "torch._dynamo.utils",
    "torch._inductor.config",
    # Of tensors: how often one was written to, and which memory is whose without memory.
    "._version",
    "._cdata",
    # What torch.compiler.assume_constant_result sets, without importing the compiler.
    "._dynamo_marked_constant",
}

#: Private attributes of torch's objects that have tempted us.
ATTRIBUTES = {
    *("_version", "_cdata", "_dynamo_marked_constant", "_current_level", "_compiled_call_impl"),
    *("_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers", "_modules"),
}


def private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [
                f"{node.module}.{name.name}" if name.name.startswith("_") else node.module or ""
                for name in node.names
                if not node.level
            ]
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            modules = [dotted] if node.attr.startswith("_") else []
            if node.attr in ATTRIBUTES and ast.unparse(node.value) != "self":
                yield f".{node.attr}"
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "torch" and any(p.startswith("_") and p[1] != "_" for p in parts[1:]):
                yield module


def test_only_these_private_names_of_torch_are_used() -> None:
    found: dict[str, list[str]] = {}
    package = Path(kanlm.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for name in private_names(ast.parse(path.read_text())):
            found.setdefault(name, []).append(str(path.relative_to(package)))
    assert {name: places for name, places in found.items() if name not in ALLOWED} == {}
    assert set(found) >= ALLOWED, "these are used no more"


def test_private_names_are_found() -> None:
    code = (
        "from torch._C import x\nimport torch._dynamo\nfrom torch.nn import _reduction\n"
        "torch.jit._trace.f()\nmodule._forward_hooks\nself._modules\nfrom . import _y"
    )
    assert set(private_names(ast.parse(code))) == {
        "torch._C",
        "torch._dynamo",
        "torch.nn._reduction",
        "torch.jit._trace",
        "._forward_hooks",
    }
