"""Importance against its definition, and the files it is kept in."""

import copy
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
    DataCollatorWithPadding,
)

from hf_moebert import measure_importance
from hf_moebert.methods.moebert.conversion import (
    count_tokens,
    fingerprint,
    load_importance,
    measure_expert_load,
    save_importance,
)


HEADS = ("classes", "several", "regression", "tokens", "spans")


def make_examples(head, size=7):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number in range(size):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = torch.randint(1, 100, (length,), generator=generator)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "text": "is ignored"}
        if head == "classes":
            example["labels"] = torch.tensor(number % 3)
        elif head == "several":
            example["labels"] = torch.tensor([1.0, number % 2, 0])
        elif head == "regression":
            example["labels"] = torch.tensor(
                number / 3, dtype=torch.float64
            )  # as the model: not every torch mixes them
        elif head == "tokens":
            example["labels"] = torch.where(ids % 5 == 0, -100, ids % 3)
        else:
            example |= {"start_positions": torch.tensor(1), "end_positions": torch.tensor(length - 1)}
        examples.append(example)
    return examples


def collate(examples):
    """Pad ids and masks with zeros, and token labels with -100."""
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        fill = -100 if name == "labels" else 0
        per_token = values[0].dim() == 1 and values[0].shape == examples[0]["input_ids"].shape
        batch[name] = (
            torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
            if per_token
            else torch.stack(values)
        )
    return batch


def make_model(head, config, dtype=torch.float64):
    config = copy.deepcopy(config)
    config.num_labels = {"regression": 1, "spans": 2}.get(head, 3)
    classes = {"tokens": BertForTokenClassification, "spans": BertForQuestionAnswering}
    torch.manual_seed(0)
    return classes.get(head, BertForSequenceClassification)(config).to(dtype)


def by_definition(model, examples):
    """The published score: one backward per example, weights times their gradients."""
    model = copy.deepcopy(model).eval()
    scores = torch.zeros(3, 64, dtype=model.dtype)
    for example in examples:
        model.zero_grad()
        batch = collate([{name: value for name, value in example.items() if name != "text"}])
        model(**batch).loss.backward()
        for index, layer in enumerate(model.bert.encoder.layer):
            up, down = layer.intermediate.dense.weight, layer.output.dense.weight
            scores[index] += ((up * up.grad).sum(dim=1) + (down * down.grad).sum(dim=0)).abs()
    return scores


@pytest.mark.parametrize("head", HEADS)
def test_importance_equals_its_definition_at_every_batch_size(dense_config, head):
    model, examples = make_model(head, dense_config), make_examples(head)
    wanted = by_definition(model, examples)
    for batch_size in (1, 3, 7):
        scores = measure_importance(model, examples, collate, batch_size=batch_size)
        torch.testing.assert_close(scores, wanted, rtol=1e-10, atol=1e-16)


def test_importance_adds_up_over_shards(dense_config):
    model, examples = make_model("classes", dense_config), make_examples("classes")
    parts = [measure_importance(model, part, collate) for part in (examples[:3], examples[3:])]
    torch.testing.assert_close(sum(parts), measure_importance(model, examples, collate), rtol=1e-12, atol=0)


def test_the_absolute_value_is_taken_per_example(dense_config):
    model, examples = make_model("classes", dense_config), make_examples("classes")
    model.eval()
    scores = measure_importance(model, examples, collate)
    model(**collate([{k: v for k, v in e.items() if k != "text"} for e in examples])).loss.backward()
    up, down = (m.dense.weight for m in (model.bert.encoder.layer[0].intermediate, model.bert.encoder.layer[0].output))
    shortcut = ((up * up.grad).sum(dim=1) + (down * down.grad).sum(dim=0)).abs() * len(examples)
    assert (scores[0] > shortcut * 1.05).any()  # the tempting shortcut lets examples cancel


