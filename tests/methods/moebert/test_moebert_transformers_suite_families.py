"""Mixtures of the families least like BERT under the tests of transformers, body and head of each."""

import unittest
from unittest.mock import patch

import pytest
import torch
import transformers
from tiny_families import CONFIGS, IMAGES, LAYERS, VOCAB
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers_suite import TransformersSuiteUnavailableError, load

from hf_moebert.methods.moebert.modeling_moebert import moe_class


try:
    common = load("test_modeling_common")
except TransformersSuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.process


class TinyModels:
    """Tiny configs and inputs; the attributes are what the suite reads of any tester."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, config_class, fields):
        self.dense, self.config_class, self.fields = config_class.__bases__[2], config_class, fields
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, LAYERS
        self.num_attention_heads = config.num_attention_heads
        if self.dense.model_type in IMAGES:
            self.seq_length = 5  # four patches and the token of the class

    def get_config(self):
        family = self.dense.model_type
        dense = AutoConfig.for_model(family, **CONFIGS[family])
        sizes = {"num_experts": 3, "expert_size": 16, "num_shared_neurons": 12}
        return self.config_class.from_dense(dense, **sizes, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        if self.dense.model_type in IMAGES:
            return self.get_config(), {"pixel_values": common.floats_tensor([self.batch_size, 3, 8, 8])}
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, VOCAB).clamp(min=3)  # positions of some families leave out padding
        return self.get_config(), {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}


class Suite(common.ModelTesterMixin):
    """The suite for one family: its body and a head, with gates."""

    dense = ()  # names of classes of transformers
    heads = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    fields = {"routing": "gate-token", "top_k": 2, "router_aux_loss_coef": 0.01}
    test_can_init_all_missing_weights_before_2023 = True
    test_bc_torch_dtype = None  # it takes two names of one argument, which is no matter of a family; BERT's does

    def setUp(self):
        torch.manual_seed(0)
        self.all_model_classes = tuple(moe_class(getattr(transformers, name)) for name in self.dense)
        body, head = self.all_model_classes
        self.model_tester = TinyModels(body.config_class, self.fields)
        for table, model_class in (("MODEL_MAPPING_NAMES", body), (self.heads, head)):
            names = {body.config_class.model_type: model_class.__name__}
            added = patch.dict(getattr(modeling_auto, table), names)
            added.start()
            self.addCleanup(added.stop)

    @unittest.skip("A route is that of a whole batch; chunks are refused by design.")
    def test_feed_forward_chunking(self):
        pass


class DebertaV2Test(Suite, unittest.TestCase):
    dense = ("DebertaV2Model", "DebertaV2ForSequenceClassification")


class ModernBertTest(Suite, unittest.TestCase):
    dense = ("ModernBertModel", "ModernBertForMaskedLM")
    heads = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"


class AlbertTest(Suite, unittest.TestCase):
    dense = ("AlbertModel", "AlbertForMaskedLM")
    heads = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"


class ViTTest(Suite, unittest.TestCase):
    dense = ("ViTModel", "ViTForImageClassification")
    heads = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    fields = {"routing": "gate-sentence"}

    test_resize_embeddings = False  # the switch of the suite for models of pictures

    def setUp(self):
        super().setUp()
        if (
            "eager_matches_sdpa" in self._testMethodName
        ):  # it wants a body whose constructor says that patches are masked
            self.all_model_classes = self.all_model_classes[1:]

    @unittest.skip("Patches are embedded by a convolution, not by a table of tokens.")
    def test_model_get_set_embeddings(self):
        pass
