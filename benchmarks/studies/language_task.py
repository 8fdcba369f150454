"""The task of language models: text in blocks, models that continue it, and how well they do.

A decoder alone predicts every token of a block; an encoder-decoder reads its first half and predicts the second. Where
labelled texts are given too, they are part of the training, and a second score tells whether their labels are known.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from labelled_text import LabelledText, LabelledTextArguments, accuracy, mix
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
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_moebert.architectures.functional_routing import expert_load


END = "<|endoftext|>"


@dataclass
class LanguageArguments(LabelledTextArguments):
    """The model to start from, and the files of the text."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Decoder or T5: Hub id or folder."})
    from_scratch: bool = field(default=False, metadata={"help": "Train a tokenizer and a model of these sizes first."})
    architecture: Literal["gpt2", "llama"] = field(default="gpt2", metadata={"help": "Its kind, if from scratch."})
    vocab_size: int = field(default=4000, metadata={"help": "Tokens, if from scratch."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of the network, if from scratch."})
    hidden_size: int = field(default=256, metadata={"help": "Width, if from scratch."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads, if from scratch."})
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "Units of a feed-forward network; by default 4 times the width, 8/3 times for Llama."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Plain text."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    block_size: int = field(default=128, metadata={"help": "Tokens that belong together."})
    max_validation_blocks: int | None = field(default=None, metadata={"help": "Evaluate on this many, the first."})
    smoke: bool = field(default=False, metadata={"help": "Run on a tiny random model and made-up text, offline."})


def perplexity(losses: np.ndarray, references: np.ndarray) -> float:
    """Turn the mean loss of each block, all of one length, into one over the tokens; blocks have a reference of 0."""
    return math.exp(losses[references == 0].mean())


class LanguageTask:
    """Text cut into blocks for one model, and labelled texts if there are any."""

    metrics = {"perplexity": perplexity}
    number = ".2f"
    labelled: LabelledText | None = None
    collator = staticmethod(default_data_collator)

    def __init__(self, arguments: LanguageArguments) -> None:
        self.arguments = arguments
        train, validation = (
            Path(file).read_text(encoding="utf-8") for file in (arguments.train_file, arguments.validation_file)
        )
        if arguments.task_train_file or arguments.task_validation_file:
            self.labelled = LabelledText(arguments)
        if arguments.from_scratch:
            known = train + (self.labelled.as_text() if self.labelled else "")
            self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(known, arguments.vocab_size)
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
        if self.labelled is not None:
            self.add_labelled(self.labelled)

    def add_labelled(self, labelled: LabelledText) -> None:
        """Mix labelled texts into the training blocks, and score how many of their labels are known."""
        labelled.answers(self.tokenizer, reads_first=self.reads_first)  # refuses words now, not after the training
        if self.reads_first:
            rows = labelled.rows(self.tokenizer, self.arguments.block_size // 2)
            ones = np.ones_like(self.train_dataset["input_ids"])
            self.train_dataset = self.train_dataset.add_column("attention_mask", ones.tolist())
        else:
            rows = self.cut(labelled.as_text())
        self.train_dataset = mix(self.train_dataset, rows, self.arguments.task_share)
        self.references = np.repeat([0, 1], [len(self.validation), len(labelled.validation)])
        self.metrics, self.number = {"perplexity": perplexity, "accuracy": accuracy}, ".3f"

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
        sizes = {"vocab_size": len(self.tokenizer), "bos_token_id": end, "eos_token_id": end}
        if arguments.architecture == "llama":
            return LlamaForCausalLM(llama_config(arguments, **sizes))
        config = GPT2Config(
            n_positions=arguments.block_size,
            n_embd=arguments.hidden_size,
            n_layer=arguments.num_layers,
            n_head=arguments.num_heads,
            n_inner=arguments.intermediate_size,
            **sizes,
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
        """Return the mean loss of each block of the validation text, then 1 or 0 for each labelled text."""
        losses = []
        for batch in self.batches(model):
            logits, labels = model(**batch).logits.float(), batch["labels"]  # (batch, tokens, vocabulary)
            if not self.reads_first:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses += F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1).tolist()
        if self.labelled is not None:
            losses += self.labelled.predict(model, self.tokenizer, len(self.validation[0]["input_ids"]))
        return losses

    @torch.no_grad()
    def measure_load(self, model: PreTrainedModel, blocks: int = 128) -> list[list[float]]:
        """Return the share of the tokens that each expert of each converted block gets, `(blocks, experts)`."""
        load: Tensor | int = 0
        for batch in self.batches(model, blocks):
            logits = [x.flatten(0, 1) for x in model(**batch, output_router_logits=True).router_logits]
            load = load + torch.stack(
                [
                    expert_load(x.argmax(-1, keepdim=True), torch.ones_like(x[:, 0], dtype=torch.bool), x.shape[-1])
                    for x in logits
                ]
            )
        return (load / load.sum(dim=1, keepdim=True)).tolist()


def llama_config(arguments: LanguageArguments, **sizes: int) -> LlamaConfig:
    """Describe a Llama whose gated networks are as large as plain ones of four times its width, up to rounding."""
    return LlamaConfig(
        max_position_embeddings=arguments.block_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size or max(round(arguments.hidden_size * 8 / 3 / 64), 1) * 64,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        tie_word_embeddings=True,
        **sizes,
    )


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
