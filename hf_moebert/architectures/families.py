"""Where each family of models keeps its layers, attention and feed-forward networks: one row for each model type."""

from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from operator import attrgetter
from typing import Any

from .paths import Architecture, AttentionPaths, FeedForwardPaths, Stack


NEURONS, HEADS = ("neurons",), ("neurons", "heads")
TWO_STACKS = "`per_layer_config` counts the layers of one stack, and the family has two"


def _bert_like(file: str, name: str) -> Architecture:
    return replace(BERT, bert_like=f"transformers.models.{file}.modeling_{file}.{name}")


SEPARATE = AttentionPaths(("q_proj", "k_proj", "v_proj"), "o_proj")
GATED = FeedForwardPaths(gate="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
TWO_LAYERS = FeedForwardPaths(up="fc1", activation="activation_fn", down="fc2")

BERT_FEED_FORWARD = FeedForwardPaths(
    up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense"
)
BERT = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(
                AttentionPaths(
                    readers=("attention.self.query", "attention.self.key", "attention.self.value"),
                    writer="attention.output.dense",
                    module="attention.self",
                    head_size="attention_head_size",
                ),
            ),
            feed_forwards=(BERT_FEED_FORWARD,),
        ),
    ),
    units=HEADS,
    trunk=(),
)
MPNET = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(AttentionPaths(("q", "k", "v"), "o").under("attention.attn"),),
            feed_forwards=(BERT_FEED_FORWARD,),
        ),
    ),
    units=NEURONS,
    kept="the heads of all layers share a table of relative positions",
    trunk=("encoder.relative_attention_bias",),
)
DEBERTA = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(AttentionPaths(("attention.self.in_proj",), "attention.output.dense"),),
            feed_forwards=(BERT_FEED_FORWARD,),
        ),
    ),
    units=NEURONS,
    kept="queries, keys and values of a head are one above the other, and their biases apart",
    undeclared=("cls_dropout", "embedding_size", "talking_head"),
)
DEBERTA_V2 = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(
                AttentionPaths(
                    readers=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
                    writer="attention.output.dense",
                    module="attention.self",
                    head_size="attention_head_size",
                    extras=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
                ),
            ),
            feed_forwards=(BERT_FEED_FORWARD,),
        ),
    ),
    units=HEADS,
    undeclared=(
        "attention_head_size",
        "cls_dropout",
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "embedding_size",
        "norm_rel_ebd",
        "position_buckets",
        "share_att_key",
    ),
    trunk=("encoder.rel_embeddings", "encoder.LayerNorm"),
)
DISTILBERT = Architecture(
    stacks=(
        Stack(
            path="transformer.layer",
            attentions=(
                AttentionPaths(
                    readers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                    writer="attention.out_lin",
                    module="attention",
                    head_size="attention_head_size",
                ),
            ),
            feed_forwards=(
                FeedForwardPaths(
                    up="ffn.lin1", activation="ffn.activation", down="ffn.lin2", outer_dropout="ffn.dropout"
                ),
            ),
        ),
    ),
    units=HEADS,
    neurons="hidden_dim",
    heads="n_heads",
    trunk=(),
)
VIT = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(SEPARATE.under("attention", "head_dim"),),
            feed_forwards=(TWO_LAYERS.under("mlp"),),
        ),
    ),
    units=HEADS,
    undeclared=("head_dim",),
)
DINOV2 = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(SEPARATE.under("attention", "head_dim"),),
            feed_forwards=(TWO_LAYERS.under("mlp"), GATED.under("mlp")),
        ),
    ),
    units=HEADS,
    undeclared=("head_dim",),
)
ALBERT = Architecture(
    stacks=(
        Stack(
            path="encoder.albert_layer_groups.*.albert_layers",
            attentions=(AttentionPaths(("query", "key", "value"), "dense").under("attention"),),
            feed_forwards=(FeedForwardPaths(up="ffn", activation="activation", down="ffn_output"),),
        ),
    ),
    kept="`per_layer_config` counts layers, and these share their weights",
)
MODERNBERT = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(AttentionPaths(("Wqkv",), "Wo").under("attn", "head_dim"),),
            feed_forwards=(
                FeedForwardPaths(up="Wi", activation="act", down="Wo", inner_dropout="drop", fused=True).under("mlp"),
            ),
        ),
    ),
    units=HEADS,
    undeclared=("head_dim",),
    trunk=(),
)
NOMIC = Architecture(
    stacks=(Stack("layers", (SEPARATE.under("self_attn", "head_dim"),), (GATED.under("mlp"),)),),
    units=HEADS,
    undeclared=("head_dim",),
)
JINA = Architecture(
    stacks=(Stack("layers", (SEPARATE.under("self_attn", "head_dim"),), (TWO_LAYERS.under("mlp"),)),),
    units=HEADS,
    undeclared=("head_dim",),
)
LLAMA = replace(NOMIC, heads="num_key_value_heads")
GPT2 = Architecture(
    stacks=(
        Stack(
            path="h",
            attentions=(
                AttentionPaths(("attn.c_attn",), "attn.c_proj"),
                AttentionPaths(("crossattention.q_attn", "crossattention.c_attn"), "crossattention.c_proj"),
            ),
            feed_forwards=(
                FeedForwardPaths(up="mlp.c_fc", activation="mlp.act", down="mlp.c_proj", outer_dropout="mlp.dropout"),
            ),
        ),
    ),
    units=NEURONS,
    kept="its attention computes with the number of heads",
    neurons="n_inner",
    undeclared=("classifier_dropout", "hidden_dropout", "summary_last_dropout"),
)
GPT_NEOX = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(AttentionPaths(("attention.query_key_value",), "attention.dense"),),
            feed_forwards=(FeedForwardPaths(up="mlp.dense_h_to_4h", activation="mlp.act", down="mlp.dense_4h_to_h"),),
        ),
    ),
    units=NEURONS,
    kept="queries, keys and values of a head are one above the other in one matrix",
    undeclared=("head_dim",),
)
BLOOM = Architecture(
    stacks=(
        Stack(
            path="h",
            attentions=(AttentionPaths(("self_attention.query_key_value",), "self_attention.dense"),),
            feed_forwards=(
                FeedForwardPaths(
                    up="mlp.dense_h_to_4h", activation="mlp.gelu_impl", down="mlp.dense_4h_to_h", adds_residual=True
                ),
            ),
        ),
    ),
    units=NEURONS,
    kept="queries, keys and values of a head are one above the other in one matrix",
    undeclared=("classifier_dropout",),
)
PHI = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(AttentionPaths(("q_proj", "k_proj", "v_proj"), "dense").under("self_attn", "head_dim"),),
            feed_forwards=(TWO_LAYERS.under("mlp"),),
        ),
    ),
    units=HEADS,
    heads="num_key_value_heads",
    undeclared=("head_dim",),
)
BART_ATTENTION = AttentionPaths(("q_proj", "k_proj", "v_proj"), "out_proj")
OPT = Architecture(
    stacks=(Stack("decoder.layers", (BART_ATTENTION.under("self_attn"),), (TWO_LAYERS,)),),
    units=NEURONS,
    kept="its attention computes with the number of heads",
    neurons="ffn_dim",
)
BART = Architecture(
    stacks=(
        Stack("encoder.layers", (BART_ATTENTION.under("self_attn"),), (TWO_LAYERS,)),
        Stack(
            path="decoder.layers",
            attentions=(BART_ATTENTION.under("self_attn"), BART_ATTENTION.under("encoder_attn")),
            feed_forwards=(TWO_LAYERS,),
            depth="decoder_layers",
        ),
    ),
    kept=TWO_STACKS,
)
T5_ATTENTION = AttentionPaths(("q", "k", "v"), "o")
T5_PLAIN = FeedForwardPaths(up="wi", activation="act", down="wo", inner_dropout="dropout")
T5_GATED = FeedForwardPaths(gate="wi_0", up="wi_1", activation="act", down="wo", inner_dropout="dropout")
T5 = Architecture(
    stacks=(
        Stack(
            path="encoder.block",
            attentions=(T5_ATTENTION.under("layer.0.SelfAttention"),),
            feed_forwards=(T5_PLAIN.under("layer.1.DenseReluDense"), T5_GATED.under("layer.1.DenseReluDense")),
        ),
        Stack(
            path="decoder.block",
            attentions=(
                T5_ATTENTION.under("layer.0.SelfAttention"),
                T5_ATTENTION.under("layer.1.EncDecAttention"),
            ),
            feed_forwards=(T5_PLAIN.under("layer.2.DenseReluDense"), T5_GATED.under("layer.2.DenseReluDense")),
            depth="num_decoder_layers",
        ),
    ),
    kept=TWO_STACKS,
)

