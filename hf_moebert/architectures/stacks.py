"""The form that a model has already, asked by every method before it begins: which may follow, in which order."""

from typing import Any

from torch import nn

from .protocols import OptimizedForInference


# What the configurations of this package call a model, by the beginning of their model type
MODEL_TYPES = {
    "shrunk_": ("shrunk", "one whose layers differ in width"),
    "moe": ("experts", "a mixture of experts"),
    "mpoe_": ("shared_experts", "a mixture of experts that share tensors"),
    "mom_": ("masks", "one with masks for experts"),
    "bert_crf": ("crf", "one with a CRF"),
    "crf": ("crf", "one with a CRF"),
    "multitask_": ("tasks", "one of many tasks"),
}
# What any method can say to a form that it does not take, unless it says more
REMEDIES = {
    "adapters": "Merge the adapter by `merge_and_unload` first",
    "chains": "Chains come after it: call `to_dense(model)` first, and `compress_mpo` on the result",
    "crf": "A CRF comes after it: do it to the token classifier, and call `masked_crf.from_dense` on the result",
    "experts": "Experts come after it: do it to the dense model, and call `moebert.from_dense` on the result",
    "masks": "Masks and this method change the same networks: do one of them, to the dense model",
    "optimised": "Call `revert_optimizations` first, and `optimize_for_inference` on the result",
    "shared_experts": "Do it to the dense model, or leave it out",
    "shrunk": "Do it to the dense model first, and `shrink` the result",
    "tasks": "Merging comes after it: do it to the model of each task, and call `from_tasks` on the results",
}


def has_adapters(model: nn.Module) -> bool:
    """Check whether PEFT keeps weights beside those of the model's class."""
    wrappers = ("base_layer", "modules_to_save")  # attributes of the layers of all PEFT methods
    return any(hasattr(part, wrapper) for part in model.modules() for wrapper in wrappers)


def find_forms(model: Any) -> dict[str, str]:
    """Return what a model is besides one of transformers: the forms by name, each with its description.

    Args:
        model: Anything; what is no model has no form.
    """
    if not isinstance(model, nn.Module):
        return {}
    found: dict[str, str] = {}
    if has_adapters(model) or type(model).__module__.startswith("peft."):
        found["adapters"] = "one with an adapter of PEFT"
    if getattr(model, "quantization_method", None) == "mpo":
        found["chains"] = "one whose matrices are chains of cores"
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    found |= [form for start, form in MODEL_TYPES.items() if model_type.startswith(start)][:1]
    if any(isinstance(module, OptimizedForInference) for module in model.modules()):
        found["optimised"] = "optimised for inference"
    return found


def refuse_forms(model: Any, aim: str, *forms: str, **remedies: str) -> None:
    """Refuse a model of a form that a method does not take, before any work.

    Args:
        model: Anything; what is no model passes here.
        aim: What the method does, as the end of "`model` must be …": "dense to be cut into experts".
        *forms: Names of the forms it does not take.
        **remedies: The order that works, by the name of further forms; that of `forms` is in `REMEDIES`.

    Raises:
        ValueError: If the model is of such a form; the message names the order that works.
    """
    orders = {name: REMEDIES[name] for name in forms} | remedies
    for name, description in find_forms(model).items():
        if name in orders:
            raise ValueError(f"`model` must be {aim}, but {type(model).__name__} is {description}. {orders[name]}.")
