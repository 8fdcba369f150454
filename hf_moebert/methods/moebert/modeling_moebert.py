"""Models whose feed-forward networks are mixtures of experts: one base for all, and a class for each of transformers'.

The experts of a layer take the place of its down-projection, or of the module that holds the network; everything else
stays as transformers built it, under its own name.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    initialization as init,
)
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .configuration_families import find_architecture
from .configuration_moebert import PREFIX, MoEBertConfig, moe_config, why_not_experts
from .configuration_widths import as_dense, as_equal
from .functional import choose_experts
from .functional_routing import balance_loss, expert_load, real_tokens
from .modeling_dense import check_dense, check_importance, check_token_counts, load_dense
from .modeling_empty_losses import zero_empty_loss
from .modeling_experts import MoEBertExperts
from .modeling_inputs import check_classes, check_inputs, check_table
from .modeling_layers import (
    MoEBertFeedForward,
    MoEBertGate,
    MoEBertHashRouter,
    Route,
    keep_route,
    routing,
    scale_output,
)
from .modeling_outputs import with_routing
from .modeling_routing import Routing, recording
from .modeling_strict import StrictModel
from .modeling_surgery import find_feed_forwards, get_part
from .modeling_units import narrow_layers


logger = logging.get_logger(__name__)
MAX_IDLE_STEPS = 100  # training steps without a token after which an expert counts as dead
FLAGS = ("output_router_logits", "output_expert_load")
# Where version 0.1, which knew BERT alone, kept the experts and the normalisation behind them
NAMES_OF_0_1 = {
    r"encoder\.layer\.(\d+)\.moe\.LayerNorm\.": r"encoder.layer.\1.output.LayerNorm.",
    r"encoder\.layer\.(\d+)\.moe\.": r"encoder.layer.\1.output.dense.",
}


class _Thread(threading.local):
    """State that a head and its body exchange, past the classes of transformers between them."""

    wanted: dict[str, bool] | None = None  # the records that the head was asked for; None outside of a head
    decisions: dict[str, Any] | None = None  # what the routers of the body decided


_thread = _Thread()


def add_routing(forward: Callable) -> Callable:
    """Wrap the forward of a class of transformers, so that its output has what the routers decided."""
    names = list(inspect.signature(forward).parameters)[1:]

    @can_return_tuple
    @functools.wraps(forward)  # with its signature, by which transformers chooses columns
    def wrapped(self: "MoEBertPreTrainedModel", *args: Any, **kwargs: Any) -> ModelOutput:
        given = dict(zip(names, args, strict=False)) | kwargs
        given.pop("return_dict", None)
        wanted = {name: given.pop(name, None) for name in FLAGS}
        wanted = {name: getattr(self.config, name) if flag is None else flag for name, flag in wanted.items()}
        run = functools.partial(forward, self, return_dict=True)
        return self.run_body(run, given, wanted) if self.base_model is self else self.run_head(run, given, wanted)

    return wrapped


class MoEBertPreTrainedModel(StrictModel):
    """Base of all mixtures of experts; a subclass only adds the class of transformers that it extends."""

    config: MoEBertConfig
    accepts_loss_kwargs = False  # losses are means over the batch: the Trainer divides by accumulation steps
    router: MoEBertHashRouter | None  # of a body
    steps: int  # training steps with gates, of a body
    idle_steps: Tensor | None  # since each expert's last token, (layers, experts), of a body

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if MoEBertPreTrainedModel in cls.__bases__:  # further subclasses inherit the wrapped method
            dense: Any = cls.__bases__[1]
            cls.forward = add_routing(dense.forward)
            _made[dense] = cls

    def __init__(self, config: MoEBertConfig, *args: Any, **kwargs: Any) -> None:
        with as_dense(config):
            super().__init__(config, *args, **kwargs)
        body: Any = self.base_model
        if body is not self:  # transformers' heads build the stock body
            body.__class__ = moe_class(type(body))
            # What a class can record is noted when its first model is built, and this one was built as another
            PreTrainedModel.__init__(body.__class__.__new__(body.__class__), config)
        body.build_experts()
        self.post_init()

    def build_experts(self) -> None:
        """Put experts in the place of the feed-forward networks of this body, and a router before them."""
        if self.config.is_heterogeneous:
            narrow_layers(self, self.config.widths)
        self.config.validate_layers()  # again: a field may have been set since the configuration was made
        found = find_feed_forwards(self)
        hooked = self.config.gate_scaling == "reference"
        if hooked and not find_architecture(self).bert_like:
            raise ValueError(
                f"`gate_scaling` 'reference' needs layers that compute as BERT's do, got a {type(self).__name__}. Use "
                "'probability'."
            )
        for index, layer in enumerate(self.config.converted_layers):
            dense = found[layer]
            dense.replace_in(self, MoEBertFeedForward(dense, self.config, index))
            if hooked:
                get_part(dense.layer, "output.LayerNorm").register_forward_hook(scale_output)
        self.router = None if self.config.uses_gate else MoEBertHashRouter(self.config)
        self.steps, self.idle_steps = 0, None

    def initialize_weights(self) -> None:
        """Draw the weights that are not loaded."""
        with as_equal(self.config):  # rotations ask for the number of heads
            super().initialize_weights()

    def networks(self) -> dict[str, MoEBertFeedForward]:
        """Return the mixtures of experts by path, from the first layer to the last."""
        return {path: module for path, module in self.named_modules() if isinstance(module, MoEBertFeedForward)}

    def run_head(self, forward: Callable, given: dict[str, Any], wanted: dict[str, bool]) -> ModelOutput:
        """Run a head of transformers around its body, and add the balance loss to its loss."""
        check_classes(self, given)
        _thread.wanted = wanted
        try:
            outputs = forward(**given)
            decisions: Any = _thread.decisions
        finally:
            _thread.wanted = _thread.decisions = None  # or the graph of this pass would live until the next
        zero_empty_loss(self, (), given, outputs)
        if decisions["aux_loss"] is not None and outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + self.config.router_aux_loss_coef * decisions["aux_loss"]
        elif decisions["aux_loss"] is not None and self.training and torch.is_grad_enabled():
            logger.warning_once(
                "Without labels the balance loss is in no loss, as with `label_smoothing_factor`: add "
                "`router_aux_loss_coef * aux_loss`."
            )
        return with_routing(outputs, **decisions)

    def run_body(self, forward: Callable, given: dict[str, Any], wanted: dict[str, bool]) -> ModelOutput:
        """Run a body of transformers with the route of its batch."""
        check_inputs(self, given)
        in_head = _thread.wanted is not None
        wanted = _thread.wanted or wanted
        route = self._make_route(given)
        gated = self.config.uses_gate and (self.config.router_aux_loss_coef > 0 or self.training)
        watched: AbstractContextManager[list[Routing]] = nullcontext([])
        if gated or any(wanted.values()):
            watched = recording()
        with routing(route), watched as records:
            outputs = forward(**given)
        decisions = self._tell(records, route, wanted, given.get("sentences"))
        if in_head:
            _thread.decisions = decisions
        return outputs if in_head else with_routing(outputs, **decisions)

    def _make_route(self, given: dict[str, Any]) -> Route:
        ids, mask, sentences = given.get("input_ids"), given.get("attention_mask"), given.get("sentences")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if isinstance(mask, Tensor) and tokens is not None:
            mask = real_tokens(mask, tokens.shape[:2])
        lengths = None if sentences is None else sentences.lengths
        return Route(mask, lengths, None if self.router is None else self.router(ids))

    def _tell(self, records: list[Routing], route: Route, wanted: dict[str, bool], sentences: Any) -> dict[str, Any]:
        """Return what an output tells of the decisions of its routers."""
        told: dict[str, Any] = {"aux_loss": None, "router_logits": None, "expert_load": None}
        if not records:
            return told
        experts, by_sentence = self.config.num_experts, self.config.routing == "gate-sentence"
        real = real_tokens(None, records[0].chosen.shape[:1] + (1,)) if route.token_mask is None else route.token_mask
        real = real.to(records[0].chosen.device)
        if wanted["output_expert_load"]:
            told["expert_load"] = tuple(expert_load(r.chosen, real.flatten(), experts) for r in records)
        if not self.config.uses_gate:
            return told
        logits: list[Any] = [r.logits for r in records]
        if wanted["output_router_logits"]:
            unpack = by_sentence or sentences is None
            told["router_logits"] = tuple(x if unpack else sentences.unpack(x) for x in logits)
        if by_sentence:
            real = _real_sentences(route, logits[0])
        flat = [x.flatten(0, -2) for x in logits]  # (items, experts)
        chosen = [choose_experts(x.detach(), self.config.top_k, "probability")[0] for x in flat]
        if self.config.router_aux_loss_coef > 0:
            losses = [balance_loss(x, c, real.flatten()) for x, c in zip(flat, chosen, strict=True)]
            told["aux_loss"] = torch.stack(losses).sum()
        if self.training and not torch.compiler.is_compiling():
            self._warn_of_idle_experts(torch.stack([expert_load(c, real.flatten(), experts) for c in chosen]))
        return told

    @torch.no_grad()
    def _warn_of_idle_experts(self, load: Tensor) -> None:
        """Warn of experts that the gates have not chosen for a long time, `(layers, experts)`; training goes on."""
        before = 0 if self.idle_steps is None else self.idle_steps.to(load.device)
        idle = torch.where(load > 0, 0, before + 1)
        self.steps, self.idle_steps = self.steps + 1, idle
        if self.steps % MAX_IDLE_STEPS == 0 and (idle >= MAX_IDLE_STEPS).any():  # seldom, for it waits for a GPU
            where = (idle >= MAX_IDLE_STEPS).nonzero().tolist()
            logger.warning(
                f"{len(where)} of {idle.numel()} experts had no token for {MAX_IDLE_STEPS} steps or more: {where} "
                "(converted layer, expert). Raise `router_aux_loss_coef`."
            )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as `StrictModel`, also what version 0.1 saved, under its names.

        Args:
            *args: As `StrictModel.from_pretrained`.
            **kwargs: Likewise.
        """
        kwargs.setdefault("key_mapping", NAMES_OF_0_1)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_table(model, model.config.name_or_path)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save under the modules' own names, and name all classes of the family, whose code is saved along."""
        family = [cls for cls in _made.values() if cls.config_class is self.config_class]
        code = {c._auto_class: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in family if c._auto_class}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | code
        kwargs.setdefault("save_original_format", False)  # else the names of version 0.1 would be written
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for its decorator in another file

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Prefer `sorted_mm` to the choice of transformers."""
        return super().get_correct_experts_implementation(requested_experts or "sorted_mm")

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, keep_route(gradient_checkpointing_func), **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, MoEBertExperts):
            for name, parameter in module.named_parameters():
                init.zeros_(parameter) if name.endswith("bias") else init.normal_(parameter, std=std)
        elif isinstance(module, MoEBertGate):
            init.normal_(module.weight, std=std)
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
        model: PreTrainedModel,
        importance: Tensor,
        *,
        token_counts: Tensor | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Convert a fine-tuned dense model with the same head: cut its feed-forward networks into experts.

        Args:
            model: Model of the class that this one extends, or its shrunk form. It is not changed.
            importance: Score of each neuron, from `measure_importance`. Shape `(networks, width of the widest)`.
            token_counts: Occurrences of each token id in the training corpus, for `hash-balanced`. Shape `(vocab,)`.
            seed: Seed of hash tables and gates.
            **options: Fields of `MoEFields`: `num_experts`, `expert_size`, `num_shared_neurons`, `routing`, `top_k`,
                `gate_scaling`, `router_aux_loss_coef`, `layers`.

        Returns:
            The student in eval mode, with the dense model's dtype and device.

        Raises:
            ValueError: If the importance, the model or an option does not fit.

        Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.2.
        """
        dense_class: Any = cls.__bases__[1]
        check_dense(model, dense_class, cls.__name__)
        config = cls.config_class.from_dense(model.config, routing_seed=seed, **options)
        found = find_feed_forwards(model)
        check_importance(importance, found)
        if config.routing == "hash-balanced":
            check_token_counts(token_counts, config.vocab_size)

        with torch.random.fork_rng(devices=[]):  # gates are drawn from `seed`, and nothing else is disturbed
            torch.manual_seed(seed)
            has_pooler = "add_pooling_layer" in inspect.signature(dense_class.__init__).parameters
            pooling = {"add_pooling_layer": False} if has_pooler and model.pooler is None else {}
            student = cls(config, **pooling).to(dtype=model.dtype, device=model.device)
        load_dense(student, model, found, importance)
        if config.routing == "hash-balanced":
            router = student.base_model.router
            router.table.copy_(router.draw_table(config.vocab_size, token_counts))
        return student.eval()


