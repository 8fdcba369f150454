"""Conversion of dense token classifiers into token classifiers with a CRF."""

from typing import Any

from transformers import PreTrainedModel

from hf_moebert.architectures.stacks import refuse_forms

from .modeling_masked_crf import BertCrfForTokenClassification, CrfForTokenClassification, CrfTagger, check_tagger


def from_dense(model: PreTrainedModel, **options: Any) -> CrfTagger:
    """Add a CRF to a copy of a token classifier; at first only illegal sequences are decoded otherwise.

    Args:
        model: Token classifier, trained or not, as from `AutoModelForTokenClassification`; its `id2label` names the
            tags. It is not changed.
        **options: `labels`, the tags of some rows of data, which tell the scheme where the names of the tags do not;
            and fields of `CrfFields`, such as `mask_transitions="decoding"`.

    Returns:
        A `BertCrfForTokenClassification` of a BERT, whose weights keep their names, or a `CrfForTokenClassification`
        around any other model.

    Raises:
        ValueError: If the model is no token classifier, already has a CRF, or its labels do not fit the tag scheme.
    """
    refuse_forms(
        model,
        "a token classifier to get a CRF",
        *("adapters", "chains", "tasks"),
        crf="It has one already: use it as it is",
    )
    check_tagger(model)
    is_bert = model.config.model_type == "bert"
    head = BertCrfForTokenClassification if is_bert else CrfForTokenClassification
    return head.from_dense(model, **options)
