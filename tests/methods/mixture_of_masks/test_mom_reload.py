"""Checkpoints of all stages: back through the Auto classes, in new processes, and without the package."""

import json
from pathlib import Path

import new_process
import pytest
import torch
from loopback_hub import loopback_hub  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_masks import KINDS, assert_near, logits_of, make_batch, make_dense, make_fixed, make_masked
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_moebert.methods import mixture_of_masks
from hf_moebert.methods.mixture_of_masks import shrink
from hf_moebert.methods.mixture_of_masks.modeling_mixture_of_masks import MoMLlamaForCausalLM


STAGES = {
    "learned": make_masked,
    "fixed": make_fixed,
    "compact": lambda *args, **options: shrink(make_fixed(*args, **options)),
    "narrow": lambda kind: shrink(make_fixed(kind, num_experts=1)),
}
FOLDER = Path(mixture_of_masks.__file__).parent
CODE = {path.name for role in ("configuration", "functional", "modeling") for path in FOLDER.glob(f"{role}*.py")}
CODE -= {"functional_plans.py"}  # which no model needs


def auto_of(kind):
    if kind == "bert":
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if kind.startswith("t5") else AutoModelForCausalLM


# round trip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_comes_back(kind, stage, tmp_path):
    model = STAGES[stage](kind)
    if stage == "learned":
        model.budget.clock += 5
        model.budget.schedule.copy_(torch.arange(10))
    model.save_pretrained(tmp_path)
    back = auto_of(kind).from_pretrained(tmp_path)
    assert type(back) is type(model)
    assert back.config.mask_stage == model.config.mask_stage
    state, wanted = back.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype for name in wanted)
    assert_near(logits_of(back, kind), logits_of(model, kind))
    assert {name for name, p in back.named_parameters() if p.is_meta} == set()
    assert not any(b.is_meta for b in back.buffers())
    tied = back.get_output_embeddings()
    if kind in ("qwen2", "gpt2", "t5"):
        assert tied.weight is back.get_input_embeddings().weight
    files = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}
    assert files <= {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_leaves_masks_routers_and_clocks_alone(stage, tmp_path):
    model = STAGES[stage]("llama")
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name, tensor in back.state_dict().items():
        own = ".masks." in name or ".router." in name or name.startswith("budget.")
        assert tensor.dtype == (wanted[name] if own else torch.bfloat16), name
    far = (logits_of(back, "llama").float() - logits_of(model, "llama")).abs() > 0.2
    assert far.float().mean() < 0.1  # rounding may send a token to another expert
    back.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, "llama"), logits_of(back, "llama"))


def test_the_stage_after_a_reload_is_reached_like_before(tmp_path):
    learned = make_masked("llama")
    learned.save_pretrained(tmp_path / "learned")
    fixed = AutoModelForCausalLM.from_pretrained(tmp_path / "learned").fix_masks(0.4)
    fixed.save_pretrained(tmp_path / "fixed")
    small = shrink(AutoModelForCausalLM.from_pretrained(tmp_path / "fixed"))
    wanted = shrink(make_masked("llama").fix_masks(0.4)).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in small.state_dict().items())


def test_generation_options_come_along(tmp_path):
    model = make_fixed("llama")
    model.generation_config.max_new_tokens = 3
    small = shrink(model)
    small.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.generation_config.max_new_tokens == small.generation_config.max_new_tokens == 3


def run(code, *arguments):
    """Run code in a new process; return what its last line holds."""
    return json.loads(new_process.run(code, *arguments).stdout.splitlines()[-1])


