from .modeling_multitask import MultiTaskBertModel as MultiTaskBertModel
from .pipeline import MultiTaskPipeline as MultiTaskPipeline
from .recipe import MultiTaskSweepConfig as MultiTaskSweepConfig
from .training import MultiTaskSweep as MultiTaskSweep
from .training import MultiTaskSweepTask as MultiTaskSweepTask
