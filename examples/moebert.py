"""Cut a fine-tuned BERT into experts, let it follow its teacher, save it, reload it, and run it in int8.

    python examples/moebert.py --model textattack/bert-base-uncased-SST-2 --dataset nyu-mll/glue --config sst2 \
        --text_column sentence --output_dir build/moebert

The accuracy is that of the reloaded model on the validation split.
"""

import argparse
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    pipeline,
)

from hf_moebert import DistillationTrainer, measure_importance, optimize_for_inference
from hf_moebert.data import encode_text, load_splits
from hf_moebert.methods.moebert import from_dense


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="A fine-tuned BERT classifier: name on the Hub, or folder.")
parser.add_argument("--dataset", required=True, help="Name on the Hub, or a .jsonl, .csv, .tsv or .parquet file.")
parser.add_argument("--config", help="Configuration of the data set on the Hub.")
parser.add_argument("--text_column", default="text")
parser.add_argument("--label_column", default="label")
parser.add_argument("--num_experts", type=int, default=4)
parser.add_argument("--max_steps", type=int, default=-1, help="Optimizer steps; by default three epochs.")
parser.add_argument("--output_dir", required=True)
args = parser.parse_args()

teacher = AutoModelForSequenceClassification.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
source = {"train_file": args.dataset} if Path(args.dataset).is_file() else {"dataset_name": args.dataset}
splits = load_splits(**source, dataset_config_name=args.config, label_column=args.label_column)
labels = [teacher.config.id2label[index] for index in range(teacher.config.num_labels)]
columns = {"text_column": args.text_column, "label_column": args.label_column}
data = encode_text(splits, tokenizer, label_names=labels, **columns)

collator = DataCollatorWithPadding(tokenizer)
importance = measure_importance(teacher, data["train"], collator, max_examples=2048)  # (layers, intermediate)
student = from_dense(teacher, importance, num_experts=args.num_experts)
training = TrainingArguments(args.output_dir, max_steps=args.max_steps)
trainer = DistillationTrainer(student, training, collator, data["train"], teacher=teacher, processing_class=tokenizer)
trainer.train()
trainer.save_model()

reloaded = AutoModelForSequenceClassification.from_pretrained(args.output_dir)
optimize_for_inference(reloaded, precision="int8")
classify = pipeline("text-classification", reloaded, tokenizer=tokenizer, device="cpu")
answers = classify(splits["validation"][args.text_column][:], batch_size=32, truncation=True)
hits = [labels.index(x["label"]) == y for x, y in zip(answers, data["validation"]["labels"], strict=True)]
print(f"Accuracy of {args.num_experts} experts in int8: {sum(hits) / len(hits):.4f} on {len(hits)} texts.")
