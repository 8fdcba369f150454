"""The pipeline "multitask": answers of several tasks to a text, for which the trunk runs once."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Pipeline,
    PreTrainedModel,
)
from transformers.pipelines.base import pad_collate_fn

from hf_moebert.architectures.heads import kind_of as kind_of_model
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.data.buckets import group_by_length

from .functional_answers import Example, read_answer, read_classes, read_entities
from .functional_inputs import QUESTION, READERS, TOKENS, read_input
from .functional_spans import context_spans, word_spans


LOADERS = {
    "SequenceClassification": AutoModelForSequenceClassification,
    "TokenClassification": AutoModelForTokenClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
}
PROBE = 8  # tokens
OUTPUTS = ("logits", "start_logits", "end_logits", "marginals", "predictions")


class MultiTaskPipeline(Pipeline):
    """Pipeline that answers a text with several tasks on one trunk.

    `pipeline("multitask", model=folder)` makes one after `import hf_moebert`. An input is a text, `{"text": ...,
    "text_pair": ...}`, `{"tokens": [...]}` for a list of words, or `{"question": ..., "context": ...}`; a list holds
    one input per element. `tasks=[...]` selects tasks; by default all answer that can read the input. Longer inputs
    than the model takes are cut.

    The answer to an input is a dict with an entry for each task:

    - classification: `{"label", "score"}`; with several labels per text, a list of those above one half;
    - regression: `{"score"}`;
    - tagging: a list of `{"label", "word", "score", "start", "end"}`: entities where labels have prefixes such as
      `B-`, otherwise words; `O` is left out. The tag of a word is that of its first token, and the score of an entity
      the mean over its words. The tags of a masked CRF are its best legal path, their scores its marginals;
    - question answering: `{"answer", "score", "start", "end"}`, the likeliest span of at most 30 tokens.

    The formats of the answers are our own design, close to those of the pipelines of transformers for one task.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise ValueError(
                f"`tokenizer` must be a fast one, which knows the words of a text, got {type(self.tokenizer)}. Save "
                "the tokenizer of the tasks in the model's folder."
            )
        self.model.eval()

    def describe_tasks(self) -> dict[str, dict[str, Any]]:
        """Return the kind, the labels, and the numbers of shared and own layers of each task."""
        return {
            name: {
                "kind": kind_of(branch),
                "labels": list(branch.config.id2label.values()),
                "frozen_layers": branch.config.frozen_layers,
                "task_layers": branch.config.num_hidden_layers,
            }
            for name, branch in self._branches().items()
        }

    def check(self, inputs: Any, tasks: Sequence[str] | None = None) -> None:
        """Refuse an input that `answer` could not answer, without running a model.

        Raises:
            ValueError: If the form of the input is unknown, or a task is unknown or cannot read it.
        """
        form, _ = read_input(inputs)
        self._select_tasks(form, tasks)

    def answer(self, requests: Sequence[tuple[Any, Sequence[str] | None]]) -> list[dict[str, Any]]:
        """Answer inputs, each with its own tasks.

        They run as one batch; on a CPU, where padding costs as much as words, as one batch for each range of lengths.

        Args:
            requests: Pairs of an input and its tasks, `None` for all that can read it.

        Returns:
            For each request `{"answers": {task: answer}, "truncated": bool}`.

        Raises:
            ValueError: As `check`, or if a task computes numbers that are not finite.
        """
        items = [self.preprocess(inputs, tasks) for inputs, tasks in requests]
        lengths = [item["input_ids"].shape[1] for item in items]
        groups = group_by_length(lengths) if self.device.type == "cpu" else [list(range(len(items)))]
        answers: dict[int, dict[str, Any]] = {}
        for group in groups:
            found = self.forward(pad_collate_fn(self.tokenizer, None)([items[place] for place in group]))
            for place, outputs, example in zip(group, found["outputs"], found["example"], strict=True):
                read = self.postprocess({"outputs": outputs, "example": example})
                answers[place] = {"answers": read, "truncated": example.truncated}
        return [answers[place] for place in range(len(items))]

    def load_task(self, folder: str | PathLike[str]) -> PreTrainedModel:
        """Load a single-task model for `put_task` from a local folder, without running code in it.

        Raises:
            ValueError: If config.json names no single-task model, or one that needs code of the folder, or if weights
                or the answers to a probe are not finite.
            OSError: If the folder holds no checkpoint of safetensors files.
        """
        with refuse_code(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        names = config.architectures or [""]
        loader = LOADERS.get(names[0].partition("For")[2])
        if loader is None:
            raise ValueError(
                f"`architectures` of config.json must name a class for {' or '.join(LOADERS)}, got {names}. Save a "
                "fine-tuned model of one task."
            )
        model = loader.from_pretrained(
            folder, dtype=self.model.dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        refuse_nonfinite(model, folder)
        return model

    def put_task(self, name: str, model: PreTrainedModel) -> None:
        """Add a task, or replace the task of this name; the others stay as they are.

        Raises:
            ValueError: If the frozen layers of the model are not the trunk's.
        """
        put = self.model.replace_task if name in self.model.tasks else self.model.add_task
        put(name, model)
        self.model.eval()

    def remove_task(self, name: str) -> None:
        """Remove a task; the others stay as they are."""
        self.model.remove_task(name)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save model and tokenizer, without code."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory, **kwargs)

    def preprocess(self, inputs: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Turn an input into tensors of one row each, and an `Example`."""
        form, parts = read_input(inputs)
        self._select_tasks(form, tasks)
        encoded = self.tokenizer(
            *parts,
            is_split_into_words=form == TOKENS,
            truncation=True,
            max_length=min(self.tokenizer.model_max_length, self.model.trunk.longest),
            return_tensors="pt",
        )
        encoding = encoded.encodings[0]
        word_mask = torch.zeros_like(encoded["input_ids"])  # (1, seq); integers, which the padding of pipelines keeps
        if form == QUESTION:
            text, spans = parts[1], context_spans(encoding)
        else:
            text = " ".join(parts[0]) if form == TOKENS else parts[0]
            spans = word_spans(encoding, parts[0])
            word_mask[0, [position for position, *_ in spans]] = 1
        example = Example(text, form, tasks, spans, bool(encoding.overflowing))
        return {**encoded, "word_mask": word_mask, "example": example}

    def _sanitize_parameters(self, tasks: Sequence[str] | None = None, **unknown: Any) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"This pipeline takes `tasks` and `batch_size`, got {sorted(unknown)}. Leave them out.")
        return ({} if tasks is None else {"tasks": tasks}), {}, {}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the trunk once for all rows, and each branch on the rows that ask for it."""
        example, words = model_inputs.pop("example"), model_inputs.pop("word_mask").bool()
        examples = example if isinstance(example, list) else [example]  # a list only in batches
        asked = [self._select_tasks(one.form, one.tasks) for one in examples]
        rows = {name: [row for row, names in enumerate(asked) if name in names] for name in self.model.tasks}
        depths = {name: self.model.branches[name].config.frozen_layers for name, found in rows.items() if found}
        given = (model_inputs.get(key) for key in ("input_ids", "attention_mask", "token_type_ids"))
        states, mask = self.model.trunk.embed(*given, None, None)
        states = self.model.trunk.run(states, mask, depths=set(depths.values()))
        outputs: list[dict[str, dict[str, Tensor]]] = [{} for _ in examples]
        for name, depth in depths.items():
            everywhere = len(rows[name]) == len(examples)
            index = slice(None) if everywhere else torch.tensor(rows[name], device=words.device)
            here = None if mask is None else mask[index]
            found = self._run_branch(name, states[depth][index], here, words[index])
            for place, row in enumerate(rows[name]):
                outputs[row][name] = {key: tensor[place] for key, tensor in found.items()}
        return {"outputs": outputs if isinstance(example, list) else outputs[0], "example": example}

    def _run_branch(self, name: str, states: Tensor, mask: Tensor | None, words: Tensor) -> dict[str, Tensor]:
        branch = self.model.branches[name]
        extra = {"word_mask": words, "output_marginals": True} if hasattr(branch, "crf") else {}
        output = branch(inputs_embeds=states, attention_mask=mask, **extra)
        if broken := _find_nonfinite(output):
            raise ValueError(
                f"The task {name!r} must compute finite numbers, got NaN or infinity in {', '.join(broken)}. Train it "
                "again with a lower learning rate, or run it in float32."
            )
        return {key: output[key].cpu() for key in OUTPUTS if output.get(key) is not None}

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        """Turn the outputs of the branches for one input into the answers of the tasks."""
        example = model_outputs["example"]
        return {name: self._read(name, found, example) for name, found in model_outputs["outputs"].items()}

    def _read(self, name: str, found: dict[str, Tensor], example: Example) -> Any:
        branch = self.model.branches[name]
        kind = kind_of(branch)
        if kind == "question-answering":
            return read_answer(found["start_logits"], found["end_logits"], example)
        if kind == "tagging":
            return read_entities(found, branch.config.id2label, example)
        return read_classes(kind, found["logits"], branch.config.id2label)

    def _branches(self) -> dict[str, PreTrainedModel]:
        """Return a snapshot of the branches, since another thread may put and remove tasks meanwhile."""
        return dict(list(self.model.branches.items()))

    def _select_tasks(self, form: tuple[str, ...], tasks: Sequence[str] | None) -> list[str]:
        """Return the tasks to run: by default all that can read this form."""
        kinds = {name: kind_of(branch) for name, branch in self._branches().items()}
        able = [name for name, kind in kinds.items() if kind in READERS[form]]
        if tasks is None and not able:
            raise ValueError(f"An input must be one that a task can read, got {list(form)} for {kinds}. Add a task.")
        if tasks is None:
            return able
        if isinstance(tasks, str) or not tasks or not kinds.keys() >= set(tasks):
            raise ValueError(
                f"`tasks` must be a list of names in {list(kinds)}, got {tasks!r:.200}. Leave it out for all."
            )
        if unable := [name for name in tasks if name not in able]:
            raise ValueError(f"`tasks` must be among {able} to read {list(form)}, got {unable}. Leave it out for all.")
        return list(tasks)


@torch.no_grad()
def refuse_nonfinite(model: PreTrainedModel, folder: str | PathLike[str]) -> None:
    """Refuse a single-task model with weights that are not finite, or one that computes such numbers of a probe.

    Raises:
        ValueError: If it is one.
    """
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if not broken:
        ids = torch.arange(PROBE, device=model.device)[None] % model.config.vocab_size  # (1, seq)
        mask = torch.ones_like(ids)
        words = {"word_mask": mask} if hasattr(model, "crf") else {}
        broken = _find_nonfinite(model.eval()(input_ids=ids, attention_mask=mask, **words))
    if broken:
        raise ValueError(
            f"The model in {str(folder)!r} must be finite, in its weights and in its answer to a probe, got NaN or "
            f"infinity in {', '.join(broken[:3])}. Train it again with a lower learning rate, or in float32."
        )


def _find_nonfinite(outputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the outputs of a task that are not finite: tags and classes read off them are nonsense."""
    return [key for key in OUTPUTS if outputs.get(key) is not None and not outputs[key].isfinite().all()]


def kind_of(branch: PreTrainedModel) -> str:
    """Return the kind of task of a single-task model; here one score is a number, not the relevance of a pair."""
    kind = kind_of_model(branch)
    return "regression" if kind == "reranking" else kind
