"""What the tagging examples share: tagged words read for one encoder, and the tags that a model gives them.

Data has two columns of lists: words and their tags. Run with `--smoke`, they make up both, and need no network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from datasets import Dataset
from text_task import SourceArguments, draw, make_tiny_encoder, read_splits, write_rows
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
)

from hf_moebert.data import encode_tokens, tag_names_of
from hf_moebert.measuring.scores import tags_of


@dataclass
class TaggingArguments(SourceArguments):
    """What to start from, and which columns of the data are read."""

    tokens_column: str = field(default="tokens", metadata={"help": "Column of the lists of words."})
    tags_column: str = field(default="tags", metadata={"help": "Column of the lists of tags."})
    held_out: int = field(default=400, metadata={"help": "Training sentences that choose, and are not trained on."})


class TaggingTask:
    """Sentences of tagged words, tokenized for one encoder, some of those for training held out."""

    auto_class = AutoModelForTokenClassification

    def __init__(self, arguments: TaggingArguments, *, seed: int) -> None:
        self.model_name_or_path = arguments.model_name_or_path
        splits = read_splits(arguments, label_column=arguments.tags_column, seed=seed)
        self.names = tag_names_of(splits["train"], arguments.tags_column)
        splits["train"] = draw(splits["train"], arguments.max_train_examples, seed=seed)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        self.collator = DataCollatorForTokenClassification(self.tokenizer)
        data = encode_tokens(
            splits,
            self.tokenizer,
            tokens_column=arguments.tokens_column,
            tags_column=arguments.tags_column,
            tag_names=self.names,
            max_length=arguments.max_length,
        )
        words = sum(len(tags) for tags in splits["validation"][arguments.tags_column])
        parts = data["train"].train_test_split(arguments.held_out, seed=seed)
        self.train_dataset, self.held_out, self.validation = parts["train"], parts["test"], data["validation"]
        left = sum(len(tags) for tags in self.true_tags(self.validation))
        print(f"{len(self.train_dataset)} sentences to train on; {words - left} of {words} words to tag were cut off.")

    def true_tags(self, data: Dataset) -> list[list[str]]:
        """Name the tags of each sentence."""
        rows = [np.asarray(labels)[None] for labels in data["labels"]]  # (1, seq) each
        return [tags for row in rows for tags in tags_of(row, row, self.names)]

    def new_model(self) -> PreTrainedModel:
        """Put a new head on the encoder; its values come from the seed that was set last."""
        return AutoModelForTokenClassification.from_pretrained(
            self.model_name_or_path,
            id2label=dict(enumerate(self.names)),
            label2id={name: index for index, name in enumerate(self.names)},
        )

    def batches(self, data: Dataset, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        """Pad the sentences, some at a time, in their order."""
        for start in range(0, len(data), size):
            yield self.collator([data[row] for row in range(start, min(start + size, len(data)))])

    def predict(self, model: PreTrainedModel, data: Dataset | None = None) -> list[dict[str, list]]:
        """Tag the words of each sentence, and say how probable the model finds each tag."""
        data, sentences = self.validation if data is None else data, []
        order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")  # little is padded
        for batch in self.batches(data.select(order)):
            words = (batch["labels"] != -100).numpy()  # (batch, seq)
            tags, shares = tag(model.eval(), batch, with_shares=True)
            named = tags_of(tags.cpu().numpy(), batch["labels"].numpy(), self.names)
            shares = [row[mask].round(4).tolist() for row, mask in zip(shares.cpu().numpy(), words, strict=True)]
            sentences += [{"tags": t, "shares": s} for t, s in zip(named, shares, strict=True)]
        return [sentences[place] for place in np.argsort(order)]


@torch.no_grad()
def tag(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], *, with_shares: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tag the words of a batch: by the best sequence if the model has a CRF, otherwise each word on its own.

    Returns:
        Indices of tags, and the probability of each if asked for, both of shape `(batch, seq)`.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    if hasattr(model, "crf"):
        words = batch["labels"].to(model.device) != -100  # (batch, seq)
        outputs = model(**inputs, word_mask=words, output_marginals=with_shares)
        tags, shares = outputs.predictions, outputs.marginals
    else:
        logits = model(**inputs).logits.float()  # (batch, seq, tags)
        tags, shares = logits.argmax(-1), logits.softmax(-1) if with_shares else None
    if shares is None:
        return tags, None
    return tags, shares.float().gather(-1, tags.clamp(min=0)[..., None])[..., 0]


NAMES = {"person": ["ada", "ada king", "alan turing", "grace"], "place": ["london", "new york", "rome"]}
FRAMES = ["{person} was in {place}", "in {place} {person} met {person}", "{place} is far from {place}", "it was far"]


def make_sentence(random: Random) -> dict[str, list[str]]:
    """Make up a sentence of persons and places, tagged in IOB2."""
    tokens, tags = [], []
    for word in random.choice(FRAMES).split():
        kind = word.strip("{}")
        name = random.choice(NAMES[kind]).split() if kind in NAMES else [word]
        tokens += name
        tags += [f"B-{kind}"] + [f"I-{kind}"] * (len(name) - 1) if kind in NAMES else ["O"]
    return {"tokens": tokens, "tags": tags}


def make_smoke_tags(arguments: TaggingArguments, folder: Path, *, sizes: Sequence[int] = (64, 32)) -> None:
    """Make up tagged sentences, and a tiny encoder that knows their words."""
    random = Random(0)
    for name, size in zip(("train_file", "validation_file"), sizes, strict=True):
        setattr(arguments, name, write_rows(folder, name, [make_sentence(random) for _ in range(size)]))
    texts = [*FRAMES, *(name for names in NAMES.values() for name in names)]
    make_tiny_encoder(folder, sorted({word for text in texts for word in text.split() if "{" not in word}))
    arguments.model_name_or_path, arguments.held_out = str(folder), 16
