"""Register the models, quantizers, pipelines and the PEFT method of this package with transformers and PEFT."""

from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from hf_moebert.methods.mixture_of_masks import configuration_families
from hf_moebert.methods.mixture_of_masks.configuration_mixture_of_masks import (
    MoMFields,
    MoMT5Config,
    masked_config,
    why_not_masked,
)
from hf_moebert.methods.mixture_of_masks.modeling_mixture_of_masks import (
    MoMT5ForConditionalGeneration,
    classes_to_mask,
    masked_class,
)

from .architectures.checking import check_row
from .architectures.families import ARCHITECTURES
from .architectures.paths import Architecture
from .architectures.stock import stock_classes
from .checkpoints import packing  # noqa: F401 - registers the quantizer `bitmask`
from .methods.masked_crf.configuration_masked_crf import BertCrfConfig, CrfConfig
from .methods.masked_crf.modeling_masked_crf import BertCrfForTokenClassification, CrfForTokenClassification
from .methods.masked_crf.pipeline import CrfTokenClassificationPipeline
from .methods.moebert import configuration_families as moebert_families
from .methods.moebert.configuration_moebert import MoEFields, moe_config, why_not_experts
from .methods.moebert.conversion import classes_to_cut
from .methods.moebert.modeling_moebert import moe_class
from .methods.mpo import modeling_quantizer  # noqa: F401 - registers the quantizer `mpo`
from .methods.mpo.modeling_tuner import TARGETS
from .methods.mpoe.configuration_mpoe import MPOEBertConfig, MPOEGPT2Config, MPOET5Config
from .methods.mpoe.modeling_bert import MPOEBertForSequenceClassification
from .methods.mpoe.modeling_gpt2 import MPOEGPT2LMHeadModel
from .methods.mpoe.modeling_t5 import MPOET5ForConditionalGeneration
from .methods.multitask.configuration_multitask import MultiTaskBertConfig, MultiTaskFields, multitask_config
from .methods.multitask.modeling_multitask import MultiTaskBertModel, multitask_class
from .methods.multitask.pipeline import MultiTaskPipeline
from .methods.platon import configuration_families as platon_families
from .methods.platon.configuration_shrunk import ShrunkConfig, shrunk_config
from .methods.platon.modeling_shrunk import shrunk_class


# The classes that `AutoModel….from_pretrained` finds after `import hf_moebert`. Their code is saved with a checkpoint
# for users without this package (`trust_remote_code=True`), except for the classes in `_STAY`.
_TABLE: dict[Any, dict[Any, Any]] = {
    BertCrfConfig: {AutoModelForTokenClassification: BertCrfForTokenClassification},
    CrfConfig: {AutoModelForTokenClassification: CrfForTokenClassification},
    MPOEBertConfig: {AutoModelForSequenceClassification: MPOEBertForSequenceClassification},
    MPOEGPT2Config: {AutoModelForCausalLM: MPOEGPT2LMHeadModel},
    MPOET5Config: {AutoModelForSeq2SeqLM: MPOET5ForConditionalGeneration},
    MoMT5Config: {AutoModelForSeq2SeqLM: MoMT5ForConditionalGeneration},
    MultiTaskBertConfig: {AutoModel: MultiTaskBertModel},
}
_STAY = (
    MPOEBertConfig,
    MPOEGPT2Config,
    MPOET5Config,
    MultiTaskBertConfig,
)


def _register(config: Any, models: dict[Any, Any], *, travels: bool) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, model in models.items():
        auto.register(config, model)
        if travels:
            model.register_for_auto_class(auto.__name__)
    if travels:
        config.register_for_auto_class()


# By the configuration of a family's compressed form of which no model was made or loaded yet: the dense configuration
# and what makes the classes. To make them all at once would take a second.
_unused: dict[Any, tuple[Any, Any, Any, bool]] = {}


