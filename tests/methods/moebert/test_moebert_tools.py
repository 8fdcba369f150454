"""Mixtures of several families in the other tools: distillation, pruning, packed files, footprint, comparison."""

import pytest
import torch
from datasets import Dataset
from test_moebert_families import convert
from tiny_classifiers import EXAMPLES, WORDS
from tiny_families import make_model
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_moebert import DistillationTrainer, PlatonConfig, PlatonPruningCallback, count_tokens, save_packed
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.measuring.comparison import Latency, TextColumns, measure
from hf_moebert.measuring.footprint import measure_footprint


LABELS = ["negative", "positive"]
TOKENIZER = BertTokenizer(
    vocab={token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
)
ROWS = [
    {**TOKENIZER(row["text"], return_token_type_ids=False), "labels": LABELS.index(row["label"])} for row in EXAMPLES
]
COLLATE = DataCollatorWithPadding(TOKENIZER)
FAMILIES = {
    "distilbert": "hash-balanced",
    "mpnet": "gate-sentence",
    "deberta-v2": "hash-random",
    "modernbert": "gate-token",
}


@pytest.fixture(params=FAMILIES)
def pair(request):
    """A dense classifier and its mixture."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    dense = make_model(request.param, AutoModelForSequenceClassification, vocab_size=len(TOKENIZER), **names)
    routing = FAMILIES[request.param]
    counts = {"token_counts": count_tokens(Dataset.from_list(ROWS), len(TOKENIZER))} if "balanced" in routing else {}
    return dense, convert(dense, routing=routing, num_experts=2, **counts)[0]


def arguments(folder, steps):
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_steps": 2}
    return TrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=steps, learning_rate=3e-3, **options
    )


def test_a_teacher_trains_a_mixture_and_training_resumes(pair, tmp_path):
    dense, student = pair
    keep = {"args": arguments(tmp_path, 4), "train_dataset": ROWS, "data_collator": COLLATE}
    trainer = DistillationTrainer(student, teacher=dense, **keep)
    trainer.train()
    losses = [entry["loss_hidden"] for entry in trainer.state.log_history if "loss_hidden" in entry]
    assert losses[-1] < losses[0]
    middle = tmp_path / "checkpoint-2"
    again = DistillationTrainer(load_model(middle), teacher=dense, **keep)
    again.train(resume_from_checkpoint=str(middle))
    wanted = student.state_dict()
    assert [name for name, x in again.model.state_dict().items() if not torch.equal(x, wanted[name])] == []


@torch.no_grad()
def test_pruned_mixtures_are_packed_counted_and_compared(pair, tmp_path):
    dense, student = pair
    with torch.enable_grad():
        callbacks = [PlatonPruningCallback(PlatonConfig(keep_ratio=0.2))]
        Trainer(
            student, arguments(tmp_path, 24), train_dataset=ROWS, data_collator=COLLATE, callbacks=callbacks
        ).train()
    student.eval()
    stacks = [weight for network in student.base_model.networks().values() for weight, _ in network.experts.stacks]
    assert (
        0.05 < torch.cat([weight.flatten() != 0 for weight in stacks]).float().mean() < 0.4
    )  # of all matrices together a fifth
    for name, model in (("dense", dense), ("mixture", student)):
        save_packed(model, tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    batch = COLLATE(ROWS)
    assert torch.equal(load_model(tmp_path / "mixture")(**batch).logits, student(**batch).logits)

    size = measure_footprint(student, seq_len=8, folder=tmp_path / "mixture")
    experts = sum(
        x.numel() for network in student.base_model.networks().values() for x in network.experts.parameters()
    )
    assert size.active == size.total - experts // 2
    assert size.nonzero < size.total / 2

    sources = {name: str(tmp_path / name) for name in ("dense", "mixture")}
    quick = {"latency": Latency(seq=8, rounds=2), "columns": TextColumns(max_length=8)}
    told = measure(sources, Dataset.from_list(EXAMPLES), baseline="dense", optimized=["float32"], **quick)["models"]
    assert told["mixture"]["footprint"]["active"] == size.active
    assert told["mixture, float32"]["scores"] == told["mixture"]["scores"]
