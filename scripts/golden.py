"""Do two versions of kanlm train to the same bits?

A change that must not change numbers is checked by training with the old code and with the new,
on one machine, in one environment, and comparing every weight and every logged loss bitwise.
Nothing is recorded: bits that one processor makes another does not.

1. The older commit is checked out into a temporary worktree.
2. Both trees train the same runs: 50 steps of five feed-forward kinds, by one process and by two,
   a run whose grids are refined, and a run that is killed and resumed.
3. Weights and the `train`, `validation` and `grid` lines of metrics.jsonl are compared, times left
   out.

The backend of KAN layers is fixed, because `auto` may choose otherwise in other versions.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent

_START = """
import sys
from kanlm.cli import main
from kanlm.kan.kernels import use_backend
with use_backend(sys.argv[1]):
    main(sys.argv[2:])
"""

_CONFIG = """
data:
  domain: words
  root: {folder}
  cache_dir: {folder}/cache-{side}
  sources: [{{kind: files, path: words.txt, separator: "\\n\\n\\n"}}]
  validation_fraction: 0.1
  test_fraction: 0.1
tokenizer: bytes
model: {{d_model: 32, n_layers: 2, n_heads: 2, context_length: 32, dropout: 0.1}}
training:
  steps: 50
  batch_size: 8
  micro_batch_size: 2
  log_every: 1
  evaluate_every: 25
  checkpoint_every: 20
  compile: "off"
