"""Units removed in one shot: every family, what it costs, what comes out, and what is refused."""

import copy
import json

import new_process
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft_support import NEEDS_PEFT
from tiny_classifiers import save_classifier
from tiny_families import CONFIGS, make_inputs, make_model
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_moebert import prune_structured, shrink
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.inputs import load_inputs
from hf_moebert.architectures.surgery import matrix_of
from hf_moebert.methods.platon.conversion import find_uniform_kinds
from hf_moebert.methods.platon.conversion_moments import measure_influence, read_moment
from hf_moebert.methods.platon.conversion_plan import count_weights
from hf_moebert.methods.platon.modeling_units import find_unit_groups


FAMILIES = [family for family, row in ARCHITECTURES.items() if row.units]
TEXTS = ["a good film", "a bad film", "not very good", "very bad", "good", "a a a a not good"] * 8


def examples_of(model, count=40):
    inputs = make_inputs(model, count)
    return [{name: values[row] for name, values in inputs.items()} for row in range(count)]


@torch.no_grad()
def answer(model):
    return model(**make_inputs(model, 40))[0]


def count_units(model):
    return sum(float(cost[-1]) for cost in count_weights(find_unit_groups(model)))


@torch.no_grad()
def double_units(model):
    """Make every second unit a copy of the one before it, so that half of the units can go at no cost."""
    for group in find_unit_groups(model):
        for parameter in group.reader_parameters:
            units = parameter.unflatten(0, (group.blocks, group.num_units, -1))
            units[:, 1::2] = units[:, ::2]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny BERT, and its tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    model = save_classifier(folder, layers=2)
    return model, AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- identity


def test_units_that_say_what_others_say_go_at_little_cost():
    losses = []
    for double in (True, False):
        model = make_model("bert", transformers.AutoModelForSequenceClassification)
        if double:
            double_units(model)
        small = prune_structured(model, examples_of(model), keep_ratio=0.5, multiple_of=1)
        assert [layer["heads"] for layer in small.config.widths] == [2, 2] or not double
        losses.append((answer(small) - answer(model)).std() / answer(model).std())
    assert losses[0] < 0.3 * losses[1]


# --------------------------------------------------------------------------------------------------------- oracle


def test_moments_are_those_of_the_tokens_that_reach_the_outputs(classifier):
    model, tokenizer = classifier
    model = copy.deepcopy(model).requires_grad_(False)
    batches = load_inputs(model, TEXTS, tokenizer, max_examples=48, batch_size=5)
    groups = find_unit_groups(model)
    influences = measure_influence(model, groups, batches, seed=0)
    assert [group.kind for writer in influences for group in groups if group.writer is writer] == [
        *("heads", "neurons") * 2  # as the model runs
    ]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert [influence.count for influence in influences.values()] == [real, real, 48, 48]  # the last: one token a text
    seen = []
    writer = groups[0].writer
    handle = writer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in batches:
        model(**batch)
        seen[-1] = seen[-1][batch["attention_mask"].bool()]
    handle.remove()
    inputs = torch.cat(seen).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    influence = influences[writer]
    torch.testing.assert_close(influence.moment, inputs.T @ inputs)
    moment = read_moment(model, writer, batches, influence.counted)
    torch.testing.assert_close(moment, influence.moment / real)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_less_is_lost_than_without_the_fit(classifier):
    model, tokenizer = classifier
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    masked = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.6, multiple_of=1, remove=False)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for group, fitted in zip(find_unit_groups(plain), find_unit_groups(masked), strict=True):
            matrix_of(group.writer)[:, (matrix_of(fitted.writer) == 0).all(dim=0)] = 0
        wanted, found, without = (each(**inputs).logits for each in (model, masked, plain))
    assert (found - wanted).square().mean() < 0.7 * (without - wanted).square().mean()


# --------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_loses_units(family):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    small = prune_structured(model, examples_of(model), keep_ratio=0.6, multiple_of=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(small).__name__ == f"Shrunk{type(model).__name__}"
    assert 0.4 < count_units(small) / count_units(model) <= 0.602
    assert answer(small).isfinite().all()
    assert (answer(small) - answer(model)).std() < answer(model).std()
    assert not small.training
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("auto", ["TokenClassification", "QuestionAnswering", "MaskedLM", "SequenceClassification"])
def test_every_head_is_watched(auto):
    model = make_model("bert", getattr(transformers, f"AutoModelFor{auto}"))
    small = prune_structured(model, examples_of(model), keep_ratio=0.5)
    assert type(small).__name__ == f"ShrunkBertFor{auto}"
    assert 0.4 < count_units(small) / count_units(model) <= 0.502


