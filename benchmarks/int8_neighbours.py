"""Compare int8 sentence embeddings with float32, and those of a text alone with those of the same text in a batch.

    python benchmarks/int8_neighbours.py --model_name_or_path ENCODER --texts texts.jsonl

Embeddings are the mean over real tokens, of length one. The first texts of the file are taken, in batches padded to
the longest, on one thread. With `--graphs`, int8 is that of an export.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from hf_moebert import load_onnx, optimize_for_inference
from hf_moebert.data import read_file
from hf_moebert.reporting.tables import markdown_table


@dataclass
class NeighboursArguments:
    """What is compared."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of an encoder."})
    texts: Path = field(metadata={"help": "File of texts."})
    text_column: str = field(default="text", metadata={"help": "Where they are in it."})
    graphs: Path | None = field(default=None, metadata={"help": "Folder of the encoder's export in int8."})
    count: int = field(default=1000, metadata={"help": "Texts that are compared with float32."})
    alone: int = field(default=200, metadata={"help": "Texts that are also run alone."})
    batch_size: int = field(default=16, metadata={"help": "Texts in a batch."})


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> Tensor:
    """Embed texts, `(texts, hidden)`."""
    parts = []
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        batch = tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
        weights = batch["attention_mask"].unsqueeze(-1).float()  # (batch, seq, 1)
        parts.append(F.normalize((model(**batch)[0] * weights).sum(dim=1) / weights.sum(dim=1), dim=-1))
    return torch.cat(parts)


def main(args: NeighboursArguments) -> None:
    """Print one table."""
    torch.set_num_threads(1)
    texts = list(read_file(args.texts, argument="texts")[args.text_column][: args.count])
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModel.from_pretrained(args.model_name_or_path).eval()
    wanted = embed(optimize_for_inference(model), tokenizer, texts, args.batch_size)
    rough = (
        load_onnx(args.graphs, precision="int8") if args.graphs else optimize_for_inference(model, precision="int8")
    )
    found = embed(rough, tokenizer, texts, args.batch_size)
    alone = embed(rough, tokenizer, texts[: args.alone], 1)
    cosines, together = (wanted * found).sum(dim=1), found[: args.alone]
    row = {
        "texts": len(texts),
        "worst cosine to float32": f"{cosines.min():.5f}",
        "mean": f"{cosines.mean():.5f}",
        "run alone": len(alone),
        "equal to the last bit": int((alone == together).all(dim=1).sum()),
        "largest difference": f"{(alone - together).abs().max():.1e}",
    }
    print(markdown_table([row]))


if __name__ == "__main__":
    main(HfArgumentParser(NeighboursArguments).parse_args_into_dataclasses()[0])
