# Copied from hf_moebert/architectures/families.py by `make copies`; edit there.
"""Where each family of models keeps its layers, attention and feed-forward networks: one row for each model type.

All paths but that of a stack start at a layer; that of a stack starts at the body (`model.base_model`).
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class FeedForwardPaths:
    """Paths of the parts of a feed-forward network.

    Attributes:
        up: The up-projection; of a gated network the one without activation. Where gate and up-projection are one
            matrix, that one.
        down: The down-projection.
        activation: The activation function.
        gate: The up-projection that is activated, if the network is gated.
        inner_dropout: Dropout behind the activation.
        outer_dropout: Dropout at the end.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    inner_dropout: str | None = None
    outer_dropout: str | None = None

    @property
    def matrices(self) -> dict[str, str]:
        """Paths of the matrices by the name of the part."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return gate | {"up": self.up, "down": self.down}

    @property
    def holder(self) -> str:
        """Path of the module that holds the whole network and nothing else; empty if there is none."""
        return _common_parent([*self.matrices.values(), self.activation])

    @property
    def entries(self) -> list[str]:
        """Paths of the modules in front of the down-projection, which hold nothing else."""
        inner = [self.up, self.activation] if self.gate is None else [self.gate, self.up, self.activation]
        return [parent] if (parent := _common_parent(inner)) else inner

    def under(self, path: str) -> "FeedForwardPaths":
        """Return the same parts within a module."""
        named = {name: value for name, value in vars(self).items() if value is not None}
        return FeedForwardPaths(**{name: f"{path}.{value}" for name, value in named.items()})


@dataclass(frozen=True)
class AttentionPaths:
    """Paths of the parts of an attention.

    Attributes:
        readers: The projections to queries, keys and values; one path where they are one matrix.
        writer: The output projection.
        module: The module that computes the attention. Only needed for families whose heads can be removed.
        head_size: Attribute in which that module keeps the size of a head. Likewise.
    """

    readers: tuple[str, ...]
    writer: str
    module: str = ""
    head_size: str = ""

    def under(self, path: str) -> "AttentionPaths":
        """Return the same projections within a module."""
        return AttentionPaths(tuple(f"{path}.{reader}" for reader in self.readers), f"{path}.{self.writer}")


@dataclass(frozen=True)
class Stack:
    """A list of layers of one kind.

    Attributes:
        path: Path of the list in the body. A head may do without a stack: T5 for classification has no decoder.
        attentions: The attentions of each layer; those for other sequences are only there if a model has them.
        feed_forwards: Where the feed-forward network of a layer may be; the first one whose matrices are all there.
    """

    path: str
    attentions: tuple[AttentionPaths, ...]
    feed_forwards: tuple[FeedForwardPaths, ...]


@dataclass(frozen=True)
class Architecture:
    """A row of the table: where all models of a family keep their parts.

    Attributes:
        stacks: Its lists of layers, in the order in which they are counted.
        units: The kinds of units that can be removed whole, of "neurons" and "heads". Heads that share parts with
            others (relative positions, grouped keys) are not among them, nor is anything in layers that are shared.
        bert_like: Prefix of the full names of transformers' classes (`...Attention`, `...Layer`, `...Intermediate`,
            `...Output`) if they compute what BERT's do; many others have parts of the same names, and do not.
    """

    stacks: tuple[Stack, ...]
    units: tuple[str, ...] = ()
    bert_like: str = ""

    @property
    def matrix_names(self) -> list[str]:
        """Ends of names that select the matrices of attentions and feed-forward networks, and nothing else."""
        paths: list[str] = []
        for stack in self.stacks:
            for attention in stack.attentions:
                paths += [*attention.readers, attention.writer]
            for feed_forward in stack.feed_forwards:
                paths += feed_forward.matrices.values()
        return sorted({_shortest_end(path) for path in paths})


def _common_parent(paths: list[str]) -> str:
    common = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _shortest_end(path: str) -> str:
    """Return the last name of a path, or the last two where poolers and heads have the last one, too."""
    names = path.split(".")
    return ".".join(names[-2:] if names[-1] in ("dense", "out_proj") else names[-1:])


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
    units=("neurons", "heads"),
)
DEBERTA = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(AttentionPaths(("attention.self.in_proj",), "attention.output.dense"),),
            feed_forwards=(BERT_FEED_FORWARD,),
        ),
    ),
    units=("neurons",),
)
DEBERTA_V2 = Architecture(
    stacks=(
        Stack(
            path="encoder.layer",
            attentions=(
                AttentionPaths(
                    readers=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
                    writer="attention.output.dense",
                ),
            ),
            feed_forwards=(BERT_FEED_FORWARD,),
        ),
    ),
    units=("neurons",),
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
            feed_forwards=(FeedForwardPaths(up="ffn.lin1", activation="ffn.activation", down="ffn.lin2"),),
        ),
    ),
    units=("neurons", "heads"),
)
VIT = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(replace(SEPARATE.under("attention"), module="attention", head_size="head_dim"),),
            feed_forwards=(TWO_LAYERS.under("mlp"),),
        ),
    ),
    units=("neurons", "heads"),
)
ALBERT = Architecture(
    stacks=(
        Stack(
            path="encoder.albert_layer_groups.0.albert_layers",
            attentions=(AttentionPaths(("query", "key", "value"), "dense").under("attention"),),
            feed_forwards=(FeedForwardPaths(up="ffn", activation="activation", down="ffn_output"),),
        ),
    ),
)
MODERNBERT = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(AttentionPaths(("attn.Wqkv",), "attn.Wo"),),
            feed_forwards=(FeedForwardPaths(up="mlp.Wi", activation="mlp.act", down="mlp.Wo"),),
        ),
    ),
)
LLAMA = Architecture(
    stacks=(Stack(path="layers", attentions=(SEPARATE.under("self_attn"),), feed_forwards=(GATED.under("mlp"),)),),
    units=("neurons",),
)
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
)
GPT_NEOX = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(AttentionPaths(("attention.query_key_value",), "attention.dense"),),
            feed_forwards=(FeedForwardPaths(up="mlp.dense_h_to_4h", activation="mlp.act", down="mlp.dense_4h_to_h"),),
        ),
    ),
)
BLOOM = Architecture(
    stacks=(
        Stack(
            path="h",
            attentions=(AttentionPaths(("self_attention.query_key_value",), "self_attention.dense"),),
            feed_forwards=(
                FeedForwardPaths(up="mlp.dense_h_to_4h", activation="mlp.gelu_impl", down="mlp.dense_4h_to_h"),
            ),
        ),
    ),
)
PHI = Architecture(
    stacks=(
        Stack(
            path="layers",
            attentions=(AttentionPaths(("q_proj", "k_proj", "v_proj"), "dense").under("self_attn"),),
            feed_forwards=(TWO_LAYERS.under("mlp"),),
        ),
    ),
)
BART_ATTENTION = AttentionPaths(("q_proj", "k_proj", "v_proj"), "out_proj")
OPT = Architecture(
    stacks=(Stack("decoder.layers", (BART_ATTENTION.under("self_attn"),), (TWO_LAYERS,)),),
)
BART = Architecture(
    stacks=(
        Stack("encoder.layers", (BART_ATTENTION.under("self_attn"),), (TWO_LAYERS,)),
        Stack(
            path="decoder.layers",
            attentions=(BART_ATTENTION.under("self_attn"), BART_ATTENTION.under("encoder_attn")),
            feed_forwards=(TWO_LAYERS,),
        ),
    ),
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
        ),
    ),
)

ARCHITECTURES = {
    "albert": ALBERT,
    "bart": BART,
    "bert": _bert_like("bert", "Bert"),
    "bloom": BLOOM,
    "camembert": _bert_like("camembert", "Camembert"),
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "distilbert": DISTILBERT,
    "electra": _bert_like("electra", "Electra"),
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mbart": BART,
    "mistral": LLAMA,
    "modernbert": MODERNBERT,
    "mt5": T5,
    "opt": OPT,
    "phi": PHI,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "roberta": _bert_like("roberta", "Roberta"),
    "t5": T5,
    "vit": VIT,
    "xlm-roberta": _bert_like("xlm_roberta", "XLMRoberta"),
}

# What the model types of this package put before the type of the family, as in `shrunk_bert`, `mom_t5` and `moebert`
OWN_PREFIXES = ("shrunk_", "mom_", "mpoe_", "moe")


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
            f"{_nearest(family, ARCHITECTURES)}. Use a model of one of these, or add a row for its family to "
            "hf_moebert/architectures/families.py."
        )
    return ARCHITECTURES[family]


def name_family(model: Any) -> str:
    """Return the model type of a model's family, without the prefixes of this package."""
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    for prefix in OWN_PREFIXES:
        family = family.removeprefix(prefix)
    return family


def find_bert_like_classes(part: str) -> set[str]:
    """Return the full names of transformers' classes for a part ("Attention", "Layer") that compute what BERT's do."""
    return {f"{row.bert_like}{part}" for row in ARCHITECTURES.values() if row.bert_like}


def _nearest(family: str, known: Any) -> str:
    nearest = get_close_matches(family, known, n=1)
    return f" (the nearest is {nearest[0]!r})" if nearest else ""


__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]
