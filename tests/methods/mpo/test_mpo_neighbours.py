"""What transformers, accelerate and PEFT do to compressed models: it works, or it is refused in one sentence."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_mpo import MODELS, logits, make
from transformers import AutoModel

from hf_moebert import compress_mpo, to_dense
from hf_moebert.methods.mpo import MPOConfig


LAYERS = {"bert": "encoder", "gpt2": "h", "llama-tied": "layers"}
LINEAR = {"bert": "query", "gpt2": "c_attn", "llama-tied": "q_proj"}
FAMILIES = pytest.mark.parametrize("name", LAYERS)


# Offloading


@FAMILIES
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("offloaded", ["layers", "vocabulary"])
def test_offloaded_cores_give_the_same_outputs(name, offloaded, tmp_path):
    model = compress_mpo(make(name))
    model.save_pretrained(tmp_path / "model")
    prefix = model.base_model_prefix
    places = {f"{prefix}.{child}": "cpu" for child, _ in model.base_model.named_children()}
    places |= {child: "cpu" for child, _ in model.named_children() if child != prefix}
    tables = [place for place in places if place.endswith(("embeddings", "wte", "embed_tokens"))]
    places |= dict.fromkeys([f"{prefix}.{LAYERS[name]}"] if offloaded == "layers" else tables, "disk")
    auto, _ = MODELS[name]
    loaded = auto.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert any(core.is_meta for core in loaded.parameters())
    for _ in range(2):  # nothing that a call loads may be needed, or kept, for the next one
        assert torch.equal(logits(name, loaded), logits(name, model))
    assert any(core.is_meta for core in loaded.parameters())
    with pytest.raises(ValueError, match=r"must hold its weights in memory, some are offloaded\. Load it without"):
        to_dense(loaded)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())


# The vocabulary


@FAMILIES
def test_a_compressed_vocabulary_does_not_change_its_size(name, tmp_path):
    model = compress_mpo(make(name))
    model.save_pretrained(tmp_path)
    auto, _ = MODELS[name]
    for form in (model, copy.deepcopy(model), auto.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        before = {key: value.clone() for key, value in form.state_dict().items()}
        for options in ({"new_num_tokens": 120}, {"new_num_tokens": 7}, {"pad_to_multiple_of": 64}):
            with pytest.raises(ValueError, match=r"`new_num_tokens` must be 99 .*, got \d+\. Resize the dense model"):
                form.resize_token_embeddings(**options)
        for options in ({}, {"new_num_tokens": 99}, {"pad_to_multiple_of": 33}):
            assert form.resize_token_embeddings(**options) is form.get_input_embeddings()
        assert all(torch.equal(before[key], value) for key, value in form.state_dict().items())


@FAMILIES
@pytest.mark.parametrize("vocab_size", [10, 98, 100, 110])
def test_it_is_not_loaded_with_another_one(name, vocab_size, tmp_path):
    compress_mpo(make(name)).save_pretrained(tmp_path)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"must be of the saved shape \[99, 24\], got \[{vocab_size}, 24\]\."):
            AutoModel.from_pretrained(tmp_path, vocab_size=vocab_size, **options)


@FAMILIES
def test_a_dense_vocabulary_grows(name):
    model = make(name)
    for form in (to_dense(compress_mpo(model)), compress_mpo(model, target_modules=[LINEAR[name]])):
        assert form.resize_token_embeddings(120).weight.shape[0] == form.config.vocab_size == 120
        assert logits(name, form).isfinite().all()


# PEFT


@FAMILIES
@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
def test_methods_of_peft_for_dense_layers_refuse_chains(name, config):
    fields = {"target_modules": [LINEAR[name]]}
    if config is IA3Config:
        fields["feedforward_modules"] = []
    with pytest.raises(ValueError, match=r"^Target module MPO\w+\([\d, ]+bonds=\([\d, ]+\)\) is not supported\."):
        get_peft_model(compress_mpo(make(name)), config(**fields))


@FAMILIES
@pytest.mark.parametrize("targets", [None, "all-linear", "one"])
def test_adapters_of_auxiliary_tensors_refuse_chains(name, targets):
    message = "`target_modules` must be dense layers, got " if targets == "one" else r"but \d+ of its matrices are"
    with pytest.raises(ValueError, match=message):
        get_peft_model(
            compress_mpo(make(name)), MPOConfig(target_modules=[LINEAR[name]] if targets == "one" else targets)
        )
