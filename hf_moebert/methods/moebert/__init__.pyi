from .configuration_moebert import MoEBertConfig as MoEBertConfig
from .conversion import (
    count_tokens as count_tokens,
)
from .conversion import (
    from_dense as from_dense,
)
from .conversion import (
    load_importance as load_importance,
)
from .conversion import (
    measure_expert_load as measure_expert_load,
)
from .conversion import (
    measure_importance as measure_importance,
)
from .conversion import (
    save_importance as save_importance,
)
from .modeling_heads import (
    MoEBertForQuestionAnswering as MoEBertForQuestionAnswering,
)
from .modeling_heads import (
    MoEBertForSequenceClassification as MoEBertForSequenceClassification,
)
from .modeling_heads import (
    MoEBertForTokenClassification as MoEBertForTokenClassification,
)
from .modeling_moebert import MoEBertModel as MoEBertModel
