"""States of a frozen trunk, computed once for a data set, stored in files, and read while branches train."""

import hashlib
import json
import os
import platform
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .functional import chain_hashes
from .modeling_trunk import BertTrunk


TRUNK_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class CachedStates(torch.utils.data.Dataset):
    """Encoded examples with the trunk's states in place of token ids.

    An item has `inputs_embeds` `(seq, hidden)`, `attention_mask` `(seq,)` and the other columns of the examples, such
    as `labels`. States are read from the file when an item is read.

    Args:
        file: File that `cache_states` wrote.
        examples: Examples it was written for, in their order.

    Raises:
        ValueError: If the file holds another number of examples.
    """

    def __init__(self, file: str | Path, examples: Dataset) -> None:
        self.file, self.examples = Path(file), examples.select_columns(_kept_columns(examples))
        with safe_open(self.file, framework="pt") as content:
            self.offsets = content.get_tensor("offsets").tolist()
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
    trunk: BertTrunk, dataset: Dataset, folder: str | Path, *, depths: Sequence[int], batch_size: int = 32
) -> dict[int, CachedStates]:
    """Run a trunk over a data set, unless the folder already holds its states.

    The files `states-<depth>.safetensors` hold the states in float32, one row for each token, and a fingerprint of
    the trunk and the token ids. They are renamed to this name when complete. Texts of similar length share a batch.

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
            trunk.

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


def fingerprint_trunk(trunk: BertTrunk, depth: int) -> str:
    """Return a hash of the weights up to some layer, with the fields that also decide the states after it."""
    names = ("hidden_act", "layer_norm_eps", "num_attention_heads")
    sizes = "-".join(str(getattr(trunk.config, name)) for name in names)
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
    except SafetensorError as error:
        raise ValueError(f"{file} must hold states, but it is damaged: {error}. Delete it.") from error
    if found != fingerprint:
        raise ValueError(
            f"{file} must hold the states of this data set and trunk, but it holds others. Use another folder, or"
            " delete it."
        )
    return True


@torch.no_grad()
def _write(
    trunk: BertTrunk, dataset: Dataset, files: Mapping[int, Path], *, prints: Mapping[int, str], batch_size: int
) -> None:
    lengths = np.array([len(ids) for ids in dataset["input_ids"][:]])
    offsets = np.concatenate([[0], lengths.cumsum()])  # (examples + 1,)
    for file in files.values():
        _remove_stale(file)
    writer = f"{platform.node()}-{os.getpid()}"
    partial = {depth: file.with_name(f"{file.name}.{writer}.partial") for depth, file in files.items()}
    hidden = trunk.config.hidden_size
    states = {d: _lay_out(path, offsets, hidden, {"fingerprint": prints[d]}) for d, path in partial.items()}
    inputs = dataset.select_columns(_input_columns(dataset))
    for rows, batch in _batches(inputs, lengths, batch_size):
        batch = {name: tensor.to(trunk.embeddings.position_ids.device) for name, tensor in batch.items()}
        for depth, found in trunk(**batch, depths=list(files)).items():
            for row, state in zip(rows, found.float().cpu().numpy(), strict=True):  # (seq, hidden)
                states[depth][offsets[row] : offsets[row + 1]] = state[: lengths[row]]
    for depth, path in partial.items():
        states[depth].flush()
        path.replace(files[depth])


def _remove_stale(file: Path) -> None:
    """Delete unfinished files of processes of this machine that were killed."""
    for path in file.parent.glob(f"{file.name}.{platform.node()}-*.partial"):
        process = path.name.removesuffix(".partial").rpartition("-")[2]
        if process == str(os.getpid()) or (os.path.isdir("/proc/self") and not os.path.isdir(f"/proc/{process}")):
            path.unlink(missing_ok=True)


def _batches(inputs: Dataset, lengths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    for rows in np.split(order := np.argsort(-lengths, kind="stable"), range(size, len(order), size)):
        examples = [inputs[int(row)] for row in rows]
        yield rows, pad_examples([{"attention_mask": [1] * len(e["input_ids"]), **e} for e in examples])


def _lay_out(path: Path, offsets: np.ndarray, hidden: int, metadata: dict[str, str]) -> np.memmap:
    """Write a safetensors file whose states, which may exceed the memory, are filled in later."""
    tokens, start = int(offsets[-1]), offsets.nbytes
    header = {
        "__metadata__": metadata,
        "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, start]},
        "states": {"dtype": "F32", "shape": [tokens, hidden], "data_offsets": [start, start + 4 * tokens * hidden]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format demands
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + offsets.astype("<i8").tobytes())
        file.truncate(file.tell() + 4 * tokens * hidden)
    return np.memmap(path, "<f4", "r+", offset=8 + len(text) + start, shape=(tokens, hidden))
