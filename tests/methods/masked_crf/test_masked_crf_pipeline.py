"""The pipeline returns the decoded segments, for any scheme, strategy, batch size and tokenizer."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_crf import LABELS, PREFIXES, labels_of, make, make_dense, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    TokenClassificationPipeline,
    pipeline,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_moebert.methods.masked_crf import CrfTokenClassificationPipeline, pipeline as crf_pipeline
from hf_moebert.methods.masked_crf.functional_segments import find_segments
from hf_moebert.methods.masked_crf.functional_tags import count_breaks


STRATEGIES = ("simple", "first", "average", "max")
TEXTS = (
    "New Yorkers in the London and New York .",
    "London",
    "the London and Yorkers.in",
    "in the New York , and London London",
)


def make_pipeline(scheme="IOB2", kind="bert", tokenizer=None, **fields):
    model = make(kind, labels_of(scheme), tag_scheme=scheme, **fields)
    return CrfTokenClassificationPipeline(model=model, tokenizer=tokenizer or make_tokenizer())


@torch.no_grad()
def decode(pipe, text):
    """Decode a text without the pipeline: tags and probabilities of its words, and their characters."""
    listed, starts = text.split(), [found.start() for found in re.finditer(r"\S+", text)]
    encoded = pipe.tokenizer(
        listed or "", is_split_into_words=bool(listed), return_tensors="pt", return_offsets_mapping=True
    )
    offsets, words = encoded.pop("offset_mapping")[0].tolist(), encoded.word_ids()
    places = {word: [i for i, other in enumerate(words) if other == word] for word in words if word is not None}
    firsts = [positions[0] for positions in places.values()]
    mask = torch.zeros_like(encoded["input_ids"])
    mask[0, firsts] = 1
    outputs = pipe.model(**encoded, word_mask=mask, output_marginals=True)
    ids = outputs.predictions[0, firsts]
    scores = outputs.marginals[0, firsts].gather(1, ids[:, None])[:, 0]
    spans = [
        (starts[word] + offsets[positions[0]][0], starts[word] + offsets[positions[-1]][1])
        for word, positions in places.items()
    ]
    return [pipe.model.config.id2label[tag] for tag in ids.tolist()], scores.tolist(), spans


def segments_of(pipe, text):
    tags, scores, spans = decode(pipe, text)
    return [
        (kind, spans[start][0], spans[stop - 1][1], pytest.approx(min(scores[start:stop]), abs=1e-5))
        for kind, start, stop in find_segments(tags)
    ]


def told(entities):
    return [(entity["entity_group"], entity["start"], entity["end"], entity["score"]) for entity in entities]


# Oracle: the model called by hand


@pytest.mark.parametrize("kind", ["bert", "any bert"])
@pytest.mark.parametrize("scheme", PREFIXES)
def test_every_strategy_gives_the_decoded_segments(scheme, kind):
    pipe = make_pipeline(scheme, kind)
    wanted = [segments_of(pipe, text) for text in TEXTS]
    assert sum(map(len, wanted)) > 4
    for strategy in STRATEGIES:
        for size in (1, 3):
            found = pipe(list(TEXTS), aggregation_strategy=strategy, batch_size=size)
            assert [told(entities) for entities in found] == wanted


@pytest.mark.parametrize("scheme", PREFIXES)
def test_tokens_spell_the_segments_in_the_scheme(scheme):
    pipe = make_pipeline(scheme)
    for text in TEXTS:
        tokens = pipe(text, ignore_labels=[])
        tags = [token["entity"] for token in tokens]
        assert count_breaks(tags, scheme) == 0
        spelled = [(kind, tokens[i]["start"], tokens[j - 1]["end"]) for kind, i, j in find_segments(tags)]
        assert spelled == [segment[:3] for segment in segments_of(pipe, text)]
        assert [token["index"] for token in tokens] == list(range(1, len(tokens) + 1))
        assert {token["entity"] for token in pipe(text)} == set(tags) - {"O"}


def test_entities_are_described_as_by_transformers():
    pipe = make_pipeline()
    stock = pipeline("token-classification", model=make_dense(labels=labels_of("IOB2")), tokenizer=pipe.tokenizer)
    for strategy in ("none", *STRATEGIES):
        ours, theirs = (x("New Yorkers", aggregation_strategy=strategy, ignore_labels=[])[0] for x in (pipe, stock))
        assert ours.keys() == theirs.keys()
        assert isinstance(ours["score"], float)
    (group,) = [x for x in pipe(TEXTS[0], aggregation_strategy="simple", ignore_labels=[]) if x["start"] == 0]
    assert TEXTS[0][: group["end"]].lower() == group["word"]


def test_what_is_between_segments_can_be_asked_for():
    pipe = make_pipeline()
    for text in TEXTS:
        all_groups = pipe(text, aggregation_strategy="simple", ignore_labels=[])
        assert [x for x in all_groups if x["entity_group"] != "O"] == pipe(text, aggregation_strategy="simple")
        ends = [(before["end"], after["start"]) for before, after in pairwise(all_groups)]
        assert all(not text[end:start].strip() for end, start in ends)


def test_tags_without_types_name_themselves():
    labels = ["NOUN", "VERB", "DET"]
    model = make(labels=labels)
    pipe = CrfTokenClassificationPipeline(model=model, tokenizer=make_tokenizer())
    tags, _, spans = decode(pipe, TEXTS[0])
    groups = pipe(TEXTS[0], aggregation_strategy="simple")
    assert [(x["entity_group"], x["start"], x["end"]) for x in groups] == [
        (tag, *span) for tag, span in zip(tags, spans, strict=True)
    ]


# Inputs


def test_lists_of_words():
    pipe = make_pipeline("IOBES")
    for text in TEXTS[:2]:
        words = text.split()
        options = {"is_split_into_words": True, "aggregation_strategy": "simple"}
        assert told(pipe([words], **options)[0]) == segments_of(pipe, text)
        apart = pipe([words], **options, delimiter=" | ")[0]
        assert [" | ".join(words)[x["start"] : x["end"]] for x in apart] == [
            " | ".join(text[start:end].split()) for _, start, end, _ in segments_of(pipe, text)
        ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_different_lengths_in_one_batch(side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    pipe = make_pipeline("BILOU", tokenizer=tokenizer)
    pipe.model.bert.embeddings.position_embeddings.weight.data.zero_()  # which padding on the left shifts
    texts = [*TEXTS, ""]
    together = pipe(texts, aggregation_strategy="simple", batch_size=5)
    for entities, text in zip(together, texts, strict=True):
        assert told(entities) == segments_of(pipe, text)


def test_tokenizers_of_bytes():
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
    tokenizer = RobertaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    tokenizer.model_max_length = 60
    model = make("roberta", labels_of("IOBES"))
    model.resize_token_embeddings(len(tokenizer))
    pipe = CrfTokenClassificationPipeline(model=model, tokenizer=tokenizer)
    for text in (*TEXTS, "Zoë é 🙂 in"):
        assert told(pipe(text, aggregation_strategy="average")) == segments_of(pipe, text)


def make_joining_pipeline(tokenizer, labels="IOBES"):
    """A RoBERTa whose emissions do not depend on the context, with a tokenizer."""
    tokenizer.model_max_length = 60
    model = make("roberta", labels_of(labels))
    model.resize_token_embeddings(len(tokenizer))
    return CrfTokenClassificationPipeline(model=model, tokenizer=tokenizer)


def letters(*symbols):
    characters = [chr(code) for code in range(33, 127)] + ["\u2581"]
    return {symbol: number for number, symbol in enumerate([*symbols, *characters])}


@pytest.mark.parametrize("stride", [0, 5])
def test_tokenizers_that_split_no_words(stride):
    """Metaspace keeps a whole text together: its words are those between blanks, as in a list of words."""
    pipe = make_joining_pipeline(LlamaTokenizer(vocab=letters("<unk>", "<s>", "</s>"), merges=[]))
    pipe.tokenizer.pad_token = "</s>"
    assert set(pipe.tokenizer("in the London").word_ids()) <= {None, 0}
    options = {"aggregation_strategy": "simple"} | ({"stride": stride} if stride else {})
    if stride:
        pipe.tokenizer.model_max_length = 24
    for text in ("in the London and New York", " in  the\nLondon, "):
        found, words = pipe(text, **options, ignore_labels=[]), text.split()
        listed = pipe([words], **options, is_split_into_words=True, ignore_labels=[])[0]
        assert [(x["entity_group"], text[x["start"] : x["end"]].split()) for x in found] == [
            (x["entity_group"], " ".join(words)[x["start"] : x["end"]].split()) for x in listed
        ]
        assert [word for x in found for word in text[x["start"] : x["end"]].split()] == words
        assert stride or int(next(pipe.preprocess(text))["word_mask"].sum()) == len(words)


def test_spans_have_no_blanks_around_them():
    """A byte-level tokenizer may count the blank before a word with it, and takes a second blank for a word."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
    tokenizer = RobertaTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], trim_offsets=False
    )
    pipe = make_joining_pipeline(tokenizer)
    text = "in  the London and\n New York ."
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert any(text[start:end].isspace() for start, end in offsets)
    for strategy in ("none", "simple"):
        for ignored in (["O"], []):
            found = pipe(text, aggregation_strategy=strategy, ignore_labels=ignored)
            assert found
            pieces = [text[x["start"] : x["end"]] for x in found]
            assert pieces == [piece.strip() for piece in pieces]
    words = next(pipe.preprocess(text, tokenizer_params={}))
    assert int(words["word_mask"].sum()) == len(text.split())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("abNLy.,'#@é", min_size=1, max_size=6), min_size=1, max_size=6), st.sampled_from([*PREFIXES]))
