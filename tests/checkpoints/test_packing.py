"""Packed checkpoints: every bit comes back, for every architecture, and damage is named."""

import json

import new_process
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from pruned_models import SIZES, make_bert, make_gpt2, make_mixtral, make_moebert
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_moebert.checkpoints.forms import allow
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.packing import BitmaskConfig, pack, pack_folder, packed_bytes, save_packed, unpack


DTYPES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
MODELS = {
    "bert": (make_bert, AutoModelForSequenceClassification),
    "moebert": (make_moebert, AutoModelForSequenceClassification),
    "gpt2": (make_gpt2, AutoModelForCausalLM),  # tied embeddings
    "mixtral": (make_mixtral, AutoModelForCausalLM),  # transformers splits its stacked experts when it saves
}


def assert_equal_bits(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def weights_size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture
def packed(tmp_path):
    """A packed BERT in a folder."""
    save_packed(make_bert(), tmp_path / "packed")
    return tmp_path / "packed"


# Identity


def test_a_model_without_zeros_is_saved_as_it_is(tmp_path):
    model = make_bert()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(-0.0)  # a value: its sign bit is set
    save_packed(model, tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense")
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "dense")]
    assert stored[0] == stored[1]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_unpack_gives_every_bit_back(data):
    shape = data.draw(st.lists(st.integers(1, 19), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    kept = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    tensor = torch.randn(shape, generator=generator).to(dtype)
    special = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).tiny], dtype=dtype)
    drawn = special[torch.randint(len(special), shape, generator=generator)]
    tensor = torch.where(torch.rand(shape, generator=generator) < 0.3, drawn, tensor)
    tensor = torch.where(torch.rand(shape, generator=generator) < kept, tensor, torch.zeros((), dtype=dtype))
    values, bitmask = pack(tensor)
    back = unpack(values, bitmask, shape[-1])
    assert back.shape == tensor.shape
    assert torch.equal(back.view(DTYPES[dtype]), tensor.view(DTYPES[dtype]))
    assert values.count_nonzero() <= values.numel() == tensor.view(DTYPES[dtype]).count_nonzero()


# Oracle


def test_bits_are_numpys():
    tensor = torch.randn(3, 5, 21) * (torch.rand(3, 5, 21) < 0.4)
    tensor[tensor == 0] = 0.0  # a product may be -0.0
    values, bitmask = pack(tensor)
    expected = np.packbits(tensor.numpy() != 0, axis=-1, bitorder="little")
    assert torch.equal(bitmask, torch.from_numpy(expected))
    assert torch.equal(values, tensor[tensor != 0])


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    make, auto = MODELS[name]
    model = make()
    save_packed(model, tmp_path / "packed")
    loaded = auto.from_pretrained(tmp_path / "packed")
    assert type(loaded) is type(model)
    assert_equal_bits(loaded, model)
    assert not loaded.is_quantized
    model.save_pretrained(tmp_path / "dense")
    loaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "dense").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert weights_size(tmp_path / "packed") < 0.2 * weights_size(tmp_path / "dense")  # mostly headers when so small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = make_bert().to(dtype)
    save_packed(model, tmp_path)
    assert_equal_bits(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)


def test_dtype_and_device_map_mean_what_they_always_mean(packed):
    load = AutoModelForSequenceClassification.from_pretrained
    assert_equal_bits(load(packed, dtype=torch.bfloat16), make_bert().bfloat16())
    assert_equal_bits(load(packed, device_map="cpu"), make_bert())
    assert_equal_bits(load(packed).to("cpu", torch.float64), make_bert().double())


def test_offloading_to_disk_unpacks_too(packed, tmp_path):
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    model = AutoModelForSequenceClassification.from_pretrained(
        packed, device_map=places, offload_folder=tmp_path / "offload"
    )
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make_bert()(ids).logits)


