"""From the settings a user wrote to settings that state everything.

Feed-forward kinds, bases, sources and strategies bring options of their own, which `config.py`
cannot know without importing torch. Here they are checked and their defaults filled in, and the
width of the feed-forward blocks is solved, so that a run's config.yaml still means the
same when a default has changed.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kanlm.config import Config, DataSettings, ScheduleSettings, check_options, from_tree
from kanlm.data.sources import check_source
from kanlm.errors import UserError, nearest
from kanlm.kan.bases import Adaptable, Refinable
from kanlm.kan.penalties import penalty
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.decoder import KanLMDecoderLayer
from kanlm.model.feed_forward import complete_feed_forward
from kanlm.model.grids import grid_sizes, with_grid_size
from kanlm.model.matching import resolve_feed_forward
from kanlm.model.settings import LARGEST, ModelSettings
from kanlm.training.arithmetic import tf32_is_on
from kanlm.training.lbfgs_polish import coefficients
from kanlm.training.run_folder import stated_warmup
from kanlm.training.strategies import complete_strategy, make_strategy

_T = TypeVar("_T")

#: More experts, functions of an edge, or channels beside each other than any model has.
_MOST_OF_AN_OPTION = 10_000


def resolve(config: Config) -> Config:
    """Check all settings, and complete those that belong to registries.

    Raises:
        UserError: a setting that a config file could not state either, an unknown kind or
            option, or a model that cannot be built.
    """
    # What was made in Python has not been checked yet.
    config = from_tree(asdict(config))
    if config.shrink:
        config = _shrunk(config)
    model = resolve_model(at_last_grid(config))
    _check_coefficients(config, model)
    strategy = _resolve_strategy(config, model)
    tf32 = tf32_is_on() if config.training.tf32 is None else config.training.tf32
    return replace(
        config,
        model=model,
        training=replace(config.training, tf32=tf32),
        schedule=resolve_schedule(config),
        strategy=strategy,
        data=_resolve_data(config.data, "data"),
        evaluation=replace(
            config.evaluation,
            domains=[
                _resolve_data(domain, f"evaluation.domains.{i}")
                for i, domain in enumerate(config.evaluation.domains)
            ],
        ),
    )


def _shrunk(config: Config) -> Config:
    """The same experiment at a size that runs in seconds; a second time changes nothing."""
    model, schedule = config.model, config.training.grid_schedule
    if isinstance(model.feed_forward, list):
        kinds: Any = [_width_open(model.feed_forward[i]) for i in (0, -1)]
    else:
        kinds = _width_open(model.feed_forward)
    return replace(
        config,
        data=_shrunk_weights(config.data),
        model=replace(
            model,
            d_model=16,
            n_layers=2,
            n_heads=2,
            n_kv_heads=None if model.n_kv_heads is None else 1,
            context_length=32,
            feed_forward=kinds,
        ),
        training=replace(
            config.training,
            steps=2,
            batch_size=2,
            micro_batch_size=None,
            evaluate_every=2,
            polish_steps=min(config.training.polish_steps, 2),
            polish_batch_size=None,
            grid_schedule=schedule and _ends(schedule),
            grid_adaptation_steps=[1] if config.training.grid_adaptation_steps else [],
        ),
        schedule=_shrunk_schedule(config.schedule),
        evaluation=replace(config.evaluation, stride=None, batch_size=256),
        generation=replace(config.generation, max_new_tokens=8),
    )


def _shrunk_schedule(schedule: ScheduleSettings) -> ScheduleSettings:
    stated = schedule.warmup_steps
    return schedule if stated == "auto" else replace(schedule, warmup_steps=min(stated, 1))


def resolve_schedule(config: Config) -> ScheduleSettings:
    """State the warm-up in steps. Of a study it stays open, as stages may differ in theirs.

    A run that began in the folder keeps its own, so that it can get another length.
    """
    if config.schedule.warmup_steps != "auto" or config.study is not None:
        return config.schedule
    steps = stated_warmup(Path(config.output_dir))
    if steps is None or steps > config.training.steps:
        steps = min(50, config.training.steps // 10)
    return replace(config.schedule, warmup_steps=steps)


def _ends(schedule: Mapping[int, _T]) -> dict[int, _T]:
    """The schedule of two steps that goes from the first value to the last."""
    return {0: schedule[min(schedule)], 1: schedule[max(schedule)]}


def _shrunk_weights(data: DataSettings) -> DataSettings:
    """A mixture that changes goes from its first weights to its last."""
    sources = [
        source if len(weights) == 1 else {**source, "weight": _ends(weights)}
        for source, weights in zip(data.sources, data.weights, strict=True)
    ]
    return replace(data, sources=sources)


def shrunk_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part to be laid over a shrunk configuration: a list of layers in it is cut as well."""
    model = part.get("model")
    layers = model.get("feed_forward") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(layers, list) or not layers:
        return dict(part)
    ends = [
        {name: value for name, value in spec.items() if name != "repeat"}
        if isinstance(spec, Mapping)
        else spec
        for spec in (layers[0], layers[-1])
    ]
    return {**part, "model": {**model, "n_layers": 2, "feed_forward": ends}}


