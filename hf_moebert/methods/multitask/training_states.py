"""States of a frozen trunk, computed once for a data set, stored in files, and read while branches train."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_moebert.checkpoints.drafts import CHECKSUM, replacing
from hf_moebert.checkpoints.tensor_files import DAMAGE, check_digest, digest

from .functional import chain_hashes
from .modeling_trunk import Trunk


REMEDY = "Delete it, and it is computed again."
TRUNK_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class CachedStates(torch.utils.data.Dataset):
    """Encoded examples with the trunk's states in place of token ids.

    An item has `inputs_embeds` `(seq, hidden)`, `attention_mask` `(seq,)` and the other columns of the examples, such
    as `labels`. States are read from the file when an item is read.

    Args:
        file: File that `cache_states` wrote.
        examples: Examples it was written for, in their order.

    Raises:
        ValueError: If the file is damaged, or holds another number of examples.
    """

    def __init__(self, file: str | Path, examples: Dataset) -> None:
        kept = _kept_columns(examples)
        self.file, self.examples = Path(file), examples.select_columns(kept) if kept else [{}] * len(examples)
        self.offsets = _read_offsets(self.file).tolist()
        if len(self.offsets) - 1 != len(examples):
            raise ValueError(
                f"`examples` must be the {len(self.offsets) - 1} that {self.file} was written for, got"
                f" {len(examples)}. Use `cache_states` with another folder."
            )
        self._states: Any = None  # opened by the process that reads

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._states is None:
            self._states = safe_open(self.file, framework="pt").get_slice("states")
        start, end = self.offsets[index], self.offsets[index + 1]
        item = {"attention_mask": [1] * (end - start), **self.examples[index]}
        return item | {"inputs_embeds": self._states[start:end]}  # (seq, hidden)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_states": None}  # an open file does not travel to another process


def cache_states(
    trunk: Trunk, dataset: Dataset, folder: str | Path, *, depths: Sequence[int], batch_size: int = 32
) -> dict[int, CachedStates]:
    """Run a trunk over a data set, unless the folder already holds its states.

    The files `states-<depth>.safetensors` hold the states in float32, one row for each token, a fingerprint of the
    trunk and the token ids, and a checksum. They are renamed to this name when complete. Texts of similar length
    share a batch.

    Args:
        trunk: Trunk, which runs on its own device.
        dataset: Encoded examples, as from `encode_text`; `attention_mask` may be left out where nothing is padded.
            Pad questions to one length: the stock head for question answering also looks at padding.
        folder: Folder of the files. Another data set, or another split, needs another one.
        depths: Numbers of layers after which states are stored; 0 is the embeddings.
        batch_size: Examples of a batch.

    Returns:
        The data set with the states of each depth.

    Raises:
        ValueError: If the data set is empty or not encoded, or the folder holds the states of another data set or
            trunk, or damaged ones.
        OSError: If they cannot be written.

    Source: our own design; the paper's code runs the trunk in every step.
    """
    dataset = dataset.with_format(None)
    if not len(dataset) or "input_ids" not in dataset.column_names:
        raise ValueError(
            f"`dataset` must hold encoded examples with 'input_ids', got {len(dataset)} with the columns "
            f"{dataset.column_names}. Use `encode_text` first."
        )
    data = fingerprint_data(dataset.select_columns(_input_columns(dataset)))
    files = {depth: Path(folder) / f"states-{depth}.safetensors" for depth in depths}
    prints = {depth: f"{fingerprint_trunk(trunk, depth)}-{data}" for depth in depths}
    if missing := {depth: file for depth, file in files.items() if not _is_complete(file, prints[depth])}:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _write(trunk, dataset, missing, prints=prints, batch_size=batch_size)
    return {depth: CachedStates(file, dataset) for depth, file in files.items()}


def pad_examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad examples to the longest one: labels with -100, other columns with 0.

    Args:
        examples: Items of `CachedStates`, or encoded examples.

    Returns:
        The batch, `(batch, ...)` for each column.
    """
    batch = {}
    for name in examples[0]:
        values = [torch.as_tensor(example[name]) for example in examples]
        filler = -100 if name == "labels" else 0
        padded = values[0].dim() > 0
        batch[name] = pad_sequence(values, batch_first=True, padding_value=filler) if padded else torch.stack(values)
    return batch


def fingerprint_data(dataset: Dataset) -> str:
    """Return a hash of all rows, the same in every process."""
    digest = hashlib.sha256()
    dataset = dataset.with_format(None)  # plain lists
    for name in sorted(dataset.column_names):
        digest.update(json.dumps([name, dataset[name][:]]).encode())
    return digest.hexdigest()


