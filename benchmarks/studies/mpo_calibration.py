"""Make an encoder smaller without any training, by forms that know its inputs and by forms that do not.

    python benchmarks/studies/mpo_calibration.py --smoke --output_dir build/mpo-calibration-smoke
    python benchmarks/studies/mpo_calibration.py --model_name_or_path ENCODER --train_file train.jsonl \
        --validation_file validation.jsonl --output_dir build/mpo-calibration

Texts of the training file calibrate, others judge: by the error of the outputs of every linear layer on the inputs of
the dense model, relative to their norm, in the mean over the layers; by the error of the table, each row weighted by
its use; and by the cosine between the mean-pooled embeddings of the dense and of the smaller model. A form that is
there already is not made again.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from smoke import make_smoke_texts
from tasks import TextArguments, draw, read_splits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedModel

from hf_moebert import compress_mpo, to_dense
from hf_moebert.measuring.latency import environment
from hf_moebert.methods.mpo.conversion import find_matrices
from hf_moebert.methods.mpo.conversion_calibration import Statistics, measure_inputs
from hf_moebert.methods.mpo.functional_calibration import output_error
from hf_moebert.reporting.tables import markdown_table


FORMS: dict[str, dict[str, Any]] = {
    "two factors": {"num_cores": 2},
    "chains of 5": {"num_cores": 5},
    "two factors, calibrated": {"num_cores": 2},
    "chains of 3, calibrated": {"num_cores": 3},
    "chains of 5, calibrated": {"num_cores": 5},
    "chain for the table, two factors, calibrated": {"num_cores": 2, "table_cores": 5},
    "two factors for the table, chains of 5, calibrated": {"num_cores": 5, "table_cores": 2},
}


@dataclass
class CalibrationOptions:
    """What is made, and on how many texts."""

    output_dir: str = field(metadata={"help": "Folder of the results."})
    forms: list[str] = field(default_factory=lambda: list(FORMS), metadata={"help": "Rows of the table."})
    keep_ratio: float = field(default=0.5, metadata={"help": "Share of the parameters that is kept."})
    texts: int = field(default=2000, metadata={"help": "Training texts that calibrate."})
    held_out: int = field(default=300, metadata={"help": "Validation texts that judge."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    seed: int = field(default=0, metadata={"help": "Of the texts that are drawn."})

    def __post_init__(self) -> None:
        if unknown := set(self.forms) - FORMS.keys():
            raise ValueError(f"`forms` must be among {list(FORMS)}, got {sorted(unknown)}.")


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the mean-pooled embeddings, `(texts, hidden)`, of length 1."""
    rows = []
    for start in range(0, len(texts), 50):
        batch = tokenizer(
            texts[start : start + 50], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        real = batch["attention_mask"].unsqueeze(-1).to(model.dtype)  # (batch, seq, 1)
        rows.append((model(**batch).last_hidden_state * real).sum(1) / real.sum(1))
    return F.normalize(torch.cat(rows), dim=-1)


def judge(model: PreTrainedModel, smaller: PreTrainedModel, held_out: Statistics) -> dict[str, float]:
    """Return the mean error of the outputs of layers, by kind, and that of tables."""
    errors: dict[str, list[float]] = {}
    for path, moments in held_out.moments.items():
        found = output_error(model.get_submodule(path).weight, smaller.get_submodule(path).weight, moments)
        if "pooler" not in path:
            for kind in ("all layers", kind_of(model.get_submodule(path))):
                errors.setdefault(kind, []).append(found)
    for path, counts in held_out.counts.items():
        root = counts.double().sqrt().unsqueeze(1)
        weights = [root * m.get_submodule(path).weight.double() for m in (model, smaller)]
        errors["table"] = [output_error(*weights, torch.eye(weights[0].shape[1]))]
    return {kind: sum(values) / len(values) for kind, values in errors.items()}


def kind_of(layer: nn.Module) -> str:
    """Tell the layers of a block apart by their shape."""
    rows, columns = layer.weight.shape
    return "attention" if rows == columns else "up" if rows > columns else "down"


def main() -> None:
    """Make the forms that are missing, then the table."""
    arguments, options = HfArgumentParser((TextArguments, CalibrationOptions)).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    output = Path(options.output_dir)
    if arguments.smoke:
        make_smoke_texts(arguments, output / "inputs")
    splits = read_splits(arguments, label_column=arguments.label_column, seed=options.seed)
    texts, judges = (
        draw(splits[name], count, seed=options.seed)[arguments.text_column][:]
        for name, count in (("train", options.texts), ("validation", options.held_out))
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModel.from_pretrained(arguments.model_name_or_path).eval()
    held_out = measure_inputs(model, find_matrices(model), judges, tokenizer)
    expected = embed(model, tokenizer, judges)
    rows = []
    for form in options.forms:
        file = output / f"{form}.json".replace(" ", "-")
        if not file.exists():
            known = {"calibration": texts, "tokenizer": tokenizer} if "calibrated" in form else {}
            start = time.process_time()
            compressed = compress_mpo(model, keep_ratio=options.keep_ratio, **FORMS[form], **known)
            seconds = time.process_time() - start
            size = sum(p.numel() for p in compressed.parameters()) / model.num_parameters()
            found = judge(model, to_dense(compressed), held_out)
            found["cosine"] = float((embed(compressed.eval(), tokenizer, judges) * expected).sum(1).mean())
            result = {"form": form, "size": size, **found, "cpu seconds": seconds}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")
        rows.append(json.loads(file.read_text()))
        print(rows[-1], flush=True)
    cells = [{key: x if isinstance(x, str) else f"{x:.3f}" for key, x in row.items()} for row in rows]
    report = f"{markdown_table(cells)}\n\n{json.dumps(environment())}\n"
    (output / "report.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
