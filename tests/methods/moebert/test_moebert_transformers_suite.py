"""MoEBERT under the tests of transformers, which every architecture in it has to pass."""

import unittest
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers_suite import TransformersSuiteUnavailableError, load

from hf_moebert import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
)


try:
    common = load("test_modeling_common")
    configurations = load("test_configuration_common")
except TransformersSuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.process

# By these tables of names the suite decides which tests a class gets and which labels; ours are in them for a test.
TABLES = {
    "MODEL_MAPPING_NAMES": MoEBertModel,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": MoEBertForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": MoEBertForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": MoEBertForQuestionAnswering,
}


class MoEBertModelTester:
    """Tiny configs and inputs; the attributes are what the suite reads of any tester."""

    batch_size = 3
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, **fields):
        self.fields = fields

    def get_config(self):
        sizes = {"num_experts": 4, "expert_size": 24, "num_shared_neurons": 8, "intermediate_size": 72}
        return MoEBertConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            **sizes,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": common.ids_tensor(shape, 99),
            "token_type_ids": common.ids_tensor(shape, 2),
            "attention_mask": common.random_attention_mask(shape),
        }
        return self.get_config(), inputs


class MoEBertSuite(common.ModelTesterMixin):
    """The suite for one routing."""

    all_model_classes = tuple(TABLES.values())
    test_can_init_all_missing_weights_before_2023 = True  # read from the copyright line, which we do not have
    fields = {}

    def setUp(self):
        self.model_tester = MoEBertModelTester(**self.fields)
        for table, model_class in TABLES.items():
            added = patch.dict(getattr(modeling_auto, table), {"moebert": model_class.__name__})
            added.start()
            self.addCleanup(added.stop)

    def test_bc_torch_dtype(self):
        self.all_model_classes = (MoEBertModel,)  # loads it 14 times, by two names of one argument
        super().test_bc_torch_dtype()

    @patch.dict(configurations.config_common_kwargs, {"chunk_size_feed_forward": 0})  # others are refused
    def test_config(self):
        tester = configurations.ConfigTester(self, config_class=MoEBertConfig, hidden_size=32, **self.fields)
        tester.run_common_tests()

    @unittest.skip("A route is that of a whole batch; chunks are refused by design.")
    def test_feed_forward_chunking(self):
        pass


class GateTokenTest(MoEBertSuite, unittest.TestCase):
    fields = {"routing": "gate-token", "top_k": 2, "router_aux_loss_coef": 0.01}


class HashRandomTest(MoEBertSuite, unittest.TestCase):
    fields = {"routing": "hash-random", "layers": [1]}  # the first layer stays dense
    all_model_classes = (MoEBertModel, MoEBertForSequenceClassification)  # the heads are the same
    test_bc_torch_dtype = None

    @unittest.skip("Hash routing looks token ids up and refuses embeddings.")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("Hash routing looks token ids up and refuses embeddings.")
    def test_inputs_embeds_matches_input_ids(self):
        pass

    @unittest.skip("Hash routing has no gate, and so no logits to return.")
    def test_output_router_logits_from_config(self):
        pass

    def test_init_weights_can_init_buffers(self):
        """The suite expects buffers to be filled before `_init_weights`; ours is drawn there, from the seed."""
        for model_class in self.all_model_classes:
            config = self.model_tester.get_config()
            built = dict(model_class(config).named_buffers())
            with torch.device("meta"):
                revived = model_class(config)
            revived.to_empty(device="cpu").init_weights()
            assert built.keys() == dict(revived.named_buffers()).keys()
            for name, buffer in revived.named_buffers():
                assert torch.equal(buffer, built[name]), name
