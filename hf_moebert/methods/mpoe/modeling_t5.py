"""T5 whose feed-forward networks are experts that share central tensors."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.utils.generic import can_return_tuple

from hf_moebert.architectures.functional_routing import real_tokens
from hf_moebert.architectures.routing import RoutingOutput, recording

from .configuration_mpoe import MPOET5Config
from .modeling_experts import MPOEFeedForward
from .modeling_mpoe import MPOEMixin, with_shapes


@dataclass
class MPOESeq2SeqLMOutput(RoutingOutput, Seq2SeqLMOutput):
    """Output of `MPOET5ForConditionalGeneration`."""


class MPOET5ForConditionalGeneration(MPOEMixin, T5ForConditionalGeneration):
    """T5, T5 v1.1 or FLAN-T5 whose feed-forward networks are experts."""

    config: MPOET5Config
    config_class = MPOET5Config

    def __init__(self, config: MPOET5Config) -> None:
        config = with_shapes(config)
        super().__init__(config)
        blocks: list[Any] = [*self.encoder.block, *self.decoder.block]
        for block in (blocks[place] for place in config.converted_layers):
            block.layer[-1].DenseReluDense = MPOEFeedForward(
                config, config.dense_act_fn, inner_dropout=config.dropout_rate
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MPOESeq2SeqLMOutput:
        """Run the base class's forward, and add the routers' logits and balance loss to the output.

        Args:
            input_ids: Shape `(batch, source)`.
            attention_mask: Shape `(batch, source)`.
            decoder_input_ids: Shape `(batch, target)`.
            decoder_attention_mask: Shape `(batch, target)`.
            encoder_outputs: Of an encoder that has run already; its routers are then not in the output.
            past_key_values: As for the base class.
            inputs_embeds: Shape `(batch, source, hidden)`.
            decoder_inputs_embeds: Shape `(batch, target, hidden)`.
            labels: -100 where there is none; such a target is padding for the balance loss. Shape `(batch, target)`.
            use_cache: As for the base class.
            output_router_logits: Whether the routers' logits are returned.
            cache: The name of `past_key_values` from transformers 5.24 on.
            **kwargs: As for the base class.

        Raises:
            ValueError: If an id or a label does not exist.
        """
        for name, ids in (("input_ids", input_ids), ("decoder_input_ids", decoder_input_ids)):
            self._check_ids(name, ids, self.shared.num_embeddings)
        self._check_ids("labels", labels, self.shared.num_embeddings, ignored=True)
        named = {"past_key_values": past_key_values, "cache": cache}
        past = {name: value for name, value in named.items() if value is not None}
        with recording() as records:
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                return_dict=True,
                **past,
                **kwargs,
            )
        if labels is not None and not (labels != -100).any():  # the base class's mean over no target is NaN
            outputs.loss = outputs.logits.sum() * 0.0
        in_encoder = sum(place < self.config.num_layers for place in self.config.converted_layers)
        in_encoder = in_encoder if encoder_outputs is None else 0
        masks = [real_tokens(attention_mask, x.logits.shape[:2]) for x in records[:in_encoder]]
        for x in records[in_encoder:]:
            mask = real_tokens(decoder_attention_mask, x.logits.shape[:2])
            masks.append(mask if labels is None else mask.to(labels.device) & (labels != -100))
        return self._finish(MPOESeq2SeqLMOutput, outputs, records, masks, output_router_logits)


__all__ = ["MPOET5ForConditionalGeneration"]
