"""Time of decoding one token after another with a whole model, by size of its vocabulary.

A head is read whole whatever the blocks are, so a larger vocabulary leaves less to gain. Tokens
are random ones behind a short cache, so that no token meets the weights of the one before.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarking.blocks import REFERENCE, matched_spec
from benchmarking.measure import bytes_read, interleaved, ratio
from benchmarking.report import Results, rules, where
from kanlm.kan import decoding
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.reporting.format import count, fixed, span
from kanlm.reporting.table import Table

if TYPE_CHECKING:
    from benchmarking.decode import Settings

#: Tokens in the cache before the first that is timed.
_PROMPT = 16
#: Tokens timed as one.
_TOKENS = 8


@torch.inference_mode()
def measure_models(settings: "Settings", report: Callable[[str], object]) -> list[dict]:
    """Return a row a dtype, vocabulary and block: time over the MLP model's, bytes read a token."""
    rows = []
    for name in settings.dtypes:
        for vocab_size in settings.vocab_sizes:
            report(f"{name}, whole models, {vocab_size:,} tokens")
            rows += _measure_vocabulary(settings, getattr(torch, name), vocab_size)
    return rows


def model_bytes_read(model: KanLMForCausalLM) -> float:
    """Count bytes of weights that decoding one token reads at least: of the embedding, one row."""
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    row = table.shape[1] * table.element_size()
    # A tied table is read whole, as the head.
    unread = 0 if head is table else table.numel() * table.element_size()
    return bytes_read(model) - unread + row


def _measure_vocabulary(settings: "Settings", dtype: torch.dtype, vocab_size: int) -> list[dict]:
    torch.manual_seed(0)
    models = {}
    for spec in (REFERENCE, *settings.blocks):
        config = KanLMConfig(
            vocab_size=vocab_size,
            d_model=settings.d_model,
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            feed_forward=matched_spec(spec, settings.d_model),
            dropout=0.0,
        )
        model = KanLMForCausalLM(config).eval()
        nn.Module.to(model, dtype)
        models[account(config).feed_forward] = model
    runs = {label: _decoder(model, vocab_size) for label, model in models.items()}
    seconds = interleaved(runs, settings.rounds, lambda: None)
    reference = model_bytes_read(models[REFERENCE])
    rows = []
    for label, model in models.items():
        read = model_bytes_read(model)
        median = sorted(seconds[label])[settings.rounds // 2] / _TOKENS
        times = ratio(seconds[label], seconds[REFERENCE])
        rows.append(
            {
                "what": "model",
                "dtype": str(dtype).removeprefix("torch."),
                "vocab_size": vocab_size,
                "block": label,
                "time_ratio": times,
                "seconds_per_token": median,
                "bytes_ratio": read / reference,
                # Speed over that of a model that reads its bytes as fast as the MLP its own.
                "share_of_allowed_speed": read / reference / times["median"],
                "bytes_per_second": read / median,
            }
        )
    return rows


def _decoder(model: KanLMForCausalLM, vocab_size: int) -> Callable[[], None]:
    prompt = torch.randint(vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    cache = model(prompt, use_cache=True).past_key_values
    tokens = torch.randint(vocab_size, (512,), generator=torch.Generator().manual_seed(1))
    return functools.partial(_decode, model, cache, itertools.cycle(tokens.split(1)))


def _decode(model: KanLMForCausalLM, cache: object, tokens: Iterator[Tensor]) -> None:
    cache = copy.deepcopy(cache)
    with decoding(model):
        for token in itertools.islice(tokens, _TOKENS):
            model(token[None], past_key_values=cache, use_cache=True)


# Showing


def models_table(results: Results) -> Table:
    """Tabulate whole models."""
    settings = results["settings"]

    def cells(row: Results) -> list[str]:
        return [
            row["block"],
            row["dtype"],
            f"{row['vocab_size']:,}",
            fixed(row["time_ratio"]["median"], 2),
            span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
            fixed(row["bytes_ratio"], 2),
            fixed(row["share_of_allowed_speed"], 2),
            fixed(1 / row["seconds_per_token"], 1),
            count(row["bytes_per_second"], "B/s"),
        ]

    groups = [
        where(results, what="model", dtype=dtype, vocab_size=size)
        for dtype in settings["dtypes"]
        for size in settings["vocab_sizes"]
    ]
    return Table(
        title=f"Whole models of {settings['n_layers']} layers, d_model {settings['d_model']}, "
        "token by token, equal parameters",
        columns=[
            "block",
            "dtype",
            "vocabulary",
            "× MLP's time",
            "quartiles",
            "× MLP's bytes",
            "speed / allowed",
            "tokens/s",
            "read at",
        ],
        rows=[cells(row) for group in groups for row in group],
        note="Allowed is the speed of a model that reads its own bytes as fast as the MLP's model "
        "reads its.",
        rules=rules(groups),
    )


def speed(row: Mapping[str, Any]) -> str:
    """Format tokens a second, and in brackets the share of what bytes allow."""
    share = fixed(row["share_of_allowed_speed"], 2)
    return f"{fixed(1 / row['seconds_per_token'], 1)} ({share})"