def test_the_bare_model_loads_from_a_heads_checkpoint_and_back(packed, tmp_path):
    model = make_bert()
    bare = AutoModel.from_pretrained(packed)
    assert_equal_bits(bare, model.bert)
    save_packed(bare, tmp_path / "bare")
    with pytest.raises(ValueError, match="must hold all weights .* not so for classifier.bias, classifier.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    with allow("missing"):
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    assert_equal_bits(classifier.bert, model.bert)


def test_a_large_model_is_sharded(tmp_path):
    save_packed(make_bert(), tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert_equal_bits(AutoModelForSequenceClassification.from_pretrained(tmp_path), make_bert())


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = make_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_packed(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


# Round trip in a new process


LOAD = """
from transformers import AutoModel, AutoModelForSequenceClassification
try:
    AutoModel.from_pretrained("bert/packed")
except ValueError as error:
    assert "pip install hf_moebert" in str(error), error
else:
    raise AssertionError("transformers alone took a packed checkpoint")
import hf_moebert, torch
for name in ("bert", "moebert"):
    load = AutoModelForSequenceClassification.from_pretrained
    packed, dense = (load(f"{name}/{form}").state_dict() for form in ("packed", "dense"))
    assert packed.keys() == dense.keys() and all(torch.equal(packed[key], dense[key]) for key in dense)
"""


@pytest.mark.process
def test_a_new_process_loads_it_after_the_import_and_refuses_it_before(tmp_path):
    for name in ("bert", "moebert"):
        save_packed(MODELS[name][0](), tmp_path / name / "packed")
        MODELS[name][0]().save_pretrained(tmp_path / name / "dense")
    new_process.run(LOAD, cwd=tmp_path)


# Size


def test_ninety_percent_of_zeros_take_at_most_fourteen_percent_of_the_bytes(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(768, 768)
    weight[torch.rand(768, 768) > 0.1] = 0
    assert packed_bytes(weight) <= 0.14 * weight.nbytes
    values, bitmask = pack(weight)
    save_file({"weight": values, "weight.bitmask": bitmask}, tmp_path / "packed.safetensors")
    assert weights_size(tmp_path) <= 0.14 * weight.nbytes
    assert weights_size(tmp_path) - 64 <= packed_bytes(weight)  # the whole header beside the second entry


def test_what_would_grow_is_left_alone(tmp_path):
    model = make_bert()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.randn(2, 64)).view(-1)[:3] = 0
    save_packed(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "classifier.weight.bitmask" not in names
    assert f"{QUERY}.bitmask" in names


# Refusals


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    forget_hashes(folder)


def forget_hashes(folder):
    """Make it a checkpoint of 0.1.0."""
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {})["files"] = None
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(QUERY), "must hold the values of .*bitmask', but is missing"),
        (lambda t: t.pop(QUERY + ".bitmask"), "must have a bitmask .*, which is missing"),
        (lambda t: t.update({QUERY: t[QUERY][1:]}), "must have as many values as its bitmask has ones, got"),
        (lambda t: t[QUERY + ".bitmask"].zero_(), "has ones, got .* for 0"),
        (lambda t: t.update({QUERY + ".bitmask": t[QUERY + ".bitmask"][1:]}), r"got U8 of shape \[63, 8\]"),
        (lambda t: t.update({QUERY + ".bitmask": t[QUERY + ".bitmask"].flatten()}), r"got U8 of shape \[512\]"),
        (
            lambda t: t.update({QUERY + ".bitmask": t[QUERY + ".bitmask"].int()}),
            "a bitmask of U8 .* got I32",
        ),
        (lambda t: t.update({QUERY: t[QUERY].int()}), "must be a list of floating point values, got I32"),
        (lambda t: t.update({QUERY: t[QUERY].unsqueeze(0)}), r"floating point values, got F32 of shape \[1, "),
    ],
)
def test_damage_is_named(packed, edit, message):
    change(packed, edit)
    with pytest.raises(ValueError, match=f"'{QUERY}' of the packed checkpoint .*{message}"):
        AutoModelForSequenceClassification.from_pretrained(packed)


@pytest.mark.parametrize("left", [4, 200, -1])
def test_a_truncated_file_is_named(packed, left):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"packed' must hold the weights .* model.safetensors has the SHA-256"):
        AutoModel.from_pretrained(packed)
    forget_hashes(packed)
    with pytest.raises(ValueError, match=r"must be of complete safetensors files, got '.*model.safetensors'"):
        AutoModel.from_pretrained(packed)


def test_pickles_are_not_read(packed):
    torch.save(load_file(packed / "model.safetensors"), packed / "pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    forget_hashes(packed)
    with pytest.raises(ValueError, match=r"must be of safetensors files, got \['.*pytorch_model.bin'\]"):
        AutoModel.from_pretrained(packed)


def test_a_model_of_other_sizes_is_refused(packed):
    with pytest.raises(ValueError, match=r"'classifier.weight'.*to become \[3, 64\].*save it dense first"):
        AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3, ignore_mismatched_sizes=True)


def test_a_newer_format_is_refused(packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = "2"
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`format_version` .* got '2'. Update hf_moebert"):
        AutoModel.from_pretrained(packed)


def test_a_dense_checkpoint_is_not_packed_by_loading(tmp_path):
    make_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModel.from_pretrained(tmp_path, quantization_config=BitmaskConfig())


def test_unpack_counts(packed):
    with pytest.raises(ValueError, match="`bitmask` must have one bit for each of the 2 values, got 3"):
        unpack(torch.ones(2), torch.tensor([7], dtype=torch.uint8), 8)


def test_weights_that_are_elsewhere_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**SIZES))
    with pytest.raises(ValueError, match="BertForSequenceClassification has weights on the meta device"):
        save_packed(model, tmp_path)


# Folders


def test_a_packed_copy_has_what_lies_beside_the_weights(tmp_path):
    source, output = tmp_path / "dense", tmp_path / "packed"
    make_bert().save_pretrained(source)
    (source / "vocab.txt").write_text("word\n")
    (source / "training_args.bin").write_bytes(b"")
    pack_folder(source, output)
    assert {file.name for file in output.iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}
    assert_equal_bits(load_model(output), load_model(source))
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        pack_folder(source, output)


def test_load_model_refuses_what_it_cannot_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="`folder` must hold config.json"):
        load_model(tmp_path)
    make_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(ValueError, match="`architectures` .* got 'Nothing'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    change(tmp_path, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(ValueError, match=f"must hold all weights of .* not so for {QUERY}"):
        load_model(tmp_path)


# Training


def test_a_loaded_model_trains_with_the_stock_trainer(packed, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    before = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    rows = {"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]] * 4, "labels": [0, 1] * 4}
    args = TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    Trainer(model, args, train_dataset=Dataset.from_dict(rows)).train()
    assert not torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, before)
    assert "quantization_config" not in json.loads((tmp_path / "run/checkpoint-2/config.json").read_text())
    model.save_pretrained(tmp_path / "trained")
    assert_equal_bits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained"), model)
    assert not [name for name in load_file(tmp_path / "trained/model.safetensors") if name.endswith(".bitmask")]


def test_a_compiled_model_is_saved_by_its_own_names(tmp_path):
    model = make_bert()
    save_packed(torch.compile(model, backend="eager"), tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by peft
def test_an_adapter_is_refused(tmp_path):
    model = get_peft_model(make_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="is one with an adapter of PEFT. Merge the adapter"):
        save_packed(model, tmp_path)
