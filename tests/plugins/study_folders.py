"""A study folder such as `kanlm continual` leaves, with curves and losses made up."""

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kanlm.evaluation.perplexity import Evaluation
from kanlm.experiments.derive import derive
from kanlm.experiments.result_files import write_results
from kanlm.results.schema import EvaluationKey, Record
from kanlm.results.sweep import edges

DOMAINS = ("prose", "code")
LABELS = {"kan": "kan/bspline1-g6-silu", "swiglu": "swiglu", "gelu": "gelu"}
#: Bits per byte without noise: [stage][domain].
LOSSES = {
    "kan": [[2.113, 3.204], [2.431, 1.312]],
    "swiglu": [[2.071, 3.155], [2.492, 1.283]],
    "gelu": [[2.158, 3.262], [2.507, 1.371]],
}
STEPS = (600, 300)


def make_study(
    folder: Path,
    arms: tuple[str, ...] = ("kan", "swiglu", "gelu"),
    seeds: tuple[int, ...] = (0, 1),
    stages: int = 2,
    losses: dict[str, list[list[float]]] = LOSSES,
) -> Path:
    """Write a study's results.json, documents.jsonl and run folders below `folder`."""
    rng = np.random.default_rng(0)
    bytes = rng.lognormal(7, 0.8, 60).astype(np.int64)
    hardness = rng.normal(1, 0.12, 60)
    evaluations = {}
    for arm in arms:
        for seed in seeds:
            shift = rng.normal(0, 0.008)
            for stage in range(stages):
                for j, domain in enumerate(DOMAINS[:2]):
                    bits = losses[arm][stage][j] + shift + rng.normal(0, 0.004)
                    key = EvaluationKey(
                        arm=arm,
                        seed=seed,
                        strategy="fine-tuning",
                        stage=stage,
                        domain=domain,
                        step=STEPS[stage],
                        split="test",
                    )
                    noise = hardness + rng.normal(0, 0.01, 60)
                    noise *= bytes.sum() / (bytes * noise).sum()
                    evaluations[key] = Evaluation(
                        nats=bits * log(2) * bytes * noise,
                        tokens=bytes // 3,
                        words=bytes // 6,
                        bytes=bytes,
                    )
                write_run(folder, arm, seed, stage, losses[arm], rng)
    results = derive(
        [Record.of(key, evaluation.sums()) for key, evaluation in evaluations.items()],
        {arm: arm_facts(arm) for arm in arms},
        domains=DOMAINS,
        documents=evaluations,
        references={
            domain: {
                "bigram": 3.142 + 0.2 * j,
                "bigram_discount": 0.81,
                "bigram_training_tokens": 812345,
                "xz": 2.361 - 0.4 * j,
                "xz_training_bytes": 2431000,
                "xz_heldout_bytes": 131000,
            }
            for j, domain in enumerate(DOMAINS)
        },
        provenance={
            "commit": "3f8c0f7bd2c4e3b0a85b3c3f65cb2a2c33a0d0a1",
            "dirty": False,
            "versions": {"python": "3.11.9", "kanlm": "0.1.0", "torch": "2.13.0"},
            "hardware": {
                "platform": "Linux-6.8-x86_64",
                "cpu": "AMD EPYC 7763",
                "cores": 2,
                "threads": 2,
                "memory_bytes": 16_700_000_000,
                "gpus": [],
            },
            "config_hash": "e27a7485a01e1b064397c4939188a6e345007f0739943ff9187474f51bfad682",
            "data_hash": {domain: f"{j}b" * 32 for j, domain in enumerate(DOMAINS)},
        },
        resamples=200,
    )
    write_results(folder, results, evaluations)
    return folder


