"""Tiny dense models, their converted forms, batches, and what the Trainer needs."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_moebert.methods.mpoe import (
    MPOEBertForSequenceClassification,
    MPOEGPT2LMHeadModel,
    MPOET5ForConditionalGeneration,
)


VOCAB = 61
CLASSES = {
    "t5": MPOET5ForConditionalGeneration,
    "t5-gated": MPOET5ForConditionalGeneration,
    "gpt2": MPOEGPT2LMHeadModel,
    "bert": MPOEBertForSequenceClassification,
}
KINDS = tuple(CLASSES)


def make_dense(kind, dropout=0.0):
    """A random dense model with outputs of a size that shows differences."""
    torch.manual_seed(0)
    if kind.startswith("t5"):
        sizes = {"d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        body = "gated-gelu" if kind == "t5-gated" else "relu"
        ends = {"decoder_start_token_id": 0, "dropout_rate": dropout, "tie_word_embeddings": kind == "t5"}
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, feed_forward_proj=body, **sizes, **ends)).eval()
    if kind == "gpt2":
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        dense = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=0, **sizes, **drops)
        )
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
        config = BertConfig(vocab_size=VOCAB, num_labels=3, max_position_embeddings=32, initializer_range=0.3)
        config.update({**sizes, **drops})
        dense = BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return dense.eval()


def make(kind, dropout=0.0, **options):
    """A converted model."""
    return CLASSES[kind].from_dense(make_dense(kind, dropout), **{"num_experts": 4, **options})


def make_batch(kind, labels=False, count=3):
    """Ids with padding at the end of the first row."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (count, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("t5"):
        targets = torch.randint(2, VOCAB, (count, 5), generator=generator)
        targets[-1, 3:] = -100
        return batch | ({"labels": targets} if labels else {"decoder_input_ids": targets.clamp(min=0)})
    if labels:
        batch["labels"] = ids.clone() if kind == "gpt2" else torch.arange(count) % 3
    return batch


def make_examples(kind, count=8):
    """The rows of one batch without padding, which any batch size collates."""
    batch = make_batch(kind, labels=True, count=count)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["labels"] = batch["labels"].clamp(min=0)
    return [{name: tensor[row] for name, tensor in batch.items()} for row in range(count)]


def make_args(folder, **options):
    """Quiet CPU training."""
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 1}
    return TrainingArguments(str(folder), **{"max_steps": 3, "per_device_train_batch_size": 4, **quiet, **options})


def centres(model):
    """The central tensors by name."""
    return {name: p for name, p in model.named_parameters() if ".centres." in name}


def randomise_routers(model, std=1.0):
    """Routers that send tokens everywhere."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for network in model.networks().values():
            network.router.weight.copy_(torch.randn(network.router.weight.shape, generator=generator) * std)
            network.router.bias.copy_(torch.randn(network.router.bias.shape, generator=generator))
    return model


def separate_experts(model):
    """Experts that differ, as after training."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".auxiliary." in name or ".biases." in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model
