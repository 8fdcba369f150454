"""Sparse linear layers compute what the dense ones do, and their size and speed are measured, not promised."""

import copy

import pytest
import torch
from pruned_models import make_bert, make_gpt2, prune
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

from hf_moebert.checkpoints.packing import packed_bytes
from hf_moebert.inference import sparse
from hf_moebert.inference.sparse import CsrLinear, to_sparse_linears
from hf_moebert.measuring import sparse_forms
from hf_moebert.measuring.latency import SpeedUp
from hf_moebert.measuring.sparse_forms import compare_sparse_forms, sparse_form_rows


def make_linear(kept=0.2, *, bias=True, dtype=torch.float32, rows=64, columns=64):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight[torch.rand_like(linear.weight) >= kept] = 0
    return linear


def make_pair(**options):
    """Two layers that share a weight in 2:4 pattern, and one that is dense."""
    model = nn.Sequential(make_linear(1.0, **options), nn.GELU(), make_linear(1.0, **options))
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.view(-1, 4)[:, :2] = 0
    return model


# Identity


def test_layers_with_more_weights_than_allowed_stay_dense():
    model = nn.Sequential(make_linear(0.1), make_linear(0.9), nn.LayerNorm(64))
    dense = model[1]
    assert list(to_sparse_linears(model, "csr", max_kept=0.2)) == ["0"]
    assert isinstance(model[0], CsrLinear)
    assert model[1] is dense


# Oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 64), (3, 64), (2, 5, 64), (2, 3, 4, 64)])
def test_csr_computes_what_the_dense_layer_does(shape, bias, dtype):
    dense = make_linear(bias=bias, dtype=dtype, rows=24)
    x = torch.randn(shape, dtype=dtype)
    y, expected = CsrLinear(dense)(x), dense(x)
    assert y.shape == expected.shape
    assert y.is_contiguous()
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_a_whole_model_computes_the_same(make):
    dense, model = make(), make()
    ids = torch.arange(24).view(2, 12)
    shares = to_sparse_linears(model, "csr")
    assert shares
    for name, share in shares.items():
        weight = dense.get_submodule(name).weight
        assert share == int(weight.count_nonzero()) / weight.numel()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)  # without no_grad as well


