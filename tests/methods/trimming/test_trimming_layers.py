"""Layers left out: every family and form, which layers, and what is refused."""

import copy
from functools import cache

import new_process
import pytest
import torch
from tiny_classifiers import save_classifier
from tiny_families import CONFIGS, UNITS, make_inputs, make_model, run
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from hf_moebert import DistillationConfig, compress_mpo, save_packed, shrink
from hf_moebert.architectures.surgery import find_feed_forwards, find_layers, matrix_of
from hf_moebert.methods import mixture_of_masks, moebert, mpoe
from hf_moebert.methods.multitask import MultiTaskModel
from hf_moebert.methods.trimming import choose_layers, drop_layers


DEPTH = 3
FAMILIES = sorted(set(CONFIGS) - {"albert"})
TEXTS = ["a good film", "a bad film", "not very good", "very bad", "good", "a a a a not good"] * 6


@cache
def deep_model(family, auto=AutoModel):
    names = AutoConfig.for_model(family).attribute_map
    fields = {names.get("num_hidden_layers", "num_hidden_layers"): DEPTH}
    fields |= {"t5": {"num_decoder_layers": DEPTH}, "bart": {"decoder_layers": DEPTH}}.get(family.lstrip("m"), {})
    return make_model(family, auto, **fields)


def skipping(model, index):
    """Return a copy of a model in which a layer passes on what it is given."""

    def skip(layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model = copy.deepcopy(model)
    find_layers(model)[index].module.register_forward_hook(skip, with_kwargs=True)
    return model


def examples_of(model, count=32):
    inputs = make_inputs(model, count)
    return [{name: values[row] for name, values in inputs.items()} for row in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_model(family):
    model = deep_model(family)
    same = drop_layers(model, range(len(find_layers(model))))
    assert type(same) is type(model)
    assert same.config.to_dict() == model.config.to_dict()
    assert torch.equal(run(same), run(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layer_the_model_answers_as_if_it_passed_on_what_it_is_given(family, tmp_path):
    model = deep_model(family)
    count, gone = len(find_layers(model)), 1 if family == "modernbert" else 0
    smaller = drop_layers(model, [index for index in range(count) if index != gone])
    assert torch.equal(run(smaller), run(skipping(model, gone)))
    smaller.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path)
    assert type(stock) is type(model)
    assert stock.config.num_hidden_layers == DEPTH - 1
    assert torch.equal(run(stock), run(smaller))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "modernbert"])
def test_layers_keep_their_types(family):
    model = deep_model(family)
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = type(model.config).from_dict(model.config.to_dict() | {"layer_types": types})
    assert drop_layers(type(model)(config), [0, 2]).config.layer_types == ["full_attention", "full_attention"]


def test_encoder_and_decoder_are_counted_one_behind_the_other():
    model = deep_model("bart")
    smaller = drop_layers(model, [0, 2, 3])
    assert (smaller.config.encoder_layers, smaller.config.decoder_layers) == (2, 1)
    assert torch.equal(smaller.decoder.layers[0].fc1.weight, model.decoder.layers[0].fc1.weight)
    assert choose_layers(model, 2) == [0, 2, 3, 5]


@pytest.mark.process
def test_a_smaller_model_loads_without_this_package(tmp_path):
    drop_layers(deep_model("bert"), 1).save_pretrained(tmp_path)
    code = "import sys, transformers\nm = transformers.AutoModel.from_pretrained(sys.argv[1])\n"
    code += "print(type(m).__name__, len(m.encoder.layer), 'hf_moebert' in sys.modules)"
    assert new_process.run(code, tmp_path).stdout.split() == ["BertModel", "1", "False"]


def prune_one_layer(family):
    model = copy.deepcopy(deep_model(family))
    with torch.no_grad():
        matrix_of(find_feed_forwards(model)[1].part("down"))[:, :9] = 0
    return shrink(model)


def make_experts(model, **options):
    return moebert.from_dense(model, torch.rand(DEPTH, UNITS), num_experts=2, **options)


def make_masks(family, auto, *, fixed, **options):
    model = mixture_of_masks.from_dense(deep_model(family, auto), num_experts=2, **options)
    for network in model.masked_networks().values() if fixed else ():
        network.masks.scores.data.copy_(torch.linspace(-3, 3, 2 * UNITS).view(2, UNITS))
    if fixed:
        model.fix_masks()
    return model


CLASSIFIER = AutoModelForSequenceClassification
FORMS = {
    "shrunk": lambda: prune_one_layer("bert"),
    "shrunk, other names": lambda: prune_one_layer("distilbert"),
    "experts": lambda: make_experts(deep_model("bert"), layers=[0, 2]),
    "experts of another family": lambda: make_experts(deep_model("roberta")),
    "gates": lambda: make_experts(deep_model("bert"), routing="gate-token"),
    "shrunk experts": lambda: make_experts(prune_one_layer("bert")),
    "masks": lambda: make_masks("bert", CLASSIFIER, fixed=True, layers=[0, 1]),
    "masks of T5": lambda: make_masks("t5", AutoModelForSeq2SeqLM, fixed=False, layers=[0, 2, 5]),
    "masks, compact": lambda: shrink(make_masks("bert", CLASSIFIER, fixed=True)),
    "shared experts": lambda: mpoe.from_dense(
        deep_model("bert", CLASSIFIER), num_experts=2, num_cores=3, layers=[0, 1]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_keep_what_each_layer_is(form, tmp_path):
    model = FORMS[form]().eval()
    kept = [index for index in range(len(find_layers(model))) if index != 1]
    smaller = drop_layers(model, kept)
    assert type(smaller) is type(model)
    assert torch.allclose(run(smaller), run(skipping(model, 1)), atol=1e-6)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path)), run(smaller))


