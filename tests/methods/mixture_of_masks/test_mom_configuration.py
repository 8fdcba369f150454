"""The configurations of masked models: defaults, round trips and refusals."""

import json

import pytest
from tiny_masks import KINDS, LAYERS, LLAMA, T5, make_dense, make_fixed, make_masked
from transformers import AutoConfig, LlamaConfig

from hf_moebert.methods.mixture_of_masks import from_dense, shrink
from hf_moebert.methods.mixture_of_masks.configuration_mixture_of_masks import (
    MoMBertConfig,
    MoMGPT2Config,
    MoMLlamaConfig,
    MoMT5Config,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_the_dense_one_and_its_own_fields(kind):
    dense = make_dense(kind).config
    config = make_masked(kind, top_k=2, group_size=4, budget="layer", router_aux_loss_coef=0, layers=[0]).config
    own = {"num_experts": 4, "num_experts_per_tok": 2, "group_size": 4, "mask_budget": "layer", "layers": [0]}
    own |= {"mask_stage": "learned", "router_aux_loss_coef": 0}
    assert {name: getattr(config, name) for name in own} == own
    assert config.model_type == f"mom_{config.dense_model_type}" == f"mom_{dense.model_type}"
    differing = {"model_type", "architectures", "dtype", "transformers_version", *own}
    for name, value in dense.to_dict().items():
        if name not in differing:
            assert config.to_dict()[name] == value, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_experts", [1, 4])
def test_configs_of_all_stages_come_back_from_json(kind, num_experts, tmp_path):
    fixed = make_fixed(kind, num_experts=num_experts)
    small = shrink(fixed)
    for config in (make_masked(kind, num_experts=num_experts).config, fixed.config, small.config):
        config.save_pretrained(tmp_path)
        back = AutoConfig.from_pretrained(tmp_path)
        assert type(back) is type(config)
        loading = ("transformers_version", "_name_or_path")
        assert all(back.to_dict()[name] == value for name, value in config.to_dict().items() if name not in loading)
        assert back == AutoConfig.from_pretrained(tmp_path)
        assert repr(back).startswith(type(back).__name__)
        assert back.blocks == list(range(2 * LAYERS if kind.startswith("t5") else LAYERS))
    assert [back.block_sizes(block) for block in back.blocks] == [small.config.block_sizes(b) for b in back.blocks]
    assert json.loads((tmp_path / "config.json").read_text())["per_layer_config"]


def test_configs_of_0_1_0_are_read(tmp_path):
    """They call `layers` `masked_layers`."""
    config = MoMGPT2Config(n_layer=2, layers=[1])
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["masked_layers"] = stored.pop("layers")
    file.write_text(json.dumps(stored))
    back = AutoConfig.from_pretrained(tmp_path)
    assert back.layers == back.blocks == [1]
    assert back.to_dict()["layers"] == [1]
    assert "masked_layers" not in back.to_dict()
    assert back.hidden_size == config.n_embd  # the names of the base class still hold
    file.write_text(json.dumps(stored | {"masked_layers": [7]}))
    with pytest.raises(ValueError, match=r"`layers` must name blocks .* got \[7\]"):
        AutoConfig.from_pretrained(tmp_path)


def test_sizes_are_read_as_they_were_written():
    sizes = {0: (7, [0, 0]), 1: (0, [3, 4]), 3: (5, [1, 0])}
    config = MoMLlamaConfig(**LLAMA | {"num_hidden_layers": 4}, num_experts=2)
    entries = config.write_sizes(sizes)
    assert entries[0] == {"intermediate_size": 7}
    compacted = MoMLlamaConfig.from_dense(config, mask_stage="compact", per_layer_config=entries)
    assert {block: compacted.block_sizes(block) for block in (1, 3)} == {1: (0, [3, 4]), 3: (5, [1, 0])}
    assert compacted.block_sizes(0) == (7, [])
    config = MoMT5Config(**T5, num_experts=2)
    compacted = MoMT5Config.from_dense(config, mask_stage="compact", per_layer_config=config.write_sizes(sizes))
    assert compacted.write_sizes(sizes)[1] == {
        "d_ff": 0,
        "expert_sizes": [3, 4],
        "d_ff_of_decoder": 5,
        "expert_sizes_of_decoder": [1, 0],
    }
    assert [compacted.block_sizes(block) for block in (0, 1, 3)] == [(7, []), (0, [3, 4]), (5, [1, 0])]


def test_widths_have_the_names_of_the_base_class():
    assert (MoMLlamaConfig.width_name, MoMGPT2Config.width_name, MoMT5Config.width_name) == (
        "intermediate_size",
        "n_inner",
        "d_ff",
    )


WRONG = [
    ({"num_experts": 0}, r"`num_experts` must be in \[1, 64\], got 0"),
    ({"num_experts": 65}, r"`num_experts` must be in \[1, 64\], got 65"),
    (
        {"num_experts_per_tok": 0},
        r"`num_experts_per_tok` .* must be in \[1, 1\], the number of experts, got 0",
    ),
    (
        {"num_experts_per_tok": 5},
        r"`num_experts_per_tok` .* must be in \[1, 1\], the number of experts, got 5",
    ),
    ({"group_size": 0}, "`group_size` must be at least 1, got 0"),
    ({"mask_stage": "soft"}, "`mask_stage` must be one of learned, fixed, compact, got 'soft'"),
    ({"mask_budget": "model"}, "`mask_budget` must be one of global, layer, got 'model'"),
    ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be finite and >= 0, got -0.1"),
    ({"router_aux_loss_coef": float("nan")}, "`router_aux_loss_coef` must be finite and >= 0, got nan"),
    ({"router_aux_loss_coef": float("inf")}, "`router_aux_loss_coef` must be finite and >= 0, got inf"),
    ({"chunk_size_feed_forward": 2}, "`chunk_size_feed_forward` must be 0, .* got 2"),
    ({"layers": []}, r"`layers` must name blocks from 0 to 1, ascending and each once, got \[\]"),
    ({"layers": [1, 0]}, r"`layers` must name blocks .* got \[1, 0\]"),
    ({"layers": [0, 0]}, r"`layers` must name blocks .* got \[0, 0\]"),
    ({"layers": [2]}, r"`layers` must name blocks .* got \[2\]"),
    ({"layers": [-1]}, r"`layers` must name blocks .* got \[-1\]"),
]


@pytest.mark.parametrize(("fields", "text"), WRONG)
def test_fields_that_break_a_rule_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        MoMBertConfig(num_hidden_layers=2, **fields)


@pytest.mark.parametrize("fields", [{"num_experts": "4"}, {"group_size": 1.5}, {"layers": "all"}])
def test_fields_of_the_wrong_type_are_refused(fields):
    with pytest.raises(ValueError, match=f"'{next(iter(fields))}'"):
        MoMLlamaConfig(**fields)


def test_blocks_of_a_t5_are_counted_through_its_decoder():
    assert MoMT5Config(num_layers=2, num_decoder_layers=3, layers=[4]).num_blocks == 5
    with pytest.raises(ValueError, match="from 0 to 4, ascending"):
        MoMT5Config(num_layers=2, num_decoder_layers=3, layers=[5])


def test_options_of_from_dense_are_refused_by_the_same_rules():
    dense = make_dense("llama")
    assert isinstance(dense.config, LlamaConfig)
    for options, text in (
        ({"num_experts": 0}, "`num_experts` must be in"),
        ({"top_k": 5}, "`num_experts_per_tok` .`top_k` of `from_dense`. must be in"),
        ({"budget": "all"}, "`mask_budget` must be one of"),
        ({"layers": [7]}, "`layers` must name blocks from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=text):
            from_dense(dense, **options)
