"""Values derived from weights are kept while these stay as they are, and rebuilt after every kind of change."""

import copy
import pickle

import pytest
import torch

from hf_moebert.inference.caching import Derived


def sources():
    return [torch.arange(64.0).view(8, 8), torch.ones(3), torch.tensor(2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_it_is_made_once(dtype):
    tensors, calls = [t.to(dtype) for t in sources()], []
    kept = Derived()
    first = kept.get(tensors, lambda: calls.append(1) or sum(t.sum() for t in tensors))
    assert kept.get(tensors, lambda: calls.append(1)) is first
    assert calls == [1]
    assert kept.is_current(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[0].mul_(2),
        lambda t: t[0].data.mul_(2),
        lambda t: t[1].data.add_(1),
        lambda t: t[2].data.zero_(),
        lambda t: t[0].set_(torch.zeros(8, 8)),
        lambda t: setattr(t[0], "data", t[0] * 1.0),
        lambda t: t.__setitem__(1, t[1].clone()),
        lambda t: t.append(torch.ones(1)),
        lambda t: t.pop(),
        lambda t: t.reverse(),
    ],
)
def test_every_change_is_seen(change):
    tensors, kept = sources(), Derived()
    kept.get(tensors, lambda: 1)
    change(tensors)
    assert not kept.is_current(tensors)
    assert kept.get(tensors, lambda: 2) == 2


@pytest.mark.parametrize("expert", range(16))
def test_an_edit_of_one_expert_among_many_is_seen(expert):
    stack, kept = torch.ones(16, 3, 5, 2, 2), Derived()
    kept.get([stack], lambda: 1)
    stack.data[expert].zero_()
    assert not kept.is_current([stack])


def test_views_are_looked_at_too():
    whole, kept = torch.arange(64.0).view(8, 8), Derived()
    kept.get([whole.T], lambda: 1)
    whole.T.data.add_(1)
    assert not kept.is_current([whole.T])


def test_what_was_made_in_inference_mode_may_meet_gradients():
    weight = torch.ones(2, requires_grad=True)
    kept = Derived()
    with torch.inference_mode():
        made = kept.get([weight], lambda: weight * 2)
    assert not made.requires_grad
    assert not made.is_inference()
    (made * torch.ones(2, requires_grad=True)).sum().backward()


def test_copies_start_empty():
    kept = Derived()
    kept.get(sources(), lambda: 1)
    assert copy.deepcopy(kept).value is None
    assert pickle.loads(pickle.dumps(kept)).value is None
    kept.clear()
    assert kept.value is None
