"""A study: arms × seeds × stages, each run an ordinary run in a process of its own.

1. `plan` derives every arm's configuration, the twins' widths solved against the first.
2. `run` starts, for each arm and seed, `kanlm pretrain` and then `kanlm finetune` for
   every later stage, skipping what is finished and resuming what was interrupted.
3. With a grid, every arm first tries it with the first seed and keeps the trial of best
   validation loss.

Runs are started by the same command a user would type, from the config.yaml that lies in
the run's folder, so that any figure can be reproduced alone. A process each keeps one
arm's peak memory out of another's.
"""

import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kanlm.config import Config, DataSettings, from_tree, merge, nested, to_tree
from kanlm.data.corpus import Corpus, open_corpus, open_tokenizer
from kanlm.errors import Interrupted, UserError
from kanlm.files import replacing, write_text
from kanlm.model.matching import twin
from kanlm.training.folder import claim, is_finished, write_config
from kanlm.training.resolve import resolve
from kanlm.training.run import check_corpus, check_inherited


@dataclass(frozen=True)
class Arm:
    """One architecture of a study with its recipe for the first stage."""

    name: str
    config: Config
    #: Settings of every trial of the grid, by dotted name; one empty trial without a grid.
    trials: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """One finished run of a study."""

    arm: str
    seed: int
    stage: int
    domain: str
    folder: Path


def plan(config: Config) -> list[Arm]:
    """Derive the arms.

    An arm is the configuration with the arm's part laid over it. The first is the
    reference; the others' feed-forward width is solved so that their blocks hold the
    reference's parameters (or FLOPs), unless the arm states `hidden`.

    Raises:
        UserError: no `study`, an impossible arm, or arms with unequally many trials.
    """
    study = config.study
    if study is None:
        raise UserError("the config has no `study:` section: name the arms under study.arms")
    tree = to_tree(replace(config, study=None))
    arms: list[Arm] = []
    for name, part in study.arms.items():
        try:
            arm = from_tree(merge(tree, part))
            if arms and not _states_hidden(part):
                arm = replace(arm, model=_matched(arm, arms[0].config, study.match))
            arm = resolve(arm)
        except UserError as error:
            raise UserError(f"study.arms.{name}: {error}") from None
        arms.append(Arm(name, arm, _trials(study.arm_grids.get(name, study.grid))))
    if len({len(arm.trials) for arm in arms}) > 1:
        counts = ", ".join(f"{arm.name} {len(arm.trials)}" for arm in arms)
        raise UserError(f"study.arm_grids: arms must have equally many trials, not {counts}")
    return arms


def run(config: Config, stages: list[dict[str, Any]]) -> list[Run]:
    """Bring every run of the study to its end and return them all.

    Raises:
        UserError: a run failed, or the folder holds another study.
        Interrupted: a signal stopped the run in progress, which saved itself.
    """
    arms = plan(config)
    assert config.study is not None
    folder = Path(config.output_dir)
    claim(folder, config)
    for arm in arms:
        check_runs(arm, stages)
    write_config(folder, config)
    runs = []
    for arm in arms:
        chosen = select(arm, stages, folder, config)
        for seed in config.study.seeds:
            runs += _run_stages(arm, chosen, seed, stages, folder, config)
    return runs


def check_runs(arm: Arm, stages: list[dict[str, Any]]) -> None:
    """Check the settings of all an arm's runs, and prepare the text that they read.

    Raises:
        UserError: what one of the runs would have been refused for, hours later.
    """
    tokenizer = open_tokenizer(arm.config.tokenizer, arm.config.data, report=print)
    corpora: dict[str, Corpus] = {}
    for trial, stage in itertools.product(arm.trials, range(len(stages) + 1)):
        settings = _stage_config(arm, trial, 0, stage, stages, Path(arm.name), None)
        if stage:
            check_inherited(to_tree(settings), to_tree(arm.config), f"stage 0 of {arm.name}")
        for data in (settings.data, *settings.evaluation.domains):
            key = json.dumps(to_tree(data), sort_keys=True)
            if key not in corpora:
                corpora[key] = open_corpus(data, tokenizer, report=print)
            check_corpus(corpora[key], settings)


