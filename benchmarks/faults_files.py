"""Every kind of file whose format is this package's own: how it is written, and what is read from it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faults_runs import SIZES, make_bert, make_data, make_sweep, make_trainer
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from hf_moebert import BertCrfForTokenClassification, MultiTaskBertModel, last_complete_checkpoint, save_packed
from hf_moebert.checkpoints.manifests import MANIFEST_FILE
from hf_moebert.checkpoints.tensor_files import digest, read_tensors
from hf_moebert.inference.onnx_export import write_chain
from hf_moebert.methods.moebert.conversion import load_importance, save_importance
from hf_moebert.methods.mpo.training import STATE_FILE as SQUEEZING_FILE
from hf_moebert.methods.multitask.modeling_splitting import take_trunk
from hf_moebert.methods.multitask.training_runs import Run
from hf_moebert.methods.multitask.training_states import CachedStates, cache_states
from hf_moebert.methods.platon.training_state import STATE_FILE as PRUNING_FILE, read_state
from hf_moebert.runtime.chains import load_chain


TEACHER = Run("teacher", 1)


@dataclass(frozen=True)
class Artefact:
    """A file, or several, of a format of ours.

    Attributes:
        write: Writes a first or a second version, 0 or 1, into a folder.
        read: Returns a text that tells what a user gets of it.
        files: Pattern of the files in the folder that may be damaged.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], str]
    files: str


def make_classifier(version: int = 0) -> BertForSequenceClassification:
    """Make a tiny classifier that is pruned; those of two versions differ in their last layer alone."""
    model = make_bert(layers=1)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            if parameter.dim() > 1:
                parameter[parameter.abs() < 0.03] = 0
        model.classifier.weight.fill_(version + 1)
    return model.eval()


def make_task(version: int) -> BertForSequenceClassification:
    """Make a model of a task, whose first layer and embeddings are those of any version."""
    model = make_classifier(version)
    model.config.frozen_layers = 0
    return model


def write_importance(folder: Path, version: int) -> None:
    """Save scores of the neurons of a classifier."""
    save_importance(folder / "importance.safetensors", torch.full((1, 32), version + 1.0), make_classifier())


def read_importance(folder: Path) -> str:
    """Load them for the same classifier."""
    return digest({"": load_importance(folder / "importance.safetensors", make_classifier())})


def write_checkpoint(kind: str, max_steps: int = 4) -> Callable[[Path, int], None]:
    """Return a function that trains a kind of run, with a checkpoint after the fourth step."""

    def write(folder: Path, version: int) -> None:
        make_trainer(kind, folder, max_steps=max_steps, save_steps=4, seed=version).train()

    return write


def read_pruning(folder: Path) -> str:
    """Read the state of a pruning run."""
    state, tensors = read_state(folder / "checkpoint-4")
    return json.dumps(state, sort_keys=True) + digest(tensors)


def read_squeezing(folder: Path) -> str:
    """Read the state of a squeezing run."""
    tensors, texts = read_tensors(folder / "checkpoint-4" / SQUEEZING_FILE, remedy="Resume from another one.")
    return texts["events"] + digest(tensors)


def read_checkpoint(folder: Path) -> str:
    """Find the last complete checkpoint, of which there is one."""
    return Path(last_complete_checkpoint(folder)).name


def write_packed(folder: Path, version: int) -> None:
    """Save a packed model."""
    save_packed(make_classifier(version), folder)


def read_packed(folder: Path) -> str:
    """Load it."""
    return digest(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())


def write_multitask(folder: Path, version: int) -> None:
    """Save the merger of two tasks, of which one changes."""
    MultiTaskBertModel.from_tasks({"a": make_task(0), "b": make_task(version)}).save_pretrained(folder)


def read_multitask(folder: Path) -> str:
    """Load it."""
    return digest(MultiTaskBertModel.from_pretrained(folder).state_dict())


def write_states(folder: Path, version: int) -> None:
    """Store the states of a trunk."""
    cache_states(take_trunk(make_bert(), 1), make_data(version), folder, depths=[1])


def read_states(folder: Path) -> str:
    """Read the states of all examples."""
    (file,) = folder.glob("states-*.safetensors")
    rows = CachedStates(file, make_data())
    tensors: dict[str, Tensor] = {str(index): rows[index]["inputs_embeds"] for index in range(len(rows))}
    return digest(tensors)


def write_sweep(folder: Path, version: int) -> None:
    """Make one run of a sweep."""
    make_sweep(folder, changed=bool(version)).make("task", TEACHER)


def read_result(folder: Path) -> str:
    """Read the score of the run, which is not made again."""
    return str(make_sweep(folder).make("task", TEACHER))


def read_run(folder: Path) -> str:
    """Load the model of the run."""
    return digest(make_sweep(folder).load("task", TEACHER).state_dict())


def write_crf(folder: Path, version: int) -> None:
    """Write the scores of a tagger, as its export does."""
    labels = dict(enumerate(["O", "B-A", "I-A"]))
    torch.manual_seed(version)
    dense = BertForTokenClassification(BertConfig(**SIZES, num_hidden_layers=1, id2label=labels))
    tagger = BertCrfForTokenClassification.from_dense(dense)
    tagger.config.save_pretrained(folder)
    write_chain(tagger.crf, folder)


def read_crf(folder: Path) -> str:
    """Decode random emissions with the scores beside the graph."""
    emissions = np.random.default_rng(0).normal(size=(64, 9, 3))
    return str(load_chain(folder).decode(emissions, np.ones((64, 9), bool)).tolist())


ARTEFACTS = {
    "importance": Artefact(write_importance, read_importance, "importance.safetensors"),
    "pruning state": Artefact(write_checkpoint("pruning"), read_pruning, f"checkpoint-4/{PRUNING_FILE}"),
    "squeezing state": Artefact(write_checkpoint("squeezing", 6), read_squeezing, f"checkpoint-4/{SQUEEZING_FILE}"),
    "manifest": Artefact(write_checkpoint("manifest"), read_checkpoint, f"checkpoint-4/{MANIFEST_FILE}"),
    "checkpoint": Artefact(write_checkpoint("manifest"), read_checkpoint, "checkpoint-4/*"),
    "packed weights": Artefact(write_packed, read_packed, "model.safetensors"),
    "CRF": Artefact(write_crf, read_crf, "crf.safetensors"),
    "many tasks": Artefact(write_multitask, read_multitask, "*.safetensors*"),
    "cached states": Artefact(write_states, read_states, "states-1.safetensors"),
    "sweep result": Artefact(write_sweep, read_result, "task/teacher-1/result.json"),
    "sweep model": Artefact(write_sweep, read_run, "task/teacher-1/*.*"),
}
