"""Speed of `generate` beside transformers' own Llama, and of a layer beside `nn.Linear`.

1. Models have the shape of the Llama model, and feed-forward blocks of as many parameters. Each
   takes turns with it, greedily, at batch 1 and from a prompt of its own every time.
2. A layer has as many coefficients as the Linear beside it weights. Inputs are new every time, and
   several layers take turns, so that no weights are in a cache.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.blocks import llama, matched_spec
from benchmarks.decode_model import model_bytes_read
from benchmarks.measure import bytes_read, interleaved, ratio
from kanlm.kan import KANLinear
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account

if TYPE_CHECKING:
    from benchmarks.decode import Settings

_PROMPT, _NEW_TOKENS = 8, 12
#: Layers of one kind that take turns.
_LAYERS = 8


def measure_generate(settings: "Settings", report: Callable[[str], object]) -> list[dict]:
    """Return a row a dtype, vocabulary and block; `other_generated` with the first two alone."""
    rows = []
    for dtype, vocab_size in itertools.product(settings.dtypes, settings.generated_vocab_sizes):
        report(f"{dtype}, generate, {vocab_size:,} tokens")
        first = (dtype, vocab_size) == (settings.dtypes[0], settings.generated_vocab_sizes[0])
        blocks = (*settings.generated, *(settings.other_generated if first else ()))
        torch.manual_seed(0)
        peer = llama(_config(settings, "swiglu", vocab_size))
        rows += [_measure_model(settings, spec, dtype, vocab_size, peer) for spec in blocks]
    return rows


def _config(settings: "Settings", spec: Any, vocab_size: int) -> KanLMConfig:
    return KanLMConfig(
        vocab_size=vocab_size,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        feed_forward=matched_spec(spec, settings.d_model),
        dropout=0.0,
    )


def _measure_model(
    settings: "Settings", spec: Any, dtype: str, vocab_size: int, peer: nn.Module
) -> dict:
    config = _config(settings, spec, vocab_size)
    model = KanLMForCausalLM(config)
    prompts = torch.randint(vocab_size, (256, 1, _PROMPT)).unbind()
    runs = {}
    for name, each in (("own", model), ("llama", peer)):
        nn.Module.to(each.eval(), getattr(torch, dtype))
        runs[name] = _generator(each, itertools.cycle(prompts))
    seconds = interleaved(runs, settings.generate_rounds, lambda: None)
    median = sorted(seconds["own"])[settings.generate_rounds // 2]
    return {
        "what": "generate",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "block": account(config).feed_forward,
        "speed_ratio": ratio(seconds["llama"], seconds["own"]),
        "tokens_per_second": _NEW_TOKENS / median,
        # Its table is tied to its head.
        "bytes_ratio": model_bytes_read(model) / bytes_read(peer),
    }


def _generator(model: Any, prompts: Iterator[Tensor]) -> Callable[[], object]:
    def generate() -> None:
        model.generate(
            next(prompts),
            min_new_tokens=_NEW_TOKENS,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    return generate


@torch.inference_mode()
def measure_few_tokens(settings: "Settings", report: Callable[[str], object]) -> list[dict]:
    """Return one row a dtype and number of tokens: of the default layer, d_model → 4/3 d_model."""
    rows = []
    inputs, out = settings.d_model, settings.d_model * 4 // 3
    for name in settings.dtypes:
        report(f"{name}, a layer")
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        layers = [KANLinear(inputs, out, bias=False).to(dtype) for _ in range(_LAYERS)]
        width = inputs * layers[0].basis.num_functions
        linears = [nn.Linear(width, out, bias=False).to(dtype) for _ in range(_LAYERS)]
        for tokens in settings.batch_sizes:
            runs = {
                "own": _turns(layers, torch.randn(64, tokens, inputs).to(dtype)),
                "linear": _turns(linears, torch.randn(64, tokens, width).to(dtype)),
            }
            seconds = interleaved(runs, settings.rounds, lambda: None)
            rows.append(
                {
                    "what": "layer",
                    "dtype": name,
                    "tokens": tokens,
                    "block": layers[0].label,
                    "time_ratio": ratio(seconds["own"], seconds["linear"]),
                    "seconds": sorted(seconds["own"])[settings.rounds // 2] / _LAYERS,
                }
            )
    return rows


def _turns(layers: list[Any], inputs: Tensor) -> Callable[[], object]:
    fresh = itertools.cycle(inputs.unbind())
    return lambda: [layer(next(fresh)) for layer in layers]
