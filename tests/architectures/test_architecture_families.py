"""Every row of the table is true of a model of its family."""

import dataclasses
import importlib
import inspect
import re

import pytest
import torch
from tiny_families import CONFIGS, IMAGES, make_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    MixtralConfig,
    T5EncoderModel,
)
from transformers.pytorch_utils import Conv1D

from hf_moebert import MoEBertConfig
from hf_moebert.architectures.families import ARCHITECTURES, find_architecture, find_bert_like_classes
from hf_moebert.architectures.surgery import find_layers, get_part
from hf_moebert.checkpoints.strict_config import EXTRAS


CROSS = {"gpt2": {"add_cross_attention": True}}  # by default there is no attention to another sequence
# What the MPO adapter was given by default before it was derived from the table
ENCODER = ["query", "key", "value", "output.dense", "intermediate.dense"]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BART = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"]
VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
T5 = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
WRITTEN_OUT = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), ENCODER),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), DECODER),
    **dict.fromkeys(("eurobert", "nomic_bert"), DECODER),
    **dict.fromkeys(("vit", "deit", "jina_embeddings_v3"), VIT),
    **dict.fromkeys(("bart", "mbart", "opt"), BART),
    **dict.fromkeys(("gpt_neox", "bloom"), NEOX),
    **dict.fromkeys(("t5", "mt5"), T5),
    "albert": ["query", "key", "value", "attention.dense", "ffn", "ffn_output"],
    "deberta": ["in_proj", "output.dense", "intermediate.dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "gpt2": ["c_attn", "q_attn", "c_proj", "c_fc"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "dinov2": [*VIT, "gate_proj", "up_proj", "down_proj"],
    "mpnet": ["q", "k", "v", "o", "output.dense", "intermediate.dense"],
}


def test_there_is_a_tiny_model_of_every_family():
    assert set(CONFIGS) == set(ARCHITECTURES) == set(WRITTEN_OUT)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_path_of_a_row_exists(family):
    model = make_model(family, **CROSS.get(family, {}))
    architecture, layers = find_architecture(model), find_layers(model)
    assert {layer.stack for layer in layers} == set(architecture.stacks)
    modules = dict(model.named_modules())
    for layer in layers:
        assert modules[layer.path] is layer.module
        for attention in layer.stack.attentions:
            for path in (*attention.readers, attention.writer):
                assert type(get_part(layer.module, path)) in (nn.Linear, Conv1D), path
            if "heads" in architecture.units:
                assert getattr(get_part(layer.module, attention.module), attention.head_size) == 8
        fitting = [paths for paths in layer.stack.feed_forwards if get_part(layer.module, paths.up) is not None]
        assert len(fitting) == 1
        parts = {name: path for name, path in vars(fitting[0]).items() if isinstance(path, str)}
        found = {name: get_part(layer.module, path) for name, path in parts.items()}
        assert all(type(found[name]) in (nn.Linear, Conv1D) for name in fitting[0].matrices)
        assert all(isinstance(module, nn.Dropout) for name, module in found.items() if "dropout" in name)
        assert found["activation"](torch.ones(1)).shape == (1,)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_select_the_matrices_that_were_written_out(family):
    auto = AutoModelForImageClassification if family in IMAGES else AutoModelForSequenceClassification
    models = [make_model(family, auto=auto), make_model(family, **CROSS.get(family, {}))]
    if family in ("t5", "mt5"):
        models.append(make_model(family, feed_forward_proj="gated-gelu"))
    for model in models:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        derived, written = (
            {name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)}
            for ends in (ARCHITECTURES[family].matrix_names, WRITTEN_OUT[family])
        )
        assert derived == written
        assert derived


# Read by classes that no method takes, or checked for by a copy of another family's code
NOT_OURS = {"gemma3_text": {"image_token_id", "mm_tokens_per_image", "text_config", "vision_config"}}
NOT_OURS |= {"electra": {"summary_first_dropout", "summary_proj_to_labels"}, "mbart": {"gradient_checkpointing"}}
NOT_OURS |= {name: {"embedding_size"} for name in ("bert", "camembert", "ernie", "mpnet", "roberta", "xlm-roberta")}
NOT_OURS |= {"t5": {"decoder_start_token_id"}, "phi": {"partial_rotary_factor"}}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_models_read_off_their_configuration_is_declared_or_told(family):
    config = type(make_model(family).config)
    source = inspect.getsource(importlib.import_module(config.__module__.replace("configuration_", "modeling_")))
    read = set(re.findall(r"\bconfig\.([a-z]\w*)", source))
    read |= set(re.findall(r"(?:get|has)attr\((?:self\.)?config, \"(\w+)\"", source))
    declared = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | set(dir(config))
    told = {*ARCHITECTURES[family].undeclared, *NOT_OURS.get(family, ()), *vars(config()), *EXTRAS}
    assert not {name for name in read - declared - told if not name.startswith("_")}


def test_prefixes_of_this_package_are_no_part_of_a_family():
    for model_type in ("shrunk_bert", "mom_bert", "mpoe_bert", "moebert", "bert"):
        model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
        model.config.model_type = model_type
        assert find_architecture(model) is ARCHITECTURES["bert"]


def test_unknown_families_are_refused():
    class Model:
        config = MixtralConfig()

    with pytest.raises(ValueError, match=r"one of \['albert', .*'xlm-roberta'\], got 'mixtral' \(the nearest is 'mi"):
        find_architecture(Model())
    with pytest.raises(ValueError, match=r"got 'Linear'. Use a model .* or describe its family by `hf_moebert"):
        find_architecture(nn.Linear(2, 2))


def test_models_without_their_layers_are_refused():
    model = make_model("bert")
    del model.encoder.layer
    with pytest.raises(ValueError, match=r"keep its layers in \['encoder.layer'\], but BertModel does not"):
        find_layers(model)


def test_a_head_may_do_without_a_stack():
    encoder = T5EncoderModel(make_model("t5").config)
    assert {layer.stack.path for layer in find_layers(encoder)} == {"encoder.block"}
    decoder = make_model("bart", auto=AutoModelForCausalLM)
    assert {layer.path.rpartition(".")[0] for layer in find_layers(decoder)} == {"model.decoder.layers"}


def test_classes_that_compute_as_berts_do_exist():
    for part in ("Attention", "Layer", "Intermediate", "Output"):
        names = find_bert_like_classes(part)
        assert len(names) == 6
        for name in names:
            module, _, cls = name.rpartition(".")
            assert issubclass(getattr(__import__(module, fromlist=[cls]), cls), nn.Module)
    assert MoEBertConfig.model_type not in ARCHITECTURES
