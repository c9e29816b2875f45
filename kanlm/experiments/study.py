"""A study: arms × seeds × stages, each run an ordinary run in a process of its own.

1. `plan` derives every arm's configuration, the twins' widths solved against the reference.
2. With a grid, every arm first tries it with the first seed and keeps the trial of least
   validation loss (`sweep.py`).
3. For each arm and seed, `kanlm pretrain` and then `kanlm finetune` for every later stage,
   skipping what is finished and resuming what was interrupted. With `finalists`, only the
   best arms go on to the seeds after the first.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kanlm.atomic_io import atomic_folder
from kanlm.config import (
    Config,
    DataSettings,
    StudySettings,
    from_tree,
    merge,
    nested,
    to_tree,
)
from kanlm.data.corpus import Corpus, check_few_documents, open_corpus, open_tokenizer
from kanlm.errors import UserError
from kanlm.evaluation.references import cached_references
from kanlm.experiments import sweep
from kanlm.experiments.launch import StudyProgress, run_chains
from kanlm.model.matching import Cost, has_width, solve_widths, total_cost
from kanlm.model.settings import ModelSettings
from kanlm.slow_notices import announce_if_slow
from kanlm.training.inheritance import check_inherited
from kanlm.training.resolve import at_last_grid, resolve, shrunk_part
from kanlm.training.run import check_corpus
from kanlm.training.run_folder import claim, read_config_tree, write_config
from kanlm.training.tracking import print_line


@dataclass(frozen=True)
class Arm:
    """One architecture of a study with its recipe for the first stage."""

    name: str
    config: Config
    #: Settings of every trial of the grid, by dotted name; one empty trial without a grid.
    trials: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Finished:
    """What a study has run."""

    runs: "list[Run]"
    #: Arm → what its trials came to, as results.json holds it; empty without a grid.
    sweeps: dict[str, dict[str, Any]]


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
    reference, or, where an arm has no width to solve, that arm is. The others' feed-forward
    width is solved so that their blocks hold the reference's parameters (or FLOPs), unless
    the arm states `hidden`. Shrunk arms all take the default width.

    Raises:
        UserError: no `study`, an impossible arm, several arms without a width that differ
            in cost, or arms with unequally many trials.
    """
    study = config.study
    if study is None:
        raise UserError("the config has no `study:` section: name the arms under study.arms")
    tree = to_tree(replace(config, study=None))
    configs: dict[str, Config] = {}
    for name, part in study.arms.items():
        with _naming(name):
            arm = from_tree(merge(tree, shrunk_part(part) if config.shrink else part))
            configs[name] = replace(arm, model=at_last_grid(arm))
    models = {name: arm.model for name, arm in configs.items()}
    reference = _reference(models, study.match)
    arms: list[Arm] = []
    for name, arm in configs.items():
        with _naming(name):
            free = _has_width(arm.model) and not _states_hidden(study.arms[name])
            if free and name != reference and not config.shrink:
                arm = replace(arm, model=_matched(arm.model, models[reference], study.match))
            trials = _trials(study.arm_grids.get(name, study.grid))
            # Stages may change the steps, on which an open warm-up depends.
            # The strategy is that of the stages after the first, which check it.
            if arm.strategy["kind"] != "plain" and not study.stages:
                raise UserError(
                    f"strategy.kind = {arm.strategy['kind']} needs study.stages, in which "
                    "something can be forgotten"
                )
            resolved = resolve(replace(arm, strategy={"kind": "plain"}))
            kept = {"schedule": arm.schedule, "strategy": arm.strategy}
            arms.append(Arm(name, replace(resolved, **kept), trials))
    if len({len(arm.trials) for arm in arms}) > 1:
        counts = ", ".join(f"{arm.name} {len(arm.trials)}" for arm in arms)
        raise UserError(f"study.arm_grids: arms must have equally many trials, not {counts}")
    return arms


