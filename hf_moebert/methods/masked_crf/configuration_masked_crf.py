"""Configurations of token classifiers with a CRF."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.bert.configuration_bert import BertConfig

from .configuration_strict import StrictConfig, strict
from .functional_tags import check_options


@dataclass(kw_only=True)
class CrfFields:
    """The fields that both configurations add to those of transformers; `id2label` names the tags.

    Args:
        tag_scheme: How tags spell segments: "IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU", "BMES", or by another
            name, such as "BIO" and "BIOES"; "none" (every tag may follow every other); or "auto", which infers it
            from the tags.
        mask_transitions: Where illegal sequences are forbidden: in "training" and decoding, in "decoding" only, or
            nowhere ("off").
        illegal_labels: How the training loss treats labels that break the scheme, if `mask_transitions="training"`:
            "error", "ignore" (leave the row out), "repair" (rewrite its segments legally), or "soft" (illegal moves
            score `illegal_score`, as in the paper). In evaluation, "error" leaves such rows out with a warning.
        illegal_score: Score of an illegal move under "soft"; -100 in the paper's code.

    Raises:
        ValueError: If a value has the wrong type or breaks a rule; the message names rule and remedy.

    Source: Wei et al. 2021, https://arxiv.org/abs/2103.10682; "ignore" and "repair" are our own design.
    """

    tag_scheme: str = "auto"
    mask_transitions: str = "training"
    illegal_labels: str = "error"
    illegal_score: float | int = -100.0

    @classmethod
    def check_names(cls, fields: Mapping[str, Any]) -> None:
        """Refuse fields that this class does not have: transformers would store a misspelt one and ignore it.

        Raises:
            ValueError: If there is one.
        """
        known = [field.name for field in dataclasses.fields(CrfFields)]
        if unknown := fields.keys() - set(known):
            raise ValueError(f"`fields` must be among {', '.join(known)}, got {sorted(unknown)}. Check the spelling.")

    def validate_crf(self) -> None:
        """Check the fields of this class; transformers calls every `validate_` method."""
        check_options(self.tag_scheme, self.mask_transitions, self.illegal_labels, self.illegal_score)


@strict
class BertCrfConfig(CrfFields, StrictConfig, BertConfig):
    """Configuration of a BERT token classifier with a CRF; see `CrfFields`.

    Args:
        frozen_layers: Number of layers that stayed as they were pre-trained, for a model of many tasks.
    """

    model_type = "bert_crf"
    keys_to_ignore_at_inference = ["logits", "marginals", "hidden_states", "attentions"]

    frozen_layers: int | None = None

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **fields: Any) -> Self:
        """Copy the configuration of a BERT, and add the CRF.

        Args:
            config: Configuration of a `BertForTokenClassification`.
            **fields: Fields of `CrfFields`.

        Raises:
            ValueError: If it is not the configuration of a BERT, or a field does not exist.
        """
        cls.check_names(fields)
        if config.model_type != "bert":
            raise ValueError(
                f"`model` must be a BERT, got {config.model_type!r}. Use `CrfForTokenClassification` for others."
            )
        return cls(**(cls.fields_of_dense(config) | fields))


@strict
class CrfConfig(CrfFields, StrictConfig, PreTrainedConfig):
    """Configuration of a CRF on top of any token classifier of transformers; see `CrfFields`.

    Args:
        tagger: Configuration of the token classifier; its `id2label` names the tags.
    """

    model_type = "crf"
    keys_to_ignore_at_inference = ["logits", "marginals", "hidden_states", "attentions"]
    sub_configs_defaults = {"tagger": SubConfigSpec(config_class=AutoConfig, model_type="bert")}

    tagger: PreTrainedConfig | dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Copy the names of the tags from the token classifier."""
        super().__post_init__(**kwargs)
        tagger: Any = self.tagger  # a configuration by now, even if a dict was given
        self.id2label, self.label2id = tagger.id2label, tagger.label2id

    def _travels(self) -> bool:
        """Check that the tagger is one of transformers: the code of another method does not come along."""
        return super()._travels() and type(self.tagger).__module__.startswith("transformers.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return that of the token classifier, where transformers reads sizes and writes a new vocabulary size."""
        tagger: Any = self.tagger
        return tagger.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **fields: Any) -> Self:
        """Wrap the configuration of a token classifier, and add the CRF.

        Args:
            config: Configuration of the token classifier.
            **fields: Fields of `CrfFields`.

        Raises:
            ValueError: If a field does not exist.
        """
        cls.check_names(fields)
        return cls(**({"tagger": config.to_dict()} | fields))
