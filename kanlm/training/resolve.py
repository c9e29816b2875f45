"""From the settings a user wrote to settings that state everything.

Feed-forward kinds, bases and sources bring options of their own, which `config.py` cannot
know without importing torch. Here they are checked and their defaults filled in, and the
width of the feed-forward blocks is solved, so that a run's config.yaml still means the
same when a default has changed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kanlm.config import Config, DataSettings, check_options
from kanlm.data.sources import check_source
from kanlm.errors import UserError, nearest
from kanlm.kan import BASES
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.feed_forward import FEED_FORWARDS
from kanlm.model.matching import resolve_feed_forward
from kanlm.model.settings import ModelSettings


def resolve(config: Config) -> Config:
    """Check and complete the settings that belong to registries.

    Raises:
        UserError: an unknown kind or option, or a model that cannot be built.
    """
    if config.shrink:
        config = _shrunk(config)
    return replace(
        config,
        model=resolve_model(config.model),
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
    model = config.model
    if isinstance(model.feed_forward, list):
        kinds: Any = [_width_open(model.feed_forward[i]) for i in (0, -1)]
    else:
        kinds = _width_open(model.feed_forward)
    return replace(
        config,
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
            config.training, steps=2, batch_size=2, micro_batch_size=None, evaluate_every=2
        ),
        schedule=replace(config.schedule, warmup_steps=min(config.schedule.warmup_steps, 1)),
        evaluation=replace(config.evaluation, stride=None, batch_size=256),
        generation=replace(config.generation, max_new_tokens=8),
    )


def _width_open(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec, "hidden": None}


def resolve_model(settings: ModelSettings) -> ModelSettings:
    """Complete the feed-forward options, solve widths, and build the model without memory."""
    if isinstance(settings.feed_forward, list):
        completed: Any = [
            _resolve_feed_forward(spec, f"model.feed_forward.{i}")
            for i, spec in enumerate(settings.feed_forward)
        ]
    else:
        completed = _resolve_feed_forward(settings.feed_forward, "model.feed_forward")
    try:
        settings = resolve_feed_forward(replace(settings, feed_forward=completed))
        with torch.device("meta"):
            KanLMForCausalLM(KanLMConfig.from_settings(settings, settings.vocab_size or 257))
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    return settings


def _resolve_feed_forward(spec: Mapping[str, Any], setting: str) -> dict[str, Any]:
    spec = dict(spec)
    kind = _registered(FEED_FORWARDS, spec.pop("kind", None), f"{setting}.kind")
    hidden = spec.pop("hidden", None)
    if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int)):
        raise UserError(f"{setting}.hidden = {hidden!r}: expected a whole number or null")
    options = check_options(FEED_FORWARDS[kind], spec, setting, beside=("kind", "hidden"))
    if "basis" in options:
        options["basis"] = _resolve_basis(options["basis"], f"{setting}.basis")
    return {"kind": kind, "hidden": hidden, **options}


def _resolve_basis(spec: Mapping[str, Any], setting: str) -> dict[str, Any]:
    spec = {"kind": "bspline", **spec}
    kind = _registered(BASES, spec.pop("kind"), f"{setting}.kind")
    return {"kind": kind, **check_options(BASES[kind], spec, setting, beside=("kind",))}


def _resolve_data(data: DataSettings, setting: str) -> DataSettings:
    sources = [
        check_source(spec, data.root, f"{setting}.sources.{i}")
        for i, spec in enumerate(data.sources)
    ]
    return replace(data, sources=sources)


def _registered(registry: Mapping[str, Any], kind: Any, setting: str) -> str:
    if not isinstance(kind, str) or kind not in registry:
        raise UserError(f"{setting} = {kind!r} is unknown{nearest(str(kind), registry)}")
    return kind
