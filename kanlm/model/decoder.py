"""The decoder, as transformers classes: pre-norm blocks over a residual stream.

Each block adds attention, then a feed-forward block, to the stream; both start with
outputs of variance 1 / (2 n_layers), so that all of them together add 1.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention, rotary_angles
from .configuration import KanLMConfig
from .feed_forward import make_feed_forward
from .layers import Linear, RMSNorm


class KanLMDecoderLayer(GradientCheckpointingLayer):
    """x ← x + attention(norm(x)), then x ← x + feed_forward(norm(x))."""

    def __init__(self, config: KanLMConfig, layer: int) -> None:
        super().__init__()
        output_scale = 1 / math.sqrt(2 * config.n_layers)
        spec = config.settings.feed_forward_by_layer[layer]
        self.attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.attention = Attention(config, layer, output_scale)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.feed_forward = make_feed_forward(spec, config.d_model, output_scale)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _ = self.attention(
            self.attention_norm(x), rotation, attention_mask, past_key_values, **kwargs
        )
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class KanLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of all KanLM models."""

    config: KanLMConfig
    config_class = KanLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KanLMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": KanLMDecoderLayer,
        "attentions": Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start one module: each that owns parameters or buffers knows how to itself.

        transformers calls this for every module that a checkpoint did not fill, with
        `torch.nn.init` guarded so that loaded tensors stay.

        Raises:
            TypeError: a module owns parameters and has no `reset_parameters`.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(self.config.d_model))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{type(module).__name__} owns parameters but no reset_parameters")


class KanLMModel(KanLMPreTrainedModel):
    """The decoder without its head: token ids to normalised hidden states."""

    def __init__(self, config: KanLMConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("vocab_size is null: a model needs its number of tokens")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            [KanLMDecoderLayer(config, layer) for layer in range(config.n_layers)]
        )
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Arguments:
            input_ids: (batch, length), or `inputs_embeds` (batch, length, d_model).
            attention_mask: (batch, length seen), 0 at padding.
            position_ids: (batch, length). Where they restart, a new document starts, and
                attention stays within documents; this holds without `attention_mask` and
                without earlier tokens in the cache.
            past_key_values: cache of earlier tokens.
            use_cache: return a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Packed documents are seen only without a cache: so the mask comes before it.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        head_dim = self.config.d_model // self.config.n_heads
        rotation = rotary_angles(position_ids, head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(
                x,
                rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


class KanLMForCausalLM(KanLMPreTrainedModel, GenerationMixin):
    """The decoder with its head: token ids to logits, and the loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KanLMConfig) -> None:
        super().__init__(config)
        self.model = KanLMModel(config)
        self.lm_head = Linear(config.d_model, self.model.embed_tokens.num_embeddings)
        self.loss_function = next_token_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Score, and with labels return the loss in nats a token.

        Arguments:
            labels: (batch, length), the input ids or -100 to leave out; shifted here, as
                everywhere in transformers.
            shift_labels: (batch, length), the next token at each place or -100, for
                loaders that know the token after the last; used in place of `labels`.
            num_items_in_batch: divide the summed loss by this rather than by the number
                of labels here, which makes accumulated micro-batches equal one batch.
            logits_to_keep: compute the last so many logits only; 0 is all.
            Others as in `KanLMModel.forward`.
        """
        scored = labels is not None or shift_labels is not None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if scored and use_cache is None else use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if scored:
            loss = self.loss_function(
                logits,
                labels,
                self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def next_token_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy as transformers' `ForCausalLMLoss`, which brings float64 to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return fixed_cross_entropy(
        wide.view(-1, vocab_size),
        shift_labels.reshape(-1).to(logits.device),
        num_items_in_batch,  # pyright: ignore[reportArgumentType]
        ignore_index,
    )


AutoConfig.register(KanLMConfig.model_type, KanLMConfig)
AutoModel.register(KanLMConfig, KanLMModel)
AutoModelForCausalLM.register(KanLMConfig, KanLMForCausalLM)