def select(arm: Arm, stages: list[dict[str, Any]], folder: Path, config: Config) -> dict[str, Any]:
    """The trial of least validation loss with the first seed; its run is copied to its place."""
    assert config.study is not None
    if len(arm.trials) == 1:
        return arm.trials[0]
    seed = config.study.seeds[0]
    losses = []
    for trial in arm.trials:
        place = folder / arm.name / "trials" / _trial_name(trial)
        settings = _stage_config(arm, trial, seed, 0, stages, place, None)
        _start(settings, config.study.launcher, arm.name)
        losses.append(_validation_loss(place))
    best = min(range(len(losses)), key=losses.__getitem__)
    selection = [
        {"settings": trial, "validation_nats_per_token": loss, "selected": i == best}
        for i, (trial, loss) in enumerate(zip(arm.trials, losses, strict=True))
    ]
    write_text(folder / arm.name / "selection.json", json.dumps(selection, indent=1))
    place = stage_folder(folder, arm.name, seed, 0, arm.config.data.domain)
    if not place.exists():
        source = folder / arm.name / "trials" / _trial_name(arm.trials[best])
        with replacing(place) as draft:
            shutil.copytree(source, draft, dirs_exist_ok=True)
    return arm.trials[best]


def stage_folder(folder: Path, arm: str, seed: int, stage: int, domain: str) -> Path:
    """Where a run of a study lies."""
    return folder / arm / f"seed-{seed}" / f"stage-{stage}-{domain}"


def domains_of(config: Config, stages: list[dict[str, Any]]) -> list[DataSettings]:
    """The data of every stage, pretraining's first.

    Raises:
        UserError: two stages share a domain's name, or a stage is impossible.
    """
    tree = to_tree(replace(config, study=None))
    domains = [config.data, *(from_tree(merge(tree, stage)).data for stage in stages)]
    names = [data.domain for data in domains]
    if len(set(names)) < len(names):
        raise UserError(f"study.stages: each stage needs its own data.domain, not {names}")
    return domains


def _run_stages(
    arm: Arm,
    chosen: dict[str, Any],
    seed: int,
    stages: list[dict[str, Any]],
    folder: Path,
    config: Config,
) -> Iterator[Run]:
    assert config.study is not None
    previous: Path | None = None
    for stage, data in enumerate(domains_of(arm.config, stages)):
        place = stage_folder(folder, arm.name, seed, stage, data.domain)
        settings = _stage_config(arm, chosen, seed, stage, stages, place, previous)
        _start(settings, config.study.launcher, arm.name)
        yield Run(arm.name, seed, stage, data.domain, place)
        previous = place


def _stage_config(
    arm: Arm,
    trial: dict[str, Any],
    seed: int,
    stage: int,
    stages: list[dict[str, Any]],
    place: Path,
    previous: Path | None,
) -> Config:
    """Configuration of one run: the arm's, the trial's settings, then the stage's part."""
    tree = to_tree(arm.config)
    for name, value in trial.items():
        tree = merge(tree, nested(name, value))
    if stage:
        tree = merge(tree, stages[stage - 1])
    settings = from_tree(tree)
    others = [d for d in domains_of(arm.config, stages) if d.domain != settings.data.domain]
    return resolve(
        replace(
            settings,
            seed=seed,
            output_dir=str(place),
            initialize_from=str(previous) if previous else None,
            evaluation=replace(
                settings.evaluation, domains=[*settings.evaluation.domains, *others]
            ),
        )
    )


def _start(config: Config, launcher: str | None, arm: str) -> None:
    """Run `kanlm pretrain` or `finetune` on `config` unless it is finished."""
    folder = Path(config.output_dir)
    claim(folder, config)
    if is_finished(folder):
        return
    write_config(folder, config)
    verb = "pretrain" if config.initialize_from is None else "finetune"
    python = shlex.split(launcher) if launcher else [sys.executable]
    command = [*python, "-m", "kanlm", verb, str(folder / "config.yaml")]
    process = subprocess.Popen(command)
    # Ctrl-C reaches the child too, which saves itself: wait for it instead of dying first.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    terminate = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminate)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted(code - 128)
    if code:
        raise UserError(
            f"study.arms.{arm}, seed {config.seed}: ended with exit code {code}, see above; "
            f"to run it alone: {shlex.join(command)}"
        )


def _matched(arm: Config, reference: Config, match: Literal["parameters", "flops"]) -> Any:
    try:
        twin_settings = twin(reference.model, arm.model.feed_forward, match)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(arm.model, feed_forward=twin_settings.feed_forward)


def _states_hidden(part: dict[str, Any]) -> bool:
    specs = part.get("model", {}).get("feed_forward", {})
    specs = specs if isinstance(specs, list) else [specs]
    return any(isinstance(spec, dict) and spec.get("hidden") is not None for spec in specs)


def _trials(grid: dict[str, list[Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    )


def _trial_name(trial: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in trial.items()).replace("/", "-")


def _validation_loss(folder: Path) -> float:
    """Best full validation pass over the domain trained on."""
    (facts,) = json.loads((folder / "results.json").read_text())["arms"].values()
    return facts["best_validation"]["nats_per_token"]
