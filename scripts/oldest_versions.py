"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def oldest_versions(pyproject: str) -> list[str]:
    """Turn every `name>=version,…` of the dependencies into `name==version`.

    Raises:
        ValueError: a dependency states no lowest version.
    """
    pinned = []
    for dependency in tomllib.loads(pyproject)["project"]["dependencies"]:
        found = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", dependency)
        if found is None:
            raise ValueError(f"pyproject.toml: {dependency!r} states no lowest version")
        pinned.append(f"{found[1]}=={found[2]}")
    return pinned


if __name__ == "__main__":
    print("\n".join(oldest_versions(PYPROJECT.read_text())))
