"""Prune neurons and attention heads while a text classifier is fine-tuned, then remove them.

python examples/platon.py --output_dir build/platon
python examples/platon.py --model_name_or_path distilbert/distilbert-base-uncased --output_dir build/platon
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_moebert import PlatonConfig, PlatonPruningCallback, shrink


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="google-bert/bert-base-uncased", help="any encoder of the table")
parser.add_argument("--dataset_name", default="nyu-mll/glue", help="with columns of texts and of labels")
parser.add_argument("--dataset_config_name", default="sst2")
parser.add_argument("--text_column", default="sentence")
parser.add_argument("--keep_ratio", type=float, default=0.5, help="share of the units' weights that is kept")
parser.add_argument("--learning_rate", type=float, default=5e-5)
parser.add_argument("--max_steps", type=int, default=2000)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
data = load_dataset(options.dataset_name, options.dataset_config_name)
data = data.map(lambda rows: tokenizer(rows[options.text_column], truncation=True), batched=True)
model = AutoModelForSequenceClassification.from_pretrained(
    options.model_name_or_path, num_labels=len(data["train"].unique("label"))
)

arguments = TrainingArguments(
    options.output_dir,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    per_device_train_batch_size=32,
    save_strategy="no",
    report_to="none",
)
collator = DataCollatorWithPadding(tokenizer)
pruning = PlatonPruningCallback(PlatonConfig(keep_ratio=options.keep_ratio, granularity="structured"))
Trainer(model, arguments, collator, data["train"], callbacks=[pruning]).train()

small = shrink(model, multiple_of=8)  # the pruned units are zero: now they are gone
small.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)

reloaded = AutoModelForSequenceClassification.from_pretrained(options.output_dir)
predictions = Trainer(reloaded, arguments, collator).predict(data["validation"])
accuracy = (predictions.predictions.argmax(-1) == predictions.label_ids).mean()
print(f"{model.num_parameters():,} -> {reloaded.num_parameters():,} parameters, accuracy {accuracy:.3f}")
