"""Fields of config.json, refusals, and the sizes of the published models."""

import json

import pytest
import torch
from transformers import BertConfig, GPT2Config, T5Config
from transformers.hf_argparser import HfArgumentParser

from hf_moebert.methods.mpoe import (
    MPOEBertConfig,
    MPOEBertForSequenceClassification,
    MPOEGPT2Config,
    MPOEGPT2LMHeadModel,
    MPOEGradientMaskConfig,
    MPOET5Config,
    MPOET5ForConditionalGeneration,
)


CONFIGS = (MPOET5Config, MPOEGPT2Config, MPOEBertConfig)
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
BASE_MATRIX, BASE_TOTAL, BASE_MATRICES = 768 * 3072, 222_903_552, 48
WRONG = [
    ({"num_experts": 0}, r"`num_experts` must be in \[1, 256\], got 0"),
    ({"num_experts": "8"}, "expected int"),
    ({"num_cores": 4}, "`num_cores` must be odd"),
    ({"bond": 0}, "`bond` must be a whole number of at least 1, got 0"),
    ({"gauge": "right"}, "`gauge` must be one of symmetric, left, centre, even"),
    ({"router": "top2"}, "`router` must be one of reference, switch"),
    ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be finite and >= 0"),
    ({"router_aux_loss_coef": float("nan")}, "`router_aux_loss_coef` must be finite and >= 0"),
    ({"mpoe_layers": [0, 99]}, "`mpoe_layers` must name blocks from 0 to"),
    ({"mpoe_layers": [1, 1]}, "ascending and each once"),
    ({"mpoe_shapes": {"other": {}}}, "`mpoe_shapes` must name"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("fields", "text"), WRONG)
def test_wrong_fields_are_refused(config, fields, text):
    with pytest.raises(ValueError, match=text):
        config(**fields)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": [2, 2, 2, 2, 2]}, "positive factors on each side that multiply to"),
        ({"rows": [48, 1, 1]}, "must have 5 positive factors"),
        ({"bonds": [1, 1, 1]}, "`bonds` must name 4 sizes"),
        ({"bonds": [999, 1, 1, 1]}, r"`bonds\[0\]` must be from 1 to"),
        ({"bonds": [0, 1, 1, 1]}, r"`bonds\[0\]` must be from 1 to"),
        ({"extra": [1]}, "must hold rows, columns and bonds"),
    ],
)
def test_chains_that_do_not_fit_are_refused(change, text):
    shapes = MPOEBertConfig(hidden_size=24, intermediate_size=48, num_attention_heads=4).plan_shapes()
    shapes["up"] = shapes["up"] | change
    with pytest.raises(ValueError, match=text):
        MPOEBertConfig(hidden_size=24, intermediate_size=48, num_attention_heads=4, mpoe_shapes=shapes)


@pytest.mark.parametrize(("config", "dense"), list(zip(CONFIGS, (T5Config, GPT2Config, BertConfig), strict=True)))
def test_a_config_takes_over_the_dense_one_and_comes_back_from_json(config, dense):
    made = config.from_dense(dense(pad_token_id=3), num_experts=2, bond=7, router="switch")
    assert (made.pad_token_id, made.num_experts, made.balance_coef) == (3, 2, 0.01)
    made.mpoe_shapes = made.plan_shapes()
    back = config.from_dict(json.loads(made.to_json_string()))
    assert back.to_dict() == made.to_dict()
    assert back.is_encoder_decoder == dense().is_encoder_decoder
    assert {bond for chain in back.mpoe_shapes.values() for bond in chain["bonds"]} <= set(range(1, 8))


def test_v1_1_keeps_its_scaling():
    dense = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    made = MPOET5Config.from_dense(dense)
    assert made.scale_decoder_outputs is dense.scale_decoder_outputs is False
    assert MPOET5Config.from_dict(json.loads(made.to_json_string())).scale_decoder_outputs is False


