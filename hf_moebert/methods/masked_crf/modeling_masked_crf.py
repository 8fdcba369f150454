"""Token classifiers with a CRF: on BERT, and on any encoder for which transformers has a token classifier."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    BertForTokenClassification,
    PreTrainedModel,
    initialization as init,
)
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_masked_crf import BertCrfConfig, CrfConfig
from .functional_schemes import infer_scheme
from .modeling_crf import MaskedCRF
from .modeling_strict import StrictModel


logger = logging.get_logger(__name__)
Rows = Iterable[Iterable[int]]
LAYOUT_INPUTS = {"bbox", "image", "pixel_values"}  # of classifiers of scanned documents


@dataclass
class CrfTokenClassifierOutput(TokenClassifierOutput):
    """Output of a token classifier with a CRF.

    Args:
        loss: Negative log-likelihood, mean over the rows that have words. Shape `()`.
        logits: Emissions: the logits of the token classifier without a CRF. Shape `(batch, seq, tags)`.
        predictions: Tag of each word in the best sequence, -100 off words; None in training. Shape `(batch, seq)`,
            int64.
        marginals: Probability of each tag of each word, on request. Shape `(batch, seq, tags)`.
    """

    predictions: Tensor | None = None
    marginals: Tensor | None = None


class CrfTagger(StrictModel):
    """Base class of token classifiers with a CRF, which scores the logits of a token classifier as emissions."""

    accepts_loss_kwargs = False  # losses are means over the batch: the Trainer divides by accumulation steps

    def _make_crf(self) -> MaskedCRF:
        config = self.config
        return MaskedCRF(
            _tags_of(config),
            tag_scheme=config.tag_scheme,
            mask_transitions=config.mask_transitions,
            illegal_labels=config.illegal_labels,
            illegal_score=config.illegal_score,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskedCRF):
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)
            for name, mask in zip(("legal", "legal_start", "legal_end"), module.legality(), strict=True):
                init.copy_(getattr(module, name), mask)

    @classmethod
    def _with_tagger(cls, config: Any, model: PreTrainedModel, inside: str, labels: Rows | None) -> Self:
        """Build a tagger around a copy of a token classifier; labels of data tell the scheme of its tags."""
        if hasattr(model, "crf"):
            raise ValueError(f"`model` must have no CRF yet, got {type(model).__name__}. Use it as it is.")
        config._attn_implementation = model.config._attn_implementation
        if labels is not None and config.tag_scheme == "auto" and config.mask_transitions != "off":
            config.tag_scheme = infer_scheme(_tags_of(config), _read_rows(labels, config.id2label))
        tagger = cls(config).to(dtype=model.dtype, device=model.device)
        target = tagger.get_submodule(inside)
        rest = target.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
        if rest.unexpected_keys or not all(name.startswith("crf.") for name in rest.missing_keys):
            raise ValueError(
                f"`model` must be a token classifier, got {type(model).__name__}. Load it with "
                "`AutoModelForTokenClassification`, with the `id2label` of the task."
            )
        return tagger.train(model.training)

    def _tag(
        self,
        outputs: Any,
        labels: Tensor | None,
        word_mask: Tensor | None,
        output_marginals: bool,
    ) -> CrfTokenClassifierOutput:
        """Add loss, tags and marginals to the output of a token classifier."""
        found: tuple[Tensor | None, ...] = (None, None, None)
        if self.training and labels is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logger.warning_once(
                "Without `labels` the CRF is in no loss, and is not trained. Train without `label_smoothing_factor` "
                "and `compute_loss_func`."
            )
        emissions_suffice = self.training and labels is None and not output_marginals
        if not (emissions_suffice or torch.compiler.is_exporting()):  # exported models are decoded outside
            mask = _find_words(outputs.logits, labels, word_mask)  # (batch, seq)
            found = self._run_crf(outputs, labels, mask, output_marginals=output_marginals)
        loss, tags, marginals = found
        return CrfTokenClassifierOutput(
            loss=loss,
            logits=outputs.logits,  # (batch, seq, tags)
            predictions=tags,
            marginals=marginals,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.compiler.disable  # loops over words, which would be compiled anew for each number of words
    def _run_crf(
        self, outputs: Any, labels: Tensor | None, mask: Tensor, *, output_marginals: bool
    ) -> tuple[Tensor | None, ...]:
        emissions = outputs.logits
        loss = None if labels is None else self._loss(emissions, labels, mask, outputs)
        tags = None if self.training else self.crf.decode(emissions, mask)  # (batch, seq)
        return loss, tags, self.crf.marginals(emissions, mask) if output_marginals else None

    def _loss(self, emissions: Tensor, labels: Tensor, mask: Tensor, outputs: Any) -> Tensor:
        lenient = "ignore" if self.crf.illegal_labels == "error" and not self.training else None
        labels = labels.to(emissions.device)
        likelihood, counted = self.crf.likelihood_and_rows(emissions, labels, mask, illegal_labels=lenient)
        if lenient and not torch.equal(counted, mask.any(1)):
            logger.warning_once(
                f"Labels that break the tag scheme {self.crf.tag_scheme} are left out of the evaluation loss. Set "
                "`illegal_labels` to 'repair' to count them."
            )
        if self.crf.mask_transitions == "decoding" and self.crf.illegal_rows(labels, mask).any():
            logger.warning_once(
                f"Some labels break the tag scheme {self.crf.tag_scheme}, and are never decoded. Name the scheme of "
                "the data in `tag_scheme`, or correct the data."
            )
        loss = -likelihood.sum() / counted.sum().clamp(min=1)
        if getattr(outputs, "aux_loss", None) is not None:  # balances the load of experts
            loss = loss + outputs.aux_loss * getattr(self.config.tagger, "router_aux_loss_coef", 0.0)
        return loss


def _tags_of(config: Any) -> list[str]:
    """Return the names of the tags in the order of their numbers."""
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ValueError(
            f"`id2label` must name the tags 0 to {config.num_labels - 1}, got {sorted(config.id2label)}. Number "
            "them from 0."
        )
    return [config.id2label[index] for index in range(config.num_labels)]


def _read_rows(labels: Rows, names: Mapping[int, str]) -> list[list[str]]:
    """Return the tags of each row, without what is no word."""
    rows = [[int(tag) for tag in row if tag != -100] for row in labels]
    if unknown := {tag for row in rows for tag in row} - names.keys():
        raise ValueError(
            f"`labels` must be rows of numbers in `id2label` or -100, got {min(unknown)}. Give the column `labels` of "
            "what `encode_tokens` returns."
        )
    return [[names[tag] for tag in row] for row in rows]


def check_tagger(model: Any) -> None:
    """Refuse what is no token classifier, before its configuration is read."""
    classes = {cls.__name__ for cls in type(model).__mro__}
    if not isinstance(model, PreTrainedModel) or not any(name.endswith("ForTokenClassification") for name in classes):
        raise ValueError(
            f"`model` must be a token classifier, got {type(model).__name__}. Load it with "
            "`AutoModelForTokenClassification`, with the `id2label` of the task, and merge adapters."
        )


def _find_words(emissions: Tensor, labels: Tensor | None, word_mask: Tensor | None) -> Tensor:
    """Return which positions are words: the CRF must not see padding, special tokens and later pieces of words."""
    for name, value in (("labels", labels), ("word_mask", word_mask)):
        if value is not None and value.shape != emissions.shape[:2]:
            raise ValueError(
                f"`{name}` must have the shape {tuple(emissions.shape[:2])} of the input, got {tuple(value.shape)}."
            )
    if labels is not None:
        return labels.to(emissions.device) != -100
    if word_mask is not None:
        return word_mask.to(emissions.device).bool()
    raise ValueError(
        "`word_mask`, or `labels` of any tag, must mark the first piece of each word, got neither. Use "
        '`pipeline("masked-crf", ...)`, which marks them: "token-classification" knows no CRF. If every token is a '
        "word, give `attention_mask` as `word_mask`."
    )


class BertCrfForTokenClassification(CrfTagger, BertForTokenClassification):
    """BERT token classifier with a CRF, whose weights keep the names of `BertForTokenClassification`."""

    config_class = BertCrfConfig

    def __init__(self, config: BertCrfConfig) -> None:
        super().__init__(config)
        self.crf = self._make_crf()
        self.post_init()

    @classmethod
    def from_dense(cls, model: PreTrainedModel, *, labels: Rows | None = None, **fields: Any) -> Self:
        """Add a CRF to a copy of a `BertForTokenClassification`.

        Args:
            model: Token classifier, trained or not; its `id2label` names the tags.
            labels: Numbers of the tags of some rows of data, -100 off words, as in a column `labels`: they tell the
                scheme where the names of the tags do not.
            **fields: Fields of `CrfFields`, such as `mask_transitions="decoding"`.

        Raises:
            ValueError: If the model is of another class, or its labels do not fit the tag scheme.
        """
        check_tagger(model)
        return cls._with_tagger(BertCrfConfig.from_dense(model.config, **fields), model, "", labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        word_mask: Tensor | None = None,
        output_marginals: bool = False,
        **kwargs: Any,
    ) -> CrfTokenClassifierOutput:
        """Compute logits, loss and tags of a batch.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: Shape `(batch, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Shape `(batch, seq, hidden)`.
            labels: Tags, -100 off words. Shape `(batch, seq)`.
            word_mask: True at the first piece of each word; needed in evaluation, where there are no labels to show
                it. Shape `(batch, seq)`.
            output_marginals: Whether to return the probability of each tag.
            **kwargs: Output flags of the encoder.

        Raises:
            ValueError: If a label does not exist or breaks the tag scheme, a shape does not fit, or nothing says
                which tokens are words.
        """
        outputs = BertForTokenClassification.forward(
            self,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            **kwargs | {"return_dict": True},
        )
        return self._tag(outputs, labels, word_mask, output_marginals)


class CrfForTokenClassification(CrfTagger):
    """A CRF on any token classifier that `AutoModelForTokenClassification` knows."""

    config_class = CrfConfig
    config: CrfConfig
    base_model_prefix = "tagger"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CrfConfig) -> None:
        super().__init__(config)
        tagger: Any = config.tagger
        if config.id2label != tagger.id2label:
            raise ValueError(
                f"`id2label` must be that of the tagger, {list(tagger.id2label.values())}, got "
                f"{list(config.id2label.values())}. Use `from_dense` on a token classifier that has the new tags."
            )
        self.tagger = AutoModelForTokenClassification.from_config(tagger)
        if foreign := LAYOUT_INPUTS & set(inspect.signature(self.tagger.forward).parameters):
            raise ValueError(
                f"`tagger` must read tokens alone, {type(self.tagger).__name__} reads {sorted(foreign)} as well, "
                "which the Trainer would drop. Use `MaskedCRF` in a model of your own."
            )
        self.crf = self._make_crf()
        self.post_init()

    @classmethod
    def from_dense(cls, model: PreTrainedModel, *, labels: Rows | None = None, **fields: Any) -> Self:
        """Add a CRF to a copy of a token classifier.

        Args:
            model: Token classifier, trained or not, as from `AutoModelForTokenClassification`; its `id2label` names
                the tags.
            labels: Numbers of the tags of some rows of data, -100 off words, as in a column `labels`: they tell the
                scheme where the names of the tags do not.
            **fields: Fields of `CrfFields`, such as `mask_transitions="decoding"`.

        Raises:
            ValueError: If the model is of another class, or its labels do not fit the tag scheme.
        """
        check_tagger(model)
        return cls._with_tagger(CrfConfig.from_dense(model.config, **fields), model, "tagger", labels)

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the encoder."""
        return self.tagger.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the encoder."""
        self.tagger.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        word_mask: Tensor | None = None,
        output_marginals: bool = False,
        **kwargs: Any,
    ) -> CrfTokenClassifierOutput:
        """Compute logits, loss and tags of a batch; the arguments are those of `BertCrfForTokenClassification`."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        outputs = self.tagger(**given, **kwargs | {"return_dict": True})
        return self._tag(outputs, labels, word_mask, output_marginals)
