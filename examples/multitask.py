"""Fine-tune one BERT for several tasks with its first layers frozen, and merge the tasks on one trunk.

python examples/multitask.py --output_dir build/multitask
python examples/multitask.py --tasks sst2 cola --frozen_layers 10 --output_dir build/multitask
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from hf_moebert import MultiTaskBertModel
from hf_moebert.data import encode_text, label_names_of
from hf_moebert.methods.multitask.functional import layers_run


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="google-bert/bert-base-uncased", help="a BERT")
parser.add_argument("--dataset_name", default="nyu-mll/glue", help="with columns of texts and of labels")
parser.add_argument("--tasks", nargs="+", default=["sst2", "cola"], help="configurations of the data set")
parser.add_argument("--text_column", default="sentence")
parser.add_argument("--frozen_layers", type=int, default=8, help="first layers that all tasks share")
parser.add_argument("--learning_rate", type=float, default=5e-5)
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
arguments = TrainingArguments(
    options.output_dir,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    per_device_train_batch_size=32,
    save_strategy="no",
    report_to="none",
)
models = {}
for task in options.tasks:
    examples = load_dataset(options.dataset_name, task)["train"]
    names = label_names_of(examples)
    encoded = encode_text(examples, tokenizer, text_column=options.text_column, label_names=names)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(options.model_name_or_path, **labels)
    for part in (model.bert.embeddings, *model.bert.encoder.layer[: options.frozen_layers]):
        part.requires_grad_(False)
    model.config.frozen_layers = options.frozen_layers  # merging checks that they are the same in all tasks
    Trainer(model, arguments, train_dataset=encoded, processing_class=tokenizer).train()
    models[task] = model

MultiTaskBertModel.from_tasks(models).save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)

answer = pipeline("multitask", model=options.output_dir)
text = examples[0][options.text_column]
before = sum(model.config.num_hidden_layers for model in models.values())
print(f"{before} -> {layers_run(answer.model.config.splits())} layers run; {text!r}: {answer(text)}")
