"""From a checkpoint to a predictor that computes with torch."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.heads import has_head, kind_of
from hf_moebert.architectures.pooling import read_embedding_form
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.protocols import Predictor
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.inference.linears import Precision
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.methods.multitask.pipeline import MultiTaskPipeline
from hf_moebert.runtime.chains import Chain
from hf_moebert.runtime.texts import FIELDS, TextReader

from .engines import Engine
from .kinds import check_kind, make_predictor
from .many_tasks import ManyTasks
from .rows import NO_LIMIT


OUTPUTS = {"embedding": ("last_hidden_state",), "question-answering": ("start_logits", "end_logits")}
SHORTEST_WHERE_PADDING_IS_FREE = 1e-9  # a share of the longest: all go together


def load_checkpoint(folder: Path, precision: Precision | None, pooling: str | None) -> Predictor:
    """Load a model of transformers or of this package.

    Args:
        folder: Its folder.
        precision: As for `load_predictor`.
        pooling: As for `load_predictor`.

    Raises:
        ValueError: As for `load_predictor`.
        OSError: If it is no checkpoint.
    """
    loaded = load_model(folder)
    model = keep_in_memory(loaded if loaded.dtype == torch.float32 else loaded.float())
    tokenizer = load_tokenizer(folder)
    if model.config.model_type.startswith("multitask_"):
        pipeline = MultiTaskPipeline(model=model, tokenizer=tokenizer, task="multitask", device="cpu")
        return ManyTasks(pipeline, precision or "float32")
    form = None if has_head(model) else read_embedding_form(folder)
    check_kind(folder, kind_of(model), type(model).__name__, form, pooling)
    optimize_for_inference(model, precision=precision or "float32")
    return make_predictor(make_engine(model, tokenizer), form, pooling)


def make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Put a model and its tokenizer together.

    Args:
        model: In eval mode.
        tokenizer: A fast one.

    Raises:
        ValueError: If the tokenizer is not a fast one, or has no token for padding.
    """
    kind, positions = kind_of(model), count_positions(model)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        problem = "has no token for padding" if tokenizer.is_fast else "is not a fast one"
        raise ValueError(
            f"`tokenizer` must be a fast one that pads, but {type(tokenizer).__name__} {problem}. Save the "
            "tokenizer that the model was trained with."
        )
    reader = TextReader(
        tokenizer.backend_tokenizer,
        [name for name in FIELDS if name in tokenizer.model_input_names or name == "attention_mask"],
        int(min(tokenizer.model_max_length, NO_LIMIT if positions is None else positions, NO_LIMIT)),
        pad_id=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token,
        left=tokenizer.padding_side == "left",
    )
    unpads = any("unpadding" in vars(module) for module in model.modules())  # optimised: padding costs nothing
    return Engine(
        kind,
        [] if kind == "embedding" else [model.config.id2label[number] for number in range(model.config.num_labels)],
        reader,
        partial(run_in_torch, model, OUTPUTS.get(kind, ("logits",))),
        model,
        chain=read_chain(model.crf) if hasattr(model, "crf") else None,
        shortest=SHORTEST_WHERE_PADDING_IS_FREE if unpads else 0.75,
    )


@torch.no_grad()
def run_in_torch(model: Any, names: tuple[str, ...], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model on arrays, `(batch, seq)`, and return some of its outputs in float32, `(batch, ...)`."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if hasattr(model, "crf"):  # tags are decoded later, of whole texts; here of one token
        given["word_mask"] = torch.zeros_like(given["input_ids"], dtype=torch.bool)
        given["word_mask"][:, 0] = True
    outputs = model(**given)
    return [outputs[name].float().numpy() for name in names]


def read_chain(crf: Any) -> Chain:
    """Return the scores with which a CRF decodes."""
    transitions, start, end = (score.detach().numpy() for score in crf.scores_for("decoding", torch.float32))
    return Chain(transitions, start, end, crf.tag_scheme)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer, without code of the folder.

    Raises:
        ValueError: If there is none.
    """
    with refuse_code(folder):
        if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            raise ValueError(f"{str(folder)!r} must hold a tokenizer. Save it there by `save_pretrained`.")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def keep_in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Copy weights that are mapped from files: one that is written anew would change answers, or end the process."""
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in copies:  # tied weights stay one
            copies[tensor.data_ptr()] = tensor.data.clone()
        tensor.data = copies[tensor.data_ptr()]
    return model