def _real_sentences(route: Route, logits: Tensor) -> Tensor:
    """Mark the sentences that are not padding alone, `(sentences,)`, of which the gate has logits."""
    if route.lengths is not None:
        return torch.tensor(route.lengths, device=logits.device) > 0
    mask = logits.new_ones(logits.shape[0], 1, dtype=torch.bool) if route.token_mask is None else route.token_mask
    return mask.to(logits.device).any(dim=1)


_made: dict[type[PreTrainedModel], type[MoEBertPreTrainedModel]] = {}


class MoEBertModel(MoEBertPreTrainedModel, BertModel):
    """BERT without a head."""

    config: MoEBertConfig


class MoEBertForSequenceClassification(MoEBertPreTrainedModel, BertForSequenceClassification):
    """BERT with a linear layer on the pooled [CLS]: classes, several labels at once, or regression."""

    config: MoEBertConfig


class MoEBertForTokenClassification(MoEBertPreTrainedModel, BertForTokenClassification):
    """BERT with a linear layer on every token."""

    config: MoEBertConfig


class MoEBertForQuestionAnswering(MoEBertPreTrainedModel, BertForQuestionAnswering):
    """BERT with two scores on every token: that an answer starts there, and that it ends there."""

    config: MoEBertConfig


def moe_class(dense: type[PreTrainedModel]) -> type[MoEBertPreTrainedModel]:
    """Return the class of the mixtures of a class of transformers, which the first call makes.

    Args:
        dense: A body or head of a family of encoders in the table.
    """
    if dense not in _made:
        body = {
            "__doc__": f"`{dense.__name__}` whose feed-forward networks are mixtures of experts.",
            "__module__": __name__,
            "config_class": moe_config(dense.config_class),
        }
        name = f"{PREFIX}{dense.__name__}"
        globals()[name] = type(name, (MoEBertPreTrainedModel, dense), body)
    return _made[dense]


def __getattr__(name: str) -> Any:
    """Make the class of a mixture when it is asked for by name, such as `MoERobertaForTokenClassification`."""
    dense: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if why_not_experts(getattr(getattr(dense, "config_class", None), "model_type", "")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return moe_class(dense)


__all__ = [
    "MoEBertForQuestionAnswering",
    "MoEBertForSequenceClassification",
    "MoEBertForTokenClassification",
    "MoEBertModel",
]
