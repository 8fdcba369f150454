__version__: str

from .architectures.embedding_form import EmbeddingForm as EmbeddingForm
from .architectures.importance import measure_importance as measure_importance
from .checkpoints.callbacks import CheckpointManifestCallback as CheckpointManifestCallback
from .checkpoints.embedders import save_embedder as save_embedder
from .checkpoints.packing import save_packed as save_packed
from .checkpoints.resuming import last_complete_checkpoint as last_complete_checkpoint
from .compress.stages import shrink as shrink
from .inference.onnx_export import export_onnx as export_onnx
from .inference.onnx_runtime import load_onnx as load_onnx
from .inference.optimize import (
    optimize_for_inference as optimize_for_inference,
    revert_optimizations as revert_optimizations,
)
from .measuring.engines import choose_engine as choose_engine, load_fastest as load_fastest
from .measuring.unit_latency import (
    measure_speed_up as measure_speed_up,
    measure_unit_latency as measure_unit_latency,
)
from .methods.distillation import DistillationConfig as DistillationConfig, DistillationTrainer as DistillationTrainer
from .methods.masked_crf import (
    BertCrfForTokenClassification as BertCrfForTokenClassification,
    CrfForTokenClassification as CrfForTokenClassification,
)
from .methods.mixture_of_masks import (
    MaskSparsityCallback as MaskSparsityCallback,
    MaskSparsityConfig as MaskSparsityConfig,
)
from .methods.moebert import (
    MoEBertConfig as MoEBertConfig,
    MoEBertForQuestionAnswering as MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification as MoEBertForSequenceClassification,
    MoEBertForTokenClassification as MoEBertForTokenClassification,
    MoEBertModel as MoEBertModel,
    count_tokens as count_tokens,
)
from .methods.mpo import (
    MPOConfig as MPOConfig,
    MPOSqueezingCallback as MPOSqueezingCallback,
    MPOSqueezingConfig as MPOSqueezingConfig,
    compress_mpo as compress_mpo,
    to_dense as to_dense,
)
from .methods.mpoe import (
    MPOEGradientMaskCallback as MPOEGradientMaskCallback,
    MPOEGradientMaskConfig as MPOEGradientMaskConfig,
)
from .methods.multitask import (
    MultiTaskBertModel as MultiTaskBertModel,
    MultiTaskModel as MultiTaskModel,
    MultiTaskSweep as MultiTaskSweep,
    MultiTaskSweepConfig as MultiTaskSweepConfig,
    MultiTaskSweepTask as MultiTaskSweepTask,
)
from .methods.platon import (
    PlatonConfig as PlatonConfig,
    PlatonPruningCallback as PlatonPruningCallback,
    prune_structured as prune_structured,
)
from .methods.trimming import drop_layers as drop_layers, trim_vocabulary as trim_vocabulary
from .registration import register_architecture as register_architecture