@pytest.mark.parametrize(
    "fields", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}], ids=str
)
def test_outputs_that_are_no_classes_are_watched_too(fields):
    model = make_model("bert", transformers.AutoModelForSequenceClassification, **fields)
    small = prune_structured(model, examples_of(model), keep_ratio=0.5)
    assert 0.4 < count_units(small) / count_units(model) <= 0.502


def test_labels_are_not_read_and_the_same_seed_gives_the_same_model(classifier):
    model, tokenizer = classifier
    random = torch.get_rng_state()
    encoded = [tokenizer(text) for text in sorted(TEXTS, key=len)]
    labelled = [{**example, "labels": index % 2} for index, example in enumerate(encoded)]
    one = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5)
    for data, processing in ((encoded, tokenizer), (labelled, DataCollatorWithPadding(tokenizer))):
        other = prune_structured(model, data, processing, keep_ratio=0.5)
        assert one.config.widths == other.config.widths
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_units_that_stay_as_zeros_are_those_that_go(classifier):
    model, tokenizer = classifier
    masked = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5, remove=False)
    assert type(masked) is type(model)
    small = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5)
    state = shrink(masked).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_frozen_parts_and_a_compiled_forward_stay(classifier):
    model, tokenizer = copy.deepcopy(classifier[0]), classifier[1]
    model.bert.embeddings.requires_grad_(False)
    model.compile(backend="eager")
    masked = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5, remove=False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in masked.parameters()] == flags


def test_half_precision_and_training_mode_stay(classifier):
    model, tokenizer = classifier
    model = copy.deepcopy(model).to(torch.bfloat16).train()
    small = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5)
    assert small.dtype is torch.bfloat16
    assert small.training


# ---------------------------------------------------------------------------------------------------------- uniform


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_layers_are_a_stock_model(family, tmp_path):
    model = make_model(family)
    if ARCHITECTURES[family].neurons not in vars(model.config) and family in ("dinov2", "bloom"):
        with pytest.raises(ValueError, match="`uniform` needs a stock model whose configuration says how wide"):
            prune_structured(model, examples_of(model), keep_ratio=0.9, uniform=True)
        return
    small = prune_structured(model, examples_of(model), keep_ratio=0.8, uniform=True, multiple_of=1)
    assert type(small) is type(model)
    assert count_units(small) / count_units(model) <= 0.802
    small.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert torch.equal(answer(loaded), answer(small))
    kept = {group.kind: set() for group in find_unit_groups(small)}
    for group in find_unit_groups(small):
        kept[group.kind].add(group.num_units)
    assert all(len(counts) == 1 for counts in kept.values())


def test_heads_go_alike_where_the_configuration_has_their_size():
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=4)
    assert find_uniform_kinds(model) == ["neurons", "heads"]
    small = prune_structured(model, examples_of(model), keep_ratio=0.3, uniform=True, multiple_of=1)
    assert small.config.num_attention_heads == 2 * small.config.num_key_value_heads < 8


def test_a_model_that_was_pruned_in_training_becomes_stock_too():
    model = make_model("bert")
    with torch.no_grad():
        for layer, width in zip(model.encoder.layer, (10, 14), strict=True):
            layer.output.dense.weight[:, width:] = 0
            layer.attention.output.dense.weight[:, :8] = 0
    small = shrink(model, uniform=True)
    assert type(small) is type(model)
    assert small.config.intermediate_size == 14
    torch.testing.assert_close(answer(small), answer(model), atol=2e-5, rtol=1e-4)


LOAD = """
import sys
sys.modules["hf_moebert"] = None  # not to be had
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("transformers."), type(model)
print(model(torch.tensor([[2, 5, 7, 3]])).logits[0].tolist())
"""


