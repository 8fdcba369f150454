"""Units that belong together are found by the row of the family."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_families import HEADS, LAYERS, WIDTHS, make_model, run
from torch.nn.utils import parametrize

from hf_moebert import MoEBertConfig, MoEBertModel
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.surgery import matrix_of, output_dim
from hf_moebert.architectures.units import cut_state, find_kept_units, find_unit_groups, narrow_layers


FAMILIES = [family for family, architecture in ARCHITECTURES.items() if architecture.units]
GROUPED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "eurobert", "phi"}
GATED = GROUPED - {"phi"} | {"nomic_bert"}
WITH_HEADS = GROUPED | {"bert", "camembert", "deberta-v2", "deit", "dinov2", "distilbert", "electra", "ernie"}
SEPARATE_POSITIONS = ("deberta-v2", {"share_att_key": False})
WITH_HEADS |= {"jina_embeddings_v3", "modernbert", "nomic_bert", "roberta", "vit", "xlm-roberta"}


def test_nothing_goes_where_nothing_is_zero():
    for group in find_unit_groups(make_model("bert")):
        assert find_kept_units(group).tolist() == list(range(group.num_units))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_ordered_by_layer_and_kind(family):
    groups, kinds = find_unit_groups(make_model(family)), ARCHITECTURES[family].units
    assert [(group.layer, group.kind) for group in groups] == [(layer, kind) for layer in (0, 1) for kind in kinds]
    for group in groups:
        heads = (2, 16) if family in GROUPED else (HEADS, 8)
        assert (group.num_units, group.unit_size) == (heads if group.kind == "heads" else (WIDTHS[family], 1))
        fused = family == "modernbert"
        readers = (1 if fused else 3) if group.kind == "heads" else 2 if family in GATED else 1
        assert len(group.readers) == readers
        assert group.blocks == ((3 if group.kind == "heads" else 2) if fused else 1)
        for reader in group.readers:
            assert len(matrix_of(reader)) == group.num_units * group.rows_of_unit(reader) * group.blocks


def test_heads_are_units_where_they_are_independent():
    assert {family for family in FAMILIES if "heads" in ARCHITECTURES[family].units} == WITH_HEADS


def rows_of(group, reader, parameter, units):
    """A view of what the rows of a reader hold for some units."""
    return parameter.movedim(output_dim(reader, parameter), 0).unflatten(0, (group.blocks, group.num_units, -1))[
        :, units
    ]


@pytest.mark.parametrize(("family", "fields"), [*((family, {}) for family in FAMILIES), SEPARATE_POSITIONS])
@torch.no_grad()
def test_a_unit_without_columns_is_cut_off_from_the_output(family, fields):
    """The oracle is the model itself: whatever a unit's rows hold, they matter until its columns are zero."""
    dense, model = make_model(family, **fields), make_model(family, **fields)
    for group in find_unit_groups(model):
        matrix_of(group.writer).detach().unflatten(1, (group.num_units, -1))[:, 1] = 0
    want = run(model)
    assert not torch.allclose(run(dense), want, atol=1e-3)
    for group in find_unit_groups(model):
        for reader in group.readers:
            for parameter in reader.parameters():
                own = rows_of(group, reader, parameter, slice(1, 2))
                before = own.clone()
                own.fill_(5.0)
                torch.testing.assert_close(run(model), want, atol=1e-5, rtol=0)
                own.copy_(before)
        reader = group.readers[-1]
        others = rows_of(group, reader, reader.weight, slice(0, 1))
        before = others.clone()
        others.copy_(torch.randn_like(others))  # the rows of others do matter
        assert not torch.allclose(run(model), want, atol=1e-3)
        others.copy_(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_single_number_keeps_a_unit(dtype):
    neurons, heads, *_ = find_unit_groups(make_model("bert").to(dtype))
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
def test_rows_alone_do_not_let_a_neuron_go():
    """The bias of a neuron without weights still reaches the columns behind it."""
    group = find_unit_groups(make_model("bert"))[0]
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
def test_neurons_are_rounded_up(zeros, multiple_of, kept):
    neurons, heads, *_ = find_unit_groups(make_model("bert"))
    neurons.writer.weight[:, list(zeros)] = 0
    assert find_kept_units(neurons, multiple_of=multiple_of).tolist() == kept
    heads.writer.weight.zero_()
    assert find_kept_units(heads, multiple_of=multiple_of).tolist() == [0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("family", "fields"), [*((family, {}) for family in FAMILIES), SEPARATE_POSITIONS])
@torch.no_grad()
def test_cut_units_fit_a_narrowed_model(family, fields, device):
    model, narrowed = make_model(family, **fields), make_model(family, **fields).to(device)
    kept = [(group, torch.tensor([1] if group.kind == "heads" else [0, 2, 5])) for group in find_unit_groups(model)]
    state = cut_state(model, kept)
    narrow_layers(narrowed, [{"neurons": 3, "heads": 1}] * LAYERS)
    assert {n: x.shape for n, x in state.items()} == {n: x.shape for n, x in narrowed.state_dict().items()}
    assert [(group.num_units, group.blocks) for group in find_unit_groups(narrowed)] == [
        (len(units), group.blocks) for group, units in kept
    ]
    if device == "meta":
        return
    narrowed.load_state_dict(state)
    for group, units in kept:
        columns = matrix_of(group.writer).detach().unflatten(1, (group.num_units, group.unit_size))
        columns[:, [unit for unit in range(group.num_units) if unit not in units]] = 0
    torch.testing.assert_close(run(narrowed), run(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - set(FAMILIES)))
def test_families_without_units_say_why(family):
    reason = ARCHITECTURES[family].kept
    assert reason
    with pytest.raises(ValueError, match=f"one of .*'bert'.*, got '{family}', because {reason}. Prune single weights"):
        find_unit_groups(make_model(family))


def test_other_types_are_refused():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24}
    moebert = MoEBertModel(MoEBertConfig(**sizes, num_experts=2, expert_size=12, num_shared_neurons=0))
    with pytest.raises(ValueError, match="`intermediate.dense` of BertLayer must be a plain .*got nothing. Merge"):
        find_unit_groups(moebert)
    with pytest.raises(ValueError, match="got 'Linear'"):
        find_unit_groups(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_other_modules_are_refused():
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["query"]), make_model("bert"))
    with pytest.raises(
        ValueError, match="`attention.self.query` of BertLayer must be a plain Linear or Conv1D, got .*lora.*Merge"
    ):
        find_unit_groups(adapted)
    with pytest.raises(
        ValueError, match="`attention.self.query` of BertLayer must be a plain Linear or Conv1D, got .*lora.*Merge"
    ):
        find_unit_groups(get_peft_model(make_model("bert"), LoraConfig(target_modules=["query"])))
    masked = make_model("vit")
    parametrize.register_parametrization(masked.layers[1].mlp.fc2, "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match="`mlp.fc2` of ViTLayer must be a plain Linear or Conv1D"):
        find_unit_groups(masked)
