"""No checkpoint loads as something else: every class and every form, damaged in every way that loading could miss."""

import json
import os
import resource
import runpy
import shutil
import time
from contextlib import suppress
from pathlib import Path

import new_process
import pytest
import torch
from golden.read import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from hf_moebert import MoEBertConfig
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.methods.masked_crf import BertCrfForTokenClassification


GOLDEN = Path(__file__).parents[1] / "golden/0.1.0"
OTHERS = ("crf-decoder", "importance", "masks-run", "multitask-states", "pruning", "pruning-movement", "squeezing")


def type_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text())["model_type"]


MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json") if path.parent.name not in OTHERS)
WHOLE = [name for name in MODELS if name != "multitask"]  # which has a file for each task, and tests of its own
FORMS = [name for name in WHOLE if name.startswith(("mpo", "packed")) and not name.startswith("mpoe")]
KINDS = {type_of(name): name for name in MODELS if name not in FORMS}


@pytest.fixture
def folder(request, tmp_path):
    """A copy of a golden checkpoint, with a blank and an umlaut in its path."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "möbel 1"))


def edit(folder, change):
    """Rewrite the weights with their metadata."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def dense_name(tensors):
    """The name of a tensor that is stored as it is, of two dimensions if there is one."""
    names = [name for name, x in tensors.items() if x.is_floating_point() and f"{name}.bitmask" not in tensors]
    return max(names, key=lambda name: (tensors[name].dim() == 2, name))


