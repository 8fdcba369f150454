"""Models, fields and inputs that a token classifier with a CRF refuses."""

import dataclasses

import pytest
import torch
from tiny_crf import LABELS, make, make_batch, make_config, make_dense
from transformers import AutoModelForTokenClassification, LayoutLMConfig, LayoutLMForTokenClassification

from hf_moebert import BertCrfForTokenClassification, CrfForTokenClassification
from hf_moebert.methods.masked_crf.configuration_masked_crf import BertCrfConfig, CrfFields


@pytest.mark.parametrize("head", [BertCrfForTokenClassification, CrfForTokenClassification])
@pytest.mark.parametrize("name", ["mask_transition", "id2label"])
def test_fields_that_do_not_exist(head, name):
    with pytest.raises(ValueError, match=rf"must be among tag_scheme, .*got \['{name}'\]"):
        head.from_dense(make_dense(), **{name: "off"})


def test_every_field_can_be_given():
    fields = {"tag_scheme": "IOB2", "mask_transitions": "off", "illegal_labels": "soft", "illegal_score": -5.0}
    assert fields.keys() == {field.name for field in dataclasses.fields(CrfFields)}
    crf = CrfForTokenClassification.from_dense(make_dense(), **fields).crf
    assert {name: getattr(crf, name) for name in fields} == fields


def test_tags_that_are_not_numbered_from_zero():
    config = BertCrfConfig.from_dense(make_config("bert"))
    config.id2label = {index + 1: label for index, label in enumerate(LABELS)}
    with pytest.raises(ValueError, match="`id2label` must name the tags 0 to 4"):
        BertCrfForTokenClassification(config)


def test_tags_that_the_encoder_does_not_have(tmp_path):
    make("any bert").save_pretrained(tmp_path)
    others = {index: label.replace("PER", "LOC") for index, label in enumerate(LABELS)}
    with pytest.raises(ValueError, match="`id2label` must be that of the tagger"):
        AutoModelForTokenClassification.from_pretrained(tmp_path, id2label=others)


def test_encoders_that_read_more_than_tokens():
    """The Trainer would drop the columns that `forward` does not name, and the encoder go without them."""
    config = LayoutLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.id2label = dict(enumerate(LABELS))
    with pytest.raises(ValueError, match=r"LayoutLMForTokenClassification reads \['bbox'\] as well"):
        CrfForTokenClassification.from_dense(LayoutLMForTokenClassification(config))


def test_attention_masks_of_pairs():
    model, batch = make().eval(), make_batch()
    mask = batch["attention_mask"].bool()
    pairs = (mask[:, None, :, None] & mask[:, None, None, :]) | torch.eye(mask.shape[1], dtype=torch.bool)
    found = model(batch["input_ids"], attention_mask=pairs, word_mask=mask)
    expected = model(**batch)
    assert torch.equal(found.predictions, expected.predictions)


def test_the_attention_implementation_stays():
    dense = AutoModelForTokenClassification.from_config(make_config("bert"), attn_implementation="eager")
    for head in (BertCrfForTokenClassification, CrfForTokenClassification):
        assert head.from_dense(dense).config._attn_implementation == "eager"


def test_tags_and_chances_in_inference_mode():
    model, batch = make().eval(), make_batch()
    with torch.inference_mode():
        found = model(**batch, output_marginals=True)
    assert torch.equal(found.marginals, model(**batch, output_marginals=True).marginals)
