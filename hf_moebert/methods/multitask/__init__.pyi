from .modeling_multitask import MultiTaskBertModel as MultiTaskBertModel, MultiTaskModel as MultiTaskModel
from .pipeline import MultiTaskPipeline as MultiTaskPipeline
from .recipe import MultiTaskSweepConfig as MultiTaskSweepConfig
from .training import MultiTaskSweep as MultiTaskSweep, MultiTaskSweepTask as MultiTaskSweepTask