ARCHITECTURES = {
    "albert": ALBERT,
    "bart": BART,
    "bert": _bert_like("bert", "Bert"),
    "bloom": BLOOM,
    "camembert": _bert_like("camembert", "Camembert"),
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "deit": VIT,
    "dinov2": DINOV2,
    "distilbert": DISTILBERT,
    "electra": replace(_bert_like("electra", "Electra"), trunk=None),  # what projects its embeddings is in the body
    "ernie": _bert_like("ernie", "Ernie"),
    "eurobert": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "jina_embeddings_v3": JINA,
    "llama": LLAMA,
    "mbart": BART,
    "mistral": LLAMA,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "mt5": T5,
    "nomic_bert": NOMIC,
    "opt": OPT,
    "phi": PHI,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "roberta": _bert_like("roberta", "Roberta"),
    "t5": T5,
    "vit": VIT,
    "xlm-roberta": _bert_like("xlm_roberta", "XLMRoberta"),
}

# What model types of this package put before or behind the family's: `shrunk_bert`, `mom_t5`, `moebert`, `bert_crf`
OWN_PREFIXES = ("shrunk_", "mom_", "mpoe_", "multitask_", "moe_", "moe")
OWN_SUFFIX = "_crf"


def find_architecture(model: Any) -> Architecture:
    """Return the row of a model's family.

    Args:
        model: A stock model with any head, or one of this package.

    Raises:
        ValueError: If the family is not known.
    """
    family = name_family(model)
    if family not in ARCHITECTURES:
        raise ValueError(
            f"`model` must be of a known family, one of {sorted(ARCHITECTURES)}, got {family!r}"
            f"{_nearest(model, family)}. Use a model of one of these, or describe its family by "
            "`hf_moebert.register_architecture`."
        )
    return ARCHITECTURES[family]


def name_family(model: Any) -> str:
    """Return the model type of a model's family, without what this package adds to it."""
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    for prefix in OWN_PREFIXES if family not in ARCHITECTURES else ():
        family = family.removeprefix(prefix)
    return family.removesuffix(OWN_SUFFIX)


def find_bert_like_classes(part: str) -> set[str]:
    """Return the full names of transformers' classes for a part ("Attention", "Layer") that compute what BERT's do."""
    return {f"{row.bert_like}{part}" for row in ARCHITECTURES.values() if row.bert_like}


def _nearest(model: Any, family: str) -> str:
    """Name the known family whose parts a model has, or else the one whose name is closest."""
    for name, row in ARCHITECTURES.items():
        stack = row.stacks[0]
        paths = [*stack.attentions[0].readers, *stack.feed_forwards[0].matrices.values()]
        with suppress(AttributeError, IndexError, TypeError):
            layer = attrgetter(stack.path)(model.base_model)[0]
            [attrgetter(path)(layer) for path in paths]
            return f" (its layers are built like {name!r})"
    closest = get_close_matches(family, ARCHITECTURES, n=1)
    return f" (the nearest is {closest[0]!r})" if closest else ""


__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]
