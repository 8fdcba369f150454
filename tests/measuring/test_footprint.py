"""Parameters, bytes and operations against counts made by hand."""

from dataclasses import asdict

import pytest
import torch
from pruned_models import make_bert
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from hf_moebert import shrink
from hf_moebert.measuring.footprint import Footprint, find_widths, measure_footprint, width_rows
from hf_moebert.reporting.tables import describe_sparsity


TINY = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


class Experts(nn.Module):
    """Four experts of which a token meets one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 5))
        self.active_fraction = 0.25
        self.norm = nn.LayerNorm(5)  # a child: the fraction is not its own


def test_bert_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    footprint = measure_footprint(model)
    assert footprint.total == footprint.active == 109_482_240
    assert footprint.nonzero is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_equal_the_count_by_hand(attention, device):
    with torch.device(device):
        model = BertModel(BertConfig(**TINY, attn_implementation=attention), add_pooling_layer=False)
    seq, hidden, intermediate, layers = 16, 8, 16, 2
    multiply_adds = layers * (4 * hidden * hidden + 2 * hidden * intermediate + 2 * seq * hidden)
    assert measure_footprint(model, seq_len=seq).flops_per_token == 2 * multiply_adds


def test_grouped_products_are_counted():
    class Grouped(BertModel):
        def forward(self, input_ids):
            tokens = self.embeddings(input_ids)[0]  # (tokens, hidden)
            offsets = torch.tensor([3, 16], dtype=torch.int32)
            return nn.functional.grouped_mm(tokens, self.experts, offs=offsets)

    model = Grouped(BertConfig(**TINY))
    model.experts = nn.Parameter(torch.ones(2, 8, 24))
    assert measure_footprint(model, seq_len=16).flops_per_token == 2 * 8 * 24


def test_tied_parameters_count_once():
    model = BertForMaskedLM(BertConfig(**TINY))
    untied = BertForMaskedLM(BertConfig(**TINY, tie_word_embeddings=False))
    assert measure_footprint(untied, seq_len=4).total - measure_footprint(model, seq_len=4).total == 32 * 8 + 32


def test_active_fraction_applies_to_own_parameters_only():
    model = nn.Sequential(nn.Linear(5, 3), Experts())
    assert measure_footprint(model) == Footprint(18 + 60 + 10, 18 + 15 + 10, 18 + 60 + 5, 0, 0, None, None)


def test_parameter_tied_to_experts_counts_as_its_busier_user():
    model = nn.ModuleList([Experts(), Experts()])
    model[1].weight = model[0].weight
    model[1].active_fraction = 0.5
    assert measure_footprint(model).active == 30 + 20


def test_nonzero_sees_pruned_weights():
    model = nn.Linear(4, 4)
    nn.init.ones_(model.bias)
    nn.init.zeros_(model.weight)
    model.weight.data[0] = 2.0
    assert measure_footprint(model).nonzero == 4 + 4


def test_zeros_of_pruned_matrices_are_counted_apart():
    model = make_bert()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    footprint = measure_footprint(model, seq_len=8)
    assert 0 < footprint.pruned <= sum(weight.numel() for weight in matrices)
    assert footprint.pruned_nonzero == pytest.approx(0.1 * footprint.pruned, rel=0.05)
    words = describe_sparsity(asdict(footprint))
    assert f"{1 - footprint.pruned_nonzero / footprint.pruned:.1%} of pruned matrices" in words
    assert f"{1 - footprint.nonzero / footprint.total:.1%} of the model" in words
    dense = measure_footprint(BertForSequenceClassification(BertConfig(**TINY)), seq_len=8)
    assert (dense.pruned, dense.pruned_nonzero) == (0, 0)
    assert describe_sparsity(asdict(dense)) == "nothing pruned"
    with torch.device("meta"):
        assert measure_footprint(BertModel(BertConfig(**TINY)), seq_len=8).pruned is None


def test_bytes_on_disk_are_the_files_sizes(tmp_path):
    model = BertForSequenceClassification(BertConfig(**TINY))
    model.save_pretrained(tmp_path)
    (tmp_path / "platon_state.safetensors").write_bytes(b"of a callback")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert measure_footprint(model, seq_len=4, folder=tmp_path).bytes_on_disk == size


def test_modes_are_put_back():
    model = BertModel(BertConfig(**TINY)).train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    measure_footprint(model, seq_len=4)
    assert [module.training for module in model.modules()] == modes


def test_encoder_decoder_has_no_operations_per_token():
    model = T5Model(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert measure_footprint(model, seq_len=4).flops_per_token is None


@pytest.mark.parametrize("seq_len", [0, 33])
def test_refuses_a_length_the_model_has_no_positions_for(seq_len):
    with pytest.raises(ValueError, match=f"`seq_len` must be .* 32 positions, got {seq_len}"):
        measure_footprint(BertModel(BertConfig(**TINY)), seq_len=seq_len)


def test_the_places_that_a_family_leaves_to_padding_are_no_positions():
    model = RobertaModel(RobertaConfig(**TINY, pad_token_id=1))
    assert measure_footprint(model, seq_len=30).flops_per_token > 0
    with pytest.raises(ValueError, match="`seq_len` must be .* 30 positions, got 31"):
        measure_footprint(model, seq_len=31)


def test_refuses_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` must hold the model's \*.safetensors"):
        measure_footprint(nn.Linear(2, 2), folder=tmp_path)


def test_widths_beside_the_dense_origin():
    dense = make_bert()
    assert find_widths(dense) == []
    with torch.no_grad():
        dense.bert.encoder.layer[0].output.dense.weight[:, 3:] = 0
    narrow = shrink(dense)
    widths = find_widths(narrow)
    assert [width.units for width in widths if width.kind == "neurons"] == [3]
    origin = narrow.num_parameters() + sum(width.weights * (width.dense - width.units) for width in widths)
    assert origin == dense.num_parameters()
    rows = width_rows(widths)
    assert rows[0]["neurons"] == f"3 of {dense.config.intermediate_size}"
    assert list(rows[0]) == ["layer", "neurons", "heads"]
