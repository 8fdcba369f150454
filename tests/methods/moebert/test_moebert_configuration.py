"""The config of a MoEBERT: what it accepts and refuses, and that it survives its file."""

import json

import pytest
from hypothesis import given, strategies as st
from transformers import AutoConfig, BertConfig, RobertaConfig

from hf_moebert import MoEBertConfig


def test_config_survives_json(tmp_path):
    config = MoEBertConfig(routing="gate-token", top_k=2, layers=[1, 3], num_experts=8, expert_size=640)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoEBertConfig
    assert loaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}
    assert (loaded.routing, loaded.top_k, loaded.layers, loaded.num_experts) == ("gate-token", 2, [1, 3], 8)


def test_configs_of_version_0_1_load_and_are_saved_anew(tmp_path):
    MoEBertConfig(layers=[2, 5]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["moe_layers"] = fields.pop("layers")
    file.write_text(json.dumps(fields))
    old = AutoConfig.from_pretrained(tmp_path)
    assert old.layers == [2, 5]
    old.save_pretrained(tmp_path)
    saved = json.loads(file.read_text())
    assert saved["layers"] == [2, 5]
    assert "moe_layers" not in saved


@pytest.mark.parametrize("name", ["layers", "moe_layers"])
@pytest.mark.parametrize("value", [[12], [1.0], [True], ["1"], "abc", 3])
def test_layers_are_validated_under_either_name(name, value):
    with pytest.raises(ValueError, match="layers"):
        MoEBertConfig(**{name: value})


@given(st.integers(1, 16), st.integers(1, 200), st.integers(0, 64))
def test_sizes_are_accepted_exactly_when_the_neurons_suffice(num_experts, expert_size, num_shared):
    enough = num_shared <= expert_size <= num_shared + (64 - num_shared) // num_experts
    sizes = {"num_experts": num_experts, "expert_size": expert_size, "num_shared_neurons": num_shared}
    if enough:
        assert MoEBertConfig(intermediate_size=64, **sizes).expert_size == expert_size
    else:
        with pytest.raises(ValueError, match="must be"):
            MoEBertConfig(intermediate_size=64, **sizes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, r"`num_experts` must be in \[1, 256\], got 0"),
        ({"num_experts": 257}, r"`num_experts` must be in \[1, 256\], got 257"),
        ({"num_experts": "4"}, "expected int, got str"),
        ({"expert_size": 1153}, "`expert_size` must be at most 1152 for 4 experts .* got 1153"),
        ({"expert_size": 0, "num_shared_neurons": 0}, "`num_shared_neurons` must be in"),
        ({"num_shared_neurons": 769}, r"`num_shared_neurons` must be in \[0, expert_size\], got 769"),
        ({"routing": "hash_random"}, "`routing` must be one of .* got 'hash_random'"),
        ({"gate_scaling": "none"}, "`gate_scaling` must be one of"),
        ({"top_k": 0}, r"`top_k` must be in \[1, 1\]"),
        ({"top_k": 2}, r"`top_k` must be in \[1, 1\] .* needs a gate"),
        ({"top_k": 5, "routing": "gate-token"}, r"`top_k` must be in \[1, 4\]"),
        ({"top_k": 2, "routing": "gate-token", "gate_scaling": "reference"}, r"`top_k` must be in \[1, 1\]"),
        ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be finite and >= 0, got -0.1"),
        ({"router_aux_loss_coef": float("nan")}, "`router_aux_loss_coef` must be finite"),
        ({"layers": [12]}, r"`layers` must name layers from 0 to 11"),
        ({"layers": [1, 1]}, "`layers` must name layers .* each once"),
        ({"layers": [2, 1]}, "`layers` must name layers .* ascending"),
        ({"is_decoder": True}, "`is_decoder` and `add_cross_attention` must be False"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEBertConfig(**fields)


def test_from_dense_keeps_what_the_dense_config_says():
    dense = BertConfig(hidden_act="relu", id2label={0: "no", 1: "yes"}, problem_type="single_label_classification")
    config = MoEBertConfig.from_dense(dense, routing="gate-sentence")
    assert config.model_type == "moebert"
    assert (config.hidden_act, config.id2label, config.routing) == ("relu", {0: "no", 1: "yes"}, "gate-sentence")
    assert config.problem_type == "single_label_classification"


def test_from_dense_refuses_typos_and_other_architectures():
    with pytest.raises(ValueError, match="`num_expert` is no field of MoEBertConfig. Did you mean `num_experts`?"):
        MoEBertConfig.from_dense(BertConfig(), num_expert=4)
    with pytest.raises(ValueError, match="must be of the family .'bert'. .* got 'roberta'"):
        MoEBertConfig.from_dense(RobertaConfig())
