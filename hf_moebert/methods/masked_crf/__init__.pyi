from .conversion import from_dense as from_dense
from .modeling_crf import MaskedCRF as MaskedCRF
from .modeling_masked_crf import (
    BertCrfForTokenClassification as BertCrfForTokenClassification,
    CrfForTokenClassification as CrfForTokenClassification,
)
from .pipeline import CrfTokenClassificationPipeline as CrfTokenClassificationPipeline
