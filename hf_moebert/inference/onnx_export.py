"""Export a finished model to ONNX Runtime, for any batch and length, checked against torch before it has its name.

transformers' exporter writes the graph, and ONNX Runtime's quantiser its int8 form.
"""

import inspect
import warnings
from collections.abc import Sequence
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import is_onnx_available, is_onnxscript_available

from hf_moebert.architectures.functional_numpy import digest
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.protocols import OptimizedForInference
from hf_moebert.architectures.stacks import refuse_forms
from hf_moebert.checkpoints.drafts import CHECKSUM, drafting, replacing
from hf_moebert.checkpoints.json_files import save_json
from hf_moebert.checkpoints.manifests import describe_files
from hf_moebert.runtime.chains import CHAIN_FILE, SCORES

from .linears import check_precision
from .onnx_runtime import FORMAT_VERSION, MANIFEST, PRECISIONS, OnnxModel, check_packages, open_exported


Batch = dict[str, Tensor]
TOLERANCE = 1e-4  # between torch and ONNX Runtime in float32, for values around 1
# Rows, tokens and padding of the batches that must give the same: none has the shape of the example that is traced
EXAMPLE, CHECKED = (2, 9, 2), ((1, 1, 0), (1, 7, 2), (3, 16, 16), (5, 12, 0))
PACKAGES = ("hf_moebert", "transformers", "torch", "onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel,
    folder: str | PathLike[str],
    *,
    precisions: Sequence[str] = ("float32",),
    tokenizer: Any = None,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a model for ONNX Runtime: one graph for each precision, for any batch and length.

    The folder appears whole or not at all, and only if the float32 graph gives what the model gives in torch, on
    batches of several shapes with and without padding. In int8, weights have one scale per output, and activations
    one per tensor, computed in each call: there, unlike in `optimize_for_inference`, a text's answer depends on the
    others in its batch. How far int8 is from float32 on the texts is measured and written down.

    Args:
        model: A model in float32 on the CPU that reads ids or images, stock or of this package, with any head. The
            graph of a tagger with a CRF gives emissions, and its scores are written beside it, to decode them with.
        folder: A folder that does not exist yet, or is empty.
        precisions: Some of "float32" and "int8".
        tokenizer: Saved beside the graphs, and needed for texts.
        texts: What int8 is measured on; by default eight rows of drawn ids or images.

    Returns:
        The manifest, which `onnx_manifest.json` holds: versions, inputs, longest text, differences, and SHA-256.

    Raises:
        ValueError: If an argument is refused, if the model cannot be exported, if the graph gives something else, or
            if a package or the instruction for int8 is missing.
        OSError: If the folder cannot be written.
    """
    target = Path(folder)
    check_arguments(model, target, precisions, tokenizer, texts)
    was_training = model.training
    try:
        exported = trace(model.eval(), make_batch(model, *EXAMPLE))
        target.parent.mkdir(parents=True, exist_ok=True)
        with drafting(target.resolve()) as draft:
            manifest = write_forms(model, exported, draft, precisions, samples_of(model, tokenizer, texts))
            model.config.save_pretrained(draft)
            if hasattr(model, "crf"):
                write_chain(model.crf, draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
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
            return OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
    except Exception as error:  # of torch, onnxscript and transformers, of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`model` must be one that transformers can export, {type(model).__name__} is not: {reason}. Use "
            "`optimize_for_inference`."
        ) from error


def quantize_graph(exported: Any, inputs: Batch) -> Any:
    """Return the int8 form of a graph."""
    import onnx
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.base import ExportedComponent, ExportedModel

    unknown = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of values whose type the quantiser cannot infer
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, extra_options=unknown))
    ((name, component),) = exported.components.items()
    program = quantizer.quantize(component.program, inputs, exported.export_format)
    return ExportedModel(
        {name: ExportedComponent(program, component.metadata)}, exported.export_format, exported.config
    )


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
    forms: dict[str, Any] = {"float32": {"largest_difference_to_torch": check_parity(model, plain, max_length)}}
    if "int8" in precisions:
        quantize_graph(exported, make_batch(model, *EXAMPLE)).save_pretrained(draft / "int8")
        forms["int8"] = {
            "weights": "int8, one scale per output",
            "activations": "uint8, one scale per tensor, computed in each call",
            "difference_to_float32": compare(OnnxModel(open_exported(draft / "int8", 1), max_length), plain, samples),
        }
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


def check_parity(model: PreTrainedModel, found: OnnxModel, max_length: int | None) -> float:
    """Return the largest difference between a model and its graph.

    Raises:
        ValueError: If it is too large.
    """
    largest = 0.0
    for rows, length, pad in CHECKED:
        batch = make_batch(model, rows, min(length, max_length or length), pad)
        for wanted, got in zip(compute(model, batch), tensors_of(found(**batch)), strict=True):
            difference = float((got - wanted).abs().max())
            if got.shape != wanted.shape or not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
                raise ValueError(
                    f"`model` must give in ONNX Runtime what it gives in torch up to {TOLERANCE}, "
                    f"{type(model).__name__} differs by {difference:.1e} for {rows} x {length}. Use "
                    "`optimize_for_inference`."
                )
            largest = max(largest, difference)
    return largest


def compute(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Return what the graph of a model must give: the emissions of a CRF, which is decoded outside."""
    if not hasattr(model, "crf"):
        return tensors_of(model(**batch))
    return [model(**batch, word_mask=batch["attention_mask"] == 1).logits]


def write_chain(crf: Any, folder: Path) -> None:
    """Write the scores of a CRF for `load_chain`: loops over words are slow in a graph, and short in numpy."""
    scores = zip(SCORES, crf.scores_for("decoding", torch.float32), strict=True)
    arrays = {name: score.detach().contiguous().numpy() for name, score in scores}
    with replacing(folder / CHAIN_FILE) as draft:
        save_file(arrays, draft, metadata={CHECKSUM: digest(arrays), "scheme": crf.tag_scheme})


def compare(found: OnnxModel, wanted: OnnxModel, samples: list[Batch]) -> dict[str, float]:
    """Compare the first outputs of two graphs, text by text."""
    pairs = [(tensors_of(found(**one))[0].flatten(), tensors_of(wanted(**one))[0].flatten()) for one in samples]
    cosines = torch.stack([F.cosine_similarity(*pair, dim=0) for pair in pairs])
    return {
        "texts": len(samples),
        "worst_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def samples_of(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> list[Batch]:
    """Return each text as a batch of one, or drawn ids where there are none."""
    names = make_batch(model, *EXAMPLE).keys()
    if not texts:
        return [make_batch(model, 1, 8, 0, seed=seed) for seed in range(8)]
    options = {"truncation": True, "max_length": min(count_positions(model) or 512, 512), "return_tensors": "pt"}
    encoded = [tokenizer(text, **options) for text in texts]
    return [{name: one[name] for name in names if name in one} for one in encoded]


def make_batch(model: PreTrainedModel, rows: int, length: int, pad: int, seed: int = 0) -> Batch:
    """Draw inputs; the last row has padding, at most as much as leaves it empty."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        return {"pixel_values": torch.randn(rows, config.num_channels, *size, generator=generator)}
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(length - pad, 0) :] = 0
    batch = {"input_ids": ids.where(mask == 1, getattr(config, "pad_token_id", None) or 0), "attention_mask": mask}
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and (getattr(config, "type_vocab_size", None) or 0) > 1:
        batch["token_type_ids"] = torch.randint(2, (rows, length), generator=generator)
    return batch


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output, in order."""
    parts = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [one for part in parts for one in (part if isinstance(part, tuple) else (part,)) if isinstance(one, Tensor)]
