"""One network of experts: gradients, rebuilding, and a cache that is never stale."""

import pytest
import torch
from torch.nn import functional as F

from hf_moebert.methods.mpo.functional import contract
from hf_moebert.methods.mpoe import MPOET5Config
from hf_moebert.methods.mpoe.modeling_experts import MPOEFeedForward


ROUTERS = ("reference", "switch")


def make_network(share=True, router="reference", **options):
    """One network in float64 with experts that differ, and tokens that reach all of them but the last."""
    config = MPOET5Config(d_model=12, d_ff=20, num_experts=4, share_centre=share, router=router, **options)
    torch.manual_seed(0)
    network = MPOEFeedForward(config, config.dense_act_fn).double()
    with torch.no_grad():
        network.router.weight.normal_()
        network.router.bias[3] = -1e9
    return network, torch.randn(30, 12, dtype=torch.float64)


@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
def test_the_gradient_of_the_centre_is_the_sum_over_experts(proj):
    network, tokens = make_network(feed_forward_proj=proj)
    network(tokens).square().sum().backward()
    index = network.score(tokens).argmax(1)
    assert index.unique().tolist() == [0, 1, 2]
    total = {name: torch.zeros_like(centre) for name, centre in network.centres.items()}
    for expert in range(3):
        matrices, own = {}, {}
        for name in network.sizes:
            cores = [core[expert] for core in network.auxiliary[name]]
            own[name] = network.centres[name].detach().clone().requires_grad_()
            matrices[name] = contract([*cores[:2], own[name], *cores[2:]], *network.sizes[name])
        x = tokens[index == expert]
        *ups, down = matrices.values()
        inner = network.act_fn(F.linear(x, ups[0]))
        inner = inner * F.linear(x, ups[1]) if len(ups) > 1 else inner
        F.linear(inner, down).square().sum().backward()
        for name, centre in own.items():
            total[name] += centre.grad
    for name, centre in network.centres.items():
        torch.testing.assert_close(centre.grad, total[name])


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_without_tokens_get_no_gradient_and_routers_get_one(router):
    network, tokens = make_network(router=router)
    network(tokens).square().sum().backward()
    for stack in network.auxiliary.parameters():
        assert stack.grad[:3].flatten(1).abs().sum(1).min() > 0
        assert (stack.grad[3] == 0).all()
    assert network.router.weight.grad[:3].abs().sum() > 0


def test_all_parameters_get_a_gradient_without_any_token():
    network, tokens = make_network()
    network(tokens[:0]).sum().backward()
    names = {name for name, p in network.named_parameters() if p.grad is None}
    assert not names


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [1, 3], [2]])
def test_rebuilding_together_is_rebuilding_one_by_one(share, experts):
    network, _ = make_network(share)
    for name, sizes in network.sizes.items():
        stack = network.contract(name, experts)
        for matrix, expert in zip(stack, experts, strict=True):
            cores = [core if share and k == 2 else core[expert] for k, core in enumerate(network.chain(name))]
            torch.testing.assert_close(matrix, contract(cores, *sizes))


def test_gradients_are_those_of_finite_differences():
    network, tokens = make_network()
    names = [name for name, _ in network.named_parameters() if ".wi" in name and "router" not in name]
    values = [dict(network.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *x: torch.func.functional_call(network, dict(zip(names, x, strict=True)), (tokens[:4],)),
        values,
        fast_mode=True,
    )


def test_the_cache_notices_every_change():
    network, tokens = make_network()
    network.eval()

    def check():
        with torch.no_grad():
            kept = network(tokens)
        expected = network(tokens)  # with gradients nothing is kept
        torch.testing.assert_close(kept, expected.detach(), rtol=1e-12, atol=1e-12)
        return expected

    first = check()
    stack = network._rebuilt["wi"].value
    check()
    assert network._rebuilt["wi"].value is stack
    changes = [
        lambda: network.centres["wi"].data.copy_(network.centres["wi"] * 2),
        lambda: network.auxiliary["wo"][1].requires_grad_(False).mul_(3),
        lambda: network.centres.update({"wi": torch.nn.Parameter(torch.ones_like(network.centres["wi"]))}),
        lambda: setattr(network.centres["wo"], "data", network.centres["wo"].data * 5),
        lambda: network.load_state_dict({k: v * 1.1 for k, v in network.state_dict().items()}),
        lambda: network.load_state_dict({k: v * 1.1 for k, v in network.state_dict().items()}, assign=True),
        lambda: network.float().double(),
    ]
    for number, change in enumerate(changes):
        change()
        now = check()
        if number < len(changes) - 1:
            assert not torch.allclose(now, first), number
        first = now
    network.train()
    assert network._rebuilt["wi"].value is None


def test_what_inference_mode_has_kept_serves_later_forwards():
    network, tokens = make_network()
    network.eval()
    with torch.inference_mode():
        first = network(tokens).clone()
    with torch.no_grad():
        assert torch.equal(network(tokens), first)
    x = tokens.clone().requires_grad_()
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0
