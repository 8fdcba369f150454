"""The lengths of texts that models can take: the longest runs, and a longer one does not."""

import pytest
import torch
from tiny_families import CONFIGS, IMAGES, make_model
from torch import nn

from hf_moebert.architectures.positions import count_learned_positions, count_positions


OFFSET = {"roberta": 1, "xlm-roberta": 1, "camembert": 1, "mpnet": 2}  # the places before the first token's
TWO_STACKS = ("bart", "mbart", "t5", "mt5")


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(IMAGES) - set(TWO_STACKS)))
def test_the_longest_text_runs_and_a_longer_one_does_not(family):
    model = make_model(family)
    longest, learned = count_positions(model), count_learned_positions(model)
    assert longest == 32 - OFFSET.get(family, 0)
    ids = torch.full((1, longest + 1), 5)
    assert model(ids[:, 1:])[0].shape[1] == longest
    if learned is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(ids)


def test_some_models_have_no_limit():
    assert count_positions(nn.Linear(2, 2)) is None
    assert count_positions(make_model("vit")) is None
