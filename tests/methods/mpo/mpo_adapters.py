"""Tiny random models for the tests of MPO adapters."""

import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconMambaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MobileBertConfig,
    MobileBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)


VOCAB = 32
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WIDE = {"initializer_range": 0.3}  # so that outputs differ
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig(**SMALL, **USUAL, **WIDE)),
    "albert": (AlbertForSequenceClassification, AlbertConfig(**SMALL, **USUAL, **WIDE, embedding_size=8)),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(**SMALL, **WIDE, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**SMALL, **WIDE, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, **USUAL, **WIDE)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(**SMALL, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
    ),
}


def build(kind, **options):
    """A random model, always the same."""
    cls, config = MODELS[kind]
    torch.manual_seed(0)
    return cls(type(config)(**{**config.to_dict(), **options})).eval()


def ids(rows=3):
    return torch.randint(3, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(1))


def inputs(model, x):
    return {"input_ids": x} | ({"decoder_input_ids": x[:, :4]} if model.config.model_type == "t5" else {})


def logits(model, x, *, grad=False):
    with torch.set_grad_enabled(grad):
        return model.eval()(**inputs(model, x)).logits.detach()


def train(model, x, *, steps=3, weight_decay=0.0):
    """A few steps of what trains, which leave the model in evaluation mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=weight_decay)
    torch.manual_seed(2)
    for _ in range(steps):
        model.train()(**inputs(model, x)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# Models with modules that read the weights of their linear layers
READ = {
    "wavlm": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "mamba": ["dt_proj", "x_proj"],
    "falcon_mamba": ["dt_proj"],
    "mobilebert": ["predictions.transform.dense", "predictions.dense"],
    "t5": ["q", "wo"],  # it reads a dtype
}


def read_directly(kind):
    """A random model, the names of its layers that are read, and inputs."""
    torch.manual_seed(0)
    tokens = {"input_ids": ids()}
    if kind == "wavlm":
        drops = ("layerdrop", "hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
        sizes = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
        sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
        model = WavLMModel(WavLMConfig(**USUAL, **sizes, **dict.fromkeys(drops, 0.0)))
        return model, READ[kind], {"input_values": torch.randn(2, 200)}
    if kind == "t5":
        return build(kind), READ[kind], tokens | {"decoder_input_ids": tokens["input_ids"]}
    if kind == "mobilebert":
        sizes = {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8}
        return MobileBertForMaskedLM(MobileBertConfig(**SMALL, **USUAL, **sizes)), READ[kind], tokens
    config = (MambaConfig if kind == "mamba" else FalconMambaConfig)(
        **SMALL, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    return AutoModelForCausalLM.from_config(config), READ[kind], tokens
