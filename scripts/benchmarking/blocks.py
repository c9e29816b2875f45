"""The blocks that benchmarks set side by side: each with the parameters of one MLP."""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from kanlm.errors import UserError
from kanlm.model import KanLMConfig
from kanlm.model.feed_forward import FeedForward, make_feed_forward
from kanlm.model.matching import DEFAULT_PARAMETERS, has_width, solve_hidden

#: What all blocks are measured against: the MLP of hidden width 4 d_model.
REFERENCE = "gelu"


def matched_spec(spec: Any, d_model: int) -> dict[str, Any]:
    """Give a kind's options the width that has the MLP's parameters.

    Args:
        spec: a kind's name, or `kind` and options.

    Raises:
        UserError: the kind or an option is unknown, or the block has no such width.
    """
    described: dict[str, Any] = {"kind": spec} if isinstance(spec, str) else dict(spec)
    try:
        if has_width(described):
            parameters = DEFAULT_PARAMETERS * d_model**2
            described["hidden"] = solve_hidden(described, d_model, parameters=parameters)
    except ValueError as error:
        raise UserError(f"blocks: {error}") from None
    return described


def matched_block(spec: Any, d_model: int) -> FeedForward:
    """Build the block of a kind that has the MLP's parameters.

    Raises:
        UserError: the kind or an option is unknown, or the block has no such width.
    """
    described = matched_spec(spec, d_model)
    try:
        return make_feed_forward(described, d_model, 1.0)
    except ValueError as error:
        raise UserError(f"blocks: {error}") from None


LLAMA = "transformers' Llama"


def llama(config: KanLMConfig) -> LlamaForCausalLM:
    """Build a Llama whose SwiGLU has as many parameters as our blocks, and a tied embedding."""
    assert config.vocab_size is not None
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=matched_spec("swiglu", config.d_model)["hidden"],
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=max(config.context_length, 64),
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
