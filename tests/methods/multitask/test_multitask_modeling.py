"""Tasks on one trunk return the outputs of their single-task models, bit for bit, with fewer layers."""

import copy

import peft
import pytest
import torch
from tiny_multitask import (
    HEADS,
    LIMIT,
    TASKS,
    VOCAB,
    assert_same,
    assert_same_models,
    make_batch,
    make_encoder,
    make_labels,
    make_task,
    make_tasks,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

from hf_moebert.methods.multitask.functional import layers_run, overhead
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel
from hf_moebert.methods.multitask.modeling_splitting import join, take_branch, take_trunk


@pytest.fixture(scope="module")
def models():
    return make_tasks()


@pytest.fixture(scope="module")
def merged(models):
    return MultiTaskBertModel.from_tasks(models)


# Identity


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", list(TASKS))
def test_one_task_is_the_single_task_model(name, attention, padded):
    model = make_tasks([name])[name]
    model.set_attn_implementation(attention)
    merged = MultiTaskBertModel.from_tasks({name: model})
    batch = make_batch(padded=padded)
    labels = make_labels(batch)[name]
    assert_same(merged(**batch)[name], model(**batch))
    assert_same(merged(**batch, labels={name: labels})[name], model(**batch, **labels))
    batch.pop("attention_mask")
    assert_same(merged(**batch)[name], model(**batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_merged_task_is_its_single_task_model(dtype):
    models = {name: model.to(dtype) for name, model in make_tasks().items()}
    merged = MultiTaskBertModel.from_tasks(models)
    assert merged.dtype == dtype
    batch = make_batch()
    labels = make_labels(batch)
    if dtype != torch.float32:
        labels = {
            name: {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()} for name, x in labels.items()
        }
    outputs = merged(**batch, labels={name: x.get("labels", x) for name, x in labels.items()})
    assert list(outputs) == merged.tasks == sorted(TASKS)
    for name, model in models.items():
        assert_same(outputs[name], model(**batch, **labels[name]))


def test_merging_changes_nothing_that_it_was_given(models):
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    configs = {name: model.config.to_dict() for name, model in models.items()}
    merged = MultiTaskBertModel.from_tasks(models)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    for name, model in models.items():
        assert model.config.to_dict() == configs[name]
        assert all(torch.equal(x, before[name][key]) for key, x in model.state_dict().items())


def test_extracted_tasks_are_the_models_that_were_merged(models, merged):
    for name, model in models.items():
        assert_same_models(merged.extract_task(name), model)


@pytest.mark.parametrize("kind", list(HEADS))
def test_trunk_and_branch_join_to_the_model(kind):
    model = make_task(make_encoder(), 1, 3, kind)
    for frozen in range(4):
        trunk, branch = take_trunk(model, 3), take_branch(model, frozen)
        joined = join(trunk, branch)
        assert joined.config.frozen_layers == frozen
        joined.config.frozen_layers = 1
        assert_same_models(joined, model)
        assert all(parameter.requires_grad for parameter in joined.parameters())


def test_a_shorter_branch_is_the_model_without_its_last_layers():
    model, batch = make_task(make_encoder(), 1, 3, "classes"), make_batch()
    branch = take_branch(model, 1, 1)
    joined = join(take_trunk(model, 1), branch)
    assert joined.config.num_hidden_layers == 2
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    assert_same(joined(**batch), model(**batch))


def test_a_branch_holds_no_embeddings_but_knows_its_vocabulary():
    branch = take_branch(make_task(make_encoder(), 1, 3, "classes"), 1)
    assert branch.config.vocab_size == VOCAB
    assert not any("embeddings" in name for name in branch.state_dict())
    with pytest.raises(ValueError, match="must get the trunk's states as `inputs_embeds`"):
        branch(input_ids=make_batch()["input_ids"])


def test_masks_of_every_form_mean_the_same(merged):
    batch = make_batch()
    mask = batch.pop("attention_mask")
    expected = merged(**batch, attention_mask=mask)
    full = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    forms = [mask.bool(), mask.float(), full.bool()]
    for form in forms:
        outputs = merged(**batch, attention_mask=form)
        for name in merged.tasks:
            assert_same(outputs[name], expected[name])


def test_attention_can_be_switched_everywhere(models):
    merged, batch = MultiTaskBertModel.from_tasks(models), make_batch()
    merged.set_attn_implementation("eager")
    assert {x.config._attn_implementation for x in (merged, merged.trunk, *merged.branches.values())} == {"eager"}
    outputs = merged(**batch, output_attentions=True, output_hidden_states=True)
    for name, (frozen, own, _) in TASKS.items():
        single = copy.deepcopy(models[name])
        single.set_attn_implementation("eager")
        expected = single(**batch, output_attentions=True, output_hidden_states=True)
        assert len(outputs[name].attentions) == own
        for ours, theirs in zip(outputs[name].attentions, expected.attentions[frozen:], strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(outputs[name].hidden_states, expected.hidden_states[frozen:], strict=True):
            assert torch.equal(ours, theirs)


def test_words_are_told_to_the_taggers(models, merged):
    batch = make_batch()
    batch["word_mask"] = words = batch["attention_mask"].bool() & (torch.arange(9) % 2 == 1)
    output = merged(**batch, output_marginals=True)["slots"]
    assert_same(output, models["slots"](**batch, output_marginals=True))
    assert ((output.predictions == -100) == ~words).all()
    del batch["word_mask"]
    assert "slots" not in merged(**batch, tasks=[name for name in merged.tasks if name != "slots"])
    with pytest.raises(ValueError, match="`word_mask`, or `labels` of any tag, must mark the first piece"):
        merged(**batch)


# Layers that are run, and their cost


def run_layers(model, batch, **options):
    """Return the names of the layers that one request runs."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in model.named_modules()
        if type(module).__name__ == "BertLayer"
    ]
    model(**batch, **options)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_request_runs_what_its_tasks_need_and_no_more(merged):
    batch = make_batch()
    everything = merged(**batch)
    splits = {name: (frozen, own) for name, (frozen, own, _) in TASKS.items()}
    assert merged.config.splits() == splits
    for asked in (["qq"], ["qqp"], ["ner", "answers"], ["topics", "qq", "score"], list(TASKS)):
        outputs = merged(**batch, tasks=asked)
        assert list(outputs) == asked
        for name in asked:
            assert_same(outputs[name], everything[name])
        seen = run_layers(merged, batch, tasks=asked)
        assert len(seen) == layers_run({name: splits[name] for name in asked})
        assert len(set(seen)) == len(seen)
        branches = {name.split(".")[1] for name in seen if name.startswith("branches.")}
        assert branches == set(asked)


def test_operations_agree_with_the_formula():
    models = {f"t{own}": make_task(make_encoder(), 4 - own, own, "classes") for own in (1, 2, 3)}
    merged, batch = MultiTaskBertModel.from_tasks(models), make_batch(padded=False)
    del batch["word_mask"]

    def count(model):
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged.trunk(**batch, depths=[1])
    layer = counter.get_total_flops()
    heads = count(models["t1"]) - 4 * layer
    relative = (count(merged) - 3 * heads) / sum(count(model) - heads for model in models.values())
    assert relative == overhead(merged.config.splits(), 4) == 9 / 12


# Adding, replacing, removing


def test_tasks_come_and_go_and_others_do_not_notice(models):
    merged, batch = MultiTaskBertModel.from_tasks({"qq": models["qq"], "qqp": models["qqp"]}), make_batch()
    assert len(merged.trunk.layer) == merged.config.num_hidden_layers == 2
    merged.add_task("answers", models["answers"])  # deeper than the trunk was
    assert len(merged.trunk.layer) == merged.config.num_hidden_layers == 3
    merged.add_task("qqp-2_b", models["qqp-2_b"])
    other = make_task(make_encoder(), 1, 3, "classes", seed=9)
    merged.replace_task("qq", other)
    outputs = merged(**batch)
    expected = {**{name: models[name] for name in ("qqp", "answers", "qqp-2_b")}, "qq": other}
    assert set(outputs) == set(expected)
    for name, model in expected.items():
        assert_same(outputs[name], model(**batch))
    merged.remove_task("qqp")
    merged.remove_task("answers")
    assert merged.tasks == ["qq", "qqp-2_b"] == list(merged.config.tasks)
    assert len(merged.trunk.layer) == 3
    for name, output in merged(**batch).items():
        assert_same(output, expected[name](**batch))


def test_a_refused_task_leaves_the_model_as_it_was(models):
    merged = MultiTaskBertModel.from_tasks({"qq": models["qq"]})
    config, keys = merged.config.to_dict(), list(merged.state_dict())
    with pytest.raises(ValueError, match="layer 1"):
        merged.replace_task("qq", changed_task(frozen=3, layer=0))
    assert merged.config.to_dict() == config
    assert list(merged.state_dict()) == keys


def changed_task(*, frozen, layer):
    """Change one bit of a frozen layer of a task."""
    model = make_task(make_encoder(), frozen, 1, "classes")
    weight = model.bert.encoder.layer[layer].output.dense.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    return model


# Refusals


def test_other_layers_are_refused_by_name_and_hash(models):
    for layer in (0, 1):
        text = rf"frozen part of `model` must be the trunk .* layer {layer + 1} .* SHA-256 \w{{64}} here, \w{{64}} exp"
        with pytest.raises(ValueError, match=text):
            MultiTaskBertModel.from_tasks({"a": models["answers"], "b": changed_task(frozen=2, layer=layer)})
    MultiTaskBertModel.from_tasks({"a": models["qqp"], "b": changed_task(frozen=2, layer=1)})  # nothing shared but ids
    other = make_task(make_encoder(seed=1), 2, 1, "classes")
    with pytest.raises(ValueError, match="but the embeddings differ"):
        MultiTaskBertModel.from_tasks({"a": models["answers"], "b": other})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 32),
        ("num_attention_heads", 2),
        ("vocab_size", 62),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-6),
        ("max_position_embeddings", 32),
        ("intermediate_size", 64),
    ],
)
def test_other_architectures_are_refused(merged, field, value):
    other = make_task(make_encoder(), 1, 1, "classes")
    other.config.update({field: value})
    with pytest.raises(ValueError, match=f"must have the trunk's `{field}` .*, got {value!r}"):
        merged.add_task("new", other)


def test_other_models_are_refused(merged, models):
    with pytest.raises(ValueError, match="must be one of BertForSequenceClassification, .*, got BertForMaskedLM"):
        merged.add_task("new", BertForMaskedLM(make_encoder().config))
    with pytest.raises(ValueError, match="must have embeddings, got a branch"):
        merged.add_task("new", take_branch(models["qq"], 1))
    with pytest.raises(ValueError, match="trunk's `dtype` torch.float32, got torch.float64"):
        merged.add_task("new", copy.deepcopy(models["qq"]).double())
    with pytest.raises(ValueError, match="one task or more"):
        MultiTaskBertModel.from_tasks({})
    for frozen in (None, -1, 3, "2", True):
        model = copy.deepcopy(models["qq"])
        model.config.frozen_layers = frozen
        with pytest.raises(ValueError, match=r"`frozen_layers` must be an integer in \[0, 3\), got"):
            merged.add_task("new", model)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "keys", "training", "ä", "a b", "x" * 65, None, 3])
def test_names_that_cannot_be_are_refused(merged, models, name):
    with pytest.raises(ValueError, match="A task's name must be 1 to 64 of the characters"):
        merged.add_task(name, models["qq"])


def test_names_that_are_taken_are_refused(merged, models):
    for name in ("qq", "QQ"):
        with pytest.raises(ValueError, match="must differ in more than case"):
            merged.add_task(name, models["qq"])


def test_unknown_tasks_are_refused(merged):
    batch = make_batch()
    for asked in ([], ["qq", "q"], ["q"]):
        with pytest.raises(ValueError, match=r"`tasks` must name one or more of \['answers', 'ner'.*got"):
            merged(**batch, tasks=asked)
    for call in (merged.remove_task, merged.extract_task):
        with pytest.raises(ValueError, match=r"got \['q'\]"):
            call("q")
    with pytest.raises(ValueError, match=r"got \['q'\]"):
        merged.replace_task("q", merged.extract_task("qq"))
    with pytest.raises(ValueError, match=r"`labels` must be of tasks that are run, \['qq'\], got \['qqp'\]"):
        merged(**batch, tasks=["qq"], labels={"qqp": torch.zeros(3)})
    merged = MultiTaskBertModel(type(merged.config)(hidden_size=24, num_attention_heads=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match="add a task with `add_task`"):
        merged(**batch)


def test_splits_that_cannot_be_are_refused(models):
    model, trunk = models["qq"], take_trunk(models["qq"], 1)
    for layers in (-1, 4):
        with pytest.raises(ValueError, match=rf"`num_layers` must be in \[0, 3\], got {layers}"):
            take_trunk(model, layers)
    for frozen in (-1, 3):
        with pytest.raises(ValueError, match=rf"`frozen_layers` must be in \[0, 3\), got {frozen}"):
            take_branch(model, frozen)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=rf"`num_layers` must be in \[1, 2\] after 1 of 3 layers, got {layers}"):
            take_branch(model, 1, layers)
    with pytest.raises(ValueError, match="must have at least 2 layers, got 1"):
        join(trunk, take_branch(model, 2))
    for depths in ([], [2], [-1, 0]):
        with pytest.raises(ValueError, match=r"`depths` must name numbers of layers in \[0, 1\]"):
            trunk(make_batch()["input_ids"], depths=depths)


def test_inputs_that_cannot_be_are_refused(merged):
    ids = make_batch(padded=False)["input_ids"]
    for wrong in (VOCAB, -1):
        bad = ids.clone()
        bad[1, 4] = wrong
        with pytest.raises(ValueError, match=rf"in \[0, {VOCAB}\), got {wrong} at row 1, position 4"):
            merged(bad)
    for length in (0, LIMIT + 1):
        with pytest.raises(ValueError, match=f"1 to {LIMIT} tokens, got {length}"):
            merged(torch.ones(2, length, dtype=torch.long))
    with pytest.raises(ValueError, match=r"one row or more, got the shape \(0, 9\)"):
        merged(ids[:0])
    with pytest.raises(ValueError, match="`input_ids` must be integers"):
        merged(ids.float())
    with pytest.raises(ValueError, match="on the model's device cpu, got meta"):
        merged(ids.to("meta"))
    with pytest.raises(ValueError, match="`attention_mask` must be on the model's device cpu, got meta"):
        merged(ids, attention_mask=torch.ones_like(ids, device="meta"))
    with pytest.raises(ValueError, match="exactly one"):
        merged(ids, inputs_embeds=torch.zeros(3, 9, 24))
    with pytest.raises(ValueError, match=r"`labels\['qq'\]` must be in \[0, 3\) or -100, got 3"):
        merged(ids, labels={"qq": torch.tensor([0, 3, 1])})
    with pytest.raises(ValueError, match="vocabulary must stay"):
        merged.resize_token_embeddings(70)


def test_rows_of_padding_and_labels_to_ignore_give_numbers(merged):
    batch = make_batch()
    batch["attention_mask"][1] = 0
    for name, output in merged(**batch).items():
        assert all(value.isfinite().all() for value in output.values()), name
    ignored = torch.full_like(batch["input_ids"], -100)
    outputs = merged(**batch, labels={"ner": ignored, "slots": ignored, "qq": ignored[:, 0]})
    for name in ("ner", "slots", "qq"):
        assert outputs[name].loss == 0
        assert outputs[name].loss.requires_grad


# Training


def test_gradients_are_those_of_the_single_task_models_and_the_trunk_has_none():
    models, batch = (
        {name: model.double() for name, model in make_tasks(["qq", "ner", "answers"]).items()},
        make_batch(),
    )
    labels = make_labels(batch)
    merged = MultiTaskBertModel.from_tasks(models)
    outputs = merged(**batch, labels={name: labels[name].get("labels", labels[name]) for name in models})
    sum(output.loss for output in outputs.values()).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in merged.trunk.parameters())
    for name, model in models.items():
        model(**batch, **labels[name]).loss.backward()
        theirs = dict(model.named_parameters())
        for key, parameter in merged.branches[name].named_parameters():
            if ".layer." in key:
                index = int(key.split(".")[3])
                key = key.replace(f"layer.{index}.", f"layer.{index + TASKS[name][0]}.")
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-12, atol=1e-14)


def test_a_few_steps_train_branches_and_leave_the_trunk():
    merged, batch = MultiTaskBertModel.from_tasks(make_tasks(["qq", "slots"])).train(), make_batch()
    assert not merged.trunk.training
    assert merged.branches["qq"].training
    before = copy.deepcopy(merged.trunk.state_dict())
    labels = {name: x["labels"] for name, x in make_labels(batch).items() if name in ("qq", "slots")}
    optimizer = torch.optim.AdamW([p for p in merged.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = sum(output.loss for output in merged(**batch, labels=labels).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, tensor in merged.trunk.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.filterwarnings("ignore")  # PEFT uses a deprecated name of transformers
def test_adapters_that_are_not_merged_are_refused(models, merged):
    recipe = peft.LoraConfig(target_modules=["query"], layers_to_transform=[2], layers_pattern="layer")
    loaded, inner = (copy.deepcopy(models["qq"]) for _ in range(2))
    peft.inject_adapter_in_model(recipe, loaded)
    adapted = peft.get_peft_model(inner, recipe)
    for model in (loaded, inner):
        for refuse in (lambda m: merged.add_task("new", m), lambda m: take_branch(m, 2), lambda m: take_trunk(m, 2)):
            with pytest.raises(ValueError, match="is one with an adapter of PEFT. Merge the adapter"):
                refuse(model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    whole = adapted.merge_and_unload().eval()
    other = MultiTaskBertModel.from_tasks({"new": whole})
    assert torch.equal(other(**make_batch())["new"].logits, whole(**make_batch()).logits)


def test_weights_that_lie_otherwise_are_the_same_weights(models):
    model = copy.deepcopy(models["qq"])
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.data = weight.data.t().contiguous().t()
    merged = MultiTaskBertModel.from_tasks({"a": model})
    merged.add_task("b", model)
    MultiTaskBertModel.from_tasks(models).add_task("b", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_branch_reads_states_of_another_precision(models, dtype):
    branch = copy.deepcopy(take_branch(models["qq"], 2)).to(dtype)
    states = torch.randn(2, 5, 24)
    logits = branch(inputs_embeds=states).logits
    assert logits.dtype == dtype
    assert torch.equal(logits, branch(inputs_embeds=states.to(dtype)).logits)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"input_ids": torch.arange(5, 9)}, r"Inputs must have 2 dimensions.*got the shape \(4,\)"),
        ({"inputs_embeds": torch.zeros(4, 24)}, r"Inputs must have 3 dimensions.*got the shape \(4, 24\)"),
        ({"token_type_ids": torch.full((1, 4), 2)}, r"`token_type_ids` must be in \[0, 2\), got 2 at row 0"),
        (
            {"position_ids": torch.tensor([[0, 1, -1, 3]])},
            r"`position_ids` must be in \[0, 24\), got -1 .* position 2",
        ),
        ({"labels": {"qq": [0]}}, r"`labels\['qq'\]` must be a tensor or a mapping of tensors, got \[0\]"),
        ({"labels": {"qq": {"labels": [0]}}}, r"`labels\['qq'\]` must be a tensor or a mapping of tensors"),
    ],
)
def test_inputs_of_wrong_form_are_refused(merged, inputs, text):
    ids = {} if "inputs_embeds" in inputs else {"input_ids": torch.arange(5, 9)[None]}
    with pytest.raises(ValueError, match=text):
        merged(**ids | inputs)


def test_targets_of_minus_hundred_are_numbers(models, merged):
    batch, targets = make_batch(), torch.full((3,), -100.0)
    expected = models["score"](**batch, labels=targets).loss
    found = merged(**batch, tasks=["score"], labels={"score": targets})["score"].loss
    assert found.item() == pytest.approx(expected.item())
    assert found > 100
