"""BERT with mixtures of experts in place of its feed-forward networks."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertPooler,
    BertPreTrainedModel,
    BertSelfAttention,
)
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_moebert import MoEBertConfig
from .functional import choose_experts
from .functional_routing import balance_loss, expert_load, real_tokens
from .modeling_dense import check_dense, check_importance, check_token_counts, load_experts
from .modeling_experts import MoEBertExperts
from .modeling_layers import MoEBertEncoder, MoEBertHashRouter, MoEBertLayer, Route
from .modeling_routing import RoutingOutput
from .modeling_strict import StrictModel


logger = logging.get_logger(__name__)
MAX_IDLE_STEPS = 100  # training steps without a token after which an expert counts as dead


@dataclass
class MoEBertOutput(RoutingOutput):
    """The fields that every MoEBERT output has besides those of the base class.

    Args:
        expert_load: Real tokens that each expert of each converted layer processed, `(experts,)`.
    """

    expert_load: tuple[Tensor, ...] | None = None


@dataclass
class MoEBertModelOutput(MoEBertOutput, BaseModelOutputWithPooling):
    """Output of `MoEBertModel`."""


class MoEBertPreTrainedModel(StrictModel, BertPreTrainedModel):
    """Base class of all MoEBERTs: initialisation, growing the vocabulary, and conversion of a dense model."""

    config: MoEBertConfig
    accepts_loss_kwargs = False  # losses are means over the batch: the Trainer divides by accumulation steps
    _no_split_modules = ["BertEmbeddings", "BertLayer", "MoEBertLayer"]
    _can_record_outputs = {
        "hidden_states": GradientCheckpointingLayer,  # dense layers and converted ones alike
        "attentions": BertSelfAttention,
        "router_logits": OutputRecorder(MoEBertLayer, index=1),  # at the layer: survives reentrant checkpointing
        "expert_load": OutputRecorder(MoEBertLayer, index=2),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for its decorator in another file

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Prefer `sorted_mm` to the choice of transformers."""
        return super().get_correct_experts_implementation(requested_experts or "sorted_mm")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEBertExperts):
            for weight, bias in ((module.up_proj, module.up_proj_bias), (module.down_proj, module.down_proj_bias)):
                init.normal_(weight, std=self.config.initializer_range)
                init.zeros_(bias)
        elif isinstance(module, MoEBertHashRouter):
            init.copy_(module.table, module.draw_table(self.config.vocab_size))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embeddings like the base class, and the hash tables with them."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.base_model.router is not None:
            self.base_model.router.resize(embeddings.num_embeddings)
        return embeddings

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        model: BertPreTrainedModel,
        importance: Tensor,
        *,
        num_experts: int = 4,
        expert_size: int | None = None,
        num_shared_neurons: int | None = None,
        routing: str = "hash-random",
        token_counts: Tensor | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Convert a fine-tuned dense BERT with the same head: cut its feed-forward networks into experts.

        Args:
            model: Any model of BERT's architecture, e.g. `BertForSequenceClassification`. It is not changed.
            importance: Score of each neuron, from `measure_importance`. Shape `(layers, intermediate)`.
            num_experts: Experts per converted layer.
            expert_size: Neurons per expert; by default `intermediate_size // num_experts`, as in the paper.
            num_shared_neurons: Neurons that every expert gets; by default `intermediate_size // 6`, as in the paper,
                but at most two thirds of an expert, the paper's share, so that many experts still differ.
            routing: See `MoEBertConfig`.
            token_counts: Occurrences of each token id in the training corpus, for `hash-balanced`. Shape `(vocab,)`.
            seed: Seed of hash tables and gates.
            **options: Further fields of `MoEBertConfig`: `top_k`, `gate_scaling`, `router_aux_loss_coef`,
                `layers`.

        Returns:
            The student in eval mode, with the dense model's dtype and device.

        Raises:
            ValueError: If the importance, the model or an option does not fit.

        Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.2.
        """
        check_dense(model, cls.__name__)
        dense_size = model.config.intermediate_size
        count = num_experts if isinstance(num_experts, int) and num_experts > 0 else 1  # the config refuses others
        expert_size = dense_size // count if expert_size is None else expert_size
        if num_shared_neurons is None:
            num_shared_neurons = min(dense_size // 6, expert_size * 2 // 3)
        config = cls.config_class.from_dense(
            model.config,
            num_experts=num_experts,
            expert_size=expert_size,
            num_shared_neurons=num_shared_neurons,
            routing=routing,
            routing_seed=seed,
            **options,
        )
        check_importance(importance, (config.num_hidden_layers, dense_size))
        if routing == "hash-balanced":
            check_token_counts(token_counts, config.vocab_size)

        with torch.random.fork_rng(devices=[]):  # gates are drawn from `seed`, and nothing else is disturbed
            torch.manual_seed(seed)
            pooling = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
            student = cls(config, **pooling).to(dtype=model.dtype, device=model.device)
        load_experts(student, model, importance)
        if routing == "hash-balanced":
            router = student.base_model.router
            router.table.copy_(router.draw_table(config.vocab_size, token_counts))
        return student.eval()


class MoEBertModel(MoEBertPreTrainedModel):
    """The encoder: embeddings, layers of which some hold experts, and an optional pooler."""

    def __init__(self, config: MoEBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.router = None if config.uses_gate else MoEBertHashRouter(config)
        self.encoder = MoEBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.steps = 0  # training steps with gates
        self.idle_steps: Tensor | None = None  # since each expert's last token, (layers, experts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEBertModelOutput:
        """Encode a batch.

        Args:
            input_ids: Token ids; what hash routing looks at. Shape `(batch, seq)`.
            attention_mask: 1 or True at real tokens, shape `(batch, seq)`; or a ready mask `(batch, 1, seq, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Embeddings in place of ids, only with a gate. Shape `(batch, seq, hidden)`.
            **kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_load`,
                `return_dict`.

        Raises:
            ValueError: If ids, lengths or devices do not fit the model.
        """
        self._check_inputs(input_ids, inputs_embeds, position_ids)
        hidden_states = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        token_mask = real_tokens(attention_mask, hidden_states.shape[:2]).to(hidden_states.device)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        no_route: Route = (None, None)
        routes = self.router(input_ids) if self.router else [no_route] * len(self.config.converted_layers)
        kwargs.setdefault("output_expert_load", self.config.output_expert_load)
        hidden_states, router_logits = self.encoder(hidden_states, attention_mask, token_mask, routes, **kwargs)
        if self.training and self.config.uses_gate and router_logits and not torch.compiler.is_compiling():
            self._warn_of_idle_experts(router_logits, token_mask)
        return MoEBertModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
            aux_loss=self._balance_loss(router_logits, token_mask, kwargs.get("sentences")),
        )

    @torch.no_grad()
    def _warn_of_idle_experts(self, router_logits: list[Tensor], token_mask: Tensor) -> None:
        """Warn of experts that the gates have not chosen for a long time; training goes on."""
        mask = token_mask.any(dim=1) if self.config.routing == "gate-sentence" else token_mask
        loads = []
        for logits in router_logits:
            chosen, _ = choose_experts(logits.flatten(0, -2), self.config.top_k, "probability")
            loads.append(expert_load(chosen, mask.flatten(), self.config.num_experts))
        load = torch.stack(loads)  # (layers, experts)

        before = 0 if self.idle_steps is None else self.idle_steps.to(load.device)
        idle = torch.where(load > 0, 0, before + 1)
        self.steps, self.idle_steps = self.steps + 1, idle
        if self.steps % MAX_IDLE_STEPS == 0 and (idle >= MAX_IDLE_STEPS).any():  # seldom, for it waits for a GPU
            where = (idle >= MAX_IDLE_STEPS).nonzero().tolist()
            logger.warning(
                f"{len(where)} of {idle.numel()} experts had no token for {MAX_IDLE_STEPS} steps or more: {where} "
                "(converted layer, expert). Raise `router_aux_loss_coef`."
            )

    def _balance_loss(self, router_logits: list[Tensor], token_mask: Tensor, sentences: Any) -> Tensor | None:
        """Sum the load-balancing losses of the layers, if they have a weight."""
        if not self.config.uses_gate or self.config.router_aux_loss_coef == 0 or not router_logits:
            return None
        mask = token_mask
        if self.config.routing == "gate-sentence":
            mask = token_mask.any(dim=1) if sentences is None else torch.tensor(sentences.lengths) > 0
        losses = []
        for logits in router_logits:
            logits = logits.flatten(0, -2)  # (tokens, experts)
            chosen, _ = choose_experts(logits.detach(), self.config.top_k, "probability")
            losses.append(balance_loss(logits, chosen, mask.flatten()))
        return torch.stack(losses).sum()

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Refuse inputs that would fail later without a reason, or on a GPU take the whole process down."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if input_ids is None and self.router is not None:
            raise ValueError(
                f"`inputs_embeds` cannot be routed by `routing` {self.config.routing!r}, which looks token ids up. "
                "Give `input_ids`, or convert with a gate."
            )
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        limit = self.config.max_position_embeddings
        if given.shape[1] == 0 or (position_ids is None and given.shape[1] > limit):
            raise ValueError(f"Sequences must have 1 to {limit} tokens, got {given.shape[1]}. Truncate longer ones.")
        if input_ids is None or torch.compiler.is_compiling():
            return
        if input_ids.is_floating_point():
            raise ValueError(
                f"`input_ids` must be integers, got {input_ids.dtype}. Give embeddings as `inputs_embeds`."
            )
        vocab = self.embeddings.word_embeddings.num_embeddings
        wrong = (input_ids < 0) | (input_ids >= vocab)
        if wrong.any():
            row, column = (int(x) for x in wrong.nonzero()[0])
            raise ValueError(
                f"`input_ids` must be in [0, {vocab}), got {int(input_ids[row, column])} at row {row}, position "
                f"{column}. Use the model's own tokenizer, or `resize_token_embeddings` after adding tokens."
            )