def test_a_bond_is_not_edited_behind_the_shapes():
    config = MPOEBertConfig(hidden_size=24, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, bond=4)
    config = MPOEBertForSequenceClassification(config).config
    for bond in (2, None):
        config.bond = bond
        with pytest.raises(ValueError, match=rf"`mpoe_shapes.up` must have the bonds .* that `bond` {bond} gives"):
            MPOEBertForSequenceClassification(config)


def test_the_preset_decides_the_weight_of_the_balance():
    assert MPOET5Config().balance_coef == 0
    assert MPOET5Config(router="switch").balance_coef == 0.01
    assert MPOET5Config(router="switch", router_aux_loss_coef=0).balance_coef == 0


# Spec of the published tables: entries per matrix, millions of MPOE and of Switch Transformers
PUBLISHED = [
    (4, 3_098_176, 258.4, 562.6),
    (8, 3_837_056, 293.8, 1015.6),
    (16, 5_314_816, 364.8, 1921.6),
    (32, 8_270_336, 506.6, 3733.5),
]


@pytest.mark.parametrize(("experts", "matrix", "millions", "switch"), PUBLISHED)
def test_t5_base_has_the_published_size(experts, matrix, millions, switch):
    with torch.device("meta"):
        model = MPOET5ForConditionalGeneration(MPOET5Config(num_experts=experts, **T5_BASE))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routers = sum(size for name, size in sizes.items() if ".router." in name)
    assert routers == 24 * experts * (768 + 1)  # the published totals leave them out
    total = sum(sizes.values()) - routers
    assert total == BASE_TOTAL + BASE_MATRICES * (matrix - BASE_MATRIX)
    assert round(total / 1e6, 1) == millions
    assert round((BASE_TOTAL + BASE_MATRICES * (experts - 1) * BASE_MATRIX) / 1e6, 1) == switch


def test_eight_experts_take_a_fifth_of_experts_with_their_own_centres():
    totals = []
    for share in (True, False):
        with torch.device("meta"):
            model = MPOET5ForConditionalGeneration(MPOET5Config(**T5_BASE, share_centre=share))
        totals.append(sum(p.numel() for name, p in model.named_parameters() if ".block.0.layer.1.Dense" in name))
    routers = 8 * 769
    assert (totals[0] - routers) / (totals[1] - routers) == pytest.approx(0.1885, abs=5e-5)


def test_gpt2_has_the_published_factors():
    config = MPOEGPT2Config()
    assert config.plan_shapes()["c_proj"] == {
        "rows": [3, 4, 4, 4, 4],
        "columns": [4, 4, 8, 6, 4],
        "bonds": [12, 192, 384, 16],
    }
    with torch.device("meta"):
        model = MPOEGPT2LMHeadModel(config)
    assert model.config.mpoe_shapes == config.plan_shapes()  # part of the checkpoint's format, so config.json says it
    assert config.mpoe_shapes is None  # what was passed in stays as it is


def test_the_recipe_is_parsed_and_refuses_what_it_cannot_do():
    (recipe,) = HfArgumentParser(MPOEGradientMaskConfig).parse_args_into_dataclasses(["--keep", "0.5", "--rescale"])
    assert (recipe.keep, recipe.rescale, recipe.granularity) == (0.5, True, "tensor")
    for fields, text in (
        ({"keep": 1.5}, r"`keep` must be a number in \[0, 1\], got 1.5"),
        ({"keep": "0.5"}, r"`keep` must be a number in \[0, 1\], got '0.5'"),
        ({"keep": True}, r"`keep` must be a number in \[0, 1\], got True"),
        ({"final_keep": float("nan")}, r"`final_keep` must be a number in \[0, 1\]"),
        ({"seed": 1.5}, "`seed` must be an integer, got 1.5. Leave it out"),
        ({"rescale": 1}, "`rescale` must be True or False, got 1. Leave it out"),
        ({"granularity": "row"}, "`granularity` must be one of tensor, element"),
        ({"rescale": 2}, "`rescale` must be True or False"),
    ):
        with pytest.raises(ValueError, match=text):
            MPOEGradientMaskConfig(**fields)
