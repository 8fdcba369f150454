"""Where a family of models keeps the parts of its layers: what a row of the table is made of.

All paths but that of a stack start at a layer; that of a stack starts at the body (`model.base_model`).
"""

from dataclasses import dataclass, replace
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
        fused: Whether gate and up-projection are one matrix, the gate above.
        adds_residual: Whether the module that holds the network is given the residual, too, and adds it.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    inner_dropout: str | None = None
    outer_dropout: str | None = None
    fused: bool = False
    adds_residual: bool = False

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
        paths = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        named: dict[str, Any] = {name: f"{path}.{value}" for name, value in paths.items()}
        return replace(self, **named)


@dataclass(frozen=True)
class AttentionPaths:
    """Paths of the parts of an attention.

    Attributes:
        readers: The projections to queries, keys and values; one path where they are one matrix, with its blocks one
            above the other.
        writer: The output projection.
        module: The module that computes the attention. Only needed for families whose heads can be removed.
        head_size: Attribute in which that module keeps the size of a head. Likewise.
        extras: Further projections whose rows belong to the heads, where a model has them.
    """

    readers: tuple[str, ...]
    writer: str
    module: str = ""
    head_size: str = ""
    extras: tuple[str, ...] = ()

    def under(self, path: str, head_size: str = "") -> "AttentionPaths":
        """Return the same projections within a module, which computes the attention if it keeps the size of a head."""
        readers = tuple(f"{path}.{reader}" for reader in self.readers)
        return AttentionPaths(readers, f"{path}.{self.writer}", path if head_size else "", head_size)


@dataclass(frozen=True)
class Stack:
    """A list of layers of one kind.

    Attributes:
        path: Path of the list in the body; `*` stands for each module of a list, one after the other. A head may do
            without a stack: T5 for classification has no decoder.
        attentions: The attentions of each layer; those for other sequences are only there if a model has them.
        feed_forwards: Where the feed-forward network of a layer may be; the first one whose matrices are all there.
        depth: Field of the configuration with the number of layers.
    """

    path: str
    attentions: tuple[AttentionPaths, ...]
    feed_forwards: tuple[FeedForwardPaths, ...]
    depth: str = "num_hidden_layers"


@dataclass(frozen=True)
class Architecture:
    """A row of the table: where all models of a family keep their parts.

    Attributes:
        stacks: Its lists of layers, in the order in which they are counted.
        units: The kinds of units that can be removed whole, of "neurons" and "heads". Heads that read the same keys
            are one unit.
        kept: Why units of the other kinds stay, as the end of a sentence that begins with "because".
        neurons: Field of the configuration with the number of neurons of a layer.
        heads: Field of the configuration with the number of heads of a layer, as they are removed: of keys where
            several heads read the same.
        trunk: Paths of the modules of the body, besides the embeddings, that all layers read, if tasks can share its
            first layers; None if they cannot.
        undeclared: What the models read off their configuration, though its class does not declare it.
        bert_like: Prefix of the full names of transformers' classes (`...Attention`, `...Layer`, `...Intermediate`,
            `...Output`) if they compute what BERT's do; many others have parts of the same names, and do not.
    """

    stacks: tuple[Stack, ...]
    units: tuple[str, ...] = ()
    kept: str = ""
    neurons: str = "intermediate_size"
    heads: str = "num_attention_heads"
    trunk: tuple[str, ...] | None = None
    undeclared: tuple[str, ...] = ()
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


__all__ = ["Architecture", "AttentionPaths", "FeedForwardPaths", "Stack"]
