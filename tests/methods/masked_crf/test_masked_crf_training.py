"""Token classifiers with a CRF under the stock Trainer: losses, metrics, checkpoints, adapters."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_crf import LABELS, arguments, make, make_batch, make_dense
from transformers import (
    AutoModelForTokenClassification,
    Trainer,
)

from hf_moebert import BertCrfForTokenClassification
from hf_moebert.methods.masked_crf.functional_tags import count_breaks


KINDS = ("bert", "any bert")


@pytest.fixture(scope="module")
def data():
    """Eight rows of two lengths; a word's tag follows from its id and the tag before."""
    rows = []
    for length in (7, 7, 7, 7, 10, 10, 10, 10):
        batch = make_batch(1, length, pad=0)
        ids = batch["input_ids"][0].tolist()
        labels, before = [-100], 0
        for token in ids[1:-1]:
            before = before + 1 if before in (1, 3) and token % 2 else before if before in (2, 4) and token % 2 else 0
            before = before or (0, 1, 3)[token % 3]
            labels.append(before)
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [*labels, -100]})
        rows[-1]["input_ids"] = [(token + 7 * len(rows)) % 55 + 5 for token in ids]
    return Dataset.from_list(rows)


class Pad:
    """Collator that only pads; that of transformers needs a tokenizer."""

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: torch.tensor([row[name] + [fill[name]] * (longest - len(row[name])) for row in rows])
            for name in rows[0]
        }


def make_trainer(folder, data, model=None, **options):
    metrics = options.pop("compute_metrics", None)
    return Trainer(
        model=model or make(),
        args=arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=Pad(),
        compute_metrics=metrics,
    )


def accuracy(result):
    words = result.label_ids != -100
    return {"accuracy": float((result.predictions == result.label_ids)[words].mean())}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_get_tags_and_training_learns_them(tmp_path, data, kind):
    seen = []

    def keep(result):
        seen.append(result)
        return accuracy(result)

    model = make(kind, scores=False)
    trainer = make_trainer(tmp_path, data, model, max_steps=40, compute_metrics=keep)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.2 * before["eval_loss"]
    assert after["eval_accuracy"] > max(0.9, before["eval_accuracy"])
    labels = np.full((8, 10), -100)
    for row, tags in enumerate(data["labels"]):
        labels[row, : len(tags)] = tags
    for result in seen:
        assert isinstance(result.predictions, np.ndarray)
        assert result.predictions.shape == result.label_ids.shape == (8, 10)
        np.testing.assert_array_equal(result.label_ids, labels)
        np.testing.assert_array_equal(result.predictions == -100, labels == -100)
        for row in result.predictions:
            assert count_breaks([LABELS[tag] for tag in row[row != -100]], "IOB2") == 0
    assert model.crf.transitions.abs().sum() > 0
    assert model.crf.transitions.grad is None or model.crf.transitions.grad[~model.crf.legal].abs().sum() == 0


def test_prediction_asks_for_words(tmp_path, data):
    """Labels of any tag at the first piece of each word show where words are."""
    trainer = make_trainer(tmp_path, data)
    with pytest.raises(ValueError, match="`word_mask`, or `labels` of any tag, must mark"):
        trainer.predict(data.remove_columns("labels"))
    unlabelled = data.map(lambda row: {"labels": [min(tag, 0) for tag in row["labels"]]})
    wanted, found = trainer.predict(data), trainer.predict(unlabelled)
    assert (found.predictions == wanted.predictions).all()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_parts_make_the_step_of_the_whole(tmp_path, data, kind):
    weights = []
    for size, parts in ((4, 1), (2, 2)):
        model = make(kind)
        trainer = make_trainer(
            tmp_path, data, model, per_device_train_batch_size=size, gradient_accumulation_steps=parts, optim="sgd"
        )
        trainer.train()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5)


def test_resumed_runs_are_the_uninterrupted_run(tmp_path, data):
    whole = make(dropout=0.1)
    make_trainer(tmp_path / "whole", data, whole, max_steps=4).train()
    first = make(dropout=0.1)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path / "parts", data, first, **options).train()
    resumed = make(dropout=0.1)
    make_trainer(tmp_path / "parts", data, resumed, **options).train(str(tmp_path / "parts" / "checkpoint-2"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, data):
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "max_steps": 6}
    trainer = make_trainer(
        tmp_path,
        data,
        compute_metrics=accuracy,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        **options,
    )
    trainer.train()
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scores) == 3
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(max(scores))
    best = AutoModelForTokenClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(best.crf.transitions, trainer.model.crf.transitions)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_change_no_gradient(kind):
    model, batch = make(kind).train(), make_batch(labels=True)
    plain = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    model.activation_checkpointing_enable()
    for ours, theirs in zip(torch.autograd.grad(model(**batch).loss, list(model.parameters())), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_the_encoder_with_the_crf_beside_it(tmp_path, data, kind):
    config = LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier", "crf"])
    model = get_peft_model(make(kind), config)
    trainable = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad and ".crf." in name}
    assert trainable == {"transitions", "start", "end"}
    trainer = make_trainer(tmp_path, data, model, max_steps=6, label_names=["labels"], compute_metrics=accuracy)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make(kind), tmp_path / "adapter")
    batch = make_batch()
    with torch.no_grad():
        wanted, got, merged = model(**batch), loaded(**batch), loaded.merge_and_unload()(**batch)
    assert torch.equal(got.predictions, wanted.predictions)
    assert torch.equal(merged.predictions, wanted.predictions)
    torch.testing.assert_close(got.logits, wanted.logits)


def test_a_stopped_run_names_the_row_that_breaks_the_scheme(tmp_path, data):
    broken = Dataset.from_list([data[0] | {"labels": [-100, 0, 2, 2, 0, 0, -100]}])
    with pytest.raises(ValueError, match="row 0 of the batch is O I-PER I-PER O O"):
        make_trainer(tmp_path, broken).train()


def test_masks_keep_illegal_moves_out_of_what_is_learnt(tmp_path, data):
    """Scores of moves that are never read stay what they were; without masks all of them move."""
    for mask, moved in (("training", False), ("decoding", True)):
        model = BertCrfForTokenClassification.from_dense(make_dense(), mask_transitions=mask)
        make_trainer(tmp_path, data, model, max_steps=3).train()
        assert bool(model.crf.transitions[~model.crf.legal].abs().sum() > 0) == moved
