"""Loading of compressed models: build the layers that config.json describes, before transformers loads the weights."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer

from hf_moebert.architectures.empty_losses import hook_empty_loss, unhook_empty_loss
from hf_moebert.checkpoints.forms import StrictQuantizer

from .configuration_mpo import MPOCompressionConfig
from .modeling_matrix import MPOMatrix, list_matrices
from .modeling_mpo import TiedMPOEmbedding, TiedMPOLinear, make_layer, tie_layer


VOCABULARY = (MPOMatrix, TiedMPOEmbedding, TiedMPOLinear)  # a table or a head


def replace_matrices(model: PreTrainedModel, config: MPOCompressionConfig) -> None:
    """Replace the described modules by layers of zero cores, and remove their matrices from the tied weights.

    Args:
        model: Dense; it may be on the meta device.
        config: Its paths may be those of the model with or without a head; they become those of this model.

    Raises:
        ValueError: If the model has no such module, or one of another size.
    """
    places = _find_places(model, [*config.matrices, *config.tied])
    config.matrices = {places[path]: shape for path, shape in config.matrices.items() if path in places}
    config.tied = {places[path]: places[source] for path, source in config.tied.items() if path in places}
    config.sizes = {places[path]: size for path, size in config.sizes.items() if path in places}
    _drop_ties(model, {f"{place}.weight" for place in places.values()})
    for place, shape in config.shapes().items():
        module = model.get_submodule(place)
        assert isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        if config.sizes.get(place, size := list(module.weight.shape)) != size:
            raise ValueError(
                f"{place!r} of the model must be of the saved shape {config.sizes[place]}, got {size}. Load it as it "
                "was saved; to change it, make it dense with `to_dense`."
            )
        model.set_submodule(place, make_layer(module, **asdict(shape)))
    for place, source in config.tied.items():
        table = model.get_submodule(source)
        assert isinstance(table, MPOMatrix)
        model.set_submodule(place, tie_layer(model.get_submodule(place), table))


def _find_places(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, str]:
    """Map paths to modules of a model with or without head; those of another head are left out."""
    modules, prefix = dict(model.named_modules(remove_duplicate=False)), f"{model.base_model_prefix}."
    with_head = any(path.startswith(prefix) for path in paths)
    places = {}
    for path in paths:
        candidates = (path, path.removeprefix(prefix), prefix + path)
        if place := next((candidate for candidate in candidates if candidate in modules), None):
            places[path] = place
        elif path.startswith(prefix) or not with_head:
            raise ValueError(
                f"The model must have the module {path!r} that the checkpoint decomposes, got {type(model).__name__}. "
                "Load it with the architecture it was saved with."
            )
    return places


def _drop_ties(model: PreTrainedModel, replaced: set[str]) -> None:
    """Remove the ties of decomposed matrices: their modules share the cores themselves."""
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            dot = f"{name}." if name else ""
            ties = part.get_expanded_tied_weights_keys(all_submodels=False)
            part._dense_ties = vars(part).get("_tied_weights_keys")  # of this model alone, for `restore_ties`
            part._tied_weights_keys = {k: v for k, v in ties.items() if not {dot + k, dot + v} & replaced}
            ties = getattr(part, "all_tied_weights_keys", ties)
            part.all_tied_weights_keys = {k: v for k, v in ties.items() if not {dot + k, dot + v} & replaced}


def restore_ties(model: PreTrainedModel) -> None:
    """Give a model that is dense again what it had: ties that `replace_matrices` removed, a vocabulary that grows."""
    unhook_empty_loss(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part).pop("resize_token_embeddings", None)
            ties = vars(part).pop("_dense_ties", None)
            vars(part).pop("_tied_weights_keys", None)
            if ties is not None:
                part._tied_weights_keys = ties
            named = dict(part.named_parameters(remove_duplicate=False))
            keys = part.get_expanded_tied_weights_keys(all_submodels=False)  # which may list more than are tied
            part.all_tied_weights_keys = {k: v for k, v in keys.items() if named[k] is named[v]}


def fix_vocabulary(model: PreTrainedModel) -> None:
    """Let `resize_token_embeddings` refuse other sizes where the vocabulary is a matrix of cores."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            with suppress(NotImplementedError):  # a model without an embedding of tokens
                if any(isinstance(x, VOCABULARY) for x in (part.get_input_embeddings(), part.get_output_embeddings())):
                    part.resize_token_embeddings = partial(_resize, part)


def _resize(
    model: PreTrainedModel, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
) -> nn.Module:
    table: Any = model.get_input_embeddings()
    wanted = table.num_embeddings if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int):
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != table.num_embeddings:
        raise ValueError(
            f"`new_num_tokens` must be {table.num_embeddings} for a vocabulary written as a chain, got {wanted}. "
            "Resize the dense model, which `to_dense(model)` returns, and compress that."
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, **options)


@register_quantizer("mpo")
class MPOQuantizer(StrictQuantizer):
    """The quantizer `mpo`, which builds the layers of a compressed checkpoint before its weights are loaded."""

    quantization_config: MPOCompressionConfig

    @property
    def is_qat_trainable(self) -> bool:
        """Allow the Trainer to train a model without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Allow `generate` to compile a model."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Write the current bonds into the configuration: they may have been squeezed."""
        for path, shape in self.quantization_config.matrices.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, MPOMatrix)
            shape["bonds"] = list(layer.bonds)
        return super().get_state_dict_and_metadata(model)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replace_matrices(model, self.quantization_config)
        check_cores(self.check_stored(model, kwargs.get("checkpoint_files") or []), model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, MPOMatrix):
                module.freeze(self.quantization_config.train_centre)
                check_places(module, model.config.name_or_path)
        fix_vocabulary(model)
        hook_empty_loss(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


def check_cores(stored: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a checkpoint that lacks cores or has them in other shapes than config.json says.

    Args:
        stored: Slices of the checkpoint, by the names that they have in the model.
        model: With layers of zero cores; it may be on the meta device.

    Raises:
        ValueError: With the first tensor that is wrong.
    """
    for path, matrix in list_matrices(model).items() if stored else ():
        wanted = {f"cores.{index}": core for index, core in enumerate(matrix.chain())}
        wanted |= {f"row_use.{index}": tensor for index, tensor in enumerate(matrix.use())}
        for part, tensor in wanted.items():
            name = f"{path}.{part}"
            if (saved := stored[name].get_shape() if name in stored else None) != list(tensor.shape):
                raise ValueError(
                    f"{model.config.name_or_path!r} must hold {name!r} of shape {list(tensor.shape)}, got {saved}. "
                    "Copy or save it again."
                )


def check_places(matrix: MPOMatrix, source: str) -> None:
    """Refuse places of sorted rows that are not each row once.

    Raises:
        ValueError: If they are not.
    """
    for places in matrix.use()[1:]:
        if not places.is_meta and not torch.equal(places.sort().values, torch.arange(len(places)).to(places)):
            raise ValueError(f"{source!r} must name a place for each row once in `row_use.1`. Copy or save it again.")