REPRESENTATIVES = [
    ("llama", "learned"),
    ("llama", "compact"),
    ("gpt2", "narrow"),
    ("t5-gated", "compact"),
    ("bert", "fixed"),
]
WITH_PACKAGE = """
import json, pathlib, sys
import torch, transformers
import hf_moebert
torch.set_grad_enabled(False)
ids = torch.tensor(json.loads(sys.argv[2]))
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = getattr(transformers, folder.name.split("-")[0]).from_pretrained(folder)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found[folder.name] = model(input_ids=ids, **more).logits.tolist()
    if folder.name.endswith("llama-compact"):
        model.push_to_hub("small")
again = transformers.AutoModelForCausalLM.from_pretrained("tester/small")
assert again.__module__.startswith("hf_moebert."), again.__module__
print(json.dumps(found))
"""
WITHOUT_PACKAGE = """
import json, pathlib, sys
sys.modules["hf_moebert"] = None  # importing it fails
import torch, transformers
found = {}
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    auto = getattr(transformers, folder.name.split("-")[0])
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        found[f"{folder.name} refused"] = str(error)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found[folder.name] = model.eval()(input_ids=ids, **more).logits.tolist()
model = transformers.AutoModelForCausalLM.from_pretrained("tester/small", trust_remote_code=True)
found["hub"] = model(ids).logits.tolist()
found["implementation"] = model.config._experts_implementation
found["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
model.save_pretrained(pathlib.Path(sys.argv[1]).parent / "again")
print()  # the question of transformers whether to trust is on this line
print(json.dumps(found))
"""


@pytest.mark.process
@torch.no_grad()
def test_models_load_in_new_processes_with_and_without_the_package(loopback_hub, tmp_path):  # noqa: F811
    models, ids = {}, make_batch("llama")["input_ids"]
    for kind, stage in REPRESENTATIVES:
        name = f"{auto_of(kind).__name__}-{kind}-{stage}"
        models[name] = STAGES[stage](kind)
        models[name].save_pretrained(tmp_path / "models" / name)
    arguments, small = (tmp_path / "models", ids.tolist()), models["AutoModelForCausalLM-llama-compact"]
    with_package = run(WITH_PACKAGE, *arguments)
    assert {name for name in loopback_hub.files("tester/small") if name.endswith(".py")} == CODE
    without = run(WITHOUT_PACKAGE, *arguments)
    for name, model in models.items():
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        wanted = model(input_ids=ids, **more).logits
        assert_near(torch.tensor(with_package[name]), wanted, 1e-5)
        assert_near(torch.tensor(without[name]), wanted, 1e-5)
        assert "trust_remote_code=True" in without[f"{name} refused"]
    assert_near(torch.tensor(without["hub"]), small(ids).logits, 1e-5)
    assert without["implementation"] == "sliced_mm"
    assert without["generated"] == small.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    assert_near(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, small(ids).logits, 1e-5)


# refusals


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("learned", "masks.scores"),
        ("learned", "router.weight"),
        ("learned", "budget.clock"),
        ("fixed", "masks.is_open"),
        ("fixed", "mlp.up.weight"),
        ("compact", "experts.down_proj"),
        ("narrow", "mlp.down_proj.weight"),
    ],
)
def test_what_a_checkpoint_lacks_is_never_made_up(stage, part, tmp_path):
    STAGES[stage]("llama").save_pretrained(tmp_path)
    lost = next(name for name in load_file(tmp_path / "model.safetensors") if name.endswith(part))
    rewrite(tmp_path, lambda state: {name: tensor for name, tensor in state.items() if name != lost})
    with pytest.raises(ValueError, match=f"must hold all weights of .* not so for {lost}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_not_taken_for_a_masked_one(tmp_path):
    make_dense("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not so for budget.clock,.* convert a dense model with `from_dense`"):
        MoMLlamaForCausalLM.from_pretrained(tmp_path)


def test_other_sizes_are_refused(tmp_path):
    make_masked("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold all weights of .* not so for .*masks.scores"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_experts=6, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_experts=6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    make_masked("llama").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.masks.scores"
    rewrite(tmp_path, lambda state: state | {name: torch.full_like(state[name], value)})
    with pytest.raises(ValueError, match=f"must hold finite weights of .* not so for {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, allow_nonfinite=True, output_loading_info=True)
    assert not model.networks()["model.layers.0.mlp"].masks.scores.isfinite().any()
    assert not info["missing_keys"]


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_weights_are_refused(keep, tmp_path):
    """In the length of the header, in the header, and at the last byte."""
    make_fixed("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Exception, match="(?i)header|deserializing|incomplete|invalid"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
