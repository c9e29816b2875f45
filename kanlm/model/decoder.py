"""The decoder, as transformers classes: pre-norm blocks over a residual stream.

Each block adds attention, then a feed-forward block, to the stream; both start with
outputs of variance 1 / (2 n_layers), so that all of them together add 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..kan import decoding
from .attention import Attention, rotary_angles
from .configuration import KanLMConfig
from .documents import document_numbers, within_documents
from .feed_forward import Context, FeedForward, make_feed_forward
from .layers import Embedding, RMSNorm, start_table
from .loss import IGNORED, Head, losses_by_token, next_token_loss, shifted


@dataclass
class KanLMModelOutput(BaseModelOutputWithPast):
    """Hidden states, and in training what the feed-forward blocks want minimised.

    `auxiliary_loss` is the sum over layers of weighted means over tokens, such as a
    router's for uneven loads; None in evaluation and where no block has one.
    """

    auxiliary_loss: Tensor | None = None


@dataclass
class KanLMCausalLMOutput(CausalLMOutputWithPast):
    """Logits, and with labels the loss; in training then no logits, unless they are asked for.

    In training `loss` includes `auxiliary_loss`, so that any trainer minimises both; their
    difference is the language model's own loss. In evaluation there is no auxiliary loss.
    """

    auxiliary_loss: Tensor | None = None


class KanLMDecoderLayer(GradientCheckpointingLayer):
    """x ← x + attention(norm(x)), then x ← x + feed_forward(norm(x))."""

    def __init__(self, config: KanLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
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
        present: Tensor | None = None,
        documents: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """Run the block. Returns its output and its auxiliary losses, in training.

        They are returned, and not left behind in the module, because a checkpointed layer
        has gradients for its outputs alone.
        """
        attended, _ = self.attention(
            self.attention_norm(x), rotation, attention_mask, past_key_values, **kwargs
        )
        x = x + self.dropout(attended)
        if not self.feed_forward.takes_context:
            fed = self.feed_forward(self.feed_forward_norm(x))
            return (x + self.dropout(fed),)
        context = Context(
            layer=self.layer,
            present=present,
            documents=documents,
            past_key_values=past_key_values,
        )
        fed = self.feed_forward(self.feed_forward_norm(x), context)
        return x + self.dropout(fed), *context.auxiliary_losses


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
            # Also torch's own, which transformers puts in where it resizes the table.
            start_table(module.weight)
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
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
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
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> KanLMModelOutput:
        """Run the blocks.

        Args:
            input_ids: (batch, length), or `inputs_embeds` (batch, length, d_model).
            attention_mask: (batch, length seen), 0 at padding; or what transformers'
                `create_masks_for_generate` makes of that for static caches.
            position_ids: (batch, length). Where they restart, a new document starts, and
                attention and convolutions stay within documents; this holds without
                `attention_mask` and without earlier tokens in the cache.
            past_key_values: cache of earlier tokens.
            use_cache: return a cache.

        Raises:
            ValueError: both or none of the inputs are given, the mask does not say which
                tokens are padding and a block needs to know, or a cache has another name.
        """
        if kwargs.get("cache") is not None:
            # As transformers 5.24 and later do; passed over, it would make other text unnoticed.
            raise ValueError("cache: give it as past_key_values, with transformers below 5.24")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        present = self._present(attention_mask, x.shape[1])
        documents = None
        # Packed documents are seen only without a cache: so this comes before it.
        if position_ids is not None and attention_mask is None and past_key_values is None:
            documents = document_numbers(position_ids.expand(x.shape[:2]))
        if documents is not None and self.config._attn_implementation == "sdpa":
            mask = within_documents(documents, x, self.config.d_model // self.config.n_heads)
        else:
            mask = self._causal_mask(x, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        head_dim = self.config.d_model // self.config.n_heads
        rotation = rotary_angles(position_ids, head_dim, self.config.rope_theta, x.dtype)
        auxiliary_losses: list[Tensor] = []
        for layer in self.layers:
            x, *losses = layer(
                x,
                rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                present=present,
                documents=documents,
                **kwargs,
            )
            auxiliary_losses += losses
        return KanLMModelOutput(
            last_hidden_state=self.norm(x),
            past_key_values=past_key_values,
            auxiliary_loss=torch.stack(auxiliary_losses).sum() if auxiliary_losses else None,
        )

    @property
    def feed_forwards(self) -> list[FeedForward]:
        """The block of every layer, without the blocks that are within them."""
        layers = [layer for layer in self.layers if isinstance(layer, KanLMDecoderLayer)]
        return [layer.feed_forward for layer in layers]

    def _causal_mask(
        self,
        x: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> Any:
        """What the attention kernel takes, unless it has been made already."""
        if isinstance(attention_mask, dict):
            return attention_mask["full_attention"]
        return create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

    def _present(self, attention_mask: Any, length: int) -> Tensor | None:
        """Where the last `length` tokens are no padding, for blocks that look at several."""
        if not any(block.takes_context for block in self.feed_forwards):
            return None
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask.get("linear_attention")
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions: feed-forward blocks that "
                "look at several tokens need it as (batch, length), 0 at padding"
            )
        return attention_mask[:, -length:].bool()


class KanLMForCausalLM(KanLMPreTrainedModel, GenerationMixin):
    """The decoder with its head: token ids to logits, and the loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KanLMConfig) -> None:
        super().__init__(config)
        self.model = KanLMModel(config)
        self.lm_head = Head(config.d_model, self.model.embed_tokens.num_embeddings)
        self.loss_function = next_token_loss
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`, the layers prepared for it (`kanlm.kan.decoding`)."""
        with decoding(self):
            return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        token_losses: bool = False,
        **kwargs: Any,
    ) -> KanLMCausalLMOutput:
        """Score, and with labels return the loss in nats a token.

        In training the loss includes the blocks' auxiliary losses. They are means over the
        tokens here, so with `num_items_in_batch` they weigh as much as these are of them.

        Args:
            labels: (batch, length), the input ids or -100 to leave out; shifted here, as
                everywhere in transformers.
            shift_labels: (batch, length), the next token at each place or -100, for
                loaders that know the token after the last; used in place of `labels`.
            num_items_in_batch: divide the summed loss by this rather than by the number
                of labels here, which makes accumulated micro-batches equal one batch.
            logits_to_keep: compute the last so many logits only; 0 is all.
            skip_logits: score without logits of all tokens, and return none; None does so in
                training with labels. (Liger's patches of transformers' models have the same.)
            token_losses: return the loss of each token that has logits, (batch, length), 0 where
                it has no label, without logits and auxiliary losses.
            Others as in `KanLMModel.forward`.

        Raises:
            ValueError: `skip_logits` or `token_losses`, and there are no labels.
        """
        if labels is not None and shift_labels is None:
            shift_labels = shifted(labels)
        if skip_logits is None:
            skip_logits = token_losses or (self.training and shift_labels is not None)
        if (skip_logits or token_losses) and shift_labels is None:
            raise ValueError("skip_logits and token_losses need labels or shift_labels")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if shift_labels is not None and use_cache is None else use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits, loss, auxiliary_loss = None, None, None
        if not skip_logits:
            logits = self.lm_head(hidden)
        if shift_labels is not None:
            targets = shift_labels[:, kept]
            if token_losses:
                vocab_size = self.lm_head.weight.shape[0]
                loss = losses_by_token(self.lm_head, hidden, targets, vocab_size)
            else:
                loss = self._loss(hidden, logits, labels, targets, num_items_in_batch)
                auxiliary_loss = outputs.auxiliary_loss
            if auxiliary_loss is not None:
                if num_items_in_batch is not None:
                    share = (targets != IGNORED).sum() / num_items_in_batch
                    auxiliary_loss = auxiliary_loss * share
                loss = loss + auxiliary_loss
        return KanLMCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_loss=auxiliary_loss,
        )

    def _loss(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """The loss, from hidden states alone where nobody has asked for logits."""
        ours = isinstance(self.lm_head, Head) and self.loss_function is next_token_loss
        if logits is None and ours:
            return self.lm_head(hidden, shift_labels, num_items_in_batch)
        # Another head or loss, put in by users of transformers, knows whole logits alone.
        return self.loss_function(
            self.lm_head(hidden) if logits is None else logits,
            labels,
            self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
        )


AutoModel.register(KanLMConfig, KanLMModel)
AutoModelForCausalLM.register(KanLMConfig, KanLMForCausalLM)
