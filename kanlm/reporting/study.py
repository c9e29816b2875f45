"""What a finished folder holds: results.json and the runs' logs below it.

A study has its runs at `ARM/seed-N/stage-K-DOMAIN/`; a single run's folder is its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanlm.errors import UserError
from kanlm.results.log import read_lines
from kanlm.results.read import read_results
from kanlm.untrusted_io import read_text


@dataclass(frozen=True)
class RunLog:
    """One run's place in the study and its logs."""

    arm: str
    seed: int
    stage: int
    domain: str
    #: Lines of metrics.jsonl by their kind: `train`, `validation`, `sample`.
    lines: Mapping[str, list[dict[str, Any]]]
    #: Text of config.yaml.
    config: str

    @property
    def steps(self) -> int:
        """Last step logged."""
        return max((line["step"] for lines in self.lines.values() for line in lines), default=0)


@dataclass(frozen=True)
class Study:
    """results.json with the runs that it came from."""

    name: str
    results: dict[str, Any]
    runs: list[RunLog]

    @property
    def arms(self) -> list[str]:
        return list(self.results["arms"])

    @property
    def domains(self) -> list[str]:
        return self.results["domains"]

    @property
    def stages(self) -> list[str]:
        """Domain trained on in every stage."""
        return self.domains[: stage_count(self.results)]

    def arm_runs(self, arm: str, seed: int | None = None) -> list[RunLog]:
        """Runs of an arm in the order of seeds and stages."""
        return [r for r in self.runs if r.arm == arm and (seed is None or r.seed == seed)]


def stage_count(results: Mapping[str, Any]) -> int:
    """Return stages that were trained, pretraining included."""
    return max(len(arm["bits_per_byte"]) for arm in results["arms"].values())


def read_study(folder: Path) -> Study:
    """Read a study's or a run's folder.

    Raises:
        UserError: there is no results.json in it, or a file in it is damaged.
    """
    results = read_results(folder / "results.json")
    single = (folder / "metrics.jsonl").exists()
    runs = list(_single_run(folder, results) if single else _runs(folder, results))
    return Study(folder.resolve().name, results, runs)


def _runs(folder: Path, results: Mapping[str, Any]) -> Iterator[RunLog]:
    for arm in results["arms"]:
        # Whoever made the file may have named a folder elsewhere.
        if arm in ("", ".", "..") or "/" in arm or "\0" in arm:
            raise UserError(f"{folder / 'results.json'}: an arm's name is no folder's: {arm!r}")
        found = []
        for path in (folder / arm).glob("seed-*/stage-*-*/metrics.jsonl"):
            seed = re.fullmatch(r"seed-(\d{1,18})", path.parent.parent.name)
            stage = re.fullmatch(r"stage-(\d{1,3})-(.+)", path.parent.name)
            if seed and stage:
                found.append((int(seed[1]), int(stage[1]), stage[2], path.parent))
        for seed, stage, domain, place in sorted(found):
            yield _read_run(place, arm, seed, stage, domain)


def _single_run(folder: Path, results: Mapping[str, Any]) -> Iterator[RunLog]:
    if len(results["arms"]) != 1:
        raise UserError(f"{folder / 'results.json'} holds several arms, beside a single run's log")
    [(arm, values)] = results["arms"].items()
    yield _read_run(folder, arm, values["seeds"][0], 0, results["domains"][0])


def _read_run(folder: Path, arm: str, seed: int, stage: int, domain: str) -> RunLog:
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "sample": []}
    for line in read_lines(folder / "metrics.jsonl"):
        lines.setdefault(line["kind"], []).append(line)
    return RunLog(arm, seed, stage, domain, lines, read_text(folder / "config.yaml"))