def test_texts_split_at_blanks_are_lists_of_words(words, scheme):
    pipe = make_pipeline(scheme)
    options = {"aggregation_strategy": "simple", "ignore_labels": []}
    listed = pipe([words], **options, is_split_into_words=True)[0]
    for boundaries in ({}, {"word_boundaries": "auto"}, {"word_boundaries": "blanks"}):
        assert pipe(" ".join(words), **options, **boundaries) == listed


SCRIPTS = {
    "Latin": "aé.'@",
    "Greek": "αωΣ",
    "Cyrillic": "бЯё",
    "Arabic": "سلام\u064b",
    "Hebrew": "שלום\u05b0",
    "Devanagari": "नमस्ते",
    "Hangul": "한국",
    "Thai": "ไทย",
    "kana": "カナひら",
    "emoji": "🙂👩\u200d🔬🇩🇪",
    "unseen": "a\u200b\ufeff\u00ad\u202e",
}
HAN = "北京大学𠀀"


def train_tokenizer(kind):
    """A tokenizer of one of the usual kinds, trained on a little of each script."""
    lines = [*map(" ".join, SCRIPTS.values()), " ".join(HAN), "in the London and New York ."]
    model, trainer, before = {
        "WordPiece": (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer,
            pre_tokenizers.BertPreTokenizer(),
        ),
        "byte-level": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "byte-level, prefixed": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace()),
        "Unigram, unsplit": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace(split=False)),
        "words": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer, pre_tokenizers.Whitespace()),
    }[kind]
    made, special = Tokenizer(model), ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.pre_tokenizer = before
    if kind == "WordPiece":
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
    options = {"unk_token": "[UNK]"} if "Unigram" in kind else {}
    made.train_from_iterator(lines, trainer(special_tokens=special, vocab_size=400, show_progress=False, **options))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


