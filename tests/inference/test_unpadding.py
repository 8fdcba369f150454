"""Sentences in one row: packing, its inverse, and attention that keeps them apart."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from hf_moebert.inference.unpadding import Sentences, attend


MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


@settings(deadline=None)
@given(MASKS)
def test_unpacking_undoes_packing(rows):
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 3)
    sentences = Sentences.from_mask(mask)
    packed = sentences.pack(x)
    assert packed.shape == (1, int(mask.sum()), 3)
    assert torch.equal(sentences.unpack(packed), x * mask.unsqueeze(-1))


def test_what_is_the_same_in_all_rows_is_packed_for_each():
    sentences = Sentences.from_mask(torch.tensor([[True, True, False], [False, True, True]]))
    assert sentences.pack(torch.arange(3).unsqueeze(0)).tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("lengths", [[3, 5, 2], [4, 4, 4], [1, 1, 5, 5, 2], [0, 3, 0, 0, 2], [6]])
def test_attention_equals_that_with_a_block_mask(lengths):
    torch.manual_seed(0)
    tokens, heads, size = sum(lengths), 2, 4
    qkv = torch.randn(1, tokens, 3, heads, size)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (tokens,)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    block = owner.unsqueeze(0) == owner.unsqueeze(1)  # (tokens, tokens)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=block, scale=0.3).transpose(1, 2).flatten(2)
    sentences = Sentences(torch.arange(tokens), lengths, (len(lengths), max(lengths)))
    torch.testing.assert_close(attend(qkv, None, sentences, scale=0.3), expected, atol=1e-6, rtol=1e-5)


def test_attention_without_sentences_takes_the_mask():
    qkv, mask = torch.randn(2, 4, 3, 2, 4), torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    output = attend(qkv, mask, None, scale=0.5)
    changed = qkv.clone()
    changed[:, 3, 1:] += 1  # key and value of the masked token
    torch.testing.assert_close(attend(changed, mask, None, scale=0.5), output)
