"""Compare the importance of neurons without labels with that by labels, on a classifier that is fine-tuned already.

    python benchmarks/studies/unlabelled_importance.py --smoke --output_dir build/importance-smoke
    python benchmarks/studies/unlabelled_importance.py --model_name_or_path CLASSIFIER --train_file sst2/train.jsonl \
        --max_length 64 --output_dir build/importance-sst2

`labels, other texts` is what the choice of texts changes by itself: importance by labels again, on as many others.
Numbers are Spearman's correlation of the neurons of a layer, and the share of the more important half of them that
both ways keep; means over the layers, and the layer where it is lowest.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy.stats import spearmanr
from smoke import make_smoke_texts
from study import command, write_report
from tasks import TextArguments
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

from hf_moebert import measure_importance
from hf_moebert.data import encode_text, label_names_of, read_file
from hf_moebert.measuring.latency import environment
from hf_moebert.reporting.tables import markdown_table


@dataclass
class ImportanceOptions:
    """What is measured."""

    output_dir: Path = field(metadata={"help": "Folder for report.md."})
    examples: int = field(default=512, metadata={"help": "Texts of each measurement."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of texts, and of what is drawn for each."})


def compare(name: str, one: Tensor, other: Tensor) -> dict[str, str]:
    """Compare two scores of neurons, `(layers, intermediate)` each."""
    ranks = torch.tensor([spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)])
    half = one.shape[1] // 2
    kept = [set(scores.argsort(descending=True)[:half].tolist()) for scores in (*one, *other)]
    shared = torch.tensor([len(a & b) / half for a, b in zip(kept[: len(one)], kept[len(one) :], strict=True)])
    row = {"against labels": name}
    for title, values in (("rank correlation", ranks), ("of the better half, shared", shared)):
        row |= {title: f"{values.mean():.3f}", f"{title}: lowest layer": f"{values.min():.3f}"}
    return row


def main() -> None:
    """Measure importance in three ways, and compare them."""
    parser = HfArgumentParser((TextArguments, ImportanceOptions))
    arguments, options = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_texts(arguments, options.output_dir / "inputs")
        options.examples = 8
    texts = read_file(arguments.train_file).shuffle(seed=options.seed)
    names = label_names_of(texts, arguments.label_column)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, **({"num_labels": len(names)} if arguments.smoke else {})
    )
    count = options.examples
    columns = {"text_column": arguments.text_column, "text_pair_column": arguments.text_pair_column}
    columns |= {"label_column": arguments.label_column, "label_names": names, "max_length": arguments.max_length}
    encoded = encode_text(texts.select(range(2 * count)), tokenizer, **columns)
    first, others = encoded.select(range(count)), encoded.select(range(count, 2 * count))
    collate = DataCollatorWithPadding(tokenizer)
    labelled = measure_importance(model, first, collate)
    rows = [
        compare("no labels", labelled, measure_importance(model, first, collate, labels=False, seed=options.seed)),
        compare("labels, other texts", labelled, measure_importance(model, others, collate)),
    ]
    table = markdown_table(rows)
    about = f"{count} texts, {model.config.num_labels} labels."
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = write_report(
        options.output_dir, "Importance without labels", [about, table], {"command": command()} | environment()
    )
    print(f"{about}\n\n{table}\n\nReport: {file}")


if __name__ == "__main__":
    main()
