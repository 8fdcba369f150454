"""A CRF that takes Hugging Face labels as they are, and cannot emit an illegal tag sequence."""

from .modeling_crf import MaskedCRF
from .modeling_masked_crf import BertCrfForTokenClassification, CrfForTokenClassification
from .modeling_pipeline import CrfTokenClassificationPipeline


__all__ = [
    "BertCrfForTokenClassification",
    "CrfForTokenClassification",
    "CrfTokenClassificationPipeline",
    "MaskedCRF",
]
