"""Tiny dense models of every architecture, what masks make of them, and batches."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_moebert.methods.mixture_of_masks import from_dense


VOCAB, HIDDEN, UNITS, LAYERS = 61, 16, 32, 2
SIZES = {"hidden_size": HIDDEN, "intermediate_size": UNITS, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": VOCAB, "initializer_range": 0.3}
LLAMA = {**SIZES, **ENDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
T5 = {"d_model": HIDDEN, "d_kv": 4, "d_ff": UNITS, "num_layers": LAYERS, "num_heads": 4, "vocab_size": VOCAB}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": UNITS, **ENDS}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
BERT = {**SIZES, "vocab_size": VOCAB, "num_labels": 3, "max_position_embeddings": 32, "initializer_range": 0.3}
BERT |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
STOCK = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, head_dim=12, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=12)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5-gated": lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
}
KINDS = tuple(STOCK)
STRUCTURES = ("llama", "gpt2", "t5-gated", "bert")  # one of each: gated, transposed, encoder-decoder, encoder
GENERATIVE = tuple(kind for kind in KINDS if kind != "bert")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_dense(kind):
    """A random dense model, biases included, with outputs of a size that shows differences."""
    torch.manual_seed(0)
    dense = STOCK[kind]().eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return dense


def make_masked(kind, *, scatter=True, dense=None, **options):
    """A model whose scores and routers differ, as after training; with `scatter=False`, as `from_dense` leaves it."""
    model = from_dense(make_dense(kind) if dense is None else dense, **{"num_experts": 4} | options)
    return scatter_masks(model) if scatter else model


@torch.no_grad()
def scatter_masks(model, seed=7):
    """Spread scores over open, half open and closed, and routers over all experts."""
    generator = seeded(seed)
    for network in model.masked_networks().values():
        if network.masks.scores is not None:
            network.masks.scores.copy_(4 * torch.randn(network.masks.scores.shape, generator=generator))
        if network.router is not None:
            network.router.weight.copy_(torch.randn(network.router.weight.shape, generator=generator))
    return model


def make_fixed(kind, active=0.5, **options):
    """A model whose masks are closed for good."""
    return make_masked(kind, **options).fix_masks(active)


def make_batch(kind, *, labels=False, count=3):
    """Ids with padding at the end of the first row."""
    generator = seeded(5)
    ids = torch.randint(2, VOCAB, (count, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("t5"):
        targets = torch.randint(2, VOCAB, (count, 5), generator=generator)
        if labels:
            targets[-1, 3:] = -100
        return batch | {"labels" if labels else "decoder_input_ids": targets}
    if labels:
        batch["labels"] = torch.arange(count) % 3 if kind == "bert" else ids.masked_fill(mask == 0, -100)
    return batch


@torch.no_grad()
def logits_of(model, kind, **options):
    return model(**make_batch(kind, **options)).logits


def assert_near(found, wanted, share=1e-6):
    """Equal up to a share of the largest value."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * wanted.abs().max().item())
