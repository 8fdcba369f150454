"""Many tasks on one trunk under the tests of transformers, which every architecture in it has to pass."""

import copy
import unittest
from functools import cache
from unittest.mock import patch

import pytest
import torch
from tiny_multitask import make_encoder, make_tasks
from transformers.models.auto import modeling_auto
from transformers_suite import TransformersSuiteUnavailableError, load

from hf_moebert.methods.multitask import MultiTaskBertModel
from hf_moebert.methods.multitask.configuration_multitask import MultiTaskBertConfig


try:
    common = load("test_modeling_common")
except TransformersSuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.process


class OneTask(MultiTaskBertModel):
    """Answers as the suite expects it: with the outputs of one task, rather than a mapping of all."""

    def __init__(self, config):
        for task in config.tasks.values():  # the suite changes the trunk's alone
            task["config"]["layer_norm_eps"] = config.layer_norm_eps
        super().__init__(config)

    def forward(self, input_ids=None, return_dict=True, **kwargs):
        output = super().forward(input_ids, tasks=["qq"], **kwargs)["qq"]
        return output if return_dict else output.to_tuple()


class TinyModel:
    """A tiny config and inputs; the attributes are what the suite reads of any tester."""

    batch_size = 3
    seq_length = 7
    hidden_size = 24
    num_hidden_layers = 1  # of the task: its states start where the trunk ends
    num_attention_heads = 4
    is_training = True

    @staticmethod
    @cache
    def fields():
        merged = MultiTaskBertModel.from_tasks(make_tasks(("qq", "topics"), make_encoder()))
        return {name: value for name, value in merged.config.to_dict().items() if name != "trunk_sha256"}

    def get_config(self):
        return MultiTaskBertConfig.from_dict(copy.deepcopy(self.fields()))

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, 61)
        return self.get_config(), {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}


class MultiTaskBertTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (OneTask,)
    test_resize_embeddings = False  # refused: all tasks were trained with the vocabulary

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = TinyModel()
        added = patch.dict(modeling_auto.MODEL_MAPPING_NAMES, {MultiTaskBertConfig.model_type: OneTask.__name__})
        added.start()
        self.addCleanup(added.stop)

    def test_bc_torch_dtype(self):
        torch.set_printoptions(threshold=0, edgeitems=1)  # the test writes every tensor into a message
        self.addCleanup(torch.set_printoptions, profile="default")
        super().test_bc_torch_dtype()

    @unittest.skip("There is no `model.safetensors`, but a file for the trunk and one for each task.")
    def test_load_save_without_tied_weights(self):
        pass

    @unittest.skip("There is no `model.safetensors`, but a file for the trunk and one for each task.")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    @unittest.skip("The first states are those of the trunk, which is frozen.")
    def test_retain_grad_hidden_states_attentions(self):
        pass
