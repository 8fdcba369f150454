"""One file for the trunk, one for every task; files that do not belong together are not loaded."""

import hashlib
import json
import os

import new_process
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_multitask import assert_same, assert_same_models, make_batch, make_encoder, make_task, make_tasks
from transformers import AutoModel
from transformers.trainer_utils import load_sharded_checkpoint

from hf_moebert.methods.multitask.configuration_multitask import MultiTaskBertConfig
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel


NAMES = ("qq", "qqp", "slots", "answers")


@pytest.fixture(scope="module")
def models():
    return make_tasks(NAMES)


@pytest.fixture
def merged(models):
    return MultiTaskBertModel.from_tasks(models)


@pytest.fixture
def folder(merged, tmp_path):
    merged.save_pretrained(tmp_path / "möbel 1")
    return tmp_path / "möbel 1"


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# Round trip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_loaded_is_what_was_saved(models, merged, folder, attention):
    loaded, info = MultiTaskBertModel.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.trunk.parameters())
    assert all(parameter.requires_grad for parameter in loaded.branches.parameters())
    assert loaded.config.to_diff_dict() == merged.config.to_diff_dict()
    assert all(branch.config._attn_implementation == attention for branch in loaded.branches.values())
    merged.set_attn_implementation(attention)
    batch = make_batch()
    for name, output in merged(**batch).items():
        assert_same(loaded(**batch)[name], output)
        assert_same_models(loaded.extract_task(name), models[name])


@pytest.mark.process
def test_a_new_process_loads_it(merged, folder, tmp_path):
    code = """
import sys, torch
from safetensors.torch import save_file
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel
torch.set_num_threads(1)
model = MultiTaskBertModel.from_pretrained(sys.argv[1], local_files_only=True)
outputs = model(torch.arange(5, 14).view(1, 9), word_mask=torch.ones(1, 9))
logits = {f"outputs.{n}.{k}": v for n, x in outputs.items() for k, v in x.items()}
save_file(logits | model.state_dict(), sys.argv[2])
"""
    result = tmp_path / "outputs.safetensors"
    new_process.run(code, folder, result)
    found = load_file(result)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(found[name], tensor)
    for name, output in merged(torch.arange(5, 14).view(1, 9), word_mask=torch.ones(1, 9)).items():
        for key, value in output.items():  # mapped memory lies otherwise, and a CPU may round a single row otherwise
            torch.testing.assert_close(found[f"outputs.{name}.{key}"], value, rtol=1e-6, atol=1e-6)


def test_the_folder_has_one_file_for_each_task(merged, folder):
    shards = {"trunk.safetensors", *(f"branch-{name}.safetensors" for name in NAMES)}
    assert set(digests(folder)) == shards | {"config.json", "model.safetensors.index.json"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in merged.state_dict().values())
    for shard in shards:
        names = load_file(folder / shard).keys()
        assert names == {name for name, place in index["weight_map"].items() if place == shard}


def test_transformers_loads_it_as_a_sharded_checkpoint(models, merged, folder):
    other = MultiTaskBertModel.from_tasks(make_tasks(NAMES, make_encoder(seed=5)))
    load_sharded_checkpoint(other, str(folder), strict=True)
    batch = make_batch()
    for name, output in merged(**batch).items():
        assert_same(other(**batch)[name], output)


def test_half_precision_is_kept_and_can_be_asked_for(merged, folder, tmp_path):
    half = MultiTaskBertModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    again = MultiTaskBertModel.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert again.config.trunk_sha256 != merged.config.trunk_sha256
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name].bfloat16())


def test_a_loaded_model_takes_tasks(models, folder):
    loaded = MultiTaskBertModel.from_pretrained(folder)
    loaded.add_task("new", make_task(make_encoder(), 4, 1, "topics"))
    assert len(loaded.trunk.layer) == 4
    loaded.save_pretrained(folder)
    again, batch = MultiTaskBertModel.from_pretrained(folder), make_batch()
    for name, output in loaded(**batch).items():
        assert_same(again(**batch)[name], output)


