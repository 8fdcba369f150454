"""Leave tokens and layers of an embedder out, without training, and see what it is worth then.

    python benchmarks/studies/trimming.py --smoke
    python benchmarks/studies/trimming.py --model_name_or_path intfloat/multilingual-e5-small \
        --corpus sst2/train.jsonl stsb/train.jsonl --held_out sst2/validation.jsonl --pairs_file stsb/validation.jsonl

Files are of JSON lines: `text` (and `text_pair`, `label`, or `tokens`, which are joined). Embeddings are means over
real tokens; the score is Spearman's correlation of their cosines with the labels of the pairs.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from smoke import WORDS, make_tiny_encoder, write_rows
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from hf_moebert import drop_layers, trim_vocabulary
from hf_moebert.methods.trimming import choose_layers, compare_splitting


COLUMNS = ("text", "text_pair", "tokens")


@dataclass
class Options:
    """What is trimmed, and by which texts."""

    model_name_or_path: str = field(default="", metadata={"help": "An embedder."})
    corpus: list[str] = field(default_factory=list, metadata={"help": "Files of texts that name the tokens in use."})
    held_out: list[str] = field(default_factory=list, metadata={"help": "Files of texts that are split afterwards."})
    pairs_file: str | None = field(default=None, metadata={"help": "Pairs of texts with labels."})
    coverage: float = field(default=1.0, metadata={"help": "Share of the tokens of the corpus that stay."})
    layers: list[int] = field(default_factory=list, metadata={"help": "Numbers of layers to keep."})
    prefix: str = field(default="", metadata={"help": "What every text begins with, such as `query: `."})
    max_pairs: int | None = field(default=None, metadata={"help": "How many of the pairs are used."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model on made-up texts."})


def read_texts(files: list[str], prefix: str) -> list[str]:
    """Return all texts of files."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    texts = [row[name] if name != "tokens" else "".join(row[name]) for row in rows for name in row if name in COLUMNS]
    return [prefix + text for text in texts]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str], batch: int = 32) -> Tensor:
    """Return the mean of the last hidden states of each text, of length 1."""
    rows, order = [torch.empty(0)] * len(texts), sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([texts[index] for index in chosen], padding=True, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)  # (batch, hidden)
        for index, row in zip(chosen, torch.nn.functional.normalize(means), strict=True):
            rows[index] = row
    return torch.stack(rows)


def score(model: Any, tokenizer: Any, pairs: list[dict], prefix: str) -> float:
    """Return Spearman's correlation of cosines and labels."""
    first, second = (embed(model, tokenizer, [prefix + row[name] for row in pairs]) for name in COLUMNS[:2])
    return float(spearmanr((first * second).sum(1), [row["label"] for row in pairs]).statistic)


def count_bytes(model: Any, tokenizer: Any) -> int:
    """Return the bytes of model and tokenizer on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def study_vocabulary(model: Any, tokenizer: Any, options: Options, pairs: list[dict]) -> None:
    """Print a row for the whole vocabulary, and one for what a corpus leaves of it."""
    corpus, held_out = (read_texts(files, options.prefix) for files in (options.corpus, options.held_out))
    smaller, trimmed = trim_vocabulary(model, tokenizer, corpus, coverage=options.coverage)
    sample = corpus[:: max(len(corpus) // 200, 1)]
    moved = (embed(model, tokenizer, sample) - embed(smaller, trimmed, sample)).abs().max()
    split = compare_splitting(tokenizer, trimmed, held_out)
    print("| vocabulary | tokens | bytes | of whole | tokens per word, held out | split alike | Spearman |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    whole = count_bytes(model, tokenizer)
    for name, one, tokens, size, per_word in (
        ("whole", model, tokenizer, whole, split.tokens_per_word),
        ("trimmed", smaller, trimmed, count_bytes(smaller, trimmed), split.trimmed_tokens_per_word),
    ):
        same = 1 if name == "whole" else split.same_texts
        value = f"{score(one, tokens, pairs, options.prefix):.4f}" if pairs else ""
        sizes = f"{size / 1e6:.1f}MB | {size / whole:.3f}"
        print(f"| {name} | {len(tokens):,} | {sizes} | {per_word:.4f} | {same:.3f} | {value} |")
    print(f"largest difference of an embedding on {len(sample)} texts of the corpus: {float(moved):.1e}")


def study_layers(model: Any, tokenizer: Any, options: Options, pairs: list[dict]) -> None:
    """Print a row for each number of layers and each way to choose them."""
    texts = read_texts(options.corpus, options.prefix)
    texts = texts[:: max(len(texts) // 128, 1)][:128]
    print("| layers | kept by position | Spearman | kept by importance | Spearman |")
    print("|---:|---|---:|---|---:|")
    for keep in options.layers:
        cells = [str(keep)]
        for by in ("position", "importance"):
            kept = choose_layers(model, keep, texts, tokenizer, by=by)
            value = score(drop_layers(model, kept), tokenizer, pairs, options.prefix)
            cells += [", ".join(map(str, kept)), f"{value:.4f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def make_smoke(options: Options, folder: Path) -> None:
    """Fill in a tiny model and texts."""
    make_tiny_encoder(folder / "model", [*WORDS, *"bcdefghijklmnopqrstuvwxyz", "unused", "rare"])
    rows = [{"text": " ".join(WORDS[:size]), "text_pair": WORDS[size], "label": size} for size in range(1, 9)] * 5
    options.model_name_or_path, options.layers = str(folder / "model"), [2, 1]
    options.pairs_file = write_rows(folder, "pairs", rows)
    options.corpus = options.held_out = [options.pairs_file]


def main() -> None:
    """Read the options, and print the tables."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            make_smoke(options, Path(folder))
        model = AutoModel.from_pretrained(options.model_name_or_path).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
        lines = Path(options.pairs_file).read_text(encoding="utf-8").splitlines() if options.pairs_file else []
        pairs = [json.loads(line) for line in lines][: options.max_pairs]
        if options.held_out:
            study_vocabulary(model, tokenizer, options, pairs)
        study_layers(model, tokenizer, options, pairs)


if __name__ == "__main__":
    main()