def fingerprint_trunk(trunk: Trunk, depth: int) -> str:
    """Return a hash of the weights up to some layer, with the fields that also decide the states after it."""
    names = ("hidden_act", "layer_norm_eps", "num_attention_heads")
    if isinstance(shared := getattr(trunk.config, "shared", None), tuple):
        names = shared if type(trunk) is Trunk else names  # of BERT, as ever
    sizes = "-".join(str(getattr(trunk.config, name, None)) for name in names)
    return f"{sizes}-{chain_hashes(part.state_dict() for part in (trunk.embeddings, *trunk.layer[:depth]))[-1]}"


def _input_columns(dataset: Dataset) -> list[str]:
    return [name for name in TRUNK_INPUTS if name in dataset.column_names]


def _kept_columns(dataset: Dataset) -> list[str]:
    return [name for name in dataset.column_names if name == "attention_mask" or name not in TRUNK_INPUTS]


def _is_complete(file: Path, fingerprint: str) -> bool:
    if not file.exists():
        return False
    try:
        with safe_open(file, framework="pt") as content:
            found = (content.metadata() or {}).get("fingerprint")
    except DAMAGE as error:
        raise ValueError(f"{file} must hold states, but it is damaged: {error}. {REMEDY}") from error
    if found != fingerprint:
        raise ValueError(
            f"{file} must hold the states of this data set and trunk, but it holds others. Use another folder, or"
            " delete it."
        )
    return True


def _read_offsets(file: Path) -> Tensor:
    """Return where each example begins, and the end, `(examples + 1,)`; check all states, which are not kept."""
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in list(content.keys())}  # mapped, not in memory
            texts = content.metadata() or {}
        offsets = tensors["offsets"]
    except DAMAGE as error:
        raise ValueError(f"{file} must hold states, but it is damaged: {error}. {REMEDY}") from error
    check_digest(file, texts, digest(tensors, texts), remedy=REMEDY)
    return offsets


@torch.no_grad()
def _write(
    trunk: Trunk, dataset: Dataset, files: Mapping[int, Path], *, prints: Mapping[int, str], batch_size: int
) -> None:
    lengths = np.array([len(ids) for ids in dataset["input_ids"][:]])
    offsets = np.concatenate([[0], lengths.cumsum()])  # (examples + 1,)
    inputs = dataset.select_columns(_input_columns(dataset))
    with ExitStack() as stack:
        drafts = {depth: stack.enter_context(replacing(file)) for depth, file in files.items()}
        texts = {depth: {"fingerprint": prints[depth], CHECKSUM: "0" * 64} for depth in drafts}
        hidden = trunk.config.hidden_size
        states = {depth: _lay_out(draft, offsets, hidden, texts[depth]) for depth, draft in drafts.items()}
        for rows, batch in _batches(inputs, lengths, batch_size):
            batch = {name: tensor.to(trunk.device) for name, tensor in batch.items()}
            for depth, found in trunk(**batch, depths=list(files)).items():
                for row, state in zip(rows, found.float().cpu().numpy(), strict=True):  # (seq, hidden)
                    states[depth][offsets[row] : offsets[row + 1]] = state[: lengths[row]]
        for depth, draft in drafts.items():
            states[depth].flush()
            tensors = {"offsets": torch.from_numpy(offsets), "states": torch.from_numpy(states[depth])}
            texts[depth][CHECKSUM] = digest(tensors, texts[depth])
            _write_header(draft, offsets, states[depth].shape, texts[depth])


def _batches(inputs: Dataset, lengths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    for rows in np.split(order := np.argsort(-lengths, kind="stable"), range(size, len(order), size)):
        examples = [inputs[int(row)] for row in rows]
        yield rows, pad_examples([{"attention_mask": [1] * len(e["input_ids"]), **e} for e in examples])


def _lay_out(draft: Path, offsets: np.ndarray, hidden: int, texts: Mapping[str, str]) -> np.memmap:
    """Write a safetensors file whose states, which may exceed the memory, and checksum are filled in later."""
    shape = (int(offsets[-1]), hidden)
    draft.touch()
    start, size = _write_header(draft, offsets, shape, texts), 4 * shape[0] * shape[1]
    with draft.open("r+b") as file:
        file.truncate(start + size)
        if hasattr(os, "posix_fallocate"):  # finds a full disk here; later it would be a signal
            os.posix_fallocate(file.fileno(), start, size)
    return np.memmap(draft, "<f4", "r+", offset=start, shape=shape)


def _write_header(draft: Path, offsets: np.ndarray, shape: tuple[int, ...], texts: Mapping[str, str]) -> int:
    """Write all of the file but the states, and return where they begin."""
    start, size = offsets.nbytes, 4 * shape[0] * shape[1]
    header = {
        "__metadata__": texts,
        "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, start]},
        "states": {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format demands
    with draft.open("r+b") as file:
        file.write(struct.pack("<Q", len(text)) + text + offsets.astype("<i8").tobytes())
        return file.tell()
