"""Give a fine-tuned encoder half of its layers, let it follow its teacher, save it, reload it, and evaluate it.

    python examples/distillation.py --model textattack/bert-base-uncased-SST-2 --dataset nyu-mll/glue --config sst2 \
        --text_column sentence --output_dir build/half

The accuracy is that of the reloaded model on the validation split.
"""

import argparse
import copy
import re
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, pipeline

from hf_moebert import DistillationConfig, DistillationTrainer
from hf_moebert.data import encode_text, load_splits


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="A fine-tuned text classifier: name on the Hub, or folder.")
parser.add_argument("--dataset", required=True, help="Name on the Hub, or a .jsonl, .csv, .tsv or .parquet file.")
parser.add_argument("--config", help="Configuration of the data set on the Hub.")
parser.add_argument("--text_column", default="text")
parser.add_argument("--label_column", default="label")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output_dir", required=True)
args = parser.parse_args()

teacher = AutoModelForSequenceClassification.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
source = {"train_file": args.dataset} if Path(args.dataset).is_file() else {"dataset_name": args.dataset}
splits = load_splits(**source, dataset_config_name=args.config, label_column=args.label_column)
labels = [teacher.config.id2label[index] for index in range(teacher.config.num_labels)]
columns = {"text_column": args.text_column, "label_column": args.label_column}
data = encode_text(splits, tokenizer, label_names=labels, **columns)

config = copy.deepcopy(teacher.config)
layers = list(range(2, config.num_hidden_layers + 1, 2))  # every second layer, counted from 1
config.num_hidden_layers = len(layers)
student = AutoModelForSequenceClassification.from_config(config)
weights = teacher.state_dict()
for name, tensor in student.state_dict().items():  # layer 0 of the student is layer 1 of the teacher, layer 1 layer 3
    source = re.sub(r"\.(layers?)\.(\d+)\.", lambda match: f".{match[1]}.{2 * int(match[2]) + 1}.", name)
    tensor.copy_(weights[source])

training = TrainingArguments(args.output_dir, num_train_epochs=args.epochs)
recipe = DistillationConfig(layer_map=layers)
teaching = {"teacher": teacher, "distillation": recipe, "processing_class": tokenizer}
trainer = DistillationTrainer(student, training, train_dataset=data["train"], **teaching)
trainer.train()
trainer.save_model()

reloaded = AutoModelForSequenceClassification.from_pretrained(args.output_dir)
classify = pipeline("text-classification", reloaded, tokenizer=tokenizer)
answers = classify(splits["validation"][args.text_column][:], batch_size=32, truncation=True)
hits = [labels.index(x["label"]) == y for x, y in zip(answers, data["validation"]["labels"], strict=True)]
print(f"Accuracy of {len(layers)} layers: {sum(hits) / len(hits):.4f} on {len(hits)} texts.")
