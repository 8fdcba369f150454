"""Cost, depth and fingerprints."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import BertConfig, BertModel

from hf_moebert.methods.multitask.functional import (
    chain_hashes,
    choose_depth,
    choose_uniform,
    layers_run,
    overhead,
    separate_parameters,
    total_parameters,
)


# Four of the paper's eight tasks; the others make up its published sum of 7 shared and 26 own layers
KNOWN = {"qqp": (2, 1), "rte": (7, 5), "mnli": (4, 3), "cola": (4, 8)}
EIGHT = KNOWN | {"sst2": (6, 2), "qnli": (4, 3), "mrpc": (7, 3), "stsb": (6, 1)}


def test_one_task_costs_what_its_model_costs():
    assert overhead({"qq": (7, 5)}, 12) == 1
    sizes = {"layer": 7, "embeddings": 11, "pooler": 3, "heads": 2}
    assert total_parameters({"qq": (7, 5)}, **sizes) == separate_parameters(1, 12, **sizes)


def test_the_papers_configuration():
    assert layers_run(KNOWN) == 7 + 17
    assert layers_run(EIGHT) == 7 + 26
    assert overhead(EIGHT, 12) == 33 / 96 == 0.34375


def test_the_papers_parameters():
    with torch.device("meta"):
        bert = BertModel(BertConfig())
    parts = {"layer": bert.encoder.layer[0], "embeddings": bert.embeddings, "pooler": bert.pooler}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert round(total_parameters(EIGHT, **sizes) / 1e6, 1) == 262.5
    assert round(separate_parameters(8, 12, **sizes) / 1e6, 1) == 875.9


def test_depth_grows_while_it_pays():
    scores = {1: 0.80, 2: 0.85, 3: 0.87, 4: 0.88}
    assert [choose_depth(scores, gain) for gain in (0.0, 0.01, 0.02, 0.03, 0.05, 0.06)] == [4, 4, 3, 2, 2, 1]
    assert choose_depth({1: 0.8, 2: 0.8, 3: 0.9}, 0.0) == 1  # ties to the shallower
    assert choose_depth({1: 0.8, 2: 0.7, 3: 0.9}, 0.01) == 1
    assert choose_depth({5: 0.1}, 0.01) == 5
    assert choose_depth({1: 0.80, 4: 0.84}, 0.01) == 4  # pays for three layers
    assert choose_depth({1: 0.80, 4: 0.82}, 0.01) == 1


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(1, 20))
def test_depth_is_the_first_after_which_one_more_gains_too_little(points, gain):
    expected = next(
        (i for i in range(1, len(points)) if points[i] - points[i - 1] < gain),
        len(points),
    )
    assert choose_depth(dict(enumerate(points, start=1)), gain) == expected


def test_one_depth_for_all_is_chosen_by_the_mean():
    scores = {"a": {1: 0.5, 2: 0.9, 3: 0.9}, "b": {1: 0.6, 2: 0.6, 3: 0.6, 4: 1.0}}
    assert choose_uniform(scores, 0.1) == 2
    assert choose_uniform({"a": scores["a"]}, 0.1) == choose_depth(scores["a"], 0.1)


def test_every_prefix_has_its_fingerprint():
    generator = torch.Generator().manual_seed(0)
    parts = [{"b": torch.rand(2, 3, generator=generator), "a": torch.rand((), generator=generator)} for _ in range(4)]
    hashes = chain_hashes(parts)
    digest = hashlib.sha256()
    for name in ("a", "b"):
        digest.update(f"{name} torch.float32 {tuple(parts[0][name].shape)}\n".encode())
        digest.update(parts[0][name].numpy().tobytes())
    assert hashes[0] == digest.hexdigest()
    assert chain_hashes(parts[:2]) == hashes[:2]
    assert chain_hashes(dict(reversed(part.items())) for part in parts) == hashes
    assert len(set(hashes)) == 4
    changes = [
        {"b": parts[1]["b"].reshape(3, 2), "a": parts[1]["a"]},
        {"c": parts[1]["b"], "a": parts[1]["a"]},
        {"b": parts[1]["b"].view(torch.int32), "a": parts[1]["a"]},
        {"b": parts[1]["b"].clone().index_fill_(0, torch.tensor(1), 0.0), "a": parts[1]["a"]},
    ]
    for change in changes:
        found = chain_hashes([parts[0], change, *parts[2:]])
        assert [x == y for x, y in zip(found, hashes, strict=True)] == [True, False, False, False]


def test_fingerprints_do_not_depend_on_strides_and_know_half_precision():
    x = torch.rand(4, 3).bfloat16()
    assert chain_hashes([{"x": x.T}]) == chain_hashes([{"x": x.T.contiguous()}])
    assert chain_hashes([{"x": x}]) != chain_hashes([{"x": x.half()}])


def test_what_cannot_be_is_refused():
    for splits in ({}, {"a": (-1, 2)}, {"a": (1, -2)}):
        with pytest.raises(ValueError, match="`splits` must give"):
            layers_run(splits)
    for scores in ({}, {1: math.nan}, {1: math.inf}):
        with pytest.raises(ValueError, match="`scores` must hold a finite score"):
            choose_depth(scores, 0.01)
    for gain in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`min_gain` must be finite and >= 0"):
            choose_depth({1: 0.5}, gain)
    for scores in ({}, {"a": {1: 0.5}, "b": {2: 0.5}}):
        with pytest.raises(ValueError, match="a depth that all tasks have"):
            choose_uniform(scores, 0.01)
