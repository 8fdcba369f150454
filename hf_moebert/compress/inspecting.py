"""Look at a model before it is compressed: where its parameters are, and which stages it can go through."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from hf_moebert.architectures.families import name_family
from hf_moebert.architectures.surgery import find_feed_forwards, find_layers
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.methods.moebert.conversion import find_moe_class

from .tasks import check_task


def inspect_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model is made of, and what `compress` can do to it.

    Args:
        model: Any model; it may be on the meta device. Nothing is computed with it.

    Returns:
        A JSON-able mapping: "class", "family" and "parameters"; "parts", the parameters of embeddings, attention,
        feed-forward networks and the rest; "stages", for each stage an empty string, or why it cannot be.
    """
    return {
        "class": type(model).__name__,
        "family": name_family(model),
        "parameters": model.num_parameters(),
        "parts": count_parts(model),
        "stages": {
            "compress": find_reason(lambda: check_task(model)),
            "drop_layers": find_reason(lambda: find_layers(model)),
            "prune": find_reason(lambda: find_unit_groups(model)),
            "experts": find_reason(lambda: find_moe_class(model)),
            "optimize: bfloat16": unsupported_reason("bfloat16", True) or "",
            "optimize: int8": unsupported_reason("int8", True) or "",
        },
    }


def count_parts(model: PreTrainedModel) -> dict[str, int]:
    """Count the parameters of a model by what they are for, a shared one once.

    Layers of a family that is not known count as the rest.
    """
    sets = {"embeddings": parameters_of(model.get_input_embeddings())}
    try:
        layers, networks = find_layers(model), find_feed_forwards(model, missing_ok=True)
    except ValueError:
        layers, networks = [], []
    matrices = [model.get_submodule(path) for network in networks for path in network.matrix_paths]
    sets["feed-forward"] = set().union(*map(parameters_of, matrices))
    sets["attention and norms"] = (
        set().union(*(parameters_of(layer.module) for layer in layers)) - sets["feed-forward"]
    )
    counts: dict[str, int] = {}
    counted: set[Any] = set()
    for name, found in sets.items():
        counts[name] = sum(parameter.numel() for parameter in found - counted)
        counted |= found
    return counts | {"rest": sum(p.numel() for p in set(model.parameters()) - counted)}


def count_layers(model: PreTrainedModel) -> list[int]:
    """Count the parameters of each layer; none of a family that is not known."""
    try:
        return [sum(p.numel() for p in parameters_of(layer.module)) for layer in find_layers(model)]
    except ValueError:
        return []


def parameters_of(module: Any) -> set[Any]:
    """Return the parameters of a module, which compare by identity."""
    return set(module.parameters())


def find_reason(attempt: Callable[[], object]) -> str:
    """Return why something is refused, or an empty string."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""
