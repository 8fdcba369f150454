"""Configurations of many tasks: fields, saving, and refusals."""

import json

import pytest
from tiny_multitask import TASKS, make_encoder, make_task, make_tasks
from transformers import BertConfig

from hf_moebert.methods.multitask.configuration_multitask import MultiTaskBertConfig, describe_task
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel


TASK = {"architecture": "BertForSequenceClassification", "frozen_layers": 2, "config": {"num_hidden_layers": 3}}


def test_a_config_comes_back_from_its_file(tmp_path):
    config = MultiTaskBertModel.from_tasks(make_tasks()).config
    config.save_pretrained(tmp_path)
    again = MultiTaskBertConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.tasks == config.tasks == json.loads(json.dumps(config.tasks))
    assert list(again.tasks) == sorted(TASKS)
    assert again.splits() == {name: (frozen, own) for name, (frozen, own, _) in TASKS.items()}


def test_a_task_is_described_by_its_own_config():
    for kind in ("classes", "score", "tags", "crf", "answers"):
        model = make_task(make_encoder(), 1, 2, kind)
        task = describe_task(type(model).__name__, model.config)
        assert (task["architecture"], task["frozen_layers"]) == (type(model).__name__, 1)
        again = type(model.config).from_dict(task["config"])
        assert again.to_diff_dict() == model.config.to_diff_dict()


def test_a_trunk_takes_over_the_sizes_and_nothing_of_the_task():
    single = BertConfig(hidden_size=24, num_attention_heads=4, num_labels=7, vocab_size=99, layer_norm_eps=1e-6)
    config = MultiTaskBertConfig.from_single_task(single, 5)
    assert config.model_type == "multitask_bert"
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (5, 24, 99)
    assert (config.layer_norm_eps, config.num_labels, config.tasks) == (1e-6, 2, {})


def test_configs_share_nothing():
    MultiTaskBertConfig().tasks["qq"] = TASK
    assert MultiTaskBertConfig().tasks == {}


def test_the_weights_are_always_those_of_the_index():
    config = MultiTaskBertConfig()
    assert config.transformers_weights == "model.safetensors.index.json"
    assert "transformers_weights" not in config.to_dict()


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ({"a.b": TASK}, "A task's name must be"),
        ({"qq": TASK, "QQ": TASK}, "must differ in more than case"),
        ({"qq": {"architecture": "X"}}, "must hold architecture, frozen_layers and config, got"),
        ({"qq": {**TASK, "frozen_layers": 3}}, r"`frozen_layers` must be an integer in \[0, 3\), got 3"),
        ({"qq": {**TASK, "frozen_layers": -1}}, r"`frozen_layers` must be an integer in \[0, 3\), got -1"),
        ({"qq": {**TASK, "config": {}}}, "must hold `num_hidden_layers`, got None"),
        (
            {"qq": {**TASK, "frozen_layers": 14, "config": {"num_hidden_layers": 15}}},
            r"in \[0, 12\], the trunk's depth",
        ),
        ([TASK], "tasks"),
        ({"qq": 3}, "must hold architecture, frozen_layers and config, got 3"),
        ({"qq": {**TASK, "config": []}}, "must hold architecture, frozen_layers and config, got"),
        (
            {"qq": {**TASK, "config": {"num_hidden_layers": 3, "hidden_size": 24}}},
            r"`tasks\['qq'\].config` must have the trunk's `hidden_size` 768, got 24",
        ),
    ],
)
def test_tasks_that_cannot_be_are_refused(tasks, text):
    with pytest.raises(ValueError, match=text):
        MultiTaskBertConfig(tasks=tasks)


def test_fingerprints_of_another_depth_are_refused():
    MultiTaskBertConfig(num_hidden_layers=1, trunk_sha256=["a", "b"])
    with pytest.raises(ValueError, match="must hold 3 hashes"):
        MultiTaskBertConfig(num_hidden_layers=2, trunk_sha256=["a", "b"])


def test_unknown_architectures_are_refused():
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = MultiTaskBertConfig(
        tasks={"qq": {**TASK, "architecture": "X", "config": {**sizes, "num_hidden_layers": 3}}}, **sizes
    )
    with pytest.raises(ValueError, match=r"architecture` must be one of BertForSequenceClassification, .* got 'X'"):
        MultiTaskBertModel(config)
