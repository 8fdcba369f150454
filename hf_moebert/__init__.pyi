__version__: str

from .checkpoints.packing import save_packed as save_packed
from .compress.stages import shrink as shrink
from .inference.optimize import (
    optimize_for_inference as optimize_for_inference,
)
from .inference.optimize import (
    revert_optimizations as revert_optimizations,
)
from .methods.distillation import DistillationConfig as DistillationConfig
from .methods.distillation import DistillationTrainer as DistillationTrainer
from .methods.masked_crf import (
    BertCrfForTokenClassification as BertCrfForTokenClassification,
)
from .methods.masked_crf import (
    CrfForTokenClassification as CrfForTokenClassification,
)
from .methods.mixture_of_masks import (
    MaskSparsityCallback as MaskSparsityCallback,
)
from .methods.mixture_of_masks import (
    MaskSparsityConfig as MaskSparsityConfig,
)
from .methods.moebert import (
    MoEBertConfig as MoEBertConfig,
)
from .methods.moebert import (
    MoEBertForQuestionAnswering as MoEBertForQuestionAnswering,
)
from .methods.moebert import (
    MoEBertForSequenceClassification as MoEBertForSequenceClassification,
)
from .methods.moebert import (
    MoEBertForTokenClassification as MoEBertForTokenClassification,
)
from .methods.moebert import (
    MoEBertModel as MoEBertModel,
)
from .methods.moebert import (
    count_tokens as count_tokens,
)
from .methods.moebert import (
    measure_importance as measure_importance,
)
from .methods.mpo import (
    MPOConfig as MPOConfig,
)
from .methods.mpo import (
    MPOSqueezingCallback as MPOSqueezingCallback,
)
from .methods.mpo import (
    MPOSqueezingConfig as MPOSqueezingConfig,
)
from .methods.mpo import (
    compress_mpo as compress_mpo,
)
from .methods.mpo import (
    to_dense as to_dense,
)
from .methods.mpoe import (
    MPOEGradientMaskCallback as MPOEGradientMaskCallback,
)
from .methods.mpoe import (
    MPOEGradientMaskConfig as MPOEGradientMaskConfig,
)
from .methods.multitask import (
    MultiTaskBertModel as MultiTaskBertModel,
)
from .methods.multitask import (
    MultiTaskSweep as MultiTaskSweep,
)
from .methods.multitask import (
    MultiTaskSweepConfig as MultiTaskSweepConfig,
)
from .methods.multitask import (
    MultiTaskSweepTask as MultiTaskSweepTask,
)
from .methods.platon import (
    PlatonConfig as PlatonConfig,
)
from .methods.platon import (
    PlatonPruningCallback as PlatonPruningCallback,
)
