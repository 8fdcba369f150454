"""Export a finished model to ONNX Runtime, for any batch and length, checked against torch before it has its name.

transformers' exporter writes the graph, and `onnx_int8` its int8 form.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file
from transformers import PreTrainedModel
from transformers.utils import is_onnx_available, is_onnxscript_available

from hf_moebert.architectures.counting import count_active
from hf_moebert.architectures.functional_numpy import digest
from hf_moebert.architectures.heads import has_head, kind_of
from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.protocols import OptimizedForInference
from hf_moebert.architectures.stacks import refuse_forms
from hf_moebert.checkpoints.drafts import CHECKSUM, drafting, replacing
from hf_moebert.checkpoints.embedders import write_form
from hf_moebert.checkpoints.json_files import save_json
from hf_moebert.checkpoints.manifests import describe_files
from hf_moebert.checkpoints.tensor_files import save_tensors
from hf_moebert.runtime.chains import CHAIN_FILE, SCORES
from hf_moebert.runtime.folders import FORMAT_VERSION, MANIFEST, PRECISIONS, check_packages
from hf_moebert.runtime.verifying import GOLDEN_FILE

from .linears import check_precision
from .onnx_parity import EXAMPLE, Batch, check_parity, collate, compare, make_batch, samples_of
from .onnx_runtime import OnnxModel, open_exported
from .smoothing import DRAWN


GOLDEN_ROWS = 8  # texts whose outputs are kept
PACKAGES = ("hf_moebert", "transformers", "torch", "onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel,
    folder: str | PathLike[str],
    *,
    precisions: Sequence[str] = ("float32",),
    tokenizer: Any = None,
    texts: Sequence[str] = (),
    form: EmbeddingForm | None = None,
) -> dict[str, Any]:
    """Write a model for ONNX Runtime: one graph for each precision, for any batch and length.

    The folder appears whole or not at all, and only if the float32 graph gives what the model gives in torch, on
    batches of several shapes with and without padding. In int8, weights have one scale per output, and activations
    one per row, computed in each call, as in `optimize_for_inference`: a text's answer does not depend on the others
    in its batch. How far int8 is from float32 on the texts is measured and written down.

    Args:
        model: A model in float32 on the CPU that reads ids or images, stock or of this package, with any head. The
            graph of a tagger with a CRF gives emissions, and its scores are written beside it, to decode them with.
        folder: A folder that does not exist yet, or is empty.
        precisions: Some of "float32" and "int8".
        tokenizer: Saved beside the graphs, and needed for texts.
        texts: What int8 is measured on; by default eight rows of drawn ids or images.
        form: How a model without head makes embeddings; by default as the folder says that it was loaded from.

    Returns:
        The manifest, which `onnx_manifest.json` holds: versions, inputs, longest text, differences, and SHA-256.

    Raises:
        ValueError: If an argument is refused, if the model cannot be exported, if the graph gives something else, or
            if a package or the instruction for int8 is missing.
        OSError: If the folder cannot be written.
    """
    target = Path(folder)
    check_arguments(model, target, precisions, tokenizer, texts)
    if form is None and not has_head(model) and model.name_or_path:
        form = read_embedding_form(model.name_or_path)
    was_training = model.training
    try:
        exported = trace(model.eval(), make_batch(model, *EXAMPLE))
        target.parent.mkdir(parents=True, exist_ok=True)
        with drafting(target.resolve()) as draft:
            manifest = write_forms(model, exported, draft, precisions, samples_of(model, tokenizer, texts))
            write_companions(model, draft, tokenizer, form)
            names = [model.config.id2label[number] for number in range(model.config.num_labels)]
            manifest |= {"kind": kind_of(model), "labels": names if has_head(model) else []}
            manifest["sizes"] = count_sizes(model)
            manifest["embedding"] = None if form is None else asdict(form)
            manifest["files"] = describe_files(draft)
            save_json(draft / MANIFEST, manifest)
            if target.exists():
                target.rmdir()  # not every system renames over an empty folder
            draft.rename(target)
    finally:
        model.train(was_training)
    return manifest


def check_arguments(model: Any, target: Path, precisions: Sequence[str], tokenizer: Any, texts: Sequence[str]) -> None:
    """Refuse what cannot be exported, before any work.

    Raises:
        ValueError: If it cannot.
    """
    check_packages()
    if not (is_onnx_available() and is_onnxscript_available()):
        raise ValueError('onnx and onnxscript must be installed, but are not. Run `pip install "hf_moebert[export]"`.')
    if not precisions or isinstance(precisions, str) or not set(precisions) <= set(PRECISIONS):
        raise ValueError(f"`precisions` must be some of {PRECISIONS}, got {precisions!r}.")
    if "int8" in precisions:
        check_precision("int8")  # its products would saturate, so the difference could not be measured
    if texts and tokenizer is None:
        raise ValueError(f"`tokenizer` must be given for {len(texts)} `texts`, got None.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`folder` must be a new or empty folder, got {str(target)!r}.")
    if not isinstance(model, PreTrainedModel) or (model.dtype, model.device.type) != (torch.float32, "cpu"):
        raise ValueError(
            f"`model` must be a transformers model in float32 on the CPU, got {type(model).__name__} in "
            f"{getattr(model, 'dtype', None)} on {getattr(model, 'device', None)}. Merge adapters first, and load "
            'with `dtype="float32"`.'
        )
    if any(isinstance(module, OptimizedForInference) or "unpadding" in vars(module) for module in model.modules()):
        raise ValueError("`model` must be as it was loaded, got an optimised one. Call `revert_optimizations` first.")
    refuse_forms(model, "of one task to be exported", tasks="Export what `extract_task` returns")
    if model.config.is_encoder_decoder or model.main_input_name not in ("input_ids", "pixel_values"):
        raise ValueError(
            f"`model` must read one text or image, got {type(model).__name__}, which reads {model.main_input_name!r}"
            f"{' and has a decoder' if model.config.is_encoder_decoder else ''}. Use transformers' own exporter."
        )


def trace(model: PreTrainedModel, inputs: Batch) -> Any:
    """Write the graph of a model.

    Raises:
        ValueError: If the exporter cannot.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of exporters, about themselves
            exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
            for component in exported.components.values():
                fold_weights(component.program)
            return exported
    except Exception as error:  # of torch, onnxscript and transformers, of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`model` must be one that transformers can export, {type(model).__name__} is not: {reason}. Use "
            "`optimize_for_inference`."
        ) from error


