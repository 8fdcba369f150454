from .configuration_moebert import MoEBertConfig as MoEBertConfig
from .conversion import (
    count_tokens as count_tokens,
    from_dense as from_dense,
    load_importance as load_importance,
    measure_expert_load as measure_expert_load,
    save_importance as save_importance,
)
from .modeling_moebert import (
    MoEBertForQuestionAnswering as MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification as MoEBertForSequenceClassification,
    MoEBertForTokenClassification as MoEBertForTokenClassification,
    MoEBertModel as MoEBertModel,
)
