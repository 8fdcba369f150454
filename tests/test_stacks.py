"""Methods that stack: every pair does what the table says, and what does not belong together is not loaded."""

import copy
import json

import pytest
from peft import LoraConfig, get_peft_model
from stack_table import README, outcome, read_table
from stacks import DATA, STAGES, is_made_by, make_dense, prune
from transformers import AutoModelForTokenClassification

from hf_moebert import (
    compress_mpo,
    measure_importance,
    prune_structured,
    revert_optimizations,
    save_packed,
    shrink,
    to_dense,
)
from hf_moebert.methods import masked_crf, mixture_of_masks


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
TABLE = read_table(README.read_text())


@pytest.fixture(scope="module")
def models():
    dense = make_dense()
    return {name: make(dense) for name, make in STAGES.items()}


# The table


def test_the_table_has_every_pair():
    assert list(TABLE) == [(first, second) for first in STAGES for second in STAGES]


@pytest.mark.parametrize(("first", "second"), TABLE)
def test_a_pair_does_what_the_table_says(models, first, second):
    assert outcome(models, first, second) == TABLE[first, second]


@pytest.mark.parametrize(
    "door",
    [
        compress_mpo,
        masked_crf.from_dense,
        mixture_of_masks.from_dense,
        shrink,
        lambda model: measure_importance(model, DATA),
        lambda model: prune_structured(model, DATA, keep_ratio=0.5),
        lambda model: save_packed(model, "packed"),
    ],
)
def test_an_adapter_is_merged_first(door):
    adapted = get_peft_model(make_dense(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="[Mm]erge (the|an) adapter by `merge_and_unload`"):
        door(adapted)


ORDERS = {
    "one width, then tasks": (lambda models: shrink(prune(models["LoRA"], "structured"), uniform=True), "tasks"),
    "dense again, then units": (lambda models: to_dense(models["MPO"]), "units"),
    "dense again, then LoRA": (lambda models: to_dense(models["MPO"]), "LoRA"),
    "one task of many, then packed": (lambda models: models["tasks"].extract_task("names"), "packed"),
    "one task of many, then MPO": (lambda models: models["tasks"].extract_task("names"), "MPO"),
    "reverted, then MPO": (lambda models: revert_optimizations(copy.deepcopy(models["int8"])), "MPO"),
    "float32, then int8": (lambda models: copy.deepcopy(models["bfloat16"]).float(), "int8"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_that_a_message_names_works(models, order):
    prepare, stage = ORDERS[order]
    assert is_made_by(stage, STAGES[stage](prepare(models)))


# Folders of another release, or whose configuration is not that of their weights

FOLDERS = {
    "units": ("units",),
    "units, packed": ("units", "packed"),
    "units, CRF": ("units", "CRF"),
    "units, MPO": ("units", "MPO"),
    "units, experts": ("units", "experts"),
    "masks": ("masks",),
}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("stacks")
    for name, (first, *then) in FOLDERS.items():
        model = models[first]
        if then == ["packed"]:
            save_packed(model, root / name)
            continue
        for stage in then:
            model = STAGES[stage](model)
        model.save_pretrained(root / name)
    return root


def test_a_crf_on_another_method_names_the_package_that_loads_it(folders):
    """The code that is saved beside it is that of the CRF alone."""
    config = json.loads((folders / "units, CRF" / "config.json").read_text())
    assert "pip install hf_moebert" in config["auto_map"]["AutoConfig"]


def set_width(fields, share):
    """Give a layer this share of its heads, or of its neurons where only these are counted."""
    layer = fields["per_layer_config"]["1"]
    name = "num_attention_heads" if "num_attention_heads" in layer else "intermediate_size"
    layer[name] = max(int(share * fields[name]), 1)


def set_all(fields, **more):
    for layer in fields["per_layer_config"].values():
        layer |= more


SIZE = "size|saved shape|must hold all weights"
FAULTS = {
    "another width": (lambda fields: set_width(fields, 0.1), SIZE),
    "no widths": (lambda fields: fields.pop("per_layer_config"), SIZE),
    "a width above the dense one": (lambda fields: set_width(fields, 2), rf"must be in \[1, 4\]|{SIZE}"),
    "a field of layers of another release": (lambda fields: set_all(fields, colour=1), "name only .* got 'colour'"),
    "a field of another release": (lambda fields: fields.update(colour=1), "`colour` is no field of"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_stack_whose_configuration_does_not_fit_is_refused(folders, name, fault):
    change, message = FAULTS[fault]
    file = folders / name / "config.json"
    before = file.read_text()
    config = json.loads(before)
    change(config.get("tagger", config))
    file.write_text(json.dumps(config))
    try:
        with pytest.raises((ValueError, RuntimeError), match=message):
            AutoModelForTokenClassification.from_pretrained(folders / name)
    finally:
        file.write_text(before)