def fold_weights(program: Any) -> None:
    """Make one constant of each weight that a graph picks from a stack, such as those of experts, however large.

    The exporter folds small ones alone, and int8 would leave the products of others in float32.
    """
    from onnxscript import optimizer

    optimizer.fold_constants(program, input_size_limit=2**40, output_size_limit=2**40)
    optimizer.remove_unused_nodes(program)


def quantize_graph(exported: Any, drawn: Batch | None) -> Any:
    """Return the int8 form of a graph; see `quantize_program`."""
    from transformers.exporters.base import ExportedComponent, ExportedModel

    from .onnx_int8 import quantize_program

    ((name, component),) = exported.components.items()
    quantised = ExportedComponent(quantize_program(component.program, drawn), component.metadata)
    return ExportedModel({name: quantised}, exported.export_format, exported.config)


def write_forms(
    model: PreTrainedModel, exported: Any, draft: Path, precisions: Sequence[str], samples: list[Batch]
) -> dict[str, Any]:
    """Write the graphs into a folder, measure each, and describe them.

    Raises:
        ValueError: If float32 is not what the model is.
    """
    max_length = count_positions(model) if model.main_input_name == "input_ids" else None
    exported.save_pretrained(draft / "float32")
    plain = OnnxModel(open_exported(draft / "float32", 1), max_length)
    golden = collate(samples[:GOLDEN_ROWS])
    kept = {f"input.{name}": tensor for name, tensor in golden.items()} | {"float32": plain(**golden)[0]}
    forms: dict[str, Any] = {"float32": {"largest_difference_to_torch": check_parity(model, plain, max_length)}}
    if "int8" in precisions:
        texts, tokens = DRAWN
        drawn = make_batch(model, texts, min(tokens, max_length or tokens), 0)
        quantize_graph(exported, drawn if model.main_input_name == "input_ids" else None).save_pretrained(
            draft / "int8"
        )
        quantised = OnnxModel(open_exported(draft / "int8", 1), max_length)
        forms["int8"] = {
            "weights": "int8, one scale per output",
            "activations": "uint8, one scale per row, computed in each call",
            "difference_to_float32": compare(quantised, plain, samples),
        }
        kept["int8"] = quantised(**golden)[0]
    save_tensors(draft / GOLDEN_FILE, kept)
    if "float32" not in precisions:
        for path in (draft / "float32").iterdir():
            path.unlink()
        (draft / "float32").rmdir()
        del forms["float32"]
    return {
        "format_version": FORMAT_VERSION,
        "architecture": type(model).__name__,
        "exporter": "transformers.exporters.OnnxExporter",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "inputs": plain.input_names,
        "max_length": max_length,
        "precisions": forms,
    }


def count_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the sizes that `OnnxModel` tells of the model that was exported."""
    ids = model.get_input_embeddings().num_embeddings if model.main_input_name == "input_ids" else 0
    return {"parameters": model.num_parameters(), "active_parameters": count_active(model), "vocabulary": ids}


def write_companions(model: PreTrainedModel, draft: Path, tokenizer: Any, form: EmbeddingForm | None) -> None:
    """Write what stands beside the graphs: configuration, tokenizer, and how outputs become tags or embeddings."""
    model.config.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    if hasattr(model, "crf"):
        write_chain(model.crf, draft)
    if form is not None:
        write_form(draft, form, model.config.hidden_size)


def write_chain(crf: Any, folder: Path) -> None:
    """Write the scores of a CRF for `load_chain`: loops over words are slow in a graph, and short in numpy."""
    scores = zip(SCORES, crf.scores_for("decoding", torch.float32), strict=True)
    arrays = {name: score.detach().contiguous().numpy() for name, score in scores}
    with replacing(folder / CHAIN_FILE) as draft:
        save_file(arrays, draft, metadata={CHECKSUM: digest(arrays), "scheme": crf.tag_scheme})