def test_places_lie_evenly_and_make_a_layer_map():
    model = deep_model("bert")
    kept = choose_layers(model, 2)
    assert kept == [0, 2]
    assert choose_layers(model, 1) == [0]
    assert choose_layers(model, 3) == [0, 1, 2]
    recipe = DistillationConfig(layer_map=[*kept[1:], DEPTH])
    assert recipe.teacher_layers(2, DEPTH) == [0, 2, 3]


def silence(model, index):
    """Make a layer pass on nearly what it is given."""
    model = copy.deepcopy(model)
    attention, network = find_layers(model)[index].stack.attentions[0].writer, find_feed_forwards(model)[index]
    with torch.no_grad():
        for linear in (find_layers(model)[index].module.get_submodule(attention), network.part("down")):
            linear.weight *= 1e-3
            if linear.bias is not None:
                linear.bias *= 1e-3
    return model


HEADS = {
    "bert": AutoModelForSequenceClassification,
    "modernbert": AutoModelForTokenClassification,
    "distilbert": AutoModelForQuestionAnswering,
    "vit": AutoModel,
    "llama": AutoModel,
    "t5": AutoModel,
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("index", [1, 2])
def test_the_layer_that_does_nothing_goes_first(family, index):
    model = silence(deep_model(family, HEADS[family]), index)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kept = choose_layers(model, 2, examples_of(model), by="importance")
    assert index not in kept
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    smaller = drop_layers(model, 2, examples_of(model), by="importance")
    assert torch.equal(run(smaller), run(drop_layers(model, kept)))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    model = save_classifier(folder, layers=2)
    return model, AutoTokenizer.from_pretrained(folder)


def test_texts_are_tokenized(classifier):
    model, tokenizer = classifier
    assert len(choose_layers(model, 1, TEXTS, tokenizer, by="importance")) == 1


def test_a_packed_model_is_dense_once_it_is_loaded(classifier, tmp_path):
    save_packed(classifier[0], tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert drop_layers(model, 1).config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, r"`keep` must be in \[1, 2\], the number of layers, got 0. Use 1"),
        (3, r"`keep` must be in \[1, 2\], the number of layers, got 3"),
        (True, r"`keep` must be in \[1, 2\]"),
        ([], r"`keep` must be indices in \[0, 2\), ascending and each once, got \[\]. Use \[0\]"),
        ([2], r"`keep` must be indices in \[0, 2\)"),
        ([1, 0], "ascending"),
        ([0, 0], "each once"),
        ([0.5], "must be indices"),
    ],
)
def test_layers_out_of_range_are_refused(classifier, keep, message):
    with pytest.raises(ValueError, match=message):
        drop_layers(classifier[0], keep)


def test_other_bad_input_is_refused(classifier):
    model, tokenizer = classifier
    with pytest.raises(ValueError, match='`by` must be "position" or "importance", got \'size\''):
        drop_layers(model, 1, by="size")
    with pytest.raises(ValueError, match='`dataset` must be given for `by="importance"`'):
        drop_layers(model, 1, by="importance")
    with pytest.raises(ValueError, match="must give at least 32 examples, got 3"):
        drop_layers(model, 1, TEXTS[:3], tokenizer, by="importance")
    with pytest.raises(ValueError, match="must hold a layer of encoder and decoder each"):
        drop_layers(deep_model("t5"), [0, 1])
    with pytest.raises(ValueError, match="must hold layer 0, which is not built like the others"):
        drop_layers(deep_model("modernbert"), [1, 2])
    with pytest.raises(ValueError, match="must have weights of its own in each layer, which those of 'albert' share"):
        drop_layers(make_model("albert"), 1)
    with pytest.raises(ValueError, match="`scale_attn_by_inverse_layer_idx` must be False"):
        drop_layers(make_model("gpt2", scale_attn_by_inverse_layer_idx=True), 1)
    with pytest.raises(ValueError, match="must be a model of transformers, got Linear"):
        drop_layers(torch.nn.Linear(2, 2), 1)
    with torch.device("meta"), pytest.raises(ValueError, match="some are offloaded"):
        drop_layers(type(model)(model.config), 1)


def test_other_forms_are_refused_with_the_order_that_works(classifier):
    with pytest.raises(ValueError, match="must hold plain weights, got the form 'mpo'. Trim the model first"):
        drop_layers(compress_mpo(classifier[0], num_cores=3), 1)
    masked = make_masks("t5", AutoModelForSeq2SeqLM, fixed=True)
    with pytest.raises(ValueError, match="Drop layers before `shrink`"):
        drop_layers(shrink(masked), 1)
    model = copy.deepcopy(classifier[0])
    model.config.frozen_layers = 1
    with pytest.raises(ValueError, match="is one of many tasks. Merging comes after it: do it to the model of each"):
        drop_layers(MultiTaskModel.from_tasks({"a": model}), 1)