# Files that an update writes


def test_saving_again_touches_nothing(merged, folder):
    before = times(folder)
    merged.save_pretrained(folder)
    MultiTaskBertModel.from_pretrained(folder).save_pretrained(folder)
    assert times(folder) == before


def test_an_update_touches_the_files_of_its_task(models, merged, folder):
    description = {"config.json", "model.safetensors.index.json"}

    def changed(action):
        before, stamps = digests(folder), times(folder)
        action()
        merged.save_pretrained(folder)
        after, written = digests(folder), times(folder)
        assert all((written[name] != stamps[name]) == (after[name] != before[name]) for name in before.keys() & after)
        return {name for name in before.keys() | after if before.get(name) != after.get(name)}

    twin = make_task(make_encoder(), 2, 1, "classes", seed=8)
    assert changed(lambda: merged.replace_task("qq", twin)) == {"branch-qq.safetensors", "config.json"}
    other = make_task(make_encoder(), 1, 1, "topics", seed=9)
    assert changed(lambda: merged.add_task("q", other)) == {"branch-q.safetensors"} | description
    assert changed(lambda: merged.replace_task("qq", other)) == {"branch-qq.safetensors"} | description
    assert changed(lambda: merged.remove_task("answers")) == {"branch-answers.safetensors"} | description
    assert changed(lambda: merged.remove_task("q")) == {"branch-q.safetensors"} | description
    assert not (folder / "branch-q.safetensors").exists()
    batch = make_batch()
    loaded = MultiTaskBertModel.from_pretrained(folder)
    assert loaded.tasks == ["qq", "qqp", "slots"]
    assert_same(loaded(**batch)["qq"], other(**batch))
    assert_same(loaded(**batch)["qqp"], models["qqp"](**batch))


