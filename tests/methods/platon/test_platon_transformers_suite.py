"""Shrunk models under the tests of transformers, which every architecture in it has to pass."""

import unittest
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers_suite import TransformersSuiteUnavailableError, load

from hf_moebert.methods.platon.configuration_shrunk import ShrunkViTConfig
from hf_moebert.methods.platon.modeling_shrunk import (
    ShrunkBertForSequenceClassification,
    ShrunkDistilBertForSequenceClassification,
    ShrunkViTForImageClassification,
)


try:
    common = load("test_modeling_common")
except TransformersSuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.process

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {"vocab_size": 99, "max_position_embeddings": 64}
WIDTHS = [{"neurons": 5, "heads": 2}, {"neurons": 24, "heads": 1}]


class TinyModels:
    """Tiny configs and inputs; the attributes are what the suite reads of any tester."""

    batch_size = 3
    seq_length = 7
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = WIDTHS[0]["heads"]  # of the first layer, whose attentions the suite looks at
    is_training = True

    def __init__(self, config_class, fields):
        self.config_class, self.fields = config_class, fields
        if config_class is ShrunkViTConfig:
            self.seq_length = 5  # four patches and the token of the class

    def get_config(self):
        dense = self.config_class.__bases__[1](**self.fields)
        return self.config_class.from_dense(dense, WIDTHS)

    def prepare_config_and_inputs_for_common(self):
        if self.config_class is ShrunkViTConfig:
            return self.get_config(), {"pixel_values": common.floats_tensor([self.batch_size, 3, 8, 8])}
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, 99)
        return self.get_config(), {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}


class Suite(common.ModelTesterMixin):
    """The suite for one class."""

    table = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    test_bc_torch_dtype = None  # that of MoEBERT, which is loaded alike, takes both names of the argument

    def setUp(self):
        torch.manual_seed(0)
        (model_class,) = self.all_model_classes
        self.model_tester = TinyModels(model_class.config_class, self.fields)
        added = patch.dict(
            getattr(modeling_auto, self.table), {model_class.config_class.model_type: model_class.__name__}
        )
        added.start()
        self.addCleanup(added.stop)


class BertTest(Suite, unittest.TestCase):
    all_model_classes = (ShrunkBertForSequenceClassification,)
    fields = SIZES | TEXT


class DistilBertTest(Suite, unittest.TestCase):
    all_model_classes = (ShrunkDistilBertForSequenceClassification,)
    fields = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, **TEXT}


class ViTTest(Suite, unittest.TestCase):
    all_model_classes = (ShrunkViTForImageClassification,)
    table = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    fields = SIZES | {"image_size": 8, "patch_size": 4}

    test_resize_embeddings = False  # the switch of the suite for models of pictures

    @unittest.skip("Patches are embedded by a convolution, not by a table of tokens.")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("Saved with the modules' own names, which transformers would change by the head.")
    def test_reverse_loading_mapping(self):
        pass
