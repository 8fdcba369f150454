"""Leave the tokens and layers of an encoder out that a corpus does not need: no labels, no training.

python examples/trimming.py --output_dir build/trimming
python examples/trimming.py --keep_layers 8 --output_dir build/trimming
"""

import argparse

from datasets import load_dataset
from transformers import AutoModel, AutoTokenizer

from hf_moebert import drop_layers, trim_vocabulary
from hf_moebert.methods.trimming import compare_splitting


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default="intfloat/multilingual-e5-small", help="any encoder")
parser.add_argument("--dataset_name", default="nyu-mll/glue", help="with a column of texts, as the model is used for")
parser.add_argument("--dataset_config_name", default="sst2")
parser.add_argument("--text_column", default="sentence")
parser.add_argument("--prefix", default="", help="what the model wants every text to begin with, such as 'query: '")
parser.add_argument("--coverage", type=float, default=1.0, help="share of the tokens of the corpus that stay")
parser.add_argument("--keep_layers", type=int, help="how many layers stay; by default all")
parser.add_argument("--output_dir", required=True)
options = parser.parse_args()

model = AutoModel.from_pretrained(options.model_name_or_path)
tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
data = load_dataset(options.dataset_name, options.dataset_config_name)
texts = [options.prefix + text for text in data["train"][options.text_column]]
held_out = [options.prefix + text for text in data["validation"][options.text_column]]

small, small_tokenizer = trim_vocabulary(model, tokenizer, texts, coverage=options.coverage)
if options.keep_layers is not None:
    small = drop_layers(small, options.keep_layers, texts[:128], small_tokenizer, by="importance")
small.save_pretrained(options.output_dir)
small_tokenizer.save_pretrained(options.output_dir)

split = compare_splitting(tokenizer, small_tokenizer, held_out)
print(f"{model.num_parameters():,} -> {small.num_parameters():,} parameters", end=", ")
print(f"{len(tokenizer):,} -> {len(small_tokenizer):,} tokens", end=", ")
print(f"{split.tokens_per_word:.3f} -> {split.trimmed_tokens_per_word:.3f} tokens per word of held-out texts")
