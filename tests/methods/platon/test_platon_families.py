"""Every family of the table whose units can be removed shrinks, is saved and loaded, with and without the package."""

import json

import new_process
import pytest
import torch
import transformers
from tiny_families import CONFIGS, WIDTHS, make_inputs, make_model

from hf_moebert import PlatonConfig, shrink
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.surgery import matrix_of
from hf_moebert.methods.platon import configuration_shrunk, modeling_shrunk
from hf_moebert.methods.platon.configuration_shrunk import ShrunkConfig
from hf_moebert.methods.platon.modeling_shrunk import ShrunkModel, stock_classes
from hf_moebert.methods.platon.modeling_units import find_unit_groups
from hf_moebert.methods.platon.training_pruner import Pruner


FAMILIES = [family for family, row in ARCHITECTURES.items() if row.units]
GROUPED = [family for family in FAMILIES if ARCHITECTURES[family].heads == "num_key_value_heads"]
HEADS = [
    (family, auto)
    for family in FAMILIES
    for auto in stock_classes(type(transformers.AutoConfig.for_model(family, **CONFIGS[family])))
]


BY_FAMILY = {family: [auto for name, auto in HEADS if name == family] for family in FAMILIES}
SAVED = [  # every head of one family, and one of each of the others, in turns
    (family, auto)
    for place, (family, autos) in enumerate(BY_FAMILY.items())
    for auto in (autos if family == "bert" else [autos[place % len(autos)]])
]


@torch.no_grad()
def build(family, auto="AutoModel", **fields):
    """A lively model of which neurons 3 to 8 and the first head have no way out."""
    model = make_model(family, auto=getattr(transformers, auto), **fields)
    for group in find_unit_groups(model):
        units = [0] if group.kind == "heads" else [*range(3, 9)]
        matrix_of(group.writer).unflatten(1, (group.num_units, -1))[:, units] = 0
    return model


def inputs_of(model):
    inputs = make_inputs(model, 3)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 5:] = 0
        inputs["input_ids"][1, 5:] = model.config.pad_token_id
    return inputs


@torch.no_grad()
def answer(model):
    inputs = inputs_of(model)
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: x[None] for name, x in inputs.items()}
    return model(**inputs)[0]


@pytest.mark.parametrize(("family", "auto"), HEADS)
def test_every_head_shrinks(family, auto):
    masked = build(family, auto)
    wanted, shrunk = answer(masked), shrink(masked)
    widths = {"neurons": WIDTHS[family] - 6, "heads": 1 if family in GROUPED else 3}
    widths = {kind: widths[kind] for kind in ARCHITECTURES[family].units}
    assert shrunk.config.widths == [widths] * 2
    torch.testing.assert_close(answer(shrunk), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "auto"), SAVED)
def test_every_family_is_saved_and_loaded(tmp_path, family, auto):
    shrunk = shrink(build(family, auto))
    shrunk.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(shrunk)
    assert loaded.config.widths == shrunk.config.widths
    assert torch.equal(answer(loaded), answer(shrunk))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_takes_fewer_heads(family, implementation):
    dense = make_model(family)
    if not dense._supports_sdpa and implementation == "sdpa":
        pytest.skip("the family has eager attention alone")
    masked = build(family, attn_implementation=implementation)
    torch.testing.assert_close(answer(shrink(masked)), answer(masked), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", GROUPED)
def test_grouped_heads_go_together(family):
    config = shrink(build(family)).config
    layers = config.to_dict()["per_layer_config"].values()
    assert [(layer["num_key_value_heads"], layer["num_attention_heads"]) for layer in layers] == [(1, 2)] * 2


@pytest.mark.parametrize("family", [family for family, auto in HEADS if auto == "AutoModelForCausalLM"])
def test_shrunk_decoders_generate(family):
    model = build(family, "AutoModelForCausalLM")
    ids = inputs_of(model)["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(shrink(model).generate(ids, **options), model.generate(ids, **options))


STRANGER = """
import json, pathlib, sys
import torch, transformers

torch.set_grad_enabled(False)
sys.modules["hf_moebert"] = None  # importing it fails
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    given = json.loads((folder / "inputs.json").read_text())
    auto = getattr(transformers, given.pop("auto"))
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert model.__module__.startswith("transformers_modules."), model.__module__
    found[folder.name] = model(**{name: torch.tensor(value) for name, value in given.items()})[0].tolist()
print()
print(json.dumps(found))
"""
# One of each row whose parts are computed in another way
DISTINCT = (
    "deberta-v2",
    "dinov2",
    "gpt2",
    "bloom",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "qwen3",
    "jina_embeddings_v3",
)


@pytest.mark.process
def test_another_process_loads_them_without_the_package(tmp_path):
    wanted = {}
    for family in DISTINCT:
        auto = "AutoModelForSequenceClassification" if family == "qwen3" else "AutoModel"
        shrunk, folder = shrink(build(family, auto)), tmp_path / "models" / family
        shrunk.save_pretrained(folder)
        inputs = {name: x.tolist() for name, x in inputs_of(shrunk).items()} | {"auto": auto}
        (folder / "inputs.json").write_text(json.dumps(inputs))
        wanted[family] = answer(shrunk)
    found = json.loads(new_process.run(STRANGER, tmp_path / "models").stdout.splitlines()[-1])
    assert found.keys() == wanted.keys()
    for family, value in found.items():
        torch.testing.assert_close(torch.tensor(value), wanted[family], atol=1e-5, rtol=1e-5)


STRUCTURED = PlatonConfig(granularity="structured", keep_ratio=0.6, window=1, initial_warmup=0.2, final_warmup=0.4)


@pytest.mark.parametrize("family", FAMILIES)
def test_structured_pruning_prepares_what_shrinks(family):
    """A few steps of a schedule, without a Trainer: what is pruned in whole units shrinks to the share asked for."""
    heads = ("AutoModelForImageClassification", "AutoModelForMaskedLM", "AutoModelForCausalLM")
    head = getattr(transformers, next(auto for auto in heads if (family, auto) in HEADS))
    model = make_model(family, auto=head)
    pruner = Pruner(model, STRUCTURED, total_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs_of(model)).logits.square().mean().backward()
        pruner.observe()
        optimizer.step()
        pruner.advance()
    assert pruner.is_final
    shrunk = shrink(model)
    gone = model.num_parameters() - shrunk.num_parameters()
    assert abs(gone / pruner.numel - 0.4) < 0.1
    torch.testing.assert_close(answer(shrunk), answer(model), atol=1e-4, rtol=1e-3)


def test_what_shrink_could_not_narrow_is_refused_before_training():
    model = transformers.BertForNextSentencePrediction(transformers.BertConfig(**CONFIGS["bert"]))
    with pytest.raises(ValueError, match="`model` must be one of .*'BertModel'.*, got BertForNextSentencePrediction"):
        Pruner(model, STRUCTURED, total_steps=5)
    with pytest.raises(ValueError, match="got 'albert', because .* share their weights. Prune single weights"):
        Pruner(make_model("albert"), STRUCTURED, total_steps=5)


def test_names_of_other_things_are_no_classes():
    wrong = ("ShrunkAlbertModel", "ShrunkAlbertConfig", "ShrunkTrainer", "Shrunk", "BertModel", "ShrunkNothing")
    for module in (configuration_shrunk, modeling_shrunk):
        for name in wrong:
            with pytest.raises(AttributeError, match=name):
                getattr(module, name)
    assert issubclass(configuration_shrunk.ShrunkErnieConfig, ShrunkConfig)
    assert issubclass(modeling_shrunk.ShrunkErnieModel, ShrunkModel)
