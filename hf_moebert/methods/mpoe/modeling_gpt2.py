"""GPT-2 whose feed-forward networks are experts that share central tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.utils.generic import can_return_tuple

from hf_moebert.architectures.functional_routing import real_tokens
from hf_moebert.architectures.routing import RoutingOutput, recording

from .configuration_mpoe import MPOEGPT2Config
from .modeling_experts import MPOEFeedForward
from .modeling_mpoe import MPOEMixin, with_shapes


@dataclass
class MPOECausalLMOutput(RoutingOutput, CausalLMOutputWithCrossAttentions):
    """Output of `MPOEGPT2LMHeadModel`."""


class MPOEGPT2LMHeadModel(MPOEMixin, GPT2LMHeadModel):
    """GPT-2 with a language model head, whose feed-forward networks are experts."""

    config: MPOEGPT2Config
    config_class = MPOEGPT2Config
    transposes_dense = True
    accepts_loss_kwargs = True  # GPT-2, unlike the others, divides its loss by `num_items_in_batch`

    def __init__(self, config: MPOEGPT2Config) -> None:
        config = with_shapes(config)
        super().__init__(config)
        blocks: Any = self.transformer.h
        for block in (blocks[place] for place in config.converted_layers):
            block.mlp = MPOEFeedForward(
                config, config.activation_function, outer_dropout=config.resid_pdrop, has_bias=True
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MPOECausalLMOutput:
        """Run the base class's forward, and add the routers' logits and balance loss to the output.

        Args:
            input_ids: Shape `(batch, seq)`.
            past_key_values: As for the base class.
            attention_mask: Also of the tokens in the cache. Shape `(batch, past + seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Shape `(batch, seq, hidden)`.
            encoder_hidden_states: As for the base class.
            encoder_attention_mask: As for the base class.
            labels: The tokens themselves, -100 where there is no loss. Shape `(batch, seq)`.
            use_cache: As for the base class.
            logits_to_keep: As for the base class.
            output_router_logits: Whether the routers' logits are returned.
            cache: The name of `past_key_values` from transformers 5.24 on.
            **kwargs: As for the base class; with `num_items_in_batch`, the targets of all accumulated batches, the
                loss is the sum over this batch divided by it, and the balance loss is weighted by this batch's share.

        Raises:
            ValueError: If an id or a label does not exist, or the sequence is too long.
        """
        self._check_ids("input_ids", input_ids, self.transformer.wte.num_embeddings)
        self._check_ids("labels", labels, self.config.vocab_size, ignored=True)
        given = input_ids if inputs_embeds is None else inputs_embeds
        length = 0 if given is None else given.shape[1]
        named = {"past_key_values": past_key_values, "cache": cache}
        past = {name: value for name, value in named.items() if value is not None}
        length += sum(value.get_seq_length() for value in past.values())
        if given is not None and position_ids is None and not 0 < length <= self.config.n_positions:
            raise ValueError(
                f"Sequences must have 1 to {self.config.n_positions} tokens, got {length}. Truncate longer ones."
            )
        with recording() as records:
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **past,
                **kwargs,
            )
        share: Tensor | float = 1.0
        if labels is not None:
            targets = labels[..., 1:] if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
            count = (targets != -100).sum()
            if not count:  # the base class's mean over no target is NaN
                outputs.loss = outputs.logits.sum() * 0.0
            if (total := kwargs.get("num_items_in_batch")) is not None:
                share = count / torch.as_tensor(total, device=count.device).clamp(min=1)
        masks = [real_tokens(attention_mask, x.logits.shape[:2]) for x in records]
        return self._finish(MPOECausalLMOutput, outputs, records, masks, output_router_logits, share=share)


__all__ = ["MPOEGPT2LMHeadModel"]