def test_a_layer_used_twice_stays_one():
    linear = make_linear()
    model = nn.ModuleDict({"first": linear, "second": linear})
    to_sparse_linears(model, "csr")
    assert isinstance(model["first"], CsrLinear)
    assert model["first"] is model["second"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 needs CUDA")
def test_two_of_four_computes_what_the_dense_layers_do():
    dense = make_pair().to("cuda", torch.float16)
    model = copy.deepcopy(dense)
    assert to_sparse_linears(model, "2:4") == {"0": 0.5, "2": 0.5}
    x = torch.randn(128, 64, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.state_dict()


# Refusals


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({}, "coo", r"`layout` must be one of \['csr', '2:4'\], got 'coo'"),
        ({"kept": 0.9}, "csr", "of which at most 0.5 is kept, got 0.9.*Prune the model first"),
        (
            {"dtype": torch.bfloat16},
            "csr",
            r"float32 or float64, got '0' in torch.bfloat16. Use `model.float\(\)`",
        ),
        ({}, "2:4", "'2:4' needs CUDA, got '0' on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(options, layout, message):
    model = nn.Sequential(make_linear(**options))
    with pytest.raises(ValueError, match=message):
        to_sparse_linears(model, layout)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


class OnCuda:
    """A weight that claims to be on a GPU, to reach the checks for one."""

    device = torch.device("cuda")

    def __init__(self, weight):
        self.weight = weight

    def __getattr__(self, name):
        return getattr(self.weight, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs float16 or bfloat16, got 'layer' in torch.float32. Use `model.half\(\)`"),
        ({"dtype": torch.half, "rows": 24}, "rows in multiples of 32 and columns of 64, got 'layer' of 24 x 64"),
        ({"dtype": torch.half, "columns": 32}, "rows in multiples of 32 and columns of 64, got 'layer' of 64 x 32"),
        ({"dtype": torch.half, "kept": 0.5}, "at most 2 of every 4 weights in a row, got 4 in 'layer'"),
    ],
)
def test_what_two_of_four_asks_for(options, message):
    with pytest.raises(ValueError, match=message):
        sparse._refuse_semi_structured("layer", OnCuda(make_linear(**options).weight))


def test_a_weight_in_pattern_is_accepted():
    sparse._refuse_semi_structured("layer", OnCuda(make_pair(dtype=torch.half)[0].weight))


@pytest.mark.parametrize("max_kept", [0, -0.1, 1.1])
def test_the_share_is_a_share(max_kept):
    with pytest.raises(ValueError, match=rf"`max_kept` must be in \(0, 1\], got {max_kept}"):
        to_sparse_linears(nn.Sequential(make_linear()), "csr", max_kept=max_kept)


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match="got no such layer"):
        to_sparse_linears(nn.LayerNorm(4), "csr")


def test_a_sparse_model_can_neither_be_saved_nor_trained(tmp_path):
    model = make_bert()
    to_sparse_linears(model, "csr")
    with pytest.raises(ValueError, match=r"'bert.encoder.*' is sparse in memory only and cannot be saved"):
        model.save_pretrained(tmp_path)
    loss = model(torch.arange(8).view(1, 8), labels=torch.tensor([1])).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


# The comparison


def test_the_comparison_counts_bytes():
    model = make_bert()
    dense, packed, csr, semi = compare_sparse_forms(model, seq=8, rounds=2)
    assert [row.form for row in (dense, packed, csr, semi)] == ["dense", "packed", "csr", "2:4"]
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    assert dense.bytes == sum(weight.nbytes for weight in matrices if packed_bytes(weight) < weight.nbytes)
    assert packed.bytes < 0.2 * dense.bytes
    shadow = make_bert()
    saved = -sum(weight.nbytes for weight in shadow.parameters())
    to_sparse_linears(shadow, "csr")
    saved += sum(weight.nbytes for weight in shadow.parameters())
    for module in shadow.modules():
        if isinstance(module, CsrLinear):
            weight = module.weight
            saved += weight.values().nbytes + weight.crow_indices().nbytes + weight.col_indices().nbytes
    assert csr.bytes == dense.bytes + saved
    assert csr.speed_up.rounds == 2
    assert semi.bytes is semi.speed_up is None
    assert "needs CUDA" in semi.meaning


def test_the_comparison_leaves_the_model_as_it_is():
    model = make_bert().train()
    pointers = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    compare_sparse_forms(model, seq=8, rounds=2)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    assert pointers == {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert not any(isinstance(module, CsrLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.2, 1.4, "faster than dense"), (0.6, 0.8, "slower than dense"), (0.9, 1.1, "about as fast as dense")],
)
def test_words_follow_the_figures(low, high, verdict):
    model = nn.Sequential(make_linear(0.4))
    shares = sparse.find_sparse_linears(model, "csr")
    words = sparse_forms._describe_speed(SpeedUp((low + high) / 2, low, high, 0.1, 5, 1, "wall"), model, shares)
    assert words.startswith(verdict)
    assert f"here at {1 - shares['0']:.0%} sparsity of 1 layers" in words


def test_a_dense_model_has_nothing_to_gain():
    model = BertModel(BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_()  # the row of the padding was zero
    rows = sparse_form_rows(compare_sparse_forms(model, seq=8, rounds=2))
    assert [row["speed-up"] for row in rows] == ["-"] * 4
    assert "nothing to gain" in rows[1]["meaning"]
    assert "nothing to gain" in rows[2]["meaning"]
    matrices = sum(weight.nbytes for weight in model.parameters() if weight.dim() > 1)
    assert [row["bytes"] for row in rows] == [f"{matrices:,}"] * 2 + ["-"] * 2


def test_an_encoder_decoder_runs_too():
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert [row.form for row in compare_sparse_forms(model, seq=4, rounds=2)] == ["dense", "packed", "csr", "2:4"]


@pytest.mark.parametrize(("batch", "seq"), [(0, 8), (1, 0), (1, 17)])
def test_a_shape_that_does_not_fit_is_refused(batch, seq):
    with pytest.raises(ValueError, match=f"`seq` at most 16, got {batch} and {seq}"):
        compare_sparse_forms(make_bert(), batch=batch, seq=seq)


def test_models_of_pictures_run_too_and_those_of_sound_are_refused():
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
    forms = compare_sparse_forms(prune(ViTModel(config)), rounds=2)
    assert [form.form for form in forms] == ["dense", "packed", "csr", "2:4"]
    assert forms[2].speed_up is not None
    with torch.device("meta"):
        spoken = WhisperModel(WhisperConfig(encoder_layers=1, decoder_layers=1))
    with pytest.raises(ValueError, match="on `input_ids` or on `pixel_values` of one size, got WhisperModel"):
        compare_sparse_forms(spoken)
