"""Cut a small language model out of a large one: its first layers, and the first byte pairs of its tokenizer.

    python benchmarks/studies/slice_language_model.py --smoke --output_dir build/slice
    python benchmarks/studies/slice_language_model.py --model_name_or_path Qwen/Qwen2.5-0.5B --num_layers 4 \
        --vocab_size 16000 --output_dir build/qwen-slice

Byte pairs are learned in the order of their use, so the first of them are a tokenizer too: one that reads any text, in
more pieces. What is cut out says little at first, and is a start for further training on a small machine. For decoders
with the layers at `model.layers` (Llama, Mistral, Qwen2, Qwen3 and others) and byte pairs on the level of bytes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from language_task import END, train_tokenizer
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


@dataclass
class SliceArguments:
    """The model, and the part that is cut out of it."""

    output_dir: Path = field(metadata={"help": "Folder for model and tokenizer."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Decoder: Hub id or folder."})
    gguf_file: str | None = field(default=None, metadata={"help": "The file in there, if it is a GGUF file."})
    num_layers: int = field(default=4, metadata={"help": "Layers that stay, the first."})
    vocab_size: int = field(default=16000, metadata={"help": "Tokens that stay: all bytes, pairs, the end of text."})
    smoke: bool = field(default=False, metadata={"help": "Cut up a tiny random model, offline."})


def slice_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Keep the bytes, the first byte pairs and, as the last token, the end of text.

    Args:
        tokenizer: A fast tokenizer of byte pairs on the level of bytes.
        vocab_size: Tokens to keep, at least 257.

    Returns:
        The tokenizer, and the old id of each of its tokens.

    Raises:
        ValueError: If the tokenizer is of another kind, or `vocab_size` is too small or too large for it.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    old, merges = whole["model"]["vocab"], whole["model"].get("merges", [])
    alphabet = ByteLevel.alphabet()
    if whole["model"]["type"] != "BPE" or not set(alphabet) <= set(old):
        raise ValueError(
            f"The tokenizer must use byte pairs on the level of bytes, got {whole['model']['type']} tokens of "
            f"{type(tokenizer).__name__}. Choose a model such as Qwen2 or Llama 3."
        )
    pairs = ["".join(pair) for pair in merges]
    if not 257 <= vocab_size <= len(set(pairs)) + 257:
        raise ValueError(
            f"`vocab_size` must be in [257, {len(set(pairs)) + 257}], got {vocab_size}. "
            "Use 16000 for a small model that still reads whole words."
        )
    tokens = list(dict.fromkeys([*sorted(alphabet, key=old.__getitem__), *pairs]))[: vocab_size - 1]
    kept = set(tokens)
    whole["model"] |= {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [pair for pair, token in zip(merges, pairs, strict=True) if token in kept],
    }
    whole |= {"post_processor": None, "added_tokens": []}  # a template would add tokens that are gone
    # some classes of tokenizers have an unknown token, and would add their own
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), tokenizer.eos_token)
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), **special)
    return small, [*(old[token] for token in tokens), tokenizer.eos_token_id]


def slice_config(config: PretrainedConfig, *, num_layers: int, vocab_size: int) -> PretrainedConfig:
    """Describe the first layers of a model with fewer tokens, the last of which ends a text."""
    fields, layers = config.to_dict(), config.num_hidden_layers
    if not 1 <= num_layers <= layers:
        raise ValueError(f"`num_layers` must be in [1, {layers}], got {num_layers}. Use 4 for a small model.")
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == layers:  # such as the kind of attention of each layer
            fields[name] = value[:num_layers]
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocab_size - 1)
    fields |= {"num_hidden_layers": num_layers, "vocab_size": vocab_size}
    fields.pop("quantization_config", None)
    return type(config).from_dict(fields)


def slice_model(model: PreTrainedModel, rows: list[int], num_layers: int) -> PreTrainedModel:
    """Copy the first layers, and these rows of the embeddings and the head.

    Args:
        model: A decoder with a language modelling head.
        rows: The old id of each token that stays; the last is the end of text.
        num_layers: Layers that stay.

    Raises:
        ValueError: If the model is of another kind, or has fewer layers.
    """
    if not hasattr(model.base_model, "layers") or model.base_model_prefix != "model":
        raise ValueError(
            f"The model must have its layers at model.layers, got {type(model).__name__}. "
            "Choose a decoder such as Llama, Mistral, Qwen2 or Qwen3."
        )
    small = type(model)(slice_config(model.config, num_layers=num_layers, vocab_size=len(rows)))
    vocabulary = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    values = dict(model.named_parameters(remove_duplicate=False))
    state = {name: values[name] for name, _ in small.named_parameters(remove_duplicate=False)}
    small.load_state_dict({name: value[rows] if id(value) in vocabulary else value for name, value in state.items()})
    return small.eval()


def make_smoke_model(folder: Path) -> None:
    """Save a tiny random Llama, and a tokenizer that learned from a few sentences."""
    tokenizer = train_tokenizer("".join(f"The cat number {n} saw {n * n} mice.\n" for n in range(200)), 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read, cut, save, and show that what was saved reads and writes."""
    (arguments,) = HfArgumentParser(SliceArguments).parse_args_into_dataclasses()
    if arguments.smoke:
        arguments.model_name_or_path = str(arguments.output_dir / "whole")
        arguments.num_layers, arguments.vocab_size = 2, 300
        make_smoke_model(arguments.output_dir / "whole")
    packed = {} if arguments.gguf_file is None else {"gguf_file": arguments.gguf_file}
    plain = {"quantization_config": GgufConfig(dequantize=True)} if packed else {}
    whole = AutoTokenizer.from_pretrained(arguments.model_name_or_path, **packed)
    tokenizer, rows = slice_tokenizer(whole, arguments.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32", **packed, **plain)
    slice_model(model, rows, arguments.num_layers).save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)

    model = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    prompt = tokenizer("The history of", return_tensors="pt")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens: {arguments.output_dir}")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))


if __name__ == "__main__":
    main()