schedule: {{warmup_steps: 5}}
evaluation: {{bootstrap_resamples: 50}}
generation: {{max_new_tokens: 4}}
tracking: {{wandb: disabled}}
"""


@dataclass(frozen=True)
class Case:
    """One run, made by both versions.

    Attributes:
        overrides: of the common settings.
        processes: how many train it.
        fault: where it is killed first, as `kanlm.faults` has it; it is then started again.
    """

    name: str
    overrides: Sequence[str]
    processes: int = 1
    fault: str | None = None


def cases() -> list[Case]:
    """Five kinds by one process and by two, changing grids, and a resumed run."""
    kinds = {
        "swiglu": "swiglu",
        "kan": "kan",
        "kan-local": "kan-local",
        "kan-glu": "kan-glu",
        "moe": "{kind: moe, num_experts: 4, top_k: 2, experts: [kan, gelu]}",
    }
    made = [
        Case(f"{name}-{count}", [f"model.feed_forward={kind}"], count)
        for name, kind in kinds.items()
        for count in (1, 2)
    ]
    grids = ["training.grid_schedule={0: 3, 20: 6}", "training.grid_adaptation_steps=[10]"]
    made.append(Case("grids", ["model.feed_forward=kan-local", *grids]))
    made.append(Case("resumed", ["model.feed_forward=kan"], fault="before-update:35"))
    return made


@dataclass
class Comparison:
    """What differs between two runs of one case; nothing, if `differences` is empty."""

    case: str
    differences: list[str] = field(default_factory=list)


def compare(case: str, old: Path, new: Path) -> Comparison:
    """Compare weights and logged figures of two finished runs, bit for bit."""
    found = Comparison(case)
    found.differences += _different_weights(old, new)
    ours, theirs = (_figures(run / "metrics.jsonl") for run in (new, old))
    if len(ours) != len(theirs):
        found.differences.append(f"{len(theirs)} lines of metrics before, {len(ours)} now")
    for before, now in zip(theirs, ours, strict=False):
        # A figure that is logged now and was not before is no difference.
        different = [name for name, value in before.items() if now.get(name) != value]
        if different:
            where = f"{before['kind']} line of step {before['step']}"
            name = different[0]
            found.differences.append(f"{where}: {name} {before[name]} before, {now.get(name)} now")
            break
    return found


def _different_weights(old: Path, new: Path) -> list[str]:
    path = Path("model") / "model.safetensors"
    with safe_open(old / path, "np") as before, safe_open(new / path, "np") as now:
        if set(before.keys()) != set(now.keys()):
            names = sorted(set(before.keys()) ^ set(now.keys()))
            return [f"tensors on one side only: {', '.join(names)}"]
        return [
            f"{name}: {_largest(a, b)}"
            for name in sorted(before.keys())
            if (a := before.get_tensor(name)).tobytes() != (b := now.get_tensor(name)).tobytes()
        ]


def _largest(a: Any, b: Any) -> str:
    if a.shape != b.shape:
        return f"shape {a.shape} before, {b.shape} now"
    return f"largest difference {abs(a.astype(float) - b.astype(float)).max():.3g}"


def _figures(path: Path) -> list[Mapping[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not _timed(name)}
        for line in lines
        if line["kind"] in ("train", "validation", "grid")
    ]


def _timed(name: str) -> bool:
    """Whether a figure measures the machine, not the training."""
    return "seconds" in name or name in ("tokens_per_second", "mfu", "peak_memory_bytes")


@contextmanager
def _worktree(commit: str, folder: Path):
    """The tree of a commit, in a folder that is gone afterwards."""
    subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], cwd=ROOT, check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def _train(case: Case, tree: Path, config: Path, run: Path, backend: str) -> None:
    """Bring a run to its end with the code of a tree.

    Raises:
        RuntimeError: it ends otherwise; with what it printed.
    """
    start = config.parent / "start.py"
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.processes}"]
    command = [
        sys.executable,
        *(several if case.processes > 1 else ()),
        *(str(start), backend, "pretrain", str(config), f"output_dir={run}"),
        *case.overrides,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    faults = [case.fault, None] if case.fault else [None]
    for fault in faults:
        done = subprocess.run(
            command,
            env=environment if fault is None else {**environment, "KANLM_FAULT": fault},
            cwd=config.parent,
            capture_output=True,
            text=True,
        )
        expected = 0 if fault is None else -signal.SIGKILL
        if done.returncode != expected:
            raise RuntimeError(
                f"{run}: exit code {done.returncode}, expected {expected}\n{done.stderr[-3000:]}"
            )


def _write_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(200)]
    path.write_text("\n\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(300)))


def run(commit: str, *, only: Sequence[str], backend: str, jobs: int) -> list[Comparison]:
    """Train every case with both versions, and compare.

    Args:
        commit: the older version.
        only: names of cases; empty takes all.
        backend: of KAN layers, for both versions.
        jobs: runs at a time.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        _write_text(folder / "words.txt")
        (folder / "start.py").write_text(_START)
        configs = {side: folder / f"{side}.yaml" for side in ("old", "new")}
        for side, config in configs.items():
            config.write_text(_CONFIG.format(folder=folder, side=side))
        with _worktree(commit, folder / "tree") as tree, ThreadPoolExecutor(jobs) as pool:
            trees = {"old": tree, "new": ROOT}

            def one(case: Case) -> Comparison:
                runs = {side: folder / side / case.name for side in trees}
                for side, code in trees.items():
                    _train(case, code, configs[side], runs[side], backend)
                found = compare(case.name, runs["old"], runs["new"])
                print(f"{case.name}: {'; '.join(found.differences) or 'the same bits'}", flush=True)
                return found

            wanted = [case for case in cases() if not only or case.name in only]
            # The first prepares the text for the others.
            return [one(wanted[0]), *pool.map(one, wanted[1:])]


def main() -> None:
    """Compare, and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(
        prog="./scripts/golden",
        description="Train with an older commit and with this tree, and compare bits.",
    )
    parser.add_argument("commit", help="the version to compare this tree with")
    names = [case.name for case in cases()]
    parser.add_argument("--only", nargs="+", default=[], choices=names, help="some cases only")
    parser.add_argument("--backend", default="recompute", help="of KAN layers; default: recompute")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default: 2")
    arguments = parser.parse_args()
    found = run(
        arguments.commit, only=arguments.only, backend=arguments.backend, jobs=arguments.jobs
    )
    different = [comparison.case for comparison in found if comparison.differences]
    print(f"{len(found) - len(different)} of {len(found)} cases the same bit for bit")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
