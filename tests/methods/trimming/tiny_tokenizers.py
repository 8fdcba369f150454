"""Tokenizers of each kind, trained on a few words of many scripts."""

import random
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SCRIPTS = [
    "abcdefgh",
    "éüñßøå",
    "абвгде",
    "αβγδεζ",
    "אבגדה",
    "ابتثج",
    "कखगघङ",
    "กขฃคฅ",
    "日本語文字",
    "한국어가",
    "😀👍🏽",
    "0123.,-#",
]
KINDS = ("WordPiece", "BPE of bytes", "BPE", "BPE with byte fallback", "Unigram")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def make_texts(count, seed, scripts=SCRIPTS, words=6):
    """Texts of random words, each in one script."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        chosen = [draw.choice(scripts) for _ in range(draw.randint(1, words))]
        texts.append(" ".join("".join(draw.choices(script, k=draw.randint(1, 6))) for script in chosen))
    return texts


TEXTS = make_texts(60, 0)


def _train(kind):
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, limit_alphabet=90)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False
        )
    elif kind == "BPE of bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL)
    else:
        falls_back = kind != "BPE"
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", byte_fallback=falls_back))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = SPECIAL + ([f"<0x{byte:02X}>" for byte in range(256)] if falls_back else [])
        trainer = trainers.BpeTrainer(
            vocab_size=len(special) + 300, special_tokens=special, limit_alphabet=70, end_of_word_suffix="</w>"
        )
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    return tokenizer


@cache
def make_tokenizer(kind):
    """A tokenizer with all that holds numbers of tokens: a template, added tokens, padding, and a chat template."""
    tokenizer = _train(kind)
    tokenizer.add_tokens([AddedToken("zzz", normalized=False)])
    numbers = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=numbers
            ),
        ]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        chat_template="{{ messages[0].content }}",
        model_max_length=64,
    )
