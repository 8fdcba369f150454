"""Many tasks on one trunk, which runs once and only as deep as the tasks of a request need."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertPreTrainedModel
from transformers.utils import ModelOutput

from hf_moebert.methods.masked_crf.modeling_masked_crf import CrfTagger

from .configuration_multitask import MultiTaskBertConfig, check_task_name, describe_task, multitask_config
from .modeling_files import check_hashes, hash_trunk
from .modeling_splitting import (
    FAMILIES,
    HEADS,
    check_single_task,
    fill,
    find_head,
    join,
    take_branch,
    take_trunk,
    trunk_state,
)
from .modeling_storage import StoredByTask
from .modeling_trunk import find_dense, new_branch, new_trunk


CRF_ARGUMENTS = ("word_mask", "output_marginals")
RECORDS = ("output_attentions", "output_hidden_states")  # which the configuration may ask of all tasks
Labels = Tensor | Mapping[str, Tensor]


class MultiTaskModel(StoredByTask):
    """A trunk with a branch for every task: a single-task model of transformers without its first layers."""

    accepts_loss_kwargs = False  # losses are means over the batch: the Trainer divides by accumulation steps

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trunk = new_trunk(config)
        self.branches = nn.ModuleDict()
        for name, task in config.tasks.items():
            if (head := find_head(task["architecture"])) is None:
                raise ValueError(
                    f"`tasks[{name!r}].architecture` must be one of {', '.join(HEADS)}, or of a family in {FAMILIES}, "
                    f"got {task['architecture']!r}. "
                    "Update hf_moebert if the model is newer."
                )
            own = head.config_class.from_dict(copy.deepcopy(task["config"]))
            own.frozen_layers = task["frozen_layers"]
            own.num_hidden_layers -= own.frozen_layers
            own._attn_implementation = config._attn_implementation
            self.branches[name] = new_branch(head, own)
        # An interrupted save may have left weights of tasks and layers that config.json does not describe.
        tasks, layers = "|".join(map(re.escape, config.tasks)), "|".join(map(str, range(config.num_hidden_layers)))
        self._keys_to_ignore_on_load_unexpected = [
            rf"^branches\.(?!(?:{tasks})\.)",
            rf"^trunk\.layer\.(?!(?:{layers})\.)",
        ]
        self.post_init()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, sorted."""
        return sorted(self.branches)

    @classmethod
    def from_tasks(cls, models: Mapping[str, PreTrainedModel]) -> Self:
        """Merge single-task models that share their first layers.

        Args:
            models: For each task a `BertForSequenceClassification` or another class of `HEADS`, or one for sequence
                or token classification or question answering of one other family. `config.frozen_layers` is the number
                of layers that stayed as they were pre-trained. They are not changed.

        Returns:
            The merged model in eval mode; the outputs of each task equal those of its model bit for bit.

        Raises:
            ValueError: If there is no model, or one does not fit the others.

        Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377.
        """
        if not models:
            raise ValueError("`models` must hold one task or more, got none. Give {'sst2': model}.")
        for model in models.values():
            check_single_task(model)
            describe_task(type(model).__name__, model.config)  # refuses a `frozen_layers` that cannot be
        deepest = max(models.values(), key=lambda model: model.config.frozen_layers)
        own: Any = multitask_class(find_dense(deepest.config))
        config = own.config_class.from_single_task(deepest.config, deepest.config.frozen_layers)
        config._attn_implementation = deepest.config._attn_implementation
        with no_init_weights():
            merged = own(config)
        fill(merged.trunk, trunk_state(deepest, config.num_hidden_layers))
        merged.to(deepest.device).eval()._seal_trunk()
        for name, model in models.items():
            merged.add_task(name, model)
        return merged

    def add_task(self, name: str, model: PreTrainedModel) -> None:
        """Add a task without changing the others; if it froze more layers, the trunk becomes deeper.

        Args:
            name: Name of the task: letters, digits, `_` and `-`.
            model: Single-task model as for `from_tasks`. It is not changed.

        Raises:
            ValueError: If the task exists already, or the model was not trained on this trunk.
        """
        check_task_name(name, self.tasks)
        self.branches[name] = self._split_off(model)
        self._update_config()

    def replace_task(self, name: str, model: PreTrainedModel) -> None:
        """Replace the model of a task; see `add_task`."""
        self._check_tasks([name])
        self.branches[name] = self._split_off(model)
        self._update_config()

    def remove_task(self, name: str) -> None:
        """Remove a task; the trunk and the other tasks stay as they are."""
        self._check_tasks([name])
        del self.branches[name]
        self._update_config()

    def extract_task(self, name: str) -> PreTrainedModel:
        """Return a copy of a task as a plain single-task model of transformers, in eval mode."""
        self._check_tasks([name])
        return join(self.trunk, self._branch(name))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        tasks: Sequence[str] | None = None,
        labels: Mapping[str, Labels] | None = None,
        word_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, ModelOutput]:
        """Run the trunk once, as deep as the deepest of some tasks needs, and the branches of these tasks.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: 1 or True at real tokens, shape `(batch, seq)`; or a ready mask `(batch, 1, seq, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Word embeddings in place of ids. Shape `(batch, seq, hidden)`.
            tasks: Tasks to run, by default all.
            labels: For some tasks the `labels` of the single-task model, or a mapping of the arguments of its loss,
                such as `start_positions` and `end_positions`.
            word_mask: True at the first piece of each word; needed by tasks with a CRF that get no labels, in
                evaluation. Shape `(batch, seq)`.
            **kwargs: Arguments of all branches, such as `output_hidden_states`, which then start at the task's own
                layers; `output_marginals` is passed to those with a CRF.

        Returns:
            The output of each task, equal to that of its single-task model.

        Raises:
            ValueError: If a task, an id or a label does not exist, or the sequence is too long.
        """
        asked = self.tasks if tasks is None else list(tasks)
        self._check_tasks(asked)
        labels = {} if labels is None else labels
        by_task = isinstance(labels, Mapping)
        if not by_task:
            raise ValueError(
                f"`labels` must map tasks to their labels, got {type(labels).__name__}. Give {{{asked[0]!r}: labels}}."
            )
        if unasked := sorted(set(labels) - set(asked)):
            raise ValueError(f"`labels` must be of tasks that are run, {asked}, got {unasked}. Name them in `tasks`.")
        states, mask = self.trunk.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        depths = {name: self._branch(name).config.frozen_layers for name in asked}
        found = self.trunk.run(states, mask, position_ids, depths=set(depths.values()))
        kwargs = {name: True for name in RECORDS if getattr(self.config, name)} | kwargs
        kwargs |= {"attention_mask": mask, "position_ids": position_ids, "word_mask": word_mask, "return_dict": True}
        return {name: self._run_branch(name, found[depth], labels.get(name), kwargs) for name, depth in depths.items()}

    def _branch(self, name: str) -> PreTrainedModel:
        return cast(PreTrainedModel, self.branches[name])

    def _run_branch(self, name: str, states: Tensor, labels: Labels | None, kwargs: dict[str, Any]) -> ModelOutput:
        branch = self._branch(name)
        if not isinstance(branch, CrfTagger):
            kwargs = {key: value for key, value in kwargs.items() if key not in CRF_ARGUMENTS}
        targets = {} if labels is None else {"labels": labels} if isinstance(labels, Tensor) else labels
        if not isinstance(targets, Mapping) or not all(isinstance(target, Tensor) for target in targets.values()):
            raise ValueError(f"`labels[{name!r}]` must be a tensor or a mapping of tensors, got {labels!r}.")
        if "labels" in targets:
            self._check_labels(name, targets["labels"])
        output = branch(inputs_embeds=states, **kwargs, **targets)
        if targets and not any(x.is_floating_point() or (x != -100).any() for x in targets.values()):
            logits = next(value for key, value in output.items() if key.endswith("logits"))
            output.loss = logits.sum() * 0.0  # the mean over no label is NaN
        return output

    def _check_labels(self, name: str, labels: Tensor) -> None:
        """Refuse labels that the head does not have: on a GPU they would abort the process."""
        config = self._branch(name).config
        classes = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
        if not classes or labels.is_floating_point() or torch.compiler.is_compiling():
            return
        wrong = (labels != -100) & ((labels < 0) | (labels >= config.num_labels))
        if wrong.any():
            raise ValueError(
                f"`labels[{name!r}]` must be in [0, {config.num_labels}) or -100, got {int(labels[wrong][0])}. Map "
                "the data set's labels to the task's `label2id`."
            )

    def _check_tasks(self, names: Sequence[str]) -> None:
        """Refuse unknown tasks, and an empty list of tasks."""
        unknown = [name for name in names if name not in self.branches]
        if unknown or not names:
            raise ValueError(
                f"`tasks` must name one or more of {self.tasks}, got {unknown or list(names)}. Leave it out to run "
                "all, or add a task with `add_task`."
            )

    def _split_off(self, model: PreTrainedModel) -> PreTrainedModel:
        """Split off the branch of a model that fits the trunk, and extend the trunk by layers that it lacks."""
        check_single_task(model)
        frozen = describe_task(type(model).__name__, model.config)["frozen_layers"]
        self._check_sizes(model)
        branch = take_branch(model, frozen).to(self.device)
        branch.set_attn_implementation(self.config._attn_implementation)
        theirs = trunk_state(model, frozen)
        self._check_prefix(theirs, frozen)
        if frozen > len(self.trunk.layer):
            self.trunk = take_trunk(model, frozen).to(self.device)
            self._adopt(self.trunk.config)
        if len(self.trunk.layer) >= len(self.config.trunk_sha256):  # the trunk became deeper
            self._seal_trunk()
        return branch.train(self.training)

    def _adopt(self, config: Any) -> None:
        """Take over the depth of a deeper trunk, whose modules then read this model's configuration."""
        self.config.num_hidden_layers = config.num_hidden_layers
        if getattr(config, "layer_types", None) is not None:
            self.config.layer_types = config.layer_types
        for module in self.trunk.modules():
            if getattr(module, "config", None) is config:
                module.config = self.config
        for body in getattr(self.trunk, "_body", ()):
            body.config = self.config

    def _check_sizes(self, model: PreTrainedModel) -> None:
        """Refuse a model of other sizes or another precision than the trunk."""
        sizes: dict[str, tuple[Any, Any]] = {
            field: (getattr(self.config, field, None), getattr(model.config, field, None))
            for field in self.config.shared
        }
        families = self.config.dense_class.model_type, find_dense(model.config).model_type
        sizes = {"model_type": families} | sizes
        for field, (ours, theirs) in (sizes | {"dtype": (self.dtype, model.dtype)}).items():
            if ours != theirs:
                raise ValueError(
                    f"`model` must have the trunk's `{field}` {ours!r}, got {theirs!r}. Use tasks of one pre-trained "
                    "model."
                )

    def _check_prefix(self, theirs: Mapping[str, Tensor], frozen: int) -> None:
        """Refuse a model whose frozen layers differ from those of the trunk in any bit."""
        depth = min(frozen, len(self.trunk.layer))
        places = ("embeddings.", *(f"layer.{i}." for i in range(depth)))
        ours, theirs = (
            {name: x.to(self.device).contiguous() for name, x in side.items() if name.startswith(places)}
            for side in (self.trunk.state_dict(), theirs)
        )
        if ours.keys() != theirs.keys() or not all(
            torch.equal(x.view(torch.uint8), ours[name].view(torch.uint8)) for name, x in theirs.items()
        ):
            hashes, expected = (hash_trunk(side, side.__getitem__, depth) for side in (theirs, ours))
            check_hashes(hashes, expected, "The frozen part of `model`")

    def _update_config(self) -> None:
        """Update the configuration to the current tasks and depth."""
        tasks = {}
        for name in self.tasks:
            branch = self._branch(name)
            config = copy.deepcopy(branch.config)
            config.num_hidden_layers += config.frozen_layers
            tasks[name] = describe_task(type(branch).__name__, config)
        self.config.num_hidden_layers = len(self.trunk.layer)
        self.config.tasks = tasks

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.trunk.words

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        place = "word_embeddings" if hasattr(self.trunk.embeddings, "word_embeddings") else "tok_embeddings"
        setattr(self.trunk.embeddings, place, value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse to change the vocabulary, with which all tasks were trained."""
        raise ValueError(
            "The vocabulary must stay the one that the tasks were trained with. Resize the pre-trained model before "
            "tasks are trained on it."
        )


class MultiTaskBertModel(MultiTaskModel, BertPreTrainedModel):
    """A trunk of a BERT with a branch for every task: a single-task model without its first layers."""

    config: MultiTaskBertConfig
    config_class = MultiTaskBertConfig


_made: dict[type, type[MultiTaskModel]] = {BertConfig: MultiTaskBertModel}  # by the dense configuration


def multitask_class(dense: type[PreTrainedConfig]) -> type[MultiTaskModel]:
    """Return the class of many tasks on the trunk of a family, which the first call makes.

    Args:
        dense: Configuration of transformers, of a family in the table whose first layers tasks can share.
    """
    if dense in _made:
        return _made[dense]
    base = next(cls for cls in MODEL_MAPPING[dense].__mro__ if cls.__name__.endswith("PreTrainedModel"))
    name = MODEL_MAPPING[dense].__name__
    body = {
        "__doc__": f"A trunk of a {name} with a branch for every task: a single-task model without its first layers.",
        "__module__": __name__,
        "config_class": multitask_config(dense),
    }
    cls: Any = type(f"MultiTask{name}", (MultiTaskModel, base), body)
    globals()[cls.__name__] = _made[dense] = cls
    return cls
