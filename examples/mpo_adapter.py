"""Fine-tune only the auxiliary tensors of an encoder's matrices, as an adapter of PEFT.

python examples/mpo_adapter.py --output_dir build/adapter
python examples/mpo_adapter.py --model_name_or_path FacebookAI/roberta-base --bond 16 --output_dir build/adapter
"""

import argparse

from datasets import load_dataset
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_moebert import MPOConfig


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="google-bert/bert-base-uncased", help="any encoder")
parser.add_argument("--dataset_name", default="nyu-mll/glue", help="with columns of texts and of labels")
parser.add_argument("--dataset_config_name", default="sst2")
parser.add_argument("--text_column", default="sentence")
parser.add_argument("--bond", type=int, help="largest bond between two tensors; by default all of a matrix is adapted")
parser.add_argument("--learning_rate", type=float, default=2e-4)
parser.add_argument("--max_steps", type=int, default=2000)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
data = load_dataset(options.dataset_name, options.dataset_config_name)
data = data.map(lambda rows: tokenizer(rows[options.text_column], truncation=True), batched=True)
num_labels = len(data["train"].unique("label"))
base = AutoModelForSequenceClassification.from_pretrained(options.model_name_or_path, num_labels=num_labels)

model = get_peft_model(base, MPOConfig(bond=options.bond, task_type="SEQ_CLS"))  # which trains and saves the head, too
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

reloaded = AutoPeftModelForSequenceClassification.from_pretrained(options.output_dir, num_labels=num_labels)
predictions = Trainer(reloaded, arguments, collator).predict(data["validation"])
accuracy = (predictions.predictions.argmax(-1) == predictions.label_ids).mean()
trained, total = model.get_nb_trainable_parameters()
print(f"{trained:,} of {total:,} parameters trained, accuracy {accuracy:.3f}")