TOKENIZERS = ["WordPiece", "byte-level", "byte-level, prefixed", "Unigram", "Unigram, unsplit", "words"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_pipe(request):
    return make_joining_pipeline(train_tokenizer(request.param))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([*SCRIPTS.values()]).flatmap(lambda x: st.text(x, min_size=1, max_size=8)), max_size=6),
    st.sampled_from([" ", "  ", "\n", "\u00a0", "\t "]),
    st.sampled_from([None, 2]),
)
def test_texts_are_the_lists_of_their_words_in_every_script(any_pipe, words, blank, stride):
    options = {"aggregation_strategy": "simple", "ignore_labels": []} | ({"stride": stride} if stride else {})
    any_pipe.tokenizer.model_max_length = 12 if stride else 60
    text = blank + blank.join(words)
    found = any_pipe(text, **options)
    (listed,) = any_pipe([words], **options, is_split_into_words=True, delimiter=blank)
    moved = [group | {"start": group["start"] - len(blank), "end": group["end"] - len(blank)} for group in found]
    assert moved == listed
    assert any_pipe(text, **options, word_boundaries="blanks") == found
    pieces = [text[group["start"] : group["end"]] for group in found]
    assert all(piece == piece.strip() for piece in pieces)
    if stride:  # a window drops nothing
        assert len(" ".join(pieces).split()) == len(words)


@settings(max_examples=8, deadline=None)
@given(st.text(HAN, min_size=1, max_size=12), st.sampled_from(["", "a", "，"]))
def test_chinese_texts_are_the_lists_of_their_characters(any_pipe, text, end):
    any_pipe.tokenizer.model_max_length = 60
    options = {"aggregation_strategy": "simple", "ignore_labels": []}
    words = [*text, end] if end else [*text]
    assert any_pipe(text + end, **options) == any_pipe([words], **options, is_split_into_words=True, delimiter="")[0]


def test_words_that_are_not_sure_are_said_to_be(monkeypatch):
    warned = []
    monkeypatch.setattr(crf_pipeline.logger, "warning_once", warned.append)
    pipe = make_pipeline()
    for text in ("the London", "the London .", "北京 the", "सड़क London", "한국 and", ""):
        pipe(text)
    assert not warned
    for text in ("the London.", "@new york", "ไทย", "ひらがな"):
        pipe(text)
        assert "'London.' is one word" in warned.pop()
        for boundaries in ("tokenizer", "blanks"):
            pipe(text, word_boundaries=boundaries)
        assert not warned


