"""Configuration of many tasks on one trunk."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.bert.configuration_bert import BertConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.checkpoints.strict_config import StrictConfig, strict


# Fields in which each task must agree with the trunk
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "chunk_size_feed_forward",
)
COPIED = ("pad_token_id", "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob")  # of one task
IGNORED_FIELDS = ("transformers_version", "architectures", "auto_map", "dtype")  # of the folder, not of the task
TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESERVED = nn.ModuleDict()  # a task cannot have the name of an attribute of the dict of branches


@dataclass(kw_only=True)
class MultiTaskFields:
    """The fields that the configurations of many tasks on one trunk add; those of the base class are the trunk's.

    Args:
        tasks: For each task its `architecture` (class of the single-task model), `frozen_layers` (number of layers of
            the trunk below its branch) and `config` (configuration of the single-task model, with all of its layers);
            in a folder also `sha256`, the fingerprint of its branch and of the trunk below, filled in on saving.
        trunk_sha256: Fingerprints of the embeddings, of these with the first layer, and so on; filled in when a model
            is built or saved.

    Raises:
        ValueError: If a value has the wrong type or breaks a rule; the message names rule and remedy.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377; the format of config.json is our own.
    """

    transformers_weights = SAFE_WEIGHTS_INDEX_NAME  # transformers reads this file and no other weights in the folder
    before_use: ClassVar[list[Callable[[type], None]]] = []  # called with the class of every configuration
    dense_class: ClassVar[type[PreTrainedConfig]]
    shared: ClassVar[tuple[str, ...]] = SHARED
    copied: ClassVar[tuple[str, ...]] = COPIED

    tasks: dict[str, Any] = field(default_factory=dict)
    trunk_sha256: list[str] = field(default_factory=list)

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields as `StrictConfig` does."""
        for prepare in self.before_use:
            prepare(type(self))
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of `StrictConfig`

    @classmethod
    def from_single_task(cls, config: PreTrainedConfig, num_layers: int) -> Self:
        """Describe a trunk without tasks.

        Args:
            config: Configuration of a single-task model with this trunk.
            num_layers: Depth of the trunk.
        """
        fields: dict[str, Any] = {
            name: getattr(config, name) for name in (*cls.shared, *cls.copied) if hasattr(config, name)
        }
        if (types := getattr(config, "layer_types", None)) is not None:
            fields["layer_types"] = types[:num_layers]
        fields[cls.depth_name()] = num_layers
        return cls(**fields)

    @classmethod
    def depth_name(cls) -> str:
        """Return the name of the number of layers in config.json."""
        names: dict[str, str] = cls.dense_class.attribute_map
        return names.get("num_hidden_layers", "num_hidden_layers")

    def splits(self) -> dict[str, tuple[int, int]]:
        """Return the numbers of frozen and own layers of each task, as `functional.layers_run` takes them."""
        sizes = {name: (task["frozen_layers"], task["config"][self.depth_name()]) for name, task in self.tasks.items()}
        return {name: (frozen, depth - frozen) for name, (frozen, depth) in sizes.items()}

    def validate_tasks(self) -> None:
        """Refuse tasks whose name, description or depth is invalid."""
        default, layers = self.dense_class(), getattr(self, "num_hidden_layers")  # noqa: B009 - of the base class
        for name, task in self.tasks.items():
            check_task_name(name, [taken for taken in self.tasks if taken != name])
            known = {"architecture", "frozen_layers", "config", "sha256"}
            if not isinstance(task, dict) or task.keys() | {"sha256"} != known or not isinstance(task["config"], dict):
                raise ValueError(
                    f"`tasks[{name!r}]` must hold architecture, frozen_layers and config, got "
                    f"{sorted(task) if isinstance(task, dict) else task!r}. Add tasks with `add_task`."
                )
            for size in self.shared:
                ours, theirs = (plain(x) for x in (getattr(self, size, None), getattr(default, size, None)))
                theirs = plain(task["config"].get(size, theirs))
                if ours != theirs:
                    raise ValueError(
                        f"`tasks[{name!r}].config` must have the trunk's `{size}` {ours!r}, got {theirs!r}. Add tasks "
                        "with `add_task`."
                    )
            depth = task["config"].get(self.depth_name())
            if type(depth) is not int:
                raise ValueError(f"`tasks[{name!r}].config` must hold `{self.depth_name()}`, got {depth!r}.")
            check_split(task["frozen_layers"], depth)
            if task["frozen_layers"] > layers:
                raise ValueError(
                    f"`tasks[{name!r}].frozen_layers` must be in [0, {layers}], the trunk's depth, "
                    f"got {task['frozen_layers']}. Add tasks with `add_task`."
                )

    def validate_trunk_sha256(self) -> None:
        """Refuse fingerprints whose number does not match that of the layers."""
        layers = getattr(self, "num_hidden_layers")  # noqa: B009 - of the base class
        if self.trunk_sha256 and len(self.trunk_sha256) != layers + 1:
            raise ValueError(
                f"`trunk_sha256` must hold {layers + 1} hashes, one for the embeddings and one for "
                f"each layer, got {len(self.trunk_sha256)}. Leave it out to have it filled in."
            )


