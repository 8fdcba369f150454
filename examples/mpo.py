"""Compress a text classifier to a share of its parameters by matrix product operators, and let it recover.

python examples/mpo.py --output_dir build/mpo
python examples/mpo.py --model_name_or_path FacebookAI/roberta-base --keep_ratio 0.7 --output_dir build/mpo
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

from hf_moebert import compress_mpo, to_dense


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="textattack/bert-base-uncased-SST-2", help="any classifier")
parser.add_argument("--dataset_name", default="nyu-mll/glue", help="with columns of texts and of labels")
parser.add_argument("--dataset_config_name", default="sst2")
parser.add_argument("--text_column", default="sentence")
parser.add_argument("--keep_ratio", type=float, default=0.5, help="share of the matrices' parameters that is kept")
parser.add_argument("--learning_rate", type=float, default=5e-5)
parser.add_argument("--max_steps", type=int, default=2000)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
data = load_dataset(options.dataset_name, options.dataset_config_name)
data = data.map(lambda rows: tokenizer(rows[options.text_column], truncation=True), batched=True)
dense = AutoModelForSequenceClassification.from_pretrained(options.model_name_or_path)

model = compress_mpo(dense, keep_ratio=options.keep_ratio, train_centre=True)  # to recover, all cores have to train
arguments = TrainingArguments(
    options.output_dir,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    per_device_train_batch_size=32,
    save_strategy="no",
    report_to="none",
)
collator = DataCollatorWithPadding(tokenizer)
Trainer(model, arguments, collator, data["train"]).train()
model.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)

reloaded = AutoModelForSequenceClassification.from_pretrained(options.output_dir)
to_dense(reloaded).save_pretrained(f"{options.output_dir}/dense")  # for those without this package: as large as before
predictions = Trainer(reloaded, arguments, collator).predict(data["validation"])
accuracy = (predictions.predictions.argmax(-1) == predictions.label_ids).mean()
print(f"{dense.num_parameters():,} -> {reloaded.num_parameters():,} parameters, accuracy {accuracy:.3f}")
