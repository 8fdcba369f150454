"""Units that belong together are found by the layout of the model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_moebert import MoEBertConfig, MoEBertModel
from hf_moebert.methods.platon.modeling_units import LAYOUTS, find_kept_units, find_unit_groups


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}
GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0}
MODELS = {
    "bert": (BertModel, BertConfig, SIZES | TEXT),
    "roberta": (RobertaForTokenClassification, RobertaConfig, SIZES | TEXT),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24} | TEXT,
    ),
    "vit": (ViTForImageClassification, ViTConfig, SIZES | {"image_size": 8, "patch_size": 4}),
    "deberta": (DebertaModel, DebertaConfig, SIZES | TEXT | {"relative_attention": True, "pos_att_type": "c2p|p2c"}),
    "deberta-v2": (
        DebertaV2Model,
        DebertaV2Config,
        SIZES | TEXT | {"relative_attention": True, "pos_att_type": "c2p|p2c", "share_att_key": True},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES | TEXT | GROUPED),
    "mistral": (MistralModel, MistralConfig, SIZES | TEXT | GROUPED),
    "qwen2": (Qwen2Model, Qwen2Config, SIZES | TEXT | GROUPED),
    "qwen3": (Qwen3Model, Qwen3Config, SIZES | TEXT | GROUPED),
}


@pytest.fixture
def build():
    def make(family, **fields):
        cls, config_cls, sizes = MODELS[family]
        torch.manual_seed(0)
        model = cls(config_cls(**sizes, **fields)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name.lower():
                    parameter.copy_(torch.randn_like(parameter) / 3)
        return model

    return make


@torch.no_grad()
def run(model):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return model(torch.randn(2, 3, 8, 8, generator=generator))[0]
    return model(torch.randint(3, 50, (2, 7), generator=generator))[0]


def test_nothing_goes_where_nothing_is_zero(build):
    for group in find_unit_groups(build("bert")):
        assert find_kept_units(group).tolist() == list(range(group.num_units))


@pytest.mark.parametrize("family", LAYOUTS)
def test_groups_are_ordered_by_layer_and_kind(build, family):
    groups = find_unit_groups(build(family))
    kinds = ("neurons", "heads") if family in ("bert", "roberta", "distilbert", "vit") else ("neurons",)
    assert [(group.layer, group.kind) for group in groups] == [(layer, kind) for layer in (0, 1) for kind in kinds]
    for group in groups:
        assert (group.num_units, group.unit_size) == ((24, 1) if group.kind == "neurons" else (4, 8))
        readers = {"heads": 3, "neurons": 2 if LAYOUTS[family] is LAYOUTS["llama"] else 1}
        assert len(group.readers) == readers[group.kind]
        assert {len(reader.weight) for reader in group.readers} == {group.num_units * group.unit_size}


@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_a_unit_without_columns_is_cut_off_from_the_output(build, family):
    """The oracle is the model itself: whatever a unit's rows hold, they matter until its columns are zero."""
    dense, model = build(family), build(family)
    for group in find_unit_groups(model):
        size = group.unit_size
        group.writer.weight[:, size : 3 * size] = 0  # units 1 and 2
    want = run(model)
    assert not torch.allclose(run(dense), want, atol=1e-3)
    for group in find_unit_groups(model):
        own = slice(group.unit_size, 3 * group.unit_size)
        for reader in group.readers:
            for parameter in reader.parameters():
                before = parameter[own].clone()
                parameter[own] = 5.0
                torch.testing.assert_close(run(model), want, atol=1e-5, rtol=0)
                parameter[own] = before
        before = group.readers[-1].weight.clone()
        group.readers[-1].weight[3 * group.unit_size :] *= 2  # the rows of others do matter
        assert not torch.allclose(run(model), want, atol=1e-3)
        group.readers[-1].weight.copy_(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_single_number_keeps_a_unit(build, dtype):
    neurons, heads, *_ = find_unit_groups(build("bert").to(dtype))
    neurons.writer.weight[:, [0, 5, 23]] = -0.0
    assert find_kept_units(neurons).tolist() == [*range(1, 5), *range(6, 23)]
    neurons.writer.weight[31, 5] = 1e-38
    assert find_kept_units(neurons).tolist() == list(range(1, 23))
    neurons.writer.weight[0, 23] = float("nan")
    assert find_kept_units(neurons).tolist() == list(range(1, 24))
    heads.writer.weight[:, 8:24] = 0
    heads.writer.weight[3, 15] = 1
    assert find_kept_units(heads).tolist() == [0, 1, 3]


@torch.no_grad()
def test_rows_alone_do_not_let_a_neuron_go(build):
    """The bias of a neuron without weights still reaches the columns behind it."""
    group = find_unit_groups(build("bert"))[0]
    group.readers[0].weight[:4] = 0
    assert len(find_kept_units(group)) == 24
    group.writer.weight[:, :4] = 0
    assert group.readers[0].bias[:4].abs().min() > 0
    assert find_kept_units(group).tolist() == list(range(4, 24))


@pytest.mark.parametrize(
    ("zeros", "multiple_of", "kept"),
    [
        (range(3, 20), 8, [*range(4), *range(20, 24)]),  # 7 are needed, one more stays
        (range(8), 8, list(range(8, 24))),
        (range(7), 8, list(range(24))),
        (range(24), 8, list(range(8))),
        (range(24), 1, [0]),
        (range(1, 24), 7, list(range(7))),
        (range(2, 24), 100, list(range(24))),
    ],
)
@torch.no_grad()
def test_neurons_are_rounded_up(build, zeros, multiple_of, kept):
    neurons, heads, *_ = find_unit_groups(build("bert"))
    neurons.writer.weight[:, list(zeros)] = 0
    assert find_kept_units(neurons, multiple_of=multiple_of).tolist() == kept
    heads.writer.weight.zero_()
    assert find_kept_units(heads, multiple_of=multiple_of).tolist() == [0]


def test_other_types_are_refused():
    moebert = MoEBertModel(MoEBertConfig(**SIZES | TEXT, num_experts=2, expert_size=12, num_shared_neurons=0))
    with pytest.raises(ValueError, match="one of .*'bert'.*'vit'.*, got 'moebert'. Prune and shrink the dense model"):
        find_unit_groups(moebert)
    with pytest.raises(ValueError, match="got 'gpt2'"):
        find_unit_groups(GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(ValueError, match="got 'Linear'"):
        find_unit_groups(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_other_modules_are_refused(build):
    adapted = build("bert")
    adapted.add_adapter(LoraConfig(target_modules=["query"]))
    with pytest.raises(
        ValueError, match="`attention.self.query` of BertLayer must be a plain Linear, got .*lora.*Merge"
    ):
        find_unit_groups(adapted)
    with pytest.raises(
        ValueError, match="`attention.self.query` of BertLayer must be a plain Linear, got .*lora.*Merge"
    ):
        find_unit_groups(get_peft_model(build("bert"), LoraConfig(target_modules=["query"])))
    masked = build("vit")
    parametrize.register_parametrization(masked.vit.layers[1].mlp.fc2, "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match="`mlp.fc2` of ViTLayer must be a plain Linear"):
        find_unit_groups(masked)