def run(config: Config, stages: list[dict[str, Any]]) -> Finished:
    """Bring every run of the study to its end and return them all.

    A trial that diverges ends nothing but itself.

    Raises:
        UserError: a run failed, or the folder holds a single run or another study.
        Interrupted: a signal stopped the run in progress, which saved itself.
    """
    with announce_if_slow("resolving every arm's model", print_line):
        arms = plan(config)
    assert config.study is not None
    folder = Path(config.output_dir)
    claim(folder, config, study=True)
    for arm in arms:
        check_runs(arm, stages)
    write_config(folder, config)
    study = config.study

    def configs_of(owners: list[tuple[Arm, int]]) -> list[list[Config]]:
        return [
            _stage_configs(arm, chosen.get(arm.name, arm.trials[0]), seed, stages, folder)
            for arm, seed in owners
        ]

    trials = {arm.name: _trial_configs(arm, stages, folder, study) for arm in arms}
    tried = [[trial] for trial in itertools.chain(*trials.values())]
    _check_folders(tried)
    chosen, sweeps = {}, {}
    everyone = study.seeds if study.finalists is None else study.seeds[:1]
    owners = list(itertools.product(arms, everyone))
    # Whoever the finalists will be, there are as many.
    later = list(itertools.product(arms[: study.finalists], study.seeds[len(everyone) :]))
    whole = StudyProgress([*itertools.chain(*tried, *configs_of(owners + later))])
    start = partial(
        run_chains,
        parallel=study.parallel_runs,
        launcher=study.launcher,
        root=folder,
        whole=whole,
    )
    start([[trial] for [trial] in tried if not sweep.has_diverged(trial)], or_give_up=True)
    for arm in arms:
        chosen[arm.name] = arm.trials[0]
        if trials[arm.name]:
            outcomes = _select(arm, trials[arm.name], folder, study)
            chosen[arm.name] = next(trial.settings for trial in outcomes if trial.chosen)
            sweeps[arm.name] = _sweep_of(arm, outcomes, folder, study)
            print_line(f"{arm.name}: {sweep.sentence(outcomes)}")

    def chains_of(owners: list[tuple[Arm, int]]) -> list[list[Config]]:
        chains = configs_of(owners)
        _check_folders(chains)
        start(chains)
        return chains

    chains = chains_of(owners)
    if study.finalists is not None:
        finalists = _finalists(arms, chains, study.finalists)
        more = list(itertools.product(finalists, study.seeds[1:]))
        whole.expect([*itertools.chain(*tried, *configs_of(owners + more))])
        owners, chains = owners + more, chains + chains_of(more)
    runs = [
        Run(arm.name, seed, stage, settings.data.domain, Path(settings.output_dir))
        for (arm, seed), chain in zip(owners, chains, strict=True)
        for stage, settings in enumerate(chain)
    ]
    return Finished(runs, sweeps)


def _check_folders(chains: list[list[Config]]) -> None:
    """Check that the runs' folders are free or theirs, before the first of them starts."""
    for run in itertools.chain(*chains):
        claim(Path(run.output_dir), run)


def _finalists(arms: list[Arm], chains: list[list[Config]], count: int) -> list[Arm]:
    """The first arm, which is the reference, and the best of the others, `count` in all."""
    losses = {arm.name: _loss(chain[0]) for arm, chain in zip(arms, chains, strict=True)}
    ranked = sorted(arms[1:], key=lambda arm: losses[arm.name])
    return [arms[0], *ranked[: count - 1]]


def check_runs(arm: Arm, stages: list[dict[str, Any]]) -> None:
    """Check the settings of all an arm's runs, and prepare the text and references they read.

    Raises:
        UserError: what one of the runs would have been refused for, hours later.
    """
    for data in (arm.config.data, *arm.config.evaluation.domains):
        check_few_documents(data, ("validation", arm.config.evaluation.split))
    tokenizer = open_tokenizer(arm.config.tokenizer, arm.config.data, report=print)
    corpora: dict[str, Corpus] = {}
    for settings in check_settings(arm, stages):
        for data in (settings.data, *settings.evaluation.domains):
            key = json.dumps(to_tree(data), sort_keys=True)
            if key not in corpora:
                corpora[key] = open_corpus(data, tokenizer, report=print)
            check_corpus(corpora[key], settings)
            # Now, and not by several runs at once at their end.
            with announce_if_slow(f"computing references of {data.domain}", print_line):
                cached_references(corpora[key], settings.evaluation.split)


def check_settings(arm: Arm, stages: list[dict[str, Any]]) -> list[Config]:
    """The configurations of all an arm's trials in every stage, without reading any text.

    Raises:
        UserError: a trial or a stage is impossible, or a stage changes what it inherits.
    """
    configs: list[Config] = []
    for trial, stage in itertools.product(arm.trials, range(len(stages) + 1)):
        previous = Path(arm.name) if stage else None
        settings = _stage_config(arm, trial, 0, stage, stages, Path(arm.name), previous)
        if stage:
            check_inherited(to_tree(settings), to_tree(arm.config), f"stage 0 of {arm.name}")
        configs.append(settings)
    return configs


