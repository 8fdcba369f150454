"""Fine-tune a tagger with a CRF that cannot emit an illegal tag sequence.

python examples/masked_crf.py --output_dir build/masked_crf [--model_name_or_path FacebookAI/roberta-base]
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_moebert.data import encode_tokens, tag_names_of
from hf_moebert.methods.masked_crf import from_dense


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="google-bert/bert-base-cased", help="any encoder that reads text")
parser.add_argument("--dataset_name", default="lhoestq/conll2003", help="with columns of lists of words and of tags")
parser.add_argument("--tokens_column", default="tokens")
parser.add_argument("--tags_column", default="ner_tags")
parser.add_argument("--learning_rate", type=float, default=5e-5)
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path, add_prefix_space=True)  # for lists of words
data = load_dataset(options.dataset_name)
tags = tag_names_of(data["train"], options.tags_column)
columns = {"tokens_column": options.tokens_column, "tags_column": options.tags_column}
encoded = encode_tokens(data, tokenizer, tag_names=tags, **columns)
names = {"id2label": dict(enumerate(tags)), "label2id": {tag: index for index, tag in enumerate(tags)}}
dense = AutoModelForTokenClassification.from_pretrained(options.model_name_or_path, **names)

model = from_dense(dense, mask_transitions="training", labels=encoded["train"]["labels"])
arguments = TrainingArguments(
    options.output_dir,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    per_device_train_batch_size=32,
    save_strategy="no",
    report_to="none",
)
collator = DataCollatorForTokenClassification(tokenizer)
Trainer(model, arguments, collator, encoded["train"]).train()
model.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)

reloaded = AutoModelForTokenClassification.from_pretrained(options.output_dir)
predicted = Trainer(reloaded, arguments, collator).predict(encoded["validation"])
right = (predicted.predictions == predicted.label_ids)[predicted.label_ids != -100]
text = " ".join(data["validation"][0][options.tokens_column])
tagger = pipeline("masked-crf", model=options.output_dir, aggregation_strategy="simple")
print(f"accuracy {right.mean():.3f} over {len(right):,} words; {text!r}: {tagger(text)}")
