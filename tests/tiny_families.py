"""A tiny random model of every family in the table of architectures."""

import torch
from transformers import AutoConfig, AutoModel


HIDDEN, UNITS, LAYERS, HEADS, VOCAB = 32, 24, 2, 4, 50
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": UNITS}
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | TEXT | {"num_key_value_heads": 2, "head_dim": 8}
RELATIVE = SIZES | TEXT | {"relative_attention": True, "pos_att_type": "c2p|p2c"}
TWO_STACKS = {f"{side}_layers": LAYERS for side in ("encoder", "decoder")}
TWO_STACKS |= {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
TWO_STACKS |= {f"{side}_ffn_dim": UNITS for side in ("encoder", "decoder")}
STARTS = {"d_model": HIDDEN, "decoder_start_token_id": 0}
T5 = STARTS | {"d_kv": 8, "d_ff": UNITS, "num_layers": LAYERS, "num_heads": HEADS}
CONFIGS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "gpt_neox"), SIZES | TEXT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "eurobert"), GROUPED),
    **dict.fromkeys(("bart", "mbart"), TWO_STACKS | TEXT | STARTS),
    **dict.fromkeys(("t5", "mt5"), T5 | TEXT),
    **dict.fromkeys(("nomic_bert", "jina_embeddings_v3", "mpnet"), SIZES | TEXT),
    **dict.fromkeys(("vit", "deit"), SIZES | {"image_size": 8, "patch_size": 4}),
    "albert": SIZES | TEXT | {"embedding_size": 16},
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS} | TEXT,
    "deberta": RELATIVE,
    "deberta-v2": RELATIVE | {"share_att_key": True},
    "dinov2": {"image_size": 8, "patch_size": 4, "mlp_ratio": 2}
    | {name: size for name, size in SIZES.items() if name != "intermediate_size"},
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": UNITS} | TEXT,
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": UNITS, "n_positions": 32} | TEXT,
    "modernbert": SIZES | TEXT | {"cls_token_id": 1, "sep_token_id": 2},
    "opt": SIZES | TEXT | {"word_embed_proj_dim": HIDDEN, "ffn_dim": UNITS},
    "phi": SIZES | TEXT | {"num_key_value_heads": 2},
}
WIDTHS = dict.fromkeys(CONFIGS, UNITS) | {"bloom": 4 * HIDDEN, "dinov2": 2 * HIDDEN}  # theirs are multiples
GATED = {"t5 gated": {"feed_forward_proj": "gated-gelu"}, "dinov2 gated": {"use_swiglu_ffn": True}}
IMAGES = ("vit", "deit", "dinov2")


def make_model(family, auto=AutoModel, **fields):
    """A model whose weights and biases are all of a size that shows differences, but for normalisations."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family] | fields)
    config.architectures = []  # which transformers reads where a family has two classes for a head
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "ln_" not in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def make_inputs(model, count=2):
    """Ids or pixels for a model."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}
    inputs = {"input_ids": torch.randint(3, VOCAB, (count, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (count, 5), generator=generator)
    return inputs


@torch.no_grad()
def run(model):
    """Return what a model makes of its inputs."""
    return model(**make_inputs(model))[0]
