"""Inputs of `--smoke` runs: tiny random encoders, and made-up texts that tell their labels by single words."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tasks import TaggingArguments, TextArguments
from transformers import BertConfig, BertModel, BertTokenizer, set_seed


WORDS = ["good", "bad", "film", "book", "meal", "this", "was", "a", "very", "day"]
NAMES = {"person": ["ada", "ada king", "alan turing", "grace"], "place": ["london", "new york", "rome"]}
FRAMES = ["{person} was in {place}", "in {place} {person} met {person}", "{place} is far from {place}", "it was far"]


def make_tiny_encoder(folder: Path, words: Sequence[str]) -> None:
    """Make a random encoder that knows these words only, for a run of seconds without a network."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate([*special, *words])})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, name: str, rows: Sequence[dict]) -> str:
    """Write JSON lines, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_texts(random: Random, size: int) -> list[list[str]]:
    """Make up texts of six words, the last of which, good or bad, is the label."""
    return [random.choices(WORDS[2:], k=5) + [word] for word in WORDS[:2] * (size // 2)]


def make_smoke_texts(arguments: TextArguments, folder: Path) -> None:
    """Make up labelled texts, and an encoder that knows their words."""
    make_tiny_encoder(folder, WORDS)
    arguments.model_name_or_path = str(folder)
    arguments.text_column, arguments.label_column = "text", "label"
    random = Random(0)
    for name, size in (("train_file", 64), ("validation_file", 32)):
        rows = [{"text": " ".join(text), "label": text[-1]} for text in make_texts(random, size)]
        setattr(arguments, name, write_rows(folder, name, rows))


def make_sentence(random: Random) -> dict[str, list[str]]:
    """Make up a sentence of persons and places, tagged in IOB2."""
    tokens, tags = [], []
    for word in random.choice(FRAMES).split():
        kind = word.strip("{}")
        name = random.choice(NAMES[kind]).split() if kind in NAMES else [word]
        tokens += name
        tags += [f"B-{kind}"] + [f"I-{kind}"] * (len(name) - 1) if kind in NAMES else ["O"]
    return {"tokens": tokens, "tags": tags}


def make_smoke_tags(arguments: TaggingArguments, folder: Path) -> None:
    """Make up tagged sentences, and an encoder that knows their words."""
    random = Random(0)
    for name, size in (("train_file", 64), ("validation_file", 32)):
        setattr(arguments, name, write_rows(folder, name, [make_sentence(random) for _ in range(size)]))
    texts = [*FRAMES, *(name for names in NAMES.values() for name in names)]
    make_tiny_encoder(folder, sorted({word for text in texts for word in text.split() if "{" not in word}))
    arguments.model_name_or_path, arguments.held_out = str(folder), 16


def make_smoke_tasks(folder: Path) -> tuple[str, str]:
    """Make an encoder and a task of each kind, told by single words; return encoder and tasks.json."""
    set_seed(0)  # the same encoder when the command is run again
    make_tiny_encoder(folder / "encoder", WORDS)
    random, things = Random(0), ("film", "book", "meal")
    tasks: dict[str, dict[str, str]] = {
        "mood": {"kind": "classification"},
        "stars": {"kind": "regression"},
        "things": {"kind": "tagging"},
        "things-crf": {"kind": "crf_tagging"},
    }
    for split, size in (("train_file", 60), ("validation_file", 24)):
        rows: dict[str, list[dict]] = {"mood": [], "stars": [], "things": []}
        for words in make_texts(random, size):
            text = " ".join(words)
            rows["mood"].append({"text": text, "label": words[-1]})
            stars = 1.0 + (words[-1] == "good") + 0.1 * words.count("very")
            rows["stars"].append({"text": text, "label": stars})
            tags = ["B-thing" if word in things else "O" for word in words]
            rows["things"].append({"tokens": words, "tags": tags})
        for name, of_task in rows.items():
            tasks[name][split] = write_rows(folder, f"{name}_{split}", of_task)
        tasks["things-crf"][split] = tasks["things"][split]
    file = folder / "tasks.json"
    file.write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")
    return str(folder / "encoder"), str(file)
