"""Turn the feed-forward networks of GPT-2 into experts that share their central tensors, and train them.

python examples/mpoe.py --output_dir build/mpoe
python examples/mpoe.py --train_file text.txt --num_experts 8 --router switch --output_dir build/mpoe
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_moebert import MPOEGradientMaskCallback, MPOEGradientMaskConfig
from hf_moebert.methods.mpoe import from_dense


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="openai-community/gpt2", help="a GPT-2")
parser.add_argument("--dataset_name", default="Salesforce/wikitext", help="with a column `text`")
parser.add_argument("--dataset_config_name", default="wikitext-2-raw-v1")
parser.add_argument("--train_file", help="a text file instead of a data set")
parser.add_argument("--num_experts", type=int, default=4)
parser.add_argument("--router", default="reference", help="`reference`, or `switch` with a balance loss")
parser.add_argument("--keep", type=float, help="probability that a central tensor is updated; by default 1 / experts")
parser.add_argument("--block_size", type=int, default=128, help="tokens of an example")
parser.add_argument("--learning_rate", type=float, default=3e-4)
parser.add_argument("--max_steps", type=int, default=300)
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

if options.train_file:
    text = Path(options.train_file).read_text(encoding="utf-8")
else:
    text = "\n".join(load_dataset(options.dataset_name, options.dataset_config_name)["train"]["text"])
tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
tokens = torch.tensor(tokenizer(text).input_ids)
blocks = tokens[: len(tokens) // options.block_size * options.block_size].view(-1, options.block_size)
*train, validation = [{"input_ids": block, "labels": block} for block in blocks]

dense = AutoModelForCausalLM.from_pretrained(options.model_name_or_path)
model = from_dense(dense, num_experts=options.num_experts, router=options.router)  # at first it computes the same
arguments = TrainingArguments(
    options.output_dir,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    save_strategy="no",
    report_to="none",
)
mask = MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=options.keep))
Trainer(model, arguments, train_dataset=train, callbacks=[mask]).train()
model.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)

reloaded = AutoModelForCausalLM.from_pretrained(options.output_dir)
loss = Trainer(reloaded, arguments).evaluate([validation])["eval_loss"]
print(f"{dense.num_parameters():,} -> {reloaded.num_parameters():,} parameters, loss of the last block {loss:.3f}")
