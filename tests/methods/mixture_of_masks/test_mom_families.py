"""Masks on every family of the table whose networks take them: identity, fixed masks, the smaller model, reload."""

import json

import new_process
import pytest
import torch
import transformers
from tiny_families import CONFIGS, WIDTHS, make_inputs, make_model
from tiny_masks import scatter_masks

from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.methods.mixture_of_masks import from_dense, shrink
from hf_moebert.methods.mixture_of_masks.configuration_mixture_of_masks import why_not_masked
from hf_moebert.methods.mixture_of_masks.modeling_mixture_of_masks import classes_to_mask


FAMILIES = [family for family in ARCHITECTURES if not why_not_masked(family)]
HEADS = [
    (family, auto)
    for family in FAMILIES
    for auto in classes_to_mask(type(transformers.AutoConfig.for_model(family, **CONFIGS[family])))
]
FIRST = dict(reversed(HEADS))  # one head of each family
BY_FAMILY = {family: [auto for name, auto in HEADS if name == family] for family in FAMILIES}
SAVED = [  # every head of one family, and one of each of the others, in turns
    (family, auto)
    for place, (family, autos) in enumerate(BY_FAMILY.items())
    for auto in (autos if family == "bert" else [autos[place % len(autos)]])
]


def build(family, auto):
    return make_model(family, auto=getattr(transformers, auto))


def inputs_of(model):
    inputs = make_inputs(model, 3)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 5:] = 0
        inputs["input_ids"][1, 5:] = model.config.pad_token_id
    many = type(model).__name__.endswith("MultipleChoice")
    return {name: x[None] for name, x in inputs.items()} if many else inputs


@torch.no_grad()
def answer(model):
    return model.eval()(**inputs_of(model))[0]


@pytest.mark.parametrize(("family", "auto"), HEADS)
def test_every_head_takes_masks_and_loses_them(family, auto):
    dense = build(family, auto)
    masked = from_dense(dense, num_experts=2)
    torch.testing.assert_close(answer(masked), answer(dense), atol=1e-5, rtol=1e-5)
    assert [len(x) for x in masked.count_units().values()] == [3, 3]
    fixed = scatter_masks(masked).fix_masks(0.5)
    wanted, small = answer(fixed), shrink(fixed)
    torch.testing.assert_close(answer(small), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "auto"), SAVED)
def test_every_family_is_saved_and_loaded(tmp_path, family, auto):
    small = shrink(scatter_masks(from_dense(build(family, auto), num_experts=2)).fix_masks(0.5))
    small.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(small)
    assert torch.equal(answer(loaded), answer(small))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_mask_prunes_units(family):
    fixed = scatter_masks(from_dense(build(family, FIRST[family]), num_experts=1)).fix_masks(0.5)
    small = shrink(fixed)
    torch.testing.assert_close(answer(small), answer(fixed), atol=1e-4, rtol=1e-4)
    assert sum(width for width, _ in map(small.config.block_sizes, small.config.blocks)) == WIDTHS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training_moves_masks_and_balances_real_tokens(family):
    model = from_dense(build(family, FIRST[family]), num_experts=2).train()
    model.draw_noise(0)
    inputs = inputs_of(model)
    labels = inputs["input_ids"] if "CausalLM" in FIRST[family] else torch.zeros(3, dtype=torch.long)
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    assert outputs.aux_loss.isfinite()
    real = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 3 * 5
    networks = model.masked_networks().values()
    assert sum(network.masks.learned.grad.abs().sum() for network in networks) > 0
    for network in networks:
        assert network.load.sum() == real or network.load.sum() == 3 * 6  # a DeiT has two tokens before its patches


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - set(FAMILIES) - {"t5"}))
def test_families_that_take_no_masks_say_why(family):
    reason = why_not_masked(family)
    with pytest.raises(ValueError, match=f"take masks, got '{family}', of which they do not, because {reason}"):
        from_dense(make_model(family))


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
DISTINCT = ("deberta-v2", "dinov2", "distilbert", "modernbert", "mpnet", "opt", "qwen3")


@pytest.mark.process
def test_another_process_loads_them_without_the_package(tmp_path):
    wanted = {}
    for family in DISTINCT:
        fixed = scatter_masks(from_dense(build(family, FIRST[family]), num_experts=2)).fix_masks(0.5)
        small, folder = shrink(fixed), tmp_path / "models" / family
        small.save_pretrained(folder)
        inputs = {name: x.tolist() for name, x in inputs_of(small).items()} | {"auto": FIRST[family]}
        (folder / "inputs.json").write_text(json.dumps(inputs))
        wanted[family] = answer(small)
    found = json.loads(new_process.run(STRANGER, tmp_path / "models").stdout.splitlines()[-1])
    assert found.keys() == wanted.keys()
    for family, value in found.items():
        torch.testing.assert_close(torch.tensor(value), wanted[family], atol=1e-5, rtol=1e-5)
