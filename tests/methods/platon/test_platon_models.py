"""The callback on stock families and on our own model: what is chosen, and what becomes zero."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from platon_families import BERT_SIZES, MODELS, VOCAB, build, count_zeros_of
from platon_runs import assert_same_weights, callback_of, pruner_of
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from hf_moebert import (
    DistillationTrainer,
    PlatonConfig,
    save_packed,
)
from hf_moebert.methods.platon.training_parameters import find_prunable
from hf_moebert.methods.platon.training_pruner import Pruner


ATTENTION = [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
DISENTANGLED = [f"attention.self.{name}_proj" for name in ("query", "key", "value", "pos_key", "pos_query")]
VIT_ATTENTION = [f"attention.{name}_proj" for name in "qkvo"]
LLAMA_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
T5_ENCODER = [f"0.SelfAttention.{name}" for name in "qkvo"] + ["1.DenseReluDense.wi", "1.DenseReluDense.wo"]
T5_DECODER = [f"0.SelfAttention.{name}" for name in "qkvo"] + [f"1.EncDecAttention.{name}" for name in "qkvo"]
T5_DECODER += ["2.DenseReluDense.wi", "2.DenseReluDense.wo"]
BERT_LAYER = [f"{path}.weight" for path in [*ATTENTION, "intermediate.dense", "output.dense"]]
MOE_LAYER = [f"{path}.weight" for path in ATTENTION] + [
    "output.dense.experts.up_proj",
    "output.dense.experts.down_proj",
]

# Where the layers are, and the parameters that are pruned in each.
CHOSEN = {
    "bert": [("bert.encoder.layer.{}.", BERT_LAYER)],
    "roberta": [("roberta.encoder.layer.{}.", BERT_LAYER)],
    "distilbert": [
        (
            "distilbert.transformer.layer.{}.",
            [f"attention.{name}_lin.weight" for name in ("q", "k", "v", "out")]
            + ["ffn.lin1.weight", "ffn.lin2.weight"],
        )
    ],
    "deberta-v2": [
        (
            "deberta.encoder.layer.{}.",
            [f"{p}.weight" for p in [*DISENTANGLED, "attention.output.dense", "intermediate.dense", "output.dense"]],
        )
    ],
    "vit": [("vit.layers.{}.", [f"{path}.weight" for path in [*VIT_ATTENTION, "mlp.fc1", "mlp.fc2"]])],
    "gpt2": [("transformer.h.{}.", [f"{p}.weight" for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")])],
    "llama": [
        (
            "model.layers.{}.",
            [f"{p}.weight" for p in [*LLAMA_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]],
        )
    ],
    "t5": [
        ("transformer.encoder.block.{}.layer.", [f"{path}.weight" for path in T5_ENCODER]),
        ("transformer.decoder.block.{}.layer.", [f"{path}.weight" for path in T5_DECODER]),
    ],
    "mixtral": [
        (
            "model.layers.{}.",
            [f"{p}.weight" for p in LLAMA_ATTENTION] + ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
    ],
    "hash": [("bert.encoder.layer.{}.", MOE_LAYER)],
    "gate": [("bert.encoder.layer.{}.", MOE_LAYER)],
}


# What is chosen


@pytest.mark.parametrize("family", CHOSEN)
def test_what_is_chosen(family):
    expected = [prefix.format(i) + name for prefix, names in CHOSEN[family] for i in range(2) for name in names]
    assert list(find_prunable(build(family), PlatonConfig())) == expected


def test_a_module_that_is_used_many_times_is_chosen_once():
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    names = [f"attention.{name}" for name in ("query", "key", "value", "dense")] + ["ffn", "ffn_output"]
    assert list(find_prunable(build("albert"), PlatonConfig())) == [f"{layer}{name}.weight" for name in names]


def test_biases_only_if_asked_for():
    chosen = find_prunable(build("bert"), PlatonConfig(include_bias=True))
    weights = [name for name in chosen if name.endswith("weight")]
    assert weights == list(find_prunable(build("bert"), PlatonConfig()))
    assert list(chosen) == [f"{name.removesuffix('weight')}{kind}" for name in weights for kind in ("weight", "bias")]
    chosen = find_prunable(build("hash"), PlatonConfig(include_bias=True))
    assert [name for name in chosen if "layer.0.output.dense" in name] == [
        f"bert.encoder.layer.0.output.dense.experts.{name}"
        for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    ]


def test_modules_are_paths_and_no_parts_of_names(tiny_bert):
    model = tiny_bert(num_hidden_layers=11)
    chosen = find_prunable(model, PlatonConfig(modules=["bert.encoder.layer.1", "classifier"]))
    assert list(chosen) == [f"bert.encoder.layer.1.{name}" for name in BERT_LAYER] + ["classifier.weight"]
    chosen = find_prunable(
        model, PlatonConfig(modules=["bert.encoder.layer.10.output.dense", "bert.encoder.layer.10"])
    )
    assert len(chosen) == 6


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["encoder"], r"must be paths of modules of the model, got 'encoder'. Choose from bert.encoder.layer.0.atten"),
        (["bert.encoder.layer.2"], r"got 'bert.encoder.layer.2'. Choose from .*, or modules around them"),
        (
            ["bert.embeddings"],
            r"there are none in \['bert.embeddings'\]. Choose from .*bert.pooler.dense, classifier,",
        ),
        (["dropout"], r"there are none in \['dropout'\]"),
    ],
)
def test_modules_that_hold_nothing_are_refused(tiny_bert, make_trainer, modules, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_bert(), {"modules": modules}).train()


def test_all_frozen_is_refused(tiny_bert, make_trainer):
    model = tiny_bert()
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="all of them are frozen. Unfreeze them by `model.requires_grad_"):
        make_trainer(model).train()
    with pytest.raises(
        ValueError, match=r"must be trainable to be pruned whole, but .*layer.1.output.dense.weight are"
    ):
        make_trainer(model, {"granularity": "structured"}).train()


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="It has no linear layer at all"):
        find_prunable(torch.nn.Sequential(torch.nn.LayerNorm(4)), PlatonConfig())


def test_frozen_layers_stay_what_they_are(tiny_bert, make_trainer, caplog_of_transformers):
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    before = copy.deepcopy(model.bert.encoder.layer[0].state_dict())
    trainer = make_trainer(model)
    trainer.train()
    assert "6 of 12 parameters are frozen and so not pruned" in caplog_of_transformers.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.bert.encoder.layer[0].state_dict().items())
    assert count_zeros_of(pruner_of(trainer).parameters.values()) == round(0.7 * 2048)


# What becomes zero, and stays so


@pytest.mark.parametrize("family", MODELS)
def test_nothing_else_becomes_zero(prune, tmp_path, family):
    model = build(family)
    trainer = prune(model, data=family, max_steps=10)
    chosen = find_prunable(model, PlatonConfig())
    numel = sum(parameter.numel() for parameter in chosen.values())
    assert pruner_of(trainer).numel == numel
    assert count_zeros_of(chosen.values()) == round(0.7 * numel)
    others = {name: p for name, p in model.named_parameters() if name not in chosen}
    assert [name for name, parameter in others.items() if (parameter == 0).any()] == []
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(type(model).from_pretrained(tmp_path / "saved"), model)
    save_packed(model, tmp_path / "packed")
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    packed = auto.from_pretrained(tmp_path / "packed")
    assert type(packed) is type(model)
    assert_same_weights(packed, model)


def test_tied_weights_count_once_and_stay_tied(prune, tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**BERT_SIZES))
    model.accepts_loss_kwargs = False
    ids = torch.randint(VOCAB, (64, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    modules = ["cls.predictions.decoder", "cls.predictions.transform.dense", "bert.encoder.layer.0.output.dense"]
    trainer = prune(model, {"modules": modules}, data=data)
    assert pruner_of(trainer).numel == VOCAB * 16 + 16 * 16 + 16 * 32
    assert count_zeros_of(pruner_of(trainer).parameters.values()) == round(0.7 * pruner_of(trainer).numel)
    embeddings = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is embeddings
    assert (embeddings == 0).any()
    model.save_pretrained(tmp_path / "saved")
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert_same_weights(loaded, model)


def test_a_tie_between_layers_is_one_mask(tiny_bert, make_trainer):
    model = tiny_bert()
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    trainer = make_trainer(model)
    trainer.train()
    assert len(pruner_of(trainer).parameters) == 11
    assert second.weight is first.weight
    assert count_zeros_of(pruner_of(trainer).parameters.values()) == round(0.7 * (4096 - 512))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of peft
def test_adapters_are_pruned_and_what_they_adapt_is_not(tiny_bert, make_trainer, tmp_path, caplog_of_transformers):
    """The frozen weights cannot be: they have no gradients. What is left to prune are the adapters' own matrices."""

    def adapted():
        return get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4))

    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(model, save_strategy="steps", save_steps=10)
    trainer.train()
    assert "12 of 20 parameters are frozen and so not pruned" in caplog_of_transformers.text
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    parameters = pruner_of(trainer).parameters
    assert all(".lora_" in name for name in parameters)
    assert count_zeros_of(parameters.values()) == round(0.7 * 512)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "run" / "checkpoint-20")
    assert_same_weights(loaded, model)
    resumed = make_trainer(adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert_same_weights(resumed.model, model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of peft
def test_whole_units_of_an_adapted_model_are_refused(tiny_bert, make_trainer):
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    with pytest.raises(ValueError, match="Merge the adapter by `merge_and_unload` first"):
        make_trainer(model, {"granularity": "structured"}).train()


# Experts


def make_unbalanced():
    """A model whose first expert gets one token id alone, and data in which two tokens of a hundred have that id."""
    model = build("hash")
    model.bert.router.table.copy_(torch.arange(VOCAB).remainder(3).add(1).expand_as(model.bert.router.table))
    model.bert.router.table[:, 0] = 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (400, 16), generator=generator)
    labels = (ids[:, 0] < 10).long()
    ids[torch.rand(ids.shape, generator=generator) < 0.02] = 0
    return model, Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@pytest.mark.parametrize("balance", [True, False])
def test_few_tokens_alone_do_not_prune_an_expert(prune, balance):
    model, data = make_unbalanced()
    recipe = {"balance_experts": balance, "keep_ratio": 0.5, "window": 5, "initial_warmup": 5}
    prune(model, recipe, data=data, max_steps=60, per_device_train_batch_size=32, learning_rate=1e-3)
    stacks = [
        getattr(layer.output.dense.experts, name)
        for layer in model.bert.encoder.layer
        for name in ("up_proj", "down_proj")
    ]
    rare, *others = (
        torch.stack([(stack[expert] == 0).double().mean() for stack in stacks]).mean() for expert in range(4)
    )
    if balance:
        assert abs(rare - sum(others) / 3) < 0.1
    else:
        assert rare > max(others) + 0.3


def test_experts_without_gradient_are_no_trouble():
    """A stack that no token reached in a step, as where a layer was skipped."""
    model = build("gate")
    pruner = Pruner(model, PlatonConfig(keep_ratio=0.3, initial_warmup=2, final_warmup=6, window=3), 20)
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
    for step in range(20):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in pruner.parameters.items():
            if "experts" in name and step % 3:
                parameter.grad = None
        with torch.no_grad():
            pruner.observe()
            pruner.advance()
    assert sum(int((~keep).sum()) for keep in pruner.keep.values()) == round(0.7 * pruner.numel)
    stacks = [keep for name, keep in pruner.keep.items() if "experts" in name]
    assert all(keep.any() for keep in stacks)


# With a teacher


@pytest.mark.parametrize("family", ["bert", "hash", "gate"])
def test_with_a_teacher(prune, tmp_path, family):
    teacher = build("bert").eval()
    before = copy.deepcopy(teacher.state_dict())
    model = build(family)
    trainer = prune(model, trainer_class=DistillationTrainer, extra={"teacher": teacher})
    assert count_zeros_of(find_prunable(model, PlatonConfig()).values()) == round(0.7 * pruner_of(trainer).numel)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    logs = trainer.state.log_history[-2]
    assert logs["loss_prediction"] >= 0
    assert logs["platon_sparsity"] == pytest.approx(0.7, abs=1e-3)
    save_packed(model, tmp_path / "packed")
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed"), model)
    assert callback_of(trainer).config.keep_ratio == 0.3