def _width_open(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the width to be solved, and of many experts keep so few that this is possible."""
    spec = {**spec, "hidden": None}
    if spec.get("kind") == "moe":
        experts = spec.get("experts")
        listed = len(experts) if isinstance(experts, list) and experts else 1
        spec["num_experts"] = listed * math.ceil(2 / listed)
        if isinstance(spec.get("top_k"), int):
            spec["top_k"] = min(spec["top_k"], 2)
    return spec


def at_last_grid(config: Config) -> ModelSettings:
    """The model with completed options and, where there is a grid schedule, its last grid.

    Raises:
        UserError: as of `complete_model`, or grids are to change and there are none.
    """
    model, training = complete_model(config.model), config.training
    capabilities = {"grid_schedule": Refinable, "grid_adaptation_steps": Adaptable}
    for name, capability in capabilities.items():
        if getattr(training, name) and not grid_sizes(model, capability):
            raise UserError(
                f"training.{name} = {getattr(training, name)}: no feed-forward block's basis "
                "has a grid"
            )
    schedule = training.grid_schedule
    return model if schedule is None else with_grid_size(model, schedule[max(schedule)])


def resolve_model(settings: ModelSettings) -> ModelSettings:
    """Complete the feed-forward options, solve widths, and build the model without memory.

    Raises:
        UserError: as of `complete_model`, or the model cannot be built.
    """
    settings = complete_model(settings)
    try:
        settings = resolve_feed_forward(settings)
        _without_memory(_one_of_each(settings))
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    return settings


def complete_model(settings: ModelSettings) -> ModelSettings:
    """Check and complete the feed-forward options, and leave open widths open.

    Raises:
        UserError: an unknown kind or option, or one of a wrong type.
    """
    if isinstance(settings.feed_forward, list):
        # One of many equal layers stands for all.
        each = {json.dumps(spec): (i, spec) for i, spec in enumerate(settings.feed_forward)}
        found = {key: _complete(spec, f"model.feed_forward.{i}") for key, (i, spec) in each.items()}
        completed: Any = [dict(found[json.dumps(spec)]) for spec in settings.feed_forward]
    else:
        completed = _complete(settings.feed_forward, "model.feed_forward")
    return replace(settings, feed_forward=completed)


def count_parameters(settings: ModelSettings, vocab_size: int) -> int:
    """Parameters of a model that is resolved, without building all of it.

    Equal layers have equally many, so one of each kind is built, without memory.
    """
    counts = Counter(map(json.dumps, settings.feed_forward_by_layer))
    model = _without_memory(replace(_one_of_each(settings), vocab_size=vocab_size))
    total = sum(p.numel() for p in model.parameters())
    blocks = [m for m in model.modules() if isinstance(m, KanLMDecoderLayer)]
    for block, times in zip(blocks, counts.values(), strict=True):
        total += (times - 1) * sum(p.numel() for p in block.parameters())
    return total


def _one_of_each(settings: ModelSettings) -> ModelSettings:
    """The model with one layer of each kind it has, which is impossible if the whole is."""
    if not isinstance(settings.feed_forward, list):
        return replace(settings, n_layers=1)
    kinds = [json.loads(key) for key in dict.fromkeys(map(json.dumps, settings.feed_forward))]
    return replace(settings, n_layers=len(kinds), feed_forward=kinds)


def _without_memory(settings: ModelSettings) -> KanLMForCausalLM:
    with torch.device("meta"):
        return KanLMForCausalLM(KanLMConfig.from_settings(settings, settings.vocab_size or 257))


def _check_coefficients(config: Config, settings: ModelSettings) -> None:
    """Check that what acts on coefficients finds some, of a kind that it can act on."""
    if config.penalties.weights:
        try:
            penalty(_without_memory(_one_of_each(settings)), config.penalties.weights)
        except ValueError as error:
            raise UserError(f"penalties: {error}") from None
    if config.training.polish_steps and not coefficients(_without_memory(_one_of_each(settings))):
        raise UserError(
            f"training.polish_steps = {config.training.polish_steps}: the model has no KAN "
            "layer whose coefficients could be polished"
        )


def _resolve_strategy(config: Config, settings: ModelSettings) -> dict[str, Any]:
    """Complete the strategy's options, and check that the run and its model can take it."""
    completed = complete_strategy(config.strategy)
    kind = completed["kind"]
    if kind != "plain" and config.initialize_from is None and config.study is None:
        raise UserError(
            f"strategy.kind = {kind} belongs to fine-tuning: it needs initialize_from, a run that "
            "something can be forgotten of"
        )
    try:
        strategy = make_strategy(completed)
        strategy.check(config, _without_memory(_one_of_each(settings)))
    except ValueError as error:
        raise UserError(f"strategy.kind = {kind}: {error}") from None
    return completed


def _complete(spec: Any, setting: str) -> dict[str, Any]:
    try:
        return complete_feed_forward(spec, setting, _checked_spec)
    except ValueError as error:
        raise UserError(str(error)) from None


def _checked_spec(
    registry: Mapping[str, type], spec: Any, setting: str, beside: Sequence[str]
) -> dict[str, Any]:
    """Check a spec's kind, and names, types and sizes of its options."""
    if not isinstance(spec, Mapping):
        raise UserError(f"{setting} = {spec!r}: expected a kind with its options")
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in registry:
        raise UserError(f"{setting}.kind = {kind!r} is unknown{nearest(str(kind), registry)}")
    around = {name: value for name, value in spec.items() if name in ("kind", *beside)}
    own = {name: value for name, value in spec.items() if name not in around}
    checked = {**check_options(registry[kind], own, setting, beside=("kind", *beside)), **around}
    _check_sizes(checked, setting)
    return checked


def _check_sizes(options: Mapping[str, Any], setting: str) -> None:
    """Refuse numbers of experts, functions or cells that no model has, before they are made."""
    for name, value in options.items():
        most = LARGEST if name == "hidden" else _MOST_OF_AN_OPTION
        if isinstance(value, int) and value > most:
            raise UserError(f"{setting}.{name} = {value}: expected at most {most:,}")


def _resolve_data(data: DataSettings, setting: str) -> DataSettings:
    sources = [
        check_source(spec, data.root, f"{setting}.sources.{i}")
        for i, spec in enumerate(data.sources)
    ]
    return replace(data, sources=sources)
