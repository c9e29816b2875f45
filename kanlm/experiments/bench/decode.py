"""Time of a model's feed-forward blocks over new inputs, at several batch sizes.

Inputs are new at every step: rows that a repeated input reads would still be in cache, and
flatter a block that reads few.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kanlm.experiments.bench.blocks import REFERENCE, matched_block
from kanlm.experiments.bench.bytes_read import bytes_read
from kanlm.experiments.bench.decode_model import measure_models
from kanlm.experiments.bench.generate import measure_few_tokens, measure_generate
from kanlm.experiments.bench.settings import DecodeBenchmark
from kanlm.experiments.bench.timing import interleaved, ratio
from kanlm.kan import decoding
from kanlm.model.feed_forward import FeedForward

#: Inputs before they repeat: the weights that they touch are then out of every cache.
_INPUTS = 512
#: Steps timed as one, about as long as a few milliseconds.
_STEPS = 8


def measure_decode(settings: DecodeBenchmark, report: Callable[[str], object]) -> list[dict]:
    """One row a dtype, batch size and block, then those of whole models, of a layer, and of
    `generate`.

    Raises:
        UserError: a block is unknown or has no width of equal parameters.
    """
    rows = []
    for name in settings.dtypes:
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        stacks = {}
        for spec in (REFERENCE, *settings.blocks):
            stack = [matched_block(spec, settings.d_model) for _ in range(settings.n_layers)]
            stacks[stack[0].label] = [block.to(dtype).eval() for block in stack]
        for batch_size in settings.batch_sizes:
            report(f"{name}, batch size {batch_size}")
            rows += _measure_batch(settings, stacks, dtype, batch_size)
    rows += measure_models(settings, report)
    rows += measure_few_tokens(settings, report)
    return rows + measure_generate(settings, report)


@torch.inference_mode()
def _measure_batch(
    settings: DecodeBenchmark,
    stacks: dict[str, list[FeedForward]],
    dtype: torch.dtype,
    batch_size: int,
) -> list[dict]:
    inputs = torch.randn(_INPUTS, batch_size, settings.d_model).to(dtype)
    runs = {
        label: functools.partial(_decode, stack, itertools.cycle(inputs.unbind()))
        for label, stack in stacks.items()
    }
    seconds = interleaved(runs, settings.rounds, lambda: None)
    reference = bytes_read(stacks[REFERENCE][0])
    rows = []
    for label, stack in stacks.items():
        read = bytes_read(stack[0], batch_size)
        median = sorted(seconds[label])[settings.rounds // 2] / _STEPS
        rows.append(
            {
                "what": "blocks",
                "dtype": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "block": label,
                "time_ratio": ratio(seconds[label], seconds[REFERENCE]),
                "seconds_per_step": median,
                "bytes_ratio": read / reference,
                "bytes_per_second": read * len(stack) / median,
            }
        )
    return rows


def _decode(stack: Sequence[nn.Module], inputs: Iterator[Tensor]) -> None:
    with decoding(nn.ModuleList(stack)):
        for x in itertools.islice(inputs, _STEPS):
            for block in stack:
                block(x)
