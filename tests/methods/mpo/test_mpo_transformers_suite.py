"""Compressed models under the tests of transformers, which every architecture in it has to pass."""

import copy
import unittest
from unittest.mock import patch

import pytest
import torch
from tiny_mpo import SIZES, WORDS
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers_suite import PROVOKED, TransformersSuiteUnavailableError, load

from hf_moebert.methods.mpo import modeling_quantizer
from hf_moebert.methods.mpo.conversion import compress_mpo
from hf_moebert.methods.mpo.modeling_quantizer import replace_matrices


try:
    common = load("test_modeling_common")
except TransformersSuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.process, PROVOKED]


class TinyModels:
    """Tiny configs and inputs; the attributes are what the suite reads of any tester."""

    batch_size = 3
    seq_length = 7
    hidden_size = 24
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = True

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, 99)
        return self.get_config(), {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}


def compressed(stock, config):
    """Return a class whose models are compressed as soon as they are built; loading does it by itself."""
    chains = compress_mpo(stock(copy.deepcopy(config))).config.quantization_config

    class Compressed(stock):
        def __init__(self, config):
            super().__init__(config)
            if hasattr(config, "quantization_config"):
                return
            if self.device.type == "meta":
                replace_matrices(self, copy.deepcopy(chains))
            else:
                self.__dict__ = compress_mpo(self, train_centre=True).__dict__

    Compressed.__name__ = stock.__name__  # by which the suite decides what is asked of a class
    return Compressed


class Suite(common.ModelTesterMixin):
    """The suite for one class."""

    test_resize_embeddings = False  # refused: see `test_mpo_neighbours.py`
    all_generative_model_classes = ()  # the suite's archive leaves its tests of `generate` out
    test_bc_torch_dtype = None  # that of MoEBERT, which is loaded alike, takes both names of the argument

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = TinyModels(self.config)

    @unittest.skip("The table is a chain of cores, not an `nn.Embedding`.")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("Another vocabulary is refused: see `test_mpo_neighbours.py`.")
    def test_load_with_mismatched_shapes(self):
        pass

    def test_model_weights_reload_no_missing_tied_weights(self):
        with patch.object(modeling_quantizer, "check_cores"):  # an empty checkpoint, which ours refuses by design
            super().test_model_weights_reload_no_missing_tied_weights()


class BertTest(Suite, unittest.TestCase):
    config = BertConfig(**SIZES)
    all_model_classes = (compressed(BertForSequenceClassification, config),)


class GPT2Test(Suite, unittest.TestCase):
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=32, **WORDS)
    all_model_classes = (compressed(GPT2LMHeadModel, config),)