def test_words_of_the_tokenizer_are_split_at_punctuation():
    pipe = make_pipeline()
    starts = {
        boundaries: int(next(pipe.preprocess("London.in the", word_boundaries=boundaries))["word_mask"].sum())
        for boundaries in ("auto", "tokenizer", "blanks")
    }
    assert starts == {"auto": 2, "tokenizer": 4, "blanks": 2}
    with pytest.raises(ValueError, match="`word_boundaries` must be one of auto, tokenizer, blanks, got 'words'"):
        pipe("London", word_boundaries="words")
    joining = make_joining_pipeline(train_tokenizer("Unigram, unsplit"))
    with pytest.raises(ValueError, match="must be 'auto' or 'blanks' for .*, which takes several words as one"):
        joining("in the London", word_boundaries="tokenizer")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_that_a_tokenizer_drops_are_unknown(kind):
    """As in training, so that all words have their tags."""
    pipe = make_joining_pipeline(train_tokenizer(kind))
    words = ["in", "\u200b", "the", "\ufeff"]
    (found,) = pipe([words], is_split_into_words=True, ignore_labels=[], aggregation_strategy="simple")
    covered = {place for group in found for place in range(group["start"], group["end"])}
    assert {0, 1, 3, 5, 6, 7, 9} <= covered
    assert pipe([[]], is_split_into_words=True) == [[]]


def test_windows_are_decoded_as_one_text():
    """With emissions that do not depend on the context, windows must not change anything."""
    pipe = make_pipeline("IOBES")
    pipe.model.bert.embeddings.position_embeddings.weight.data.zero_()
    pipe.model.bert.encoder.layer = torch.nn.ModuleList()
    text = " ".join(TEXTS)
    windows = pipe(text, aggregation_strategy="simple", stride=5, batch_size=2)
    pipe.tokenizer.model_max_length = 64
    whole = pipe(text, aggregation_strategy="simple")
    assert len(list(pipe.preprocess(text, tokenizer_params={}))) == 1
    assert len(whole) > 4
    assert [x[:3] for x in told(windows)] == [x[:3] for x in told(whole)]
    assert [x["score"] for x in windows] == pytest.approx([x["score"] for x in whole], abs=1e-5)


def test_windows_of_a_contextual_model_never_overlap():
    pipe = make_pipeline("BILOU", "any bert")
    found = pipe(" ".join(TEXTS * 3), aggregation_strategy="first", stride=4, batch_size=3)
    assert len(found) > 4
    assert all(before["end"] <= after["start"] for before, after in pairwise(found))


# Refusals


def test_models_and_tokenizers_that_do_not_fit(monkeypatch):
    with pytest.raises(ValueError, match="`model` must be a tagger with a CRF, got BertForTokenClassification"):
        CrfTokenClassificationPipeline(model=make_dense(), tokenizer=make_tokenizer())
    slow = make_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ValueError, match="`tokenizer` must be a fast one"):
        CrfTokenClassificationPipeline(model=make(), tokenizer=slow)


def test_inputs_that_do_not_fit():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="must be a text without `offset_mapping`, got str"):
        pipe("the London", offset_mapping=[(0, 3), (4, 10)])
    with pytest.raises(ValueError, match="must be a text .*, got list. Set `is_split_into_words`"):
        pipe([["the", "London"]])


@pytest.mark.parametrize("kind", ["bert", "any bert"])
@pytest.mark.parametrize("strategy", ["none", *STRATEGIES])
def test_the_stock_task_is_refused(kind, strategy, tmp_path):
    """It reads logits alone, and would ignore the CRF."""
    pipe = make_pipeline(kind=kind)
    pipe.save_pretrained(tmp_path)
    for stock in (
        pipeline("token-classification", model=pipe.model, tokenizer=pipe.tokenizer),
        pipeline("ner", model=str(tmp_path)),
        TokenClassificationPipeline(model=pipe.model.eval(), tokenizer=pipe.tokenizer),
    ):
        with pytest.raises(
            ValueError, match=r'Use `pipeline\("masked-crf", ...\)`, .*"token-classification" knows no'
        ):
            stock("the London", aggregation_strategy=strategy)


def test_the_task_is_registered():
    pipe = pipeline("masked-crf", model=make(), tokenizer=make_tokenizer())
    assert type(pipe) is CrfTokenClassificationPipeline
    assert pipe.model.crf.labels == LABELS
