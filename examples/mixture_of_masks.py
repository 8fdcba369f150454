"""Learn which units of the feed-forward networks of a language model to keep, then remove the others.

python examples/mixture_of_masks.py --train_file text.txt --output_dir build/masks
python examples/mixture_of_masks.py --model_name_or_path openai-community/gpt2 --num_experts 4 --output_dir build/masks
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_moebert import DistillationConfig, DistillationTrainer, MaskSparsityCallback, MaskSparsityConfig, shrink
from hf_moebert.architectures.importance import measure_importance
from hf_moebert.methods.mixture_of_masks import from_dense


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="Qwen/Qwen2.5-0.5B", help="a Llama, Mistral, Qwen2, Qwen3, GPT-2")
parser.add_argument("--dataset_name", default="Salesforce/wikitext", help="with a column `text`")
parser.add_argument("--dataset_config_name", default="wikitext-2-raw-v1")
parser.add_argument("--train_file", help="a text file instead of a data set")
parser.add_argument("--num_experts", type=int, default=1, help="masks per block; tokens are routed if above 1")
parser.add_argument("--keep_ratio", type=float, default=0.5, help="share of the units that a token uses")
parser.add_argument("--block_size", type=int, default=128, help="tokens of an example")
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--max_steps", type=int, default=300, help="the first of them learn masks")
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

arguments = TrainingArguments(
    options.output_dir, max_steps=options.max_steps, learning_rate=options.learning_rate, save_strategy="no"
)
dense = AutoModelForCausalLM.from_pretrained(options.model_name_or_path)
importance = measure_importance(dense, train, batch_size=4, max_examples=512)
model = from_dense(dense, num_experts=options.num_experts, importance=importance)  # still the dense model
sparsity = MaskSparsityCallback(MaskSparsityConfig(keep_ratio=options.keep_ratio))
optimizers = (sparsity.make_optimizer(model, arguments), None)
teaching = {"teacher": dense, "distillation": DistillationConfig(hidden_states=False)}
DistillationTrainer(
    model, arguments, train_dataset=train, callbacks=[sparsity], optimizers=optimizers, **teaching
).train()

small = shrink(model.fix_masks(options.keep_ratio))
small.save_pretrained(options.output_dir)
tokenizer.save_pretrained(options.output_dir)

reloaded = AutoModelForCausalLM.from_pretrained(options.output_dir)
loss = Trainer(reloaded, arguments).evaluate([validation])["eval_loss"]
print(f"{model.num_parameters():,} -> {reloaded.num_parameters():,} parameters, loss of the last block {loss:.3f}")
