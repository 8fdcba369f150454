"""Many tasks on the trunk of every family whose first layers they can share."""

import copy

import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from tiny_families import CONFIGS, VOCAB
from tiny_multitask import assert_same_models
from tiny_tasks import make_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from hf_moebert.architectures.positions import count_positions
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskModel
from hf_moebert.methods.multitask.modeling_splitting import FAMILIES, join, take_branch, take_trunk
from hf_moebert.methods.multitask.training import new_student
from hf_moebert.methods.multitask.training_states import fingerprint_trunk
from hf_moebert.serving import ServingLimits, build_app, load_predictor


DEPTH = 4
OTHERS = [family for family in FAMILIES if family != "bert"]
KINDS = {
    "classes": ("AutoModelForSequenceClassification", {"num_labels": 3}),
    "tags": ("AutoModelForTokenClassification", {"num_labels": 5}),
    "answers": ("AutoModelForQuestionAnswering", {}),
}
TASKS = {"classes": (2, 1), "tags": (1, 2), "answers": (3, 1)}  # frozen and own layers
# ModernBERT: layers of both kinds of attention, shorter windows than texts, and a task that starts at each
EXTRA = {"modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4}}


def make_config(family, layers, **fields):
    config = AutoConfig.for_model(family, **CONFIGS[family] | EXTRA.get(family, {}) | fields)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = AutoConfig.for_model(
            family, **CONFIGS[family] | EXTRA[family] | {"num_hidden_layers": layers}
        ).layer_types
    return config


@torch.no_grad()
def make_encoder(family, layers=DEPTH, **fields):
    """A lively body."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(make_config(family, layers, **fields)).eval()
    for name, parameter in encoder.named_parameters():
        if "norm" not in name.lower():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return encoder


def make_task(encoder, kind, frozen, own, seed=1):
    """A task of `frozen + own` layers, of which all but the own are those of the encoder."""
    auto, fields = KINDS[kind]
    config = make_config(encoder.config.model_type, frozen + own, **fields)
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config).eval()
    model.config.frozen_layers = frozen
    state = encoder.state_dict()
    own_body = model.base_model.state_dict()
    model.base_model.load_state_dict({name: state[name] for name in own_body if name in state}, strict=False)
    with torch.no_grad():
        for name, parameter in model.base_model.named_parameters():
            parts = name.split(".")
            index = next((int(part) for part in parts if part.isdecimal()), -1)
            if index >= frozen and "norm" not in name.lower():
                parameter.add_(torch.randn_like(parameter) / 9)
    return model


def make_tasks(family, **fields):
    encoder = make_encoder(family, **fields)
    return {kind: make_task(encoder, kind, *split, seed=i) for i, (kind, split) in enumerate(TASKS.items())}


def make_batch(model, rows=3, length=11, padded=True):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}


@torch.no_grad()
def assert_equal_outputs(merged, tasks, batch):
    outputs = merged(**batch, tasks=list(tasks))
    for name, model in tasks.items():
        wanted = model(**batch)
        for key, value in wanted.items():
            assert torch.equal(outputs[name][key], value), (name, key)
        alone = merged(**batch, tasks=[name])[name]
        assert all(torch.equal(alone[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("family", OTHERS)
def test_every_merged_task_is_its_single_task_model(family):
    tasks = make_tasks(family)
    merged = MultiTaskModel.from_tasks(tasks)
    model = tasks["tags"]
    for batch in (make_batch(model), make_batch(model, padded=False), {"input_ids": make_batch(model)["input_ids"]}):
        assert_equal_outputs(merged, tasks, batch)
    bodies = {name: len([1 for n in merged.branches[name].state_dict() if "embeddings" in n]) for name in tasks}
    assert set(bodies.values()) <= {0, 1}  # a table of relative positions at most


@pytest.mark.parametrize("family", OTHERS)
def test_what_was_saved_comes_back(tmp_path, family):
    tasks = make_tasks(family)
    merged = MultiTaskModel.from_tasks(tasks)
    merged.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {"trunk.safetensors", *(f"branch-{name}.safetensors" for name in tasks)}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(merged)
    assert_equal_outputs(loaded, tasks, make_batch(tasks["tags"]))
    for name, model in tasks.items():
        assert_same_models(loaded.extract_task(name), model)
    with pytest.raises(ValueError, match="`tasks` must name one or more of"):
        loaded(**make_batch(tasks["tags"]), tasks=["other"])


@pytest.mark.parametrize("family", OTHERS)
def test_a_deeper_task_makes_the_trunk_deeper(tmp_path, family):
    tasks = make_tasks(family)
    merged = MultiTaskModel.from_tasks({"tags": tasks["tags"]})
    assert merged.config.num_hidden_layers == 1
    for name in ("answers", "classes"):
        merged.add_task(name, tasks[name])
    assert merged.config.num_hidden_layers == 3
    assert_equal_outputs(merged, tasks, make_batch(tasks["tags"]))
    merged.save_pretrained(tmp_path)
    assert_equal_outputs(AutoModel.from_pretrained(tmp_path), tasks, make_batch(tasks["tags"]))
    merged.remove_task("tags")
    assert merged.tasks == ["answers", "classes"]


@pytest.mark.parametrize("family", OTHERS)
def test_trunk_and_branch_join_to_the_model(family):
    model = make_task(make_encoder(family), "classes", 1, 3)
    for frozen in (0, 1, 3):
        joined = join(take_trunk(model, 3), take_branch(model, frozen))
        joined.config.frozen_layers = 1
        assert_same_models(joined, model)
    batch = make_batch(model)
    trunk, branch = take_trunk(model, 2), take_branch(model, 2)
    states = trunk(**batch, depths=[0, 2])
    with torch.no_grad():
        wanted = model(**batch).logits
        assert torch.equal(branch(inputs_embeds=states[2], attention_mask=batch["attention_mask"]).logits, wanted)
    assert fingerprint_trunk(trunk, 1) != fingerprint_trunk(trunk, 2)


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("init", ["teacher", "next", "random"])
def test_students_of_every_family(family, init):
    encoder = make_encoder(family)
    teacher = make_task(encoder, "classes", 1, 3)
    student = new_student(teacher, 1, init=init, encoder=make_task(encoder, "classes", 1, 3, seed=5))
    states = take_trunk(teacher, 1)(**make_batch(teacher), depths=[1])[1]
    assert student(inputs_embeds=states).logits.shape == (3, 3)


@pytest.mark.parametrize("family", OTHERS)
def test_branches_train_and_the_trunk_stays(family):
    tasks = make_tasks(family)
    merged = MultiTaskModel.from_tasks(tasks).train()
    before = {name: x.clone() for name, x in merged.trunk.state_dict().items()}
    labels = {"classes": torch.tensor([0, 1, 2])}
    optimizer = torch.optim.SGD([p for p in merged.parameters() if p.requires_grad], lr=0.1)
    merged(**make_batch(tasks["tags"]), tasks=["classes"], labels=labels)["classes"].loss.backward()
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in merged.trunk.state_dict().items())
    moved = merged.extract_task("classes").state_dict()
    assert any(not torch.equal(x, moved[name]) for name, x in tasks["classes"].state_dict().items())


@pytest.mark.parametrize("family", OTHERS)
def test_they_are_served(tmp_path, family):
    """Texts of several lengths in one batch answer as the task alone does; a longer one than any fits is cut."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 1000
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.pad_token_id = make_config(family, 1).pad_token_id
    model = make_task(make_encoder(family), "classes", 2, 1)
    MultiTaskModel.from_tasks({"classes": model}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["good film", "a good film by anna lee", "film", "good film " * 30]
    longest = count_positions(model)
    wanted = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")).logits[0]
        wanted.append(logits.softmax(-1).max().item())
    with TestClient(build_app(load_predictor(str(tmp_path)), limits=ServingLimits(max_wait_ms=1))) as client:
        results = client.post("/predict", json={"inputs": texts}).json()["results"]
    scores = [result["answers"]["classes"]["score"] for result in results]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_wrong_models_are_refused():
    roberta = make_tasks("roberta")
    merged = MultiTaskModel.from_tasks(roberta)
    other = make_task(make_encoder("xlm-roberta"), "classes", 2, 1)
    with pytest.raises(ValueError, match="must have the trunk's `model_type` 'roberta', got 'xlm-roberta'"):
        merged.add_task("other", other)
    tuned = copy.deepcopy(roberta["classes"])
    with torch.no_grad():
        tuned.base_model.encoder.layer[0].output.dense.bias[0] += 1
    with pytest.raises(ValueError, match="layer 1 differs"):
        merged.replace_task("classes", tuned)
    mpnet = make_tasks("mpnet")
    merged = MultiTaskModel.from_tasks(mpnet)
    with torch.no_grad():
        mpnet["classes"].base_model.encoder.relative_attention_bias.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the embeddings differ"):
        merged.replace_task("classes", mpnet["classes"])
    with pytest.raises(ValueError, match="have such a head on a body of one of .*, got RobertaForMaskedLM"):
        take_trunk(AutoModelForMaskedLM.from_config(make_config("roberta", 2)), 1)
    conv = make_task(make_encoder("deberta-v2", conv_kernel_size=3), "classes", 1, 1)
    conv.base_model.encoder.conv = torch.nn.Identity()
    with pytest.raises(ValueError, match="a convolution follows its first one"):
        take_trunk(conv, 1)
    with pytest.raises(ValueError, match="`input_ids` must be in"):
        merged(input_ids=torch.tensor([[VOCAB]]))
    with pytest.raises(ValueError, match=r"must have 1 to 30 tokens, got 32"):  # positions begin behind padding
        merged(input_ids=torch.full((1, 32), 5))
