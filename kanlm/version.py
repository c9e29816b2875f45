"""The version of this code, whether it was installed or lies in a checkout."""

import tomllib
from importlib.metadata import version as installed_version
from pathlib import Path

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def version() -> str:
    """The version in the checkout's pyproject.toml, or, without one, of what is installed."""
    if _PROJECT.exists():
        project = tomllib.loads(_PROJECT.read_text()).get("project", {})
        if project.get("name") == "kanlm":
            return project["version"]
    return installed_version("kanlm")
