"""What a study of language models needs: text in blocks, models that continue it, and how well they do.

A decoder alone predicts every token of a block; an encoder-decoder reads its first half and predicts the second.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_moebert.mpoe.functional import expert_load


END = "<|endoftext|>"


@dataclass
class LanguageArguments:
    """What to start from, and where the text is."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "GPT-2 or T5: Hub id or folder."})
    from_scratch: bool = field(default=False, metadata={"help": "Train a tokenizer and a GPT-2 of these sizes first."})
    vocab_size: int = field(default=4000, metadata={"help": "Tokens, if from scratch."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of the network, if from scratch."})
    hidden_size: int = field(default=256, metadata={"help": "Width, if from scratch."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads, if from scratch."})
    train_file: str | None = field(default=None, metadata={"help": "Plain text."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    block_size: int = field(default=128, metadata={"help": "Tokens that belong together."})
    max_validation_blocks: int | None = field(default=None, metadata={"help": "Evaluate on this many, the first."})
    smoke: bool = field(default=False, metadata={"help": "Run on a tiny random model and made-up text, offline."})


def perplexity(losses: np.ndarray, references: np.ndarray) -> float:
    """Turn the mean loss of each block, all of one length, into one over the tokens."""
    return math.exp(losses.mean())


class LanguageTask:
    """Text cut into blocks for one model."""

    metrics = {"perplexity": perplexity}
    number = ".2f"
    collator = staticmethod(default_data_collator)

    def __init__(self, arguments: LanguageArguments) -> None:
        self.arguments = arguments
        train, validation = (
            Path(file).read_text(encoding="utf-8") for file in (arguments.train_file, arguments.validation_file)
        )
        if arguments.from_scratch:
            self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(train, arguments.vocab_size)
            self.reads_first = False
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
            self.reads_first = AutoConfig.from_pretrained(arguments.model_name_or_path).is_encoder_decoder
        self.auto_class = AutoModelForSeq2SeqLM if self.reads_first else AutoModelForCausalLM
        self.train_dataset, self.validation = self.cut(train), self.cut(validation)
        if arguments.max_validation_blocks is not None:
            count = min(arguments.max_validation_blocks, len(self.validation))
            self.validation = self.validation.select(range(count))
        self.references = np.zeros(len(self.validation))  # the targets are in the blocks, `predict` compares

    def cut(self, text: str) -> Dataset:
        """Cut a text into blocks of tokens; what is left over at its end is dropped."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        size = self.arguments.block_size
        blocks = np.array(ids[: len(ids) // size * size]).reshape(-1, size)  # (blocks, tokens)
        inputs, labels = np.split(blocks, 2, axis=1) if self.reads_first else (blocks, blocks)
        return Dataset.from_dict({"input_ids": inputs, "labels": labels})

    def new_model(self) -> PreTrainedModel:
        """Load the model, or make one whose values come from the seed that was set last."""
        arguments, end = self.arguments, self.tokenizer.eos_token_id
        if not arguments.from_scratch:
            return self.auto_class.from_pretrained(arguments.model_name_or_path)
        config = GPT2Config(
            vocab_size=len(self.tokenizer),
            n_positions=arguments.block_size,
            n_embd=arguments.hidden_size,
            n_layer=arguments.num_layers,
            n_head=arguments.num_heads,
            bos_token_id=end,
            eos_token_id=end,
        )
        return GPT2LMHeadModel(config)

    def batches(self, model: PreTrainedModel, blocks: int | None = None) -> list[dict[str, Tensor]]:
        """Return the first blocks of the validation text, by default all, where the model is."""
        rows = self.validation.select(range(min(blocks or len(self.validation), len(self.validation))))
        batches = [
            self.collator(list(rows.select(part))) for part in np.array_split(range(len(rows)), -(-len(rows) // 16))
        ]
        return [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]

    @torch.no_grad()
    def predict(self, model: PreTrainedModel) -> list:
        """Return the mean loss of each block of the validation text."""
        losses = []
        for batch in self.batches(model):
            logits, labels = model(**batch).logits.float(), batch["labels"]  # (batch, tokens, vocabulary)
            if not self.reads_first:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses += F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1).tolist()
        return losses

    @torch.no_grad()
    def measure_load(self, model: PreTrainedModel, blocks: int = 128) -> list[list[float]]:
        """Return the share of the tokens that each expert of each converted block gets, `(blocks, experts)`."""
        load: Tensor | int = 0
        for batch in self.batches(model, blocks):
            logits = [x.flatten(0, 1) for x in model(**batch, output_router_logits=True).router_logits]
            load = load + torch.stack(
                [expert_load(x.argmax(-1), torch.ones_like(x[:, 0], dtype=torch.bool), x.shape[-1]) for x in logits]
            )
        return (load / load.sum(dim=1, keepdim=True)).tolist()


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn byte pairs from a text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        text.splitlines(keepends=True), vocab_size=vocab_size, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, pad_token=END)


def make_smoke_text(arguments: LanguageArguments, folder: Path) -> None:
    """Make texts of sentences that begin alike, and choose sizes that take seconds."""
    arguments.from_scratch, arguments.vocab_size, arguments.block_size = True, 300, 16
    arguments.num_layers, arguments.hidden_size, arguments.num_heads = 2, 32, 2
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(0)
    for name, sentences in (("train_file", 200), ("validation_file", 50)):
        path = folder / f"{name}.txt"
        lines = (f"The {random.choice(['cat', 'dog'])} saw {random.randint(2, 99)} mice.\n" for _ in range(sentences))
        path.write_text("".join(lines), encoding="utf-8")
        setattr(arguments, name, str(path))
