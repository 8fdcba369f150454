"""Lively models of every family and head that can be shrunk, with some zero units."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_moebert.methods.platon.modeling_units import find_unit_groups


TEXT = {"vocab_size": 60, "max_position_embeddings": 40}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
DISTILBERT_SIZES = {"dim": 32, "n_heads": 4, "hidden_dim": 48}
CONFIGS = {
    "bert": lambda **fields: BertConfig(**SIZES | TEXT | fields),
    "roberta": lambda **fields: RobertaConfig(**SIZES | TEXT | fields),
    "distilbert": lambda num_hidden_layers=3, **fields: DistilBertConfig(
        **DISTILBERT_SIZES | {"n_layers": num_hidden_layers} | TEXT | fields
    ),
    "vit": lambda **fields: ViTConfig(**SIZES | {"image_size": 8, "patch_size": 4} | fields),
}
CLASSES = {
    "bert": [
        BertModel,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
        BertForMaskedLM,
        BertForMultipleChoice,
    ],
    "roberta": [
        RobertaModel,
        RobertaForSequenceClassification,
        RobertaForTokenClassification,
        RobertaForQuestionAnswering,
        RobertaForMaskedLM,
        RobertaForMultipleChoice,
    ],
    "distilbert": [
        DistilBertModel,
        DistilBertForSequenceClassification,
        DistilBertForTokenClassification,
        DistilBertForQuestionAnswering,
        DistilBertForMaskedLM,
        DistilBertForMultipleChoice,
    ],
    "vit": [ViTModel, ViTForImageClassification],
}
EVERY = [(family, cls) for family, classes in CLASSES.items() for cls in classes if "Multiple" not in cls.__name__]
CLASSIFIERS = [(family, classes[1]) for family, classes in CLASSES.items()]
PRUNED = {"neurons": [range(5, 24), [], range(48)], "heads": [[0, 2], [3], []]}  # units without columns, by layer
WIDTHS = [{"neurons": 29, "heads": 2}, {"neurons": 48, "heads": 3}, {"neurons": 1, "heads": 4}]


@torch.no_grad()
def build(family, cls, *, pruned=PRUNED, **fields):
    """A lively model of which some units' columns are zero; their rows and biases are not."""
    if cls in (BertForQuestionAnswering, RobertaForQuestionAnswering, DistilBertForQuestionAnswering):
        fields["num_labels"] = 2
    torch.manual_seed(0)
    model = cls(CONFIGS[family](**fields)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            parameter.copy_(torch.randn_like(parameter) / 4)
    for group in find_unit_groups(model):
        columns = group.writer.weight.unflatten(1, (group.num_units, group.unit_size))
        columns[:, list(pruned[group.kind][group.layer])] = 0
    return model


def make_inputs(family, rows=3):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 60, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model, inputs):
    """All layers' hidden states and the head's output, in float64: products of other shapes round differently."""
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    found = copy.deepcopy(model).double()(**inputs, output_hidden_states=True)
    return [*found.hidden_states, found[0]]


def assert_same(one, other, atol=1e-6, rtol=1e-6):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