def arm_facts(arm: str) -> dict[str, Any]:
    parts = {"embedding": 262_144, "attention": 262_144, "feed_forward": 523_900, "norms": 1152}
    flops = {"attention": 524_288, "attention_scores": 262_144, "feed_forward": 1_150_000}
    return {
        "feed_forward": LABELS[arm],
        "parameters": 1_049_340,
        "feed_forward_parameters": 523_900,
        "flops_per_token": 2_460_000,
        "train_tokens": 3_686_400,
        "train_seconds": {"kan": 98.2, "swiglu": 61.4, "gelu": 54.9}[arm],
        "compile_seconds": 0.0,
        "tokens_per_second": {"kan": 37_540.0, "swiglu": 60_040.0, "gelu": 67_150.0}[arm],
        "peak_memory_bytes": 912_000_000,
        "steps": 900,
        "skipped_steps": 0,
        "accounting": {
            "parameters": {**parts, "head": 0, "total": sum(parts.values())},
            "flops_per_token": {**flops, "head": 524_288, "total": 2_460_720},
            "active_parameters": sum(parts.values()),
            "decoded_parameters": 1_049_000,
        },
    }


def write_run(
    folder: Path,
    arm: str,
    seed: int,
    stage: int,
    losses: list[list[float]],
    rng: np.random.Generator,
) -> None:
    """One run's metrics.jsonl and config.yaml, its curves falling to `losses`."""
    place = folder / arm / f"seed-{seed}" / f"stage-{stage}-{DOMAINS[stage]}"
    place.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(10, STEPS[stage] + 1, 10):
        start = 7.6 if stage == 0 else losses[0][1] * 2.1
        end = losses[stage][stage] * 2.1
        loss = end + (start - end) * np.exp(-step / 60) + rng.normal(0, 0.04)
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "bits_per_byte": loss / 2.1,
                "learning_rate": 6e-3,
                "gradient_norm": 0.5,
                "tokens": step * 4096,
                "seconds": step / 10,
                "tokens_per_second": 40_000,
            }
        )
        if step % 100 == 0:
            for j, domain in enumerate(DOMAINS):
                before = 7.5 if stage == 0 else losses[0][j]
                bits = losses[stage][j] + (before - losses[stage][j]) * np.exp(-step / 80)
                lines.append(
                    {
                        "kind": "validation",
                        "step": step,
                        "domain": domain,
                        "nats_per_token": 2.1 * bits,
                        "bits_per_byte": bits + rng.normal(0, 0.006),
                        "token_perplexity": float(np.exp(2.1 * bits)),
                    }
                )
    text = (
        "Return the number of items <b>in</b> the mapping, or None if it is empty.\n\n"
        "The optional argument is a sequence of strings that are joined to make the path. "
        "If the file is not found, OSError is raised.\n"
        if stage == 0
        else "def items(self, key=None):\n    if key is None:\n        return [x for x in self]\n"
        "    self._lock.acquire()\n    try:\n        return self._get(key & 0xff)\n"
    )
    prompt = "Return" if stage == 0 else "def "
    lines.append({"kind": "sample", "step": STEPS[stage], "prompt": prompt, "text": text})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "config.yaml").write_text(f"seed: {seed}\nmodel:\n  d_model: 128\n")


def make_run(folder: Path) -> Path:
    """Write a single run's folder, which holds the results of a study of one arm."""
    study = make_study(folder / "study", arms=("kan",), seeds=(0,), stages=1)
    run = study / "kan" / "seed-0" / "stage-0-prose"
    for name in ("results.json", "documents.jsonl"):
        (study / name).rename(run / name)
    return run.rename(folder / "run")


def sweep_of(losses: dict[Any, float | None], setting: str = "optimizer.learning_rate") -> dict:
    """A sweep of one setting as results.json holds it; a loss of None has diverged."""
    best = min(loss for loss in losses.values() if loss is not None)
    trials = [
        {
            "settings": {setting: value},
            "state": "diverged" if loss is None else "finished",
            "bits_per_byte": loss,
            "step": 600,
            "chosen": loss == best,
        }
        for value, loss in losses.items()
    ]
    known = {"seed": 0, "domain": "prose", "split": "validation", "other_trials": 0}
    return {**known, "trials": trials, "edges": edges(trials)}


@pytest.fixture
def sweep_maker() -> Callable[..., dict[str, Any]]:
    return sweep_of


@pytest.fixture
def study_maker() -> Callable[..., Path]:
    return make_study


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    return make_study(tmp_path / "quickstart")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path)
