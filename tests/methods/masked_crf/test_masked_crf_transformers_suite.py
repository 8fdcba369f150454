"""Token classifiers with a CRF under the model tests of transformers, which its own architectures have to pass."""

import unittest
from unittest.mock import patch

import pytest
from tiny_crf import names
from transformers import BertConfig
from transformers.models.auto import modeling_auto
from transformers_suite import TransformersSuiteUnavailableError, load

from hf_moebert import BertCrfForTokenClassification, CrfForTokenClassification
from hf_moebert.methods.masked_crf import modeling_masked_crf
from hf_moebert.methods.masked_crf.configuration_masked_crf import BertCrfConfig, CrfConfig


try:
    common = load("test_modeling_common")
    ConfigTester = load("test_configuration_common").ConfigTester
except TransformersSuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.process


class TaggerTester:
    """Tiny configs and inputs; the attributes are what the suite reads of any tester."""

    batch_size = 3
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        tags = names(["O", "B-X", "I-X"])
        if self.config_class is BertCrfConfig:
            return BertCrfConfig(**self.sizes, **tags)
        return CrfConfig.from_dense(BertConfig(**self.sizes, **tags))

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": common.ids_tensor(shape, 99),
            "token_type_ids": common.ids_tensor(shape, 2),
            "attention_mask": common.random_attention_mask(shape),
            "word_mask": common.random_attention_mask(shape),
        }
        return self.get_config(), inputs


class Suite(common.ModelTesterMixin):
    """The suite for one class."""

    test_bc_torch_dtype = None  # that of MoEBERT, which is loaded alike, takes both names of the argument

    def setUp(self):
        (model_class,) = self.all_model_classes
        self.model_tester = TaggerTester(model_class.config_class)
        added = patch.dict(
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            {model_class.config_class.model_type: model_class.__name__},
        )
        added.start()
        self.addCleanup(added.stop)
        find = modeling_masked_crf._find_words
        everywhere = patch.object(  # the suite makes some batches itself, and knows no words
            modeling_masked_crf,
            "_find_words",
            lambda emissions, labels, mask: find(
                emissions, labels, emissions.new_ones(emissions.shape[:2]) if mask is None else mask
            ),
        )
        everywhere.start()
        self.addCleanup(everywhere.stop)


class BertCrfTest(Suite, unittest.TestCase):
    all_model_classes = (BertCrfForTokenClassification,)

    def test_config(self):
        ConfigTester(self, config_class=BertCrfConfig, hidden_size=32).run_common_tests()


class CrfTest(Suite, unittest.TestCase):
    all_model_classes = (CrfForTokenClassification,)

    @unittest.skip("It loads the checkpoint of a token classifier without a CRF, which is refused: see `from_dense`.")
    def test_correct_missing_keys(self):
        pass