def _register_family(dense: Any, *, travels: bool) -> None:
    """Register the compressed forms of a family: the configurations, and the models once there is one of them."""
    forms: list[Any] = []
    if ARCHITECTURES[dense.model_type].units:
        forms.append((shrunk_config(dense), stock_classes, shrunk_class))
    if not why_not_masked(dense.model_type):
        forms.append((masked_config(dense), classes_to_mask, masked_class))
    if not why_not_experts(dense.model_type):
        forms.append((moe_config(dense), classes_to_cut, moe_class))
    if ARCHITECTURES[dense.model_type].trunk is not None and dense.model_type != "bert":
        config = multitask_config(dense)
        _register(config, {}, travels=False)
        _unused[config] = (dense, lambda dense: {"AutoModel": dense}, multitask_class, False)
    for config, find, make in forms:
        _register(config, {}, travels=travels)
        _unused[config] = (dense, find, make, travels)


def _register_models(config: type) -> None:
    dense, find, make, travels = _unused.pop(config, (None, None, None, False))
    if dense is not None:
        models = {getattr(transformers, auto): make(stock) for auto, stock in find(dense).items()}
        _register(config, models, travels=travels)


for _fields in (ShrunkConfig, MoMFields, MoEFields, MultiTaskFields):
    _fields.before_use.append(_register_models)
for _config, _models in _TABLE.items():
    _register(_config, _models, travels=not issubclass(_config, _STAY))
for _model_type in list(ARCHITECTURES):
    _register_family(CONFIG_MAPPING[_model_type], travels=True)

_ROLES = (configuration_families, moebert_families, platon_families)
ROWS: tuple[dict[str, Any], ...] = (ARCHITECTURES, *(role.ARCHITECTURES for role in _ROLES))


def register_architecture(model_type: str, row: Architecture, model: PreTrainedModel | None = None) -> None:
    """Describe a family of models that this package does not know, so that every method takes it.

    Its compressed checkpoints load only in a process that has registered the same row before.

    Args:
        model_type: The family's `config.model_type`.
        row: Where its models keep their parts: `Architecture`, `Stack`, `AttentionPaths` and `FeedForwardPaths` of
            `hf_moebert.architectures.paths`.
        model: A stock model of the family on which the row is checked; a tiny random one will do. By default one of
            the family's default sizes is built without weights, on which sizes are checked and nothing is run.

    Raises:
        ValueError: If the family is known already, or the row is not true of the model: the message names the part.

    Example:
        ```python
        row = Architecture(stacks=(Stack("encoder.layer", (attention,), (feed_forward,)),), units=("neurons", "heads"))
        register_architecture("roformer", row, AutoModel.from_config(tiny_config))
        ```
    """
    is_row = isinstance(row, Architecture)
    if not is_row:
        raise ValueError(
            f"`row` must be an `Architecture` of hf_moebert.architectures.paths, got {type(row).__name__}. Make one."
        )
    if ARCHITECTURES.get(model_type) == row:
        return
    if model_type in ARCHITECTURES:
        raise ValueError(f"`model_type` must be of a family that is not known yet, got {model_type!r}. Just use it.")
    if model is None:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(model_type))
    if model.config.model_type != model_type:
        raise ValueError(f"`model` must be of the family {model_type!r}, got {model.config.model_type!r}.")
    for rows in ROWS:
        rows[model_type] = row
    try:
        check_row(model)
    except ValueError as error:
        forget_architecture(model_type)
        raise ValueError(f"The row of {model_type!r} does not fit a {type(model).__name__}: {error}") from error
    except BaseException:
        forget_architecture(model_type)
        raise
    TARGETS[model_type] = row.matrix_names
    _register_family(type(model.config), travels=False)


def forget_architecture(model_type: str) -> None:
    """Take a registered row back, as `register_architecture` does with one that is not true."""
    for rows in ROWS:
        rows.pop(model_type, None)
    TARGETS.pop(model_type, None)


# The pipelines that `pipeline(name, model=...)` finds.
PIPELINE_REGISTRY.register_pipeline(
    "masked-crf", pipeline_class=CrfTokenClassificationPipeline, pt_model=AutoModelForTokenClassification, type="text"
)
PIPELINE_REGISTRY.register_pipeline("multitask", pipeline_class=MultiTaskPipeline, pt_model=AutoModel, type="text")
