"""How a form is read back: as `example.json` beside it says, and what it then answers to the inputs stored there."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_moebert import (
    MaskSparsityCallback,
    MaskSparsityConfig,
    MPOSqueezingCallback,
    MPOSqueezingConfig,
    PlatonConfig,
    PlatonPruningCallback,
)
from hf_moebert.methods.moebert.conversion import load_importance
from hf_moebert.methods.multitask.training_states import cache_states
from hf_moebert.runtime.chains import load_chain


# The recipes of the runs that are resumed: a run goes on only with the one it began with.
PRUNING = PlatonConfig(keep_ratio=0.4, initial_warmup=1, final_warmup=2, window=2)
MOVING = replace(PRUNING, criterion="movement")
SQUEEZING = MPOSqueezingConfig(metric="epoch", higher_is_better=False, cuts=3)  # gets worse whatever is learned
MASKS = MaskSparsityConfig(keep_ratio=0.6, score_rate=0.5, ramp_share=0.5, learn_share=1.0)
STOP, STEPS = 4, 6  # the step that is stored, and the last one
DEPTH = 1  # layers below the stored states


def example_of(folder: Path) -> dict[str, Any]:
    """Return what is said of a form: its `kind`, and the Auto class that loads its model."""
    return json.loads((folder / "example.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path, side: str) -> dict[str, Tensor]:
    """Return the stored tensors of a side, `input` or `output`."""
    found = load_file(folder / "example.safetensors")
    return {name.removeprefix(f"{side}."): x for name, x in found.items() if name.startswith(f"{side}.")}


def read(folder: Path) -> dict[str, Tensor]:
    """Load a form and return its outputs."""
    return KINDS[example_of(folder)["kind"]](folder, tensors_of(folder, "input"))


def assert_same(found: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Compare all outputs; only rounding may differ."""
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def load(folder: Path) -> PreTrainedModel:
    """Load the model of a form, of which nothing may be missing and nothing left over."""
    auto = getattr(transformers, example_of(folder)["auto"])
    base = folder / "base"
    model, info = auto.from_pretrained(base if base.is_dir() else folder, output_loading_info=True)
    faults = {name: found for name, found in info.items() if found}
    assert faults == {}, faults
    return model.eval()


@torch.no_grad()
def answer(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a model, and name all tensors that it returns."""
    words = (
        {"word_mask": inputs["attention_mask"]}
        if any(name.endswith("crf") for name, _ in model.named_modules())
        else {}
    )
    return dict(_flatten(model(**inputs, **words)))


def _flatten(outputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name tensors in dictionaries and tuples by their places; a cache of keys and values is neither."""
    if isinstance(outputs, Tensor):
        yield name, outputs.contiguous()
    parts = outputs.items() if isinstance(outputs, Mapping) else ()
    parts = enumerate(outputs) if isinstance(outputs, tuple) else parts
    for key, part in parts:
        yield from _flatten(part, f"{name}.{key}" if name else str(key))


def read_model(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read what `save_pretrained` or `save_packed` wrote."""
    return answer(load(folder), inputs)


def read_adapter(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a PEFT adapter onto its model, which lies in `base`."""
    return answer(PeftModel.from_pretrained(load(folder), folder).eval(), inputs)


def read_importance(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read importance, which knows the weights it was measured on."""
    model = load(folder)
    return answer(model, inputs) | {"importance": load_importance(folder / "importance.safetensors", model)}


def read_decoder(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the CRF of an exported tagger."""
    tags = load_chain(folder).decode(inputs["emissions"].numpy(), inputs["mask"].numpy())
    return {"tags": torch.from_numpy(tags)}


def read_states(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the states of a trunk, which know the trunk and the examples."""
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    rows = Dataset.from_dict({name: x.tolist() for name, x in inputs.items()})
    states = cache_states(load(folder).trunk, rows, folder, depths=[DEPTH])[DEPTH]
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()), "written anew"
    return {"states": torch.stack([row["inputs_embeds"] for row in states])}


def train(
    model: PreTrainedModel, inputs: dict[str, Tensor], callback: TrainerCallback, *, folder: Path, **options: Any
) -> Trainer:
    """Train on the inputs alone, in their order; plain descent, for Adam makes much of rounding."""
    rows = [{name: x[i] for name, x in inputs.items()} for i in range(len(inputs["labels"]))]
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0, "max_steps": STEPS}
    make = getattr(callback, "make_optimizer", None)  # of AdamW
    quiet |= {"optim": "adamw_torch" if make else "sgd", "learning_rate": 0.02}
    quiet |= {"per_device_train_batch_size": len(rows), "save_steps": STOP, "save_strategy": "steps"}
    start = options.pop("resume_from_checkpoint", None)
    args = TrainingArguments(str(folder), **quiet | options)
    optimizers = (make(model, args) if make else None, None)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[callback], optimizers=optimizers)
    trainer.train(resume_from_checkpoint=start)
    return trainer


def resume(folder: Path, inputs: dict[str, Tensor], callback: TrainerCallback, **options: Any) -> PreTrainedModel:
    """Go on from a stored checkpoint to the end, elsewhere."""
    with tempfile.TemporaryDirectory() as out:
        model = load(folder)
        train(model, inputs, callback, folder=Path(out), resume_from_checkpoint=str(folder), **options)
    return model.eval()


def read_pruning(folder: Path, inputs: dict[str, Tensor], recipe: PlatonConfig = PRUNING) -> dict[str, Tensor]:
    """Resume a pruning run, whose optimizer was not stored, and say what is not zero at its end."""
    model = resume(folder, inputs, PlatonPruningCallback(recipe, resume_from=folder, allow_changes=True))
    return {
        name: parameter != 0
        for name, parameter in model.named_parameters()
        if ".layer." in name and parameter.dim() == 2
    }


def read_squeezing(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resume a squeezing run whose cuts are judged too bad: they are taken back with what was stored."""
    callback = MPOSqueezingCallback(SQUEEZING, resume_from=folder, allow_changes=True)
    model = resume(folder, inputs, callback, eval_strategy="steps", eval_steps=STOP)
    return answer(model, {name: x for name, x in inputs.items() if name != "labels"})


def read_masks(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resume a run that learns masks, and say which are open at its end."""
    model = resume(folder, inputs, MaskSparsityCallback(MASKS))
    opened = {path: network.masks.settled() > 0 for path, network in model.masked_networks().items()}
    return opened | {"clock": model.budget.clock}


KINDS = {
    "model": read_model,
    "adapter": read_adapter,
    "importance": read_importance,
    "crf-decoder": read_decoder,
    "states": read_states,
    "pruning": read_pruning,
    "pruning-movement": partial(read_pruning, recipe=MOVING),
    "squeezing": read_squeezing,
    "masks": read_masks,
}