def _select(
    arm: Arm, configs: list[Config], folder: Path, study: StudySettings
) -> list[sweep.Trial]:
    """What an arm's trials came to; the run of the one that is chosen is copied to its place.

    Raises:
        UserError: all diverged, or other settings were chosen, and trained with, before the
            grid grew.
    """
    trials = [
        sweep.outcome(settings, config)
        for settings, config in zip(arm.trials, configs, strict=True)
    ]
    trials = sweep.choose(trials, arm.name)
    (best,) = [config for config, t in zip(configs, trials, strict=True) if t.chosen]
    place = stage_folder(folder, arm.name, study.seeds[0], 0, arm.config.data.domain)
    if not place.exists():
        with atomic_folder(place) as draft:
            shutil.copytree(best.output_dir, draft, dirs_exist_ok=True)
        return trials
    before, now = read_config_tree(place), to_tree(best)
    for name in arm.trials[0]:
        if _value(before, name) != _value(now, name):
            runs = ", ".join(str(path) for path in sorted((folder / arm.name).glob("seed-*")))
            raise UserError(
                f"study.arms.{arm.name}: of the grid as it is now {name} = {_value(now, name)} is "
                f"best, and {runs} were trained with {_value(before, name)}; delete these folders "
                "and give the same command again (trials stay where they are)"
            )
    return trials


def _value(tree: Any, name: str) -> Any:
    """A setting's value in a tree, by its dotted name."""
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _sweep_of(
    arm: Arm, trials: list[sweep.Trial], folder: Path, study: StudySettings
) -> dict[str, Any]:
    """An arm's trials as results.json holds them."""
    known = {_trial_name(settings) for settings in arm.trials}
    there = {path.parent.name for path in folder.glob(f"{arm.name}/trials/*/config.yaml")}
    return sweep.record(
        trials,
        seed=study.seeds[0],
        domain=arm.config.data.domain,
        others=len(there - known),
    )


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


def _trial_configs(
    arm: Arm, stages: list[dict[str, Any]], folder: Path, study: StudySettings
) -> list[Config]:
    """Configurations of an arm's trials with the first seed; none where there is no choice."""
    if len(arm.trials) == 1:
        return []
    place = folder / arm.name / "trials"
    return [
        _stage_config(arm, trial, study.seeds[0], 0, stages, place / _trial_name(trial), None)
        for trial in arm.trials
    ]


def _stage_configs(
    arm: Arm, chosen: dict[str, Any], seed: int, stages: list[dict[str, Any]], folder: Path
) -> list[Config]:
    """Configurations of one arm's and seed's runs, each starting from the one before."""
    configs: list[Config] = []
    previous: Path | None = None
    for stage, data in enumerate(domains_of(arm.config, stages)):
        place = stage_folder(folder, arm.name, seed, stage, data.domain)
        configs.append(_stage_config(arm, chosen, seed, stage, stages, place, previous))
        previous = place
    return configs


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
        # Grids change in pretraining; a stage that is to move them says so itself.
        still = {"grid_schedule": None, "grid_adaptation_steps": []}
        tree = merge(merge(tree, {"training": still}), stages[stage - 1])
    else:
        tree = merge(tree, {"strategy": "plain"})
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


@contextmanager
def _naming(arm: str) -> Iterator[None]:
    """Say of a mistake in which arm it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"study.arms.{arm}: {error}") from None


def _reference(models: dict[str, ModelSettings], match: Cost) -> str:
    """The arm whose cost the others get: the first, unless one has no width to solve.

    Raises:
        UserError: several have none and differ in cost, or one cannot be built.
    """
    fixed: dict[str, int] = {}
    for name, model in models.items():
        if not _has_width(model):
            with _naming(name):
                fixed[name] = _cost(model, match)
    if len(set(fixed.values())) > 1:
        costs = ", ".join(f"{name} {cost:,}" for name, cost in fixed.items())
        raise UserError(
            f"study.arms: several arms have no width to solve, and differ in {match} of their "
            f"feed-forward blocks ({costs}): keep one of them"
        )
    return next(iter(fixed or models))


def _has_width(model: ModelSettings) -> bool:
    return any(has_width(spec) for spec in model.feed_forward_by_layer)


def _matched(arm: ModelSettings, reference: ModelSettings, match: Cost) -> ModelSettings:
    total = _cost(reference, match)
    try:
        return solve_widths(arm, total, match)
    except ValueError as error:
        raise UserError(str(error)) from None


def _cost(model: ModelSettings, match: Cost) -> int:
    try:
        return total_cost(model, match)
    except ValueError as error:
        raise UserError(str(error)) from None


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


def _loss(run: Config) -> float:
    """Validation loss by which an arm is among the finalists; infinite where not finite."""
    loss, _ = sweep.final_loss(run)
    return loss if math.isfinite(loss) else math.inf