@strict
class MultiTaskBertConfig(MultiTaskFields, StrictConfig, BertConfig):
    """Configuration of many tasks on the trunk of a BERT, with the arguments of `BertConfig` and `MultiTaskFields`."""

    model_type = "multitask_bert"
    dense_class = BertConfig


_made: dict[type, Any] = {BertConfig: MultiTaskBertConfig}  # by the dense configuration


def multitask_config(dense: type[PreTrainedConfig]) -> Any:
    """Return the configuration of many tasks on the trunk of a family, which the first call makes.

    Args:
        dense: Configuration of transformers, of a family in the table whose first layers tasks can share.
    """
    if dense in _made:
        return _made[dense]
    row = ARCHITECTURES[dense.model_type]
    own = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(dense) if field.name not in own]
    depth = dense.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    of_task = [name for name in names if any(part in name for part in ("dropout", "classifier", "initializer"))]
    of_task += [name for name in names if name.endswith("_token_id") or name.startswith("reference_")]
    body = {
        "__doc__": f"Configuration of many tasks on the trunk of a model of the family {dense.model_type!r}.",
        "__module__": __name__,
        "model_type": f"multitask_{dense.model_type}",
        "dense_class": dense,
        "undeclared": row.undeclared,
        "shared": tuple(x for x in (*names, *row.undeclared) if x not in {depth, "layer_types", *of_task}),
        "copied": (*of_task, "pad_token_id"),
    }
    cls: Any = strict(type(f"MultiTask{dense.__name__}", (MultiTaskFields, StrictConfig, dense), body))
    globals()[cls.__name__] = _made[dense] = cls
    return cls


def plain(value: Any) -> Any:
    """Return a value as a file holds it."""
    return json.loads(json.dumps(value))


def describe_task(architecture: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entry in config.json of a single-task model with `config.frozen_layers`."""
    frozen = getattr(config, "frozen_layers", None)
    check_split(frozen, config.num_hidden_layers)
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in IGNORED_FIELDS}
    fields = json.loads(json.dumps(fields))  # as read from the file
    return {"architecture": architecture, "frozen_layers": frozen, "config": fields}


def check_task_name(name: str, taken: list[str]) -> None:
    """Refuse a name that is taken, or cannot name both a module and a file on every system.

    Raises:
        ValueError: If the name is refused.
    """
    if type(name) is not str or not TASK_NAME.fullmatch(name) or hasattr(RESERVED, name):
        raise ValueError(
            f"A task's name must be 1 to 64 of the characters A-Z, a-z, 0-9, _ and -, and not a method of torch's "
            f"`ModuleDict` such as 'keys', got {name!r}. Call it 'sst2' or 'my-task'."
        )
    if name.lower() in (other.lower() for other in taken):
        raise ValueError(
            f"Names of tasks must differ in more than case, got {name!r} beside {taken}. Choose another, or use "
            "`replace_task`."
        )


def check_split(frozen_layers: Any, num_layers: int) -> None:
    """Refuse a number of frozen layers that leaves the task no layer of its own.

    Raises:
        ValueError: If the number is refused.
    """
    if type(frozen_layers) is not int or not 0 <= frozen_layers < num_layers:
        raise ValueError(
            f"`frozen_layers` must be an integer in [0, {num_layers}), got {frozen_layers!r}. Set "
            "`model.config.frozen_layers` to the number of layers that stayed as they were pre-trained."
        )
