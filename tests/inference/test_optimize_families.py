"""`optimize_for_inference`, `measure_footprint` and MPO take every family of the table, dense and shrunk."""

import pytest
import torch
from peft import get_peft_model
from tiny_families import CONFIGS, IMAGES, make_inputs, make_model

from hf_moebert import MPOConfig, compress_mpo, optimize_for_inference, revert_optimizations, shrink
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.surgery import find_feed_forwards, matrix_of
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.measuring.footprint import measure_footprint


@torch.no_grad()
def answer(model):
    inputs = make_inputs(model)
    if "input_ids" in inputs and not model.config.is_encoder_decoder:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 5:] = 0
    states = model(**inputs)[0]
    return states[:, :5] if "attention_mask" in inputs else states


@torch.no_grad()
def build_shrunk(family):
    model = make_model(family)
    for group in find_unit_groups(model):
        matrix_of(group.writer).unflatten(1, (group.num_units, -1))[:, :1] = 0
    return shrink(model)


@pytest.mark.parametrize("kind", ["dense", "shrunk"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_outputs_stay(family, kind):
    if kind == "shrunk" and not ARCHITECTURES[family].units:
        pytest.skip("nothing can be removed from it")
    model = make_model(family) if kind == "dense" else build_shrunk(family)
    wanted = answer(model)
    optimize_for_inference(model)
    torch.testing.assert_close(answer(model), wanted, atol=1e-4, rtol=1e-4)
    revert_optimizations(model)
    assert torch.equal(answer(model), wanted)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_footprint_counts_what_is_left(family):
    model = make_model(family)
    dense = measure_footprint(model, seq_len=8)
    assert dense.total == dense.active == model.num_parameters()
    assert (dense.flops_per_token is None) == (family in IMAGES or model.config.is_encoder_decoder)
    if ARCHITECTURES[family].units:
        small = measure_footprint(build_shrunk(family), seq_len=8)
        assert small.total < dense.total
        assert dense.flops_per_token is None or small.flops_per_token < dense.flops_per_token


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_chains_and_their_adapters_start_as_the_model(family):
    model = make_model(family)
    wanted, paths = answer(model), {path for network in find_feed_forwards(model) for path in network.matrix_paths}
    adapted = get_peft_model(make_model(family), MPOConfig())
    torch.testing.assert_close(answer(adapted), wanted, atol=1e-3, rtol=1e-3)
    chains = {name.removeprefix("base_model.model.") for name in adapted.targeted_module_names}
    assert paths <= chains
    torch.testing.assert_close(answer(compress_mpo(model, num_cores=3)), wanted, atol=1e-3, rtol=1e-3)
