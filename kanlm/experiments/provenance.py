"""What a result was made with: code, versions, machine, settings and text."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kanlm.config import Config, to_tree
from kanlm.version import version as kanlm_version

#: Distributions whose version can change a number, beside kanlm.
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")


def collect(config: Config, data_hash: Mapping[str, str]) -> dict[str, Any]:
    """Collect commit, versions, hardware and hashes of a result.

    Args:
        config: of the run or study.
        data_hash: domain → fingerprint of its corpus.
    """
    return {
        **environment(),
        "parallel_runs": config.study.parallel_runs if config.study else 1,
        "config_hash": config_hash(config),
        "data_hash": dict(data_hash),
    }


def environment() -> dict[str, Any]:
    """Collect commit, versions and hardware."""
    commit, dirty = _commit(Path(__file__).parent)
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            "kanlm": kanlm_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "hardware": _hardware(),
    }


def config_hash(config: Config) -> str:
    """Hash every setting but the folder (sha256), so that a moved run keeps its hash."""
    tree = to_tree(config)
    del tree["output_dir"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _commit(folder: Path) -> tuple[str | None, bool | None]:
    """Find the commit of the code's repository, and whether tracked files differ from it.

    Both None for code that was installed, or where there is no git.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        tracked = _git(folder, "ls-files", "--", str(folder))
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None, None
    # An installed copy may lie inside another repository.
    return (commit, bool(changes)) if tracked else (None, None)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }


def _cpu_model() -> str:
    """Name the processor as the operating system does, and the instructions that torch uses.

    Machines of one name may be generations apart.
    """
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(found, name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
