"""transformers' Llama in the shape of one of our models."""

from transformers import LlamaConfig, LlamaForCausalLM

from kanlm.experiments.bench.blocks import matched_spec
from kanlm.model import KanLMConfig

LABEL = "transformers' Llama"


def llama(config: KanLMConfig) -> LlamaForCausalLM:
    """The model whose SwiGLU has as many parameters as our blocks are matched to, its embedding
    tied as ours is."""
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