def test_a_full_disk_leaves_the_old_model(models, merged, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    before = digests(folder)
    merged.replace_task("qq", models["qqp"])
    monkeypatch.setattr(MultiTaskBertConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        merged.save_pretrained(folder)
    assert digests(folder) == before


def test_an_old_unsharded_file_is_not_read_by_mistake(merged, folder):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in merged.state_dict().items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = MultiTaskBertModel.from_pretrained(folder)
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_other_processes_write_nothing(merged, tmp_path):
    merged.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


# Refusals


def test_another_trunk_is_refused(folder, tmp_path):
    other = make_encoder()
    other.encoder.layer[1].output.dense.bias.data[3] += 1
    wrong = MultiTaskBertModel.from_tasks({"answers": make_task(other, 3, 1, "answers")})
    wrong.save_pretrained(tmp_path / "wrong")
    (folder / "trunk.safetensors").write_bytes((tmp_path / "wrong" / "trunk.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"trunk.safetensors in .* but layer 2 differs: SHA-256 \w{64} here"):
        MultiTaskBertModel.from_pretrained(folder)


def test_a_trunk_without_fingerprints_is_refused(folder):
    edit_json(folder / "config.json", lambda config: config.pop("trunk_sha256"))
    with pytest.raises(ValueError, match="config.json must say `trunk_sha256`"):
        MultiTaskBertModel.from_pretrained(folder)


def test_files_that_lack_tensors_are_refused_with_all_names(folder):
    path = folder / "branch-qq.safetensors"
    tensors = load_file(path)
    lost = [name for name in tensors if "classifier" in name]
    save_file({name: x for name, x in tensors.items() if name not in lost} | {"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"branch-qq.* lacks \['branches.qq.classifier.bias', .*weight'\]"):
        MultiTaskBertModel.from_pretrained(folder)


def test_tasks_without_weights_and_weights_without_tasks_are_refused(merged, folder):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", lambda config: config["tasks"].update(new=config["tasks"]["qq"]))
    with pytest.raises(ValueError, match=r"not so for branches\.new\.bert.* and \d+ more"):
        MultiTaskBertModel.from_pretrained(folder)
    config["tasks"]["qqp"].pop("sha256")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"branch-qqp.safetensors in .* of SHA-256 None, got \w{64}"):
        MultiTaskBertModel.from_pretrained(folder)


@pytest.mark.parametrize("trunk", [0, 1])
def test_another_branch_is_refused(merged, folder, tmp_path, trunk):
    other = MultiTaskBertModel.from_tasks(make_tasks(NAMES, make_encoder(seed=trunk)))
    other.branches["qq"].classifier.bias.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    (folder / "branch-qq.safetensors").write_bytes((tmp_path / "other/branch-qq.safetensors").read_bytes())
    with pytest.raises(ValueError, match="branch-qq.safetensors in .* must be the branch that config.json describes"):
        MultiTaskBertModel.from_pretrained(folder)


def test_a_branch_is_bound_to_the_trunk_below_it(models, merged, folder, tmp_path):
    assert merged.config.tasks["qq"]["sha256"] != merged.config.tasks["qqp"]["sha256"]
    encoder = make_encoder()
    encoder.encoder.layer[0].output.dense.bias.data[3] += 1
    foreign = make_task(encoder, 2, 1, "classes")  # the same branch on another trunk
    wrong = MultiTaskBertModel.from_tasks({"qq": foreign})
    wrong.save_pretrained(tmp_path / "wrong")
    assert wrong.config.tasks["qq"]["sha256"] != merged.config.tasks["qq"]["sha256"]


def test_a_trunk_that_changed_is_not_saved(models, merged, folder):
    for model in (merged, MultiTaskBertModel.from_pretrained(folder)):
        before = digests(folder)
        model.trunk.layer[1].output.dense.bias.data[0] += 1
        with pytest.raises(ValueError, match="The trunk in memory must be the trunk .* but layer 2 differs"):
            model.save_pretrained(folder)
        assert digests(folder) == before


def test_adapters_are_not_saved(merged, tmp_path):
    branch = merged.branches["qq"].bert.encoder.layer[0].attention.self
    peft.get_peft_model(branch, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="Merge adapters"):
        merged.save_pretrained(tmp_path / "adapted")


# Interrupted saves


def save_interrupted(merged, folder, monkeypatch, renames):
    """Save, but fail after some files were renamed; return whether as many were."""
    count, replace = iter(range(renames)), os.replace

    def fail_later(*names):
        if next(count, None) is None:
            raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_later)
        try:
            merged.save_pretrained(folder)
        except KeyboardInterrupt:
            return True
    return False


def change_tasks(merged, change):
    if change == "add":
        merged.add_task("deep", make_task(make_encoder(), 4, 1, "classes"))
    elif change == "remove":
        merged.remove_task("slots")
    elif change == "relabel":
        other = make_task(make_encoder(), 2, 1, "classes", seed=9)
        other.config.id2label = {0: "c", 1: "b", 2: "a"}
        merged.replace_task("qq", other)
    elif change == "other tensors":
        merged.replace_task("slots", make_task(make_encoder(), 1, 3, "tags", seed=9))
    else:
        merged.replace_task("qq", make_task(make_encoder(), 1, 1, "classes", seed=9))
        merged.replace_task("slots", make_task(make_encoder(), 2, 1, "crf", seed=9))
        merged.add_task("deep", make_task(make_encoder(), 4, 1, "classes"))


CHANGES = ["add", "remove", "relabel", "other tensors", "all at once"]


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_save_leaves_the_old_or_the_new_model(tmp_path, monkeypatch, change):
    models, batch = make_tasks(("qq", "slots")), make_batch()
    outcomes, more, renames = [], True, 0
    while more:
        merged = MultiTaskBertModel.from_tasks(models)
        folder = tmp_path / f"{change}-{renames}"
        merged.save_pretrained(folder)
        old = {name: output.logits for name, output in merged(**batch).items()}
        change_tasks(merged, change)
        more = save_interrupted(merged, folder, monkeypatch, renames)
        new = {name: output.logits for name, output in merged(**batch).items()}
        for load in (AutoModel, MultiTaskBertModel):  # the second time, all is in its place
            loaded = load.from_pretrained(folder)
            found = {name: output.logits for name, output in loaded(**batch).items()}
            same = [found.keys() == x.keys() and all(torch.allclose(found[n], x[n]) for n in x) for x in (old, new)]
            assert sum(same) == 1
        outcomes.append(["old", "new"][same.index(True)])
        if outcomes[-1] == "new":
            assert loaded.tasks == merged.tasks
        merged.save_pretrained(folder)
        assert MultiTaskBertModel.from_pretrained(folder).tasks == merged.tasks
        assert not [*folder.glob("*.next.*"), *folder.glob(".*")]
        renames += 1
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"old", "new"}


def test_an_interrupted_save_is_finished_where_it_can_be(tmp_path, monkeypatch):
    merged = MultiTaskBertModel.from_tasks(make_tasks(("qq", "slots")))
    merged.save_pretrained(tmp_path)
    change_tasks(merged, "relabel")
    assert save_interrupted(merged, tmp_path, monkeypatch, 2)  # the new branch, beside the old one, and config.json
    assert (tmp_path / "branch-qq.next.safetensors").exists()

    def refuse(*_):
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="branch-qq.safetensors' cannot be written: read-only"):
            MultiTaskBertModel.from_pretrained(tmp_path)
    assert MultiTaskBertModel.from_pretrained(tmp_path).tasks == merged.tasks


@pytest.mark.parametrize("size", [4, 100, -1])
@pytest.mark.parametrize("name", ["trunk", "branch-slots"])
def test_truncated_files_are_refused_by_name(folder, name, size):
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name}.safetensors in .* must be a whole safetensors file"):
        MultiTaskBertModel.from_pretrained(folder)


@pytest.mark.parametrize("place", ["../trunk.safetensors", "/etc/passwd", "branch-qq.safetensors", "x.bin"])
def test_an_index_that_leads_elsewhere_is_refused(folder, place):
    def lead(index):
        index["weight_map"]["trunk.embeddings.LayerNorm.bias"] = place

    edit_json(folder / "model.safetensors.index.json", lead)
    with pytest.raises(ValueError, match=rf"LayerNorm.bias -> {place}"):
        MultiTaskBertModel.from_pretrained(folder)


def test_an_index_that_names_strange_tasks_is_refused(folder):
    def lead(index):
        index["weight_map"]["branches.../../x.weight"] = "branch-../../x.safetensors"

    edit_json(folder / "model.safetensors.index.json", lead)
    with pytest.raises(ValueError, match="must map each tensor to the file of its trunk or task"):
        MultiTaskBertModel.from_pretrained(folder)
    for text in ("[]", "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="must map tensors to files"):
            MultiTaskBertModel.from_pretrained(folder)


def test_missing_files_are_refused(folder, tmp_path):
    (folder / "branch-qqp.safetensors").unlink()
    with pytest.raises(OSError, match="branch-qqp.safetensors"):
        MultiTaskBertModel.from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="model.safetensors.index.json"):
        MultiTaskBertModel.from_pretrained(tmp_path / "empty")


def test_weights_that_are_no_numbers_are_refused(merged, folder):
    with torch.no_grad():
        merged.branches["qq"].classifier.bias[0] = float("nan")
    merged.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"finite weights of .* not so for branches.qq.classifier.bias\."):
        MultiTaskBertModel.from_pretrained(folder)
    assert MultiTaskBertModel.from_pretrained(folder, allow_nonfinite=True).tasks == sorted(NAMES)


def test_forms_that_cannot_be_saved_are_refused(merged, tmp_path):
    with pytest.raises(ValueError, match="without `variant`"):
        merged.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match=r"in memory, these are not: \['trunk"):
        merged.to("meta").save_pretrained(tmp_path)