def test_the_model_is_left_as_it_was(dense_config):
    model = make_model("classes", dense_config, torch.float32).train()
    model.bert.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    measure_importance(model, make_examples("classes"), collate)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_and_autocast_change_nothing_but_the_weights(dense_config):
    model, examples = make_model("classes", dense_config, torch.float32), make_examples("classes")
    plain = measure_importance(model, examples, collate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(measure_importance(model, examples, collate), plain)
    half = copy.deepcopy(model).bfloat16()
    scores = measure_importance(half, examples, collate)
    assert half.dtype == torch.bfloat16
    assert torch.equal(scores, measure_importance(half.float(), examples, collate))


def test_examples_are_drawn_with_the_seed(dense_config):
    model, examples = make_model("classes", dense_config), make_examples("classes")
    first, again, other = (
        measure_importance(model, examples, collate, max_examples=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bad_measurements_are_refused(dense_config, student):
    model, examples = make_model("classes", dense_config), make_examples("classes")
    with pytest.raises(ValueError, match="`dataset` is empty"):
        measure_importance(model, [], collate)
    with pytest.raises(ValueError, match="`max_examples` must be at least 1, got 0"):
        measure_importance(model, examples, collate, max_examples=0)
    with pytest.raises(ValueError, match="its neurons can be scored, but MoEBert.* is a mixture of experts"):
        measure_importance(student, examples, collate)
    with pytest.raises(ValueError, match="`dataset` must have labels"):
        measure_importance(model, [{k: v for k, v in e.items() if k != "labels"} for e in examples], collate)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"The importance of layers \[0, 1, 2\] is not finite"):
        measure_importance(model, examples, collate)


# --------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path, dense, importance):
    path = tmp_path / "importance.safetensors"
    save_importance(path, importance, dense, seed="0")
    return path


def test_importance_survives_its_file(saved, dense, importance):
    assert torch.equal(load_importance(saved, dense), importance)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]  # nothing half-written is left


def test_importance_of_another_model_is_refused(saved, dense):
    before = fingerprint(dense)
    with torch.no_grad():
        dense.classifier.bias[0] += 1
    with pytest.raises(ValueError, match=f"measured on another model: its fingerprint is {before}, this model's is"):
        load_importance(saved, dense)


@pytest.mark.parametrize("keep", [4, 60, 200, -1])
def test_a_truncated_file_is_refused(saved, dense, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="importance.safetensors' must be a complete safetensors file, but it is not"):
        load_importance(saved, dense)


@pytest.mark.parametrize("header", [b"\x80\x04\x95", struct.pack("<Q", 2**40), b"PK\x03\x04"])
def test_other_bytes_are_refused(saved, dense, header):
    canary = saved.with_name("canary")
    saved.write_bytes(header + f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode() * 3)
    with pytest.raises(ValueError, match="Pickles and other formats are not read"):
        load_importance(saved, dense)
    assert not canary.exists()


def test_a_missing_file_and_foreign_tensors_are_refused(tmp_path, dense):
    with pytest.raises(
        FileNotFoundError, match="nothing.safetensors' must be a safetensors file, but does not exist. Pickles"
    ):
        load_importance(tmp_path / "nothing.safetensors", dense)
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"must hold the tensor 'importance' and a fingerprint, got \['weight'\]"):
        load_importance(path, dense)
    save_file({"importance": torch.zeros(3, 64)}, path, metadata={"model": "x", "format_version": "99"})
    with pytest.raises(ValueError, match="has format version 99, this release reads 1"):
        load_importance(path, dense)


def test_a_failed_save_leaves_the_old_file(saved, dense, importance, monkeypatch):
    old = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_moebert.checkpoints.tensor_files.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_importance(saved, importance * 2, dense)
    assert saved.read_bytes() == old


# ---------------------------------------------------------------------------------------------------- the corpus


def test_token_counts():
    counts = count_tokens({"input_ids": [[1, 2, 2], [5], [], [2]]}, 7)
    assert counts.tolist() == [0, 1, 3, 0, 0, 1, 0]
    with pytest.raises(ValueError, match=r"`input_ids` must be in \[0, 5\), got 5"):
        count_tokens({"input_ids": [[1], [5]]}, 5)


def test_expert_load_of_a_data_set(student):
    examples = make_examples("classes")
    load = measure_expert_load(student, examples, collate, batch_size=3)
    ids = np.concatenate([example["input_ids"] for example in examples])
    for layer in range(3):
        table = student.bert.router.table[layer][ids].long()
        assert load[layer].tolist() == table.bincount(minlength=4).tolist()


def test_the_trainers_own_data_works(dense_config):
    """A `datasets.Dataset` with extra columns and the usual collator, as handed to a Trainer."""
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    tokenizer = BertTokenizer(vocab=vocab)
    texts = ["a b", "b", "a a a b", "b b"]
    dataset = Dataset.from_dict({"text": texts, "label": [0, 1, 2, 0], **tokenizer(texts)})
    model = make_model("classes", dense_config)
    scores = measure_importance(model, dataset, DataCollatorWithPadding(tokenizer), batch_size=2)
    examples = [{"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["label"])} for row in dataset]
    torch.testing.assert_close(scores, by_definition(model, examples), rtol=1e-10, atol=1e-16)
