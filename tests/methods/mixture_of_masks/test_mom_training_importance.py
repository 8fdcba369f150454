"""The importance of units: against the derivative written out, and against finite differences."""

import pytest
import torch
from mom_runs import KINDS, make, make_data, make_dense

from hf_moebert.methods.mixture_of_masks.modeling_surgery import find_feed_forwards
from hf_moebert.methods.mixture_of_masks.training_importance import measure_unit_importance


def batches_of(kind, size=4, count=8):
    rows = make_data(kind, count=count)
    for start in range(0, count, size):
        yield {name: torch.tensor(column) for name, column in rows[start : start + size].items()}


def loss_with(model, batch, layer, unit, value):
    """The loss with one unit scaled, by a change of the matrix that reads it."""
    down = find_feed_forwards(model)[layer].part("down").weight
    kept = down.detach().clone()
    with torch.no_grad():
        down[:, unit] *= value
        loss = float(model(**batch).loss)
        down.copy_(kept)
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_as_finite_differences_example_by_example(kind):
    model, step = make_dense(kind).double(), 0.02  # not less: transformers computes some losses in single precision
    found = measure_unit_importance(model, batches_of(kind, size=4, count=4))
    assert found.shape == (4 if kind == "t5" else 2, 24)
    assert found.device.type == "cpu"
    for layer in range(len(found)):
        for unit in (0, 7, 23):
            slopes = [
                (loss_with(model, row, layer, unit, 1 + step) - loss_with(model, row, layer, unit, 1 - step))
                / (2 * step)
                for row in batches_of(kind, size=1, count=4)
            ]
            assert found[layer, unit] == pytest.approx(sum(map(abs, slopes)), rel=1e-2, abs=5e-5)
    assert (found > 0).any()


def test_as_the_derivative_written_out():
    """Of the last layer: gradient of its output, times the matrix, times the activations, summed over tokens."""
    model, total = make_dense(), torch.zeros(24)
    kept = {}
    network = model.model.layers[1].mlp
    network.down_proj.register_forward_hook(lambda module, inputs, output: kept.update(inner=inputs[0], outer=output))
    for row in batches_of("llama", size=1):
        loss = model(**row).loss
        (gradient,) = torch.autograd.grad(loss, kept["outer"])
        total += ((gradient @ network.down_proj.weight) * kept["inner"]).sum(dim=(0, 1)).abs().detach()
    torch.testing.assert_close(measure_unit_importance(model, batches_of("llama"))[1], total)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_batches_does_not_matter(kind):
    model = make_dense(kind)
    whole = measure_unit_importance(model, batches_of(kind, size=8))
    for size in (1, 3):  # of eight, the last one is smaller
        torch.testing.assert_close(measure_unit_importance(model, batches_of(kind, size=size)), whole)


def test_signs_of_examples_do_not_cancel():
    batch = next(batches_of("bert", size=1))
    both = {name: torch.cat([column, column]) for name, column in batch.items()}
    both["labels"] = torch.tensor([0, 1])
    model = make_dense("bert")
    with torch.no_grad():
        model.classifier.bias.zero_()
        model.classifier.weight[1] = -model.classifier.weight[0]
    apart = [measure_unit_importance(model, [batch | {"labels": torch.tensor([label])}]) for label in (0, 1)]
    torch.testing.assert_close(measure_unit_importance(model, [both]), sum(apart))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = make_dense(dropout=0.5).train(training)
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = measure_unit_importance(model, batches_of("llama"))
    assert torch.equal(one, measure_unit_importance(model, batches_of("llama")))  # dropout is off
    with pytest.raises(RuntimeError):
        measure_unit_importance(model, [{"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2).long()}])
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_summed_in_single():
    found = measure_unit_importance(make_dense().bfloat16(), batches_of("llama"))
    assert found.dtype == torch.float32
    whole = measure_unit_importance(make_dense(), batches_of("llama"))
    assert torch.corrcoef(torch.stack([found.flatten(), whole.flatten()]))[0, 1] > 0.99


def test_what_cannot_be_measured_is_refused():
    model = make_dense()
    with pytest.raises(ValueError, match="must hold at least one batch, and give finite derivatives, got none"):
        measure_unit_importance(model, [])
    with pytest.raises(ValueError, match=r"must have `labels`, got \['attention_mask', 'input_ids'\]"):
        measure_unit_importance(model, [{k: v for k, v in b.items() if k != "labels"} for b in batches_of("llama")])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite derivatives, got NaN or infinity. Check the data and the model"):
        measure_unit_importance(model, batches_of("llama"))
    with pytest.raises(ValueError, match="must be a plain Linear or Conv1D, got nothing"):
        measure_unit_importance(make(), batches_of("llama"))