def refuse(folder, message):
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
@pytest.mark.parametrize("place", [0, 1])
def test_nothing_may_be_missing(folder, place):
    lost = []

    def remove(tensors):
        names = sorted(tensors)
        lost.append(names[int(place * (len(names) - 1))])
        del tensors[lost[0]]

    edit(folder, remove)
    refuse(folder, f"must .*{lost[0].removesuffix('.bitmask')}")


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
def test_nothing_may_be_unknown(folder):
    edit(folder, lambda tensors: tensors.update({"encoder.extra": torch.ones(2)}))
    refuse(folder, "must hold no weights but those of .* not so for .*encoder.extra")
    assert load_model(folder, allow_unexpected=True)


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_nothing_is_cast(folder, dtype, request):
    def cast(tensors):
        name = dense_name(tensors)
        tensors[name] = tensors[name].to(dtype)

    edit(folder, cast)
    if dtype == torch.float64 and request.node.callspec.params["folder"] in FORMS:
        pytest.skip("Whether a dtype was asked for is not known to a quantizer.")
    refuse(folder, "must hold the dtypes of .*They would be cast")


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
def test_every_number_is_finite(folder, request):
    value = float("nan" if WHOLE.index(request.node.callspec.params["folder"]) % 2 else "inf")
    edit(folder, lambda tensors: tensors[dense_name(tensors)].flatten()[:1].fill_(value))
    refuse(folder, "must hold finite weights")
    assert load_model(folder, allow_nonfinite=True)


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_pickles_are_not_read(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match=r"safetensors") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
def test_an_index_names_files_beside_it(folder, request):
    relative = WHOLE.index(request.node.callspec.params["folder"]) % 2
    name = "../model.safetensors" if relative else f"{folder.parent}/model.safetensors"
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must (name safetensors files beside it|lie in its folder)"):
        load(folder)


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
def test_a_link_does_not_lead_out_of_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    os.symlink(folder.parent / "elsewhere.safetensors", folder / "model.safetensors")
    refuse(folder, "must lie in its folder, but leads to .*elsewhere")


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
@pytest.mark.parametrize("size", [7, -1])
def test_a_file_that_was_cut_short_is_named(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuse(folder, "must be of complete safetensors files, got .*model.safetensors")


@pytest.mark.parametrize("folder", ["moebert-hash-random"], indirect=True)
def test_the_arguments_let_pass_what_they_name(folder):
    def change(tensors):
        tensors["extra"] = torch.ones(1)
        tensors["classifier.bias"] = tensors["classifier.bias"].double()
        tensors["classifier.weight"].fill_(torch.nan)
        del tensors["bert.pooler.dense.bias"]

    edit(folder, change)
    options = {"allow_missing": True, "allow_unexpected": True, "allow_cast": True, "allow_nonfinite": True}
    for option in options:
        with pytest.raises(ValueError, match=option):
            load_model(folder, **options | {option: False})
    assert load_model(folder, **options)
    with pytest.raises(ValueError, match=r"`options` must be among allow_missing, .* got \['allow_all'\]"):
        load_model(folder, allow_all=True)


@pytest.mark.parametrize("folder", ["moebert-hash-random", "packed"], indirect=True)
def test_the_body_of_a_model_with_a_head_loads_alone(folder):
    body = AutoModel.from_pretrained(folder).state_dict()
    whole = load(folder).base_model.state_dict()
    assert all(torch.equal(x, whole[name]) for name, x in body.items())


@pytest.mark.parametrize("folder", ["mpo"], indirect=True)
def test_fingerprints_find_one_flipped_bit(folder):
    model = load(folder)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in range(len(content) - 1, len(content) - 400, -37):
        content[place] ^= 1
        file.write_bytes(content)
        refuse(folder, "must hold .* as it was saved: it is damaged")
        content[place] ^= 1
    file.write_bytes(content)
    assert load(folder)


def test_a_crf_is_not_opened_by_the_class_of_another(tmp_path):
    with pytest.raises(ValueError, match=r"`model_type` of a BertCrfConfig must be 'bert_crf', got 'crf'"):
        BertCrfForTokenClassification.from_pretrained(GOLDEN / "crf-distilbert")


# Without this package


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of this release, one of each model type and form."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(GOLDEN.parent)
        write = runpy.run_path(str(GOLDEN.parent / "write.py"))["FORMS"]
    for name in {*KINDS.values(), "mpo", "packed", "packed-shrunk"}:
        write[name](folder / name)
    return folder


WITHOUT = """
import sys
from pathlib import Path
from transformers import AutoConfig, AutoModel, BertForSequenceClassification, BertModel
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for load in (AutoModel.from_pretrained, BertModel.from_pretrained, BertForSequenceClassification.from_pretrained):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            try:
                load(folder, trust_remote_code=False, **options)
            except Exception as error:
                text = str(error)
                assert "hf_moebert" in text or "trust_remote_code=True" in text, (folder, text)
            else:
                raise AssertionError(f"{load} took {folder}")
assert "hf_moebert" not in sys.modules
"""


@pytest.mark.process
def test_without_this_package_nothing_loads_as_something_else(written):
    new_process.run(WITHOUT, written)


@pytest.mark.process
def test_with_this_package_a_stock_class_takes_no_model_of_ours(written):
    for kind in sorted(KINDS.keys() - {"multitask_bert"}):
        with pytest.raises(ValueError, match="this model is of hf_moebert: `pip install hf_moebert`"):
            BertForSequenceClassification.from_pretrained(written / KINDS[kind])


# Configurations


def test_misspelt_fields_are_refused_and_the_nearest_is_named():
    with pytest.raises(ValueError, match=r"`num_expert` is no field of MoEBertConfig. Did you mean `num_experts`\?"):
        MoEBertConfig(num_expert=8)


def with_fields(kind, folder, **fields):
    config = json.loads((GOLDEN / KINDS[kind] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return AutoConfig.from_pretrained(folder)


OURS = sorted(KINDS)


@pytest.mark.parametrize("kind", OURS)
def test_every_class_refuses_a_misspelt_field_of_its_own(kind, tmp_path):
    config = AutoConfig.from_pretrained(GOLDEN / KINDS[kind])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for field in ("pad_token_ids", "something_else"):
        (tmp_path / "config.json").write_text(json.dumps(saved | {field: 1}))
        with pytest.raises(ValueError, match=f"`{field}` is no field of {type(config).__name__}"):
            AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`something_else` is no field"):
        type(config)(something_else=1)


@pytest.mark.parametrize("kind", OURS)
def test_files_of_the_first_version_may_hold_what_their_dense_models_had(kind, tmp_path):
    legacy = {"pooler_num_attention_heads": 12, "position_embedding_type": "absolute", "finetuning_task": "sst2"}
    assert not hasattr(with_fields(kind, tmp_path, **legacy), "pooler_num_attention_heads")


def test_files_of_the_first_version_may_not_hold_a_misspelt_field_of_ours(tmp_path):
    with pytest.raises(ValueError, match="`num_expert` is no field of MoEBertConfig. Did you mean `num_experts`"):
        with_fields("moebert", tmp_path, num_expert=8)


@pytest.mark.parametrize("kind", OURS)
def test_what_is_saved_loads(kind, tmp_path):
    config = AutoConfig.from_pretrained(GOLDEN / KINDS[kind])
    config.note = "an attribute of the user's"
    config.save_pretrained(tmp_path)
    assert config.note
    again = AutoConfig.from_pretrained(tmp_path)
    places = ("_name_or_path", "auto_map", "note")
    before, after = ({k: v for k, v in c.to_dict().items() if k not in places} for c in (config, again))
    assert before == after
    assert not hasattr(again, "note")


MANY = 30_000_000
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers")
HOSTILE = {
    "depth": dict.fromkeys(DEPTHS, MANY),
    "no depth": dict.fromkeys(DEPTHS, -1),
    "a text for a depth": dict.fromkeys(DEPTHS, "many"),
    "an infinite depth": dict.fromkeys(DEPTHS, 1e300),
    "labels": {"num_labels": 10**8},
    "names of labels": {"id2label": {"a": 1}, "label2id": 3},
    "layers": {"layers": list(range(5_000))},
    "widths": {"per_layer_config": {str(i): {"intermediate_size": 1} for i in range(5_000)}},
    "a width of a layer that is not there": {"per_layer_config": {"1000000000": {"intermediate_size": 1}}},
    "experts": {"num_experts": 10**9, "num_experts_per_tok": -3, "num_cores": 10**6 + 1},
    "sizes": {"hidden_size": 10**30, "dim": 10**30, "n_embd": 10**30, "d_model": 10**30},
    "dtype": {"dtype": "os.system"},
    "tasks": {"tasks": {f"t{i}": {} for i in range(5000)}},
    "chains": {"mpoe_shapes": {"up": {"rows": [2] * 5_000, "columns": [2] * 5_000, "bonds": [1] * 4_999}}},
    "a form": {"quantization_config": "x"},
    "a tagger": {"tagger": {"model_type": "bert", "num_hidden_layers": MANY, "num_labels": 10**8}},
    "marks": {"fusion_config": [1]},
}


@pytest.mark.parametrize("kind", OURS)
def test_any_configuration_is_taken_or_refused_at_once(kind, tmp_path, subtests):
    for name, fields in HOSTILE.items():
        with subtests.test(name):
            start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with suppress(ValueError):
                with_fields(kind, tmp_path, **fields)
            assert time.process_time() - start < 1
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
