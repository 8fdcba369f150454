"""A family that is not in the table is described by a row, which is checked on a model."""

import json
import re
import runpy
from dataclasses import replace

import family_table
import new_process
import pytest
import torch
from copies import COPIES
from tiny_families import GROUPED, SIZES, TEXT, make_inputs, make_model, run
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import hf_moebert
from hf_moebert import measure_importance, register_architecture, registration, shrink
from hf_moebert.architectures.checking import check_row
from hf_moebert.architectures.families import ARCHITECTURES, find_architecture
from hf_moebert.architectures.paths import Architecture, AttentionPaths, FeedForwardPaths, Stack
from hf_moebert.architectures.surgery import matrix_of
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.methods.mpo.modeling_tuner import TARGETS


ATTENTION = AttentionPaths(
    readers=("attention.self.query", "attention.self.key", "attention.self.value"),
    writer="attention.output.dense",
    module="attention.self",
    head_size="attention_head_size",
)
NETWORK = FeedForwardPaths(up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense")
STACK = Stack("encoder.layer", (ATTENTION,), (NETWORK,))
ROFORMER = Architecture(stacks=(STACK,), units=("neurons", "heads"))
DECODER = ARCHITECTURES["llama"].stacks[0]


def build(family="roformer", auto=AutoModel, **fields):
    torch.manual_seed(0)
    sizes = GROUPED if family == "olmo2" else SIZES | TEXT | {"embedding_size": 32}
    model = auto.from_config(AutoConfig.for_model(family, **sizes | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "embed_positions" not in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


@pytest.fixture
def forget():
    """Forget what a test has registered."""
    before = set(ARCHITECTURES)
    yield
    for family in set(ARCHITECTURES) - before:
        registration.forget_architecture(family)


def test_every_copy_of_the_table_gets_the_row():
    copies = {path.removesuffix(".py").replace("/", ".") for path in COPIES["hf_moebert/architectures/families.py"]}
    tables = [__import__(name, fromlist=["ARCHITECTURES"]).ARCHITECTURES for name in copies] + [ARCHITECTURES]
    assert {id(table) for table in tables} == {id(rows) for rows in registration.ROWS}


@pytest.mark.parametrize("given", [True, False])
def test_a_registered_family_has_every_method(tmp_path, forget, given):
    model = build()
    with pytest.raises(ValueError, match="'roformer' .its layers are built like 'bert'.*describe its family by"):
        find_architecture(model)
    register_architecture("roformer", ROFORMER, model if given else None)
    register_architecture("roformer", ROFORMER)  # again, as in a notebook
    with pytest.raises(ValueError, match="`model_type` must be of a family that is not known yet, got 'roformer'"):
        register_architecture("roformer", replace(ROFORMER, units=()))
    assert TARGETS["roformer"] == ["intermediate.dense", "key", "output.dense", "query", "value"]
    with torch.no_grad():
        for group in find_unit_groups(model):
            matrix_of(group.writer).unflatten(1, (group.num_units, -1))[:, :2] = 0
    shrunk = shrink(model)
    torch.testing.assert_close(run(shrunk), run(model), atol=1e-4, rtol=1e-4)
    shrunk.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert torch.equal(run(AutoModel.from_pretrained(tmp_path)), run(shrunk))
    classifier = build(auto=AutoModelForSequenceClassification, num_labels=3)
    examples = [{"input_ids": row, "labels": torch.tensor(1)} for row in make_inputs(classifier)["input_ids"]]
    assert measure_importance(classifier, examples).gt(0).all()


ROW = """
from hf_moebert.architectures.families import ARCHITECTURES
from dataclasses import replace
row = replace(ARCHITECTURES["bert"], bert_like="")
"""
LOAD = """
import json, sys, torch, transformers, hf_moebert
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1])
except Exception as error:
    print()  # the question of transformers whether to trust is on this line
    print(json.dumps(str(error)))
"""
REGISTER = """
hf_moebert.register_architecture("roformer", row)
print(AutoModel.from_pretrained(sys.argv[1])(torch.tensor(json.loads(sys.argv[2])))[0].tolist())
"""


@pytest.mark.process
def test_another_process_registers_the_row_first(tmp_path, forget):
    register_architecture("roformer", ROFORMER)
    shrunk = shrink(build())
    shrunk.save_pretrained(tmp_path)
    ids = make_inputs(shrunk)["input_ids"]
    refusal, answer = new_process.run(LOAD + ROW + REGISTER, tmp_path, json.dumps(ids.tolist())).stdout.splitlines()[
        -2:
    ]
    assert "`pip install hf_moebert`, then `hf_moebert.register_architecture('roformer', ...)`" in json.loads(refusal)
    torch.testing.assert_close(torch.tensor(json.loads(answer)), run(shrunk), atol=1e-5, rtol=1e-5)


def change(row=ROFORMER, **fields):
    """The row with other parts of its stack, by name."""
    stack, attention, network = row.stacks[0], row.stacks[0].attentions[0], row.stacks[0].feed_forwards[0]
    attention = replace(attention, **{k: v for k, v in fields.items() if k in vars(attention)})
    network = replace(network, **{k: v for k, v in fields.items() if k in vars(network)})
    stack = replace(stack, path=fields.get("path", stack.path), attentions=(attention,), feed_forwards=(network,))
    return replace(row, stacks=(stack,), **{k: v for k, v in fields.items() if k in vars(row)})


ROWS = "must have as many rows|must be the number of heads"
ON_META = [
    (change(path="encoder.layers"), r"keep its layers in \['encoder.layers'\], but RoFormerModel does not"),
    (change(up="intermediate.fc1"), "`intermediate.fc1` of RoFormerLayer must be a plain .*, got nothing"),
    (change(up="output.LayerNorm"), "`output.LayerNorm` of RoFormerLayer must be a plain .*, got .*LayerNorm"),
    (change(down="attention.output.dense"), r"`intermediate.dense` of .* must be of the size \(\d+, \d+\) .*, got"),
    (change(activation="intermediate.act"), "`intermediate.act` of RoFormerLayer must be the activation, got None"),
    (change(writer="output.dense"), ROWS),
    (change(readers=("intermediate.dense", "attention.self.key")), ROWS),
    (change(readers=("output.dense",)), r"`output.dense` of RoFormerLayer must have \d+ features \(in\), got"),
    (change(head_size="head_dim"), "`attention.self` .* must keep the size of a head in `head_dim`, got None"),
    (change(heads="hidden_size"), "`hidden_size` of the configuration must be the number of heads, got"),
    (change(neurons="vocab_size"), "`vocab_size` of the configuration must be the number of neurons, got"),
    (change(units=("rows",)), r"`units` must be of \['heads', 'neurons'\], got"),
]


@pytest.mark.parametrize("number", range(len(ON_META)))
@pytest.mark.parametrize("given", [True, False])
def test_wrong_rows_are_refused(number, given):
    row, message = ON_META[number]
    known = set(ARCHITECTURES)
    with pytest.raises(ValueError, match=rf"(?s)The row of 'roformer' does not fit a RoFormerModel: .*({message})"):
        register_architecture("roformer", row, build() if given else None)
    assert all(set(rows) == known for rows in registration.ROWS)


def test_what_parts_compute_is_checked_on_a_model_in_memory(forget):
    exchanged = replace(change(ARCHITECTURES["llama"], gate="up_proj", up="gate_proj"))
    swapped = FeedForwardPaths(gate="mlp.up_proj", up="mlp.gate_proj", activation="mlp.act_fn", down="mlp.down_proj")
    exchanged = replace(exchanged, stacks=(replace(DECODER, feed_forwards=(swapped,)),))
    olmo = build("olmo2")
    with pytest.raises(ValueError, match="`mlp` of Olmo2DecoderLayer must compute what its parts in the row do"):
        register_architecture("olmo2", replace(exchanged, units=("neurons",)), olmo)
    with pytest.raises(ValueError, match="`units` must be independent of each other"):  # all queries are normalised
        register_architecture("olmo2", ARCHITECTURES["llama"], olmo)
    register_architecture("olmo2", replace(ARCHITECTURES["llama"], units=("neurons",)), olmo)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="`row` must be an `Architecture` .*, got dict"):
        register_architecture("roformer", {})
    with pytest.raises(ValueError, match="`model` must be of the family 'olmo2', got 'roformer'"):
        register_architecture("olmo2", ROFORMER, build())
    with pytest.raises(ValueError, match="not known yet, got 'bert'"):
        register_architecture("bert", ROFORMER)
    assert hf_moebert.register_architecture is register_architecture


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_our_own_rows_pass(family):
    check_row(make_model(family))


def test_the_readme_says_what_works_for_which_family():
    text = family_table.README.read_text()
    assert family_table.table() in text
    assert family_table.with_table(text) == text, "run `python tests/family_table.py`"
    assert {name for cells in family_table.rows() for name in cells[0].split(", ")} == set(ARCHITECTURES)


def test_the_readme_describes_a_family_that_is_not_shipped(tmp_path, forget):
    (example,) = re.findall(r"```python\n(.*?)```", family_table.README.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    assert runpy.run_path(str(tmp_path / "example.py"))["row"] == ROFORMER
    check_row(build())