@pytest.mark.process
def test_the_folder_loads_without_this_package(classifier, tmp_path):
    model, tokenizer = classifier
    small = prune_structured(model, TEXTS, tokenizer, keep_ratio=0.7, uniform=True)
    small.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    printed = new_process.run(LOAD, tmp_path, cwd=tmp_path, PYTHONPATH="").stdout
    with torch.no_grad():
        assert json.loads(printed) == pytest.approx(small(torch.tensor([[2, 5, 7, 3]])).logits[0].tolist(), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- refusals


class Wrapped(nn.Module):
    """What `DataParallel` and others do."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by peft
def test_wrapped_models_are_refused(classifier):
    model, tokenizer = classifier
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["query"]))
    for wrapped in (Wrapped(model), torch.compile(model), adapted):
        with pytest.raises(ValueError, match="`model` must be a model of transformers, got"):
            prune_structured(wrapped, TEXTS, tokenizer, keep_ratio=0.5)
    with torch.device("meta"):
        model = type(model)(model.config)
    with pytest.raises(ValueError, match="must hold its weights in memory"):
        prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5)


@NEEDS_PEFT
def test_adapters_are_refused(classifier):
    model = copy.deepcopy(classifier[0])
    model.add_adapter(LoraConfig(target_modules=["dense"]))
    with pytest.raises(ValueError, match="Merge the adapter by `merge_and_unload` first"):
        prune_structured(model, TEXTS, classifier[1], keep_ratio=0.5)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in FAMILIES])
def test_layers_that_cannot_be_narrowed_are_refused(family):
    with pytest.raises(ValueError, match="whose neurons or heads can be removed"):
        prune_structured(make_model(family), None, keep_ratio=0.5)


def test_a_head_without_a_narrow_form_is_refused(classifier):
    model = transformers.BertForNextSentencePrediction(classifier[0].config)
    with pytest.raises(ValueError, match="got BertForNextSentencePrediction"):
        prune_structured(model, TEXTS, classifier[1], keep_ratio=0.5)


def test_too_few_texts_and_texts_alone_are_refused(classifier):
    model, tokenizer = classifier
    with pytest.raises(ValueError, match="must give at least 32 examples, got 6. Give some hundred texts"):
        prune_structured(model, TEXTS[:6], tokenizer, keep_ratio=0.5)
    with pytest.raises(ValueError, match="must give at least 32 examples, got 8"):
        prune_structured(model, TEXTS, tokenizer, keep_ratio=0.5, max_examples=8)
    with pytest.raises(ValueError, match="`processing` must be the model's tokenizer for texts, got NoneType"):
        prune_structured(model, TEXTS, keep_ratio=0.5)


def test_weights_that_are_not_finite_are_refused(classifier):
    model = copy.deepcopy(classifier[0])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The inputs of every layer must be finite, but those of the"):
        prune_structured(model, TEXTS, classifier[1], keep_ratio=0.5)


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, "half", float("nan")])
def test_shares_out_of_range_are_refused(classifier, ratio):
    with pytest.raises(ValueError, match=r"`keep_ratio` must be in \(0, 1\), got"):
        prune_structured(classifier[0], None, keep_ratio=ratio)


def test_what_cannot_be_reached_is_refused_before_any_work(classifier):
    model = classifier[0]
    with pytest.raises(ValueError, match=r"`keep_ratio` must be at least 0\.\d+, got 0.01: one neuron and one head"):
        prune_structured(model, None, keep_ratio=0.01)
    with pytest.raises(
        ValueError, match=r"`keep_ratio` must be at least 0\.\d+, got 0.2: .* and all heads, for `unif"
    ):
        prune_structured(model, None, keep_ratio=0.2, uniform=True)
    with pytest.raises(ValueError, match="One of `keep_ratio`, `speed_up` and `latency_ms` must be given"):
        prune_structured(model, None)
    with pytest.raises(ValueError, match="One of `keep_ratio`, `speed_up` and `latency_ms` must be given"):
        prune_structured(model, None, keep_ratio=0.5, speed_up=2.0)
    for multiple in (0, -8, 1.5):
        with pytest.raises(ValueError, match="`multiple_of` must be an integer of at least 1, got"):
            prune_structured(model, None, keep_ratio=0.5, multiple_of=multiple)
    with pytest.raises(ValueError, match="`latency` must be a table of this machine"):
        prune_structured(model, None, speed_up=2.0)
