"""Tiny token classifiers of many architectures, batches, and a tokenizer that splits words into pieces."""

import torch
from transformers import (
    AlbertConfig,
    AutoModelForTokenClassification,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    TrainingArguments,
)

from hf_moebert import BertCrfForTokenClassification, CrfForTokenClassification, MoEBertConfig


VOCAB = 60
TYPES = ("PER", "B-I-O")  # dashes and prefixes inside a type are no prefixes
PREFIXES = {
    "IOB2": "BI",
    "IOBES": "BIES",
    "BILOU": "BILU",
    "BMES": "BMES",
    "IOB1": "IB",
    "IOE1": "IE",
    "IOE2": "IE",
}
LABELS = ["O", "B-PER", "I-PER", "B-B-I-O", "I-B-I-O"]
WORDS = ["new", "york", "##er", "##s", "in", "the", "lon", "##don", "and", "."]


def labels_of(scheme):
    return ["O", *[f"{prefix}-{kind}" for kind in TYPES for prefix in PREFIXES[scheme]]]


def names(labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def make_config(family, labels=LABELS, dropout=0.0):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    common = {"vocab_size": VOCAB, "pad_token_id": 0, "max_position_embeddings": 64, **names(labels)}
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    std = {"initializer_range": 0.5}  # so that tags differ from word to word
    if family == "distilbert":
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
        return DistilBertConfig(**sizes, **common, **std, dropout=dropout, attention_dropout=dropout)
    if family == "modernbert":
        special = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(
            ("eos_token_id", "sep_token_id"), 3
        )
        return ModernBertConfig(**sizes, **common, **std, **special)
    if family == "moebert":
        experts = {"num_experts": 2, "expert_size": 12, "num_shared_neurons": 0}
        return MoEBertConfig(**sizes, **common, **std, **drops, **experts)
    classes = {
        "albert": AlbertConfig,
        "bert": BertConfig,
        "deberta": DebertaV2Config,
        "electra": ElectraConfig,
        "roberta": RobertaConfig,
    }
    more = {"embedding_size": 16} if family in ("albert", "electra") else {}
    return classes[family](**sizes, **common, **std, **drops, **more)


FAMILIES = ("bert", "roberta", "distilbert", "deberta", "modernbert", "moebert", "electra", "albert")


def make_dense(family="bert", labels=LABELS, dropout=0.0, seed=0):
    """Return a random stock token classifier."""
    torch.manual_seed(seed)
    return AutoModelForTokenClassification.from_config(make_config(family, labels, dropout)).eval()


def make(family="bert", labels=LABELS, *, dropout=0.0, scores=True, **fields):
    """Return a tagger with a CRF, by default of random scores; "any bert" is a BERT in the general class."""
    head = BertCrfForTokenClassification if family == "bert" else CrfForTokenClassification
    model = head.from_dense(make_dense(family.removeprefix("any "), labels, dropout), **fields)
    if scores:
        with torch.no_grad():
            for parameter in model.crf.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def make_batch(rows=3, length=9, *, pad=3, labels=False):
    """Return ids, padded at the end of the last row, all of them words, or labels: legal in IOB2, with gaps."""
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - pad :] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if labels:
        pattern = torch.tensor([-100, 1, 2, 0, 3, 4, 4, 0])
        tags = pattern.repeat(rows, length // 8 + 1)[:, :length].clone()
        tags[0, 1:4] = torch.tensor([1, -100, 2])[: length - 1]  # one segment, a piece of a word in it
        batch["labels"] = tags.masked_fill(mask == 0, -100)
    else:
        batch["word_mask"] = mask
    return batch


def stock_logits(dense, batch):
    """Return the logits of a token classifier without a CRF, which knows no words."""
    return dense(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def make_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: index for index, token in enumerate(special + WORDS)}
    return BertTokenizer(vocab=vocab, model_max_length=16)


def arguments(folder, **options):
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    return TrainingArguments(str(folder), **defaults | {"learning_rate": 1e-2, "seed": 0} | options)
