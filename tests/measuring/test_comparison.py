"""Measuring a model against itself, against a copy with other label ids, and against a count by hand."""

import json
import math

import pytest
import torch
from datasets import ClassLabel, Dataset
from scipy.stats import spearmanr
from tiny_classifiers import EXAMPLES, classifiers, save_classifier  # noqa: F401
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_moebert import CrfForTokenClassification, EmbeddingForm, save_embedder
from hf_moebert.measuring.answers_of_tokens import find_scheme
from hf_moebert.measuring.comparison import Latency, TextColumns, measure
from hf_moebert.measuring.metrics.seqeval.seqeval import count_illegal, span_f1
from hf_moebert.measuring.metrics.squad.squad import token_f1


QUICK = {"latency": Latency(seq=4, rounds=2), "columns": TextColumns(max_length=8)}


pytestmark = pytest.mark.usefixtures("few_resamples")  # what an interval covers is tested with the scores


@pytest.fixture
def examples():
    return Dataset.from_list(EXAMPLES)


def test_a_model_against_itself_differs_in_nothing(classifiers, examples):  # noqa: F811
    source = str(classifiers / "large")
    result = measure({"a": source, "b": source}, examples, baseline="a", **QUICK)
    first, second = result["models"].values()
    assert second["differences"] == {"accuracy": {"value": 0.0, "low": 0.0, "high": 0.0}}
    assert first["scores"] == second["scores"]
    assert first["footprint"] == second["footprint"]
    assert first["differences"] is first["speed_up"] is None
    assert second["speed_up"]["rounds"] == 2


def test_accuracy_and_footprint_equal_a_count_by_hand(classifiers, examples):  # noqa: F811
    source = str(classifiers / "large")
    model, tokenizer = BertForSequenceClassification.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        predicted = [model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item() for row in EXAMPLES]
    right = [model.config.id2label[index] == row["label"] for index, row in zip(predicted, EXAMPLES, strict=True)]
    result = measure({"large": source}, examples, baseline="large", **QUICK)["models"]["large"]
    assert result["scores"]["accuracy"]["value"] == sum(right) / len(right)
    assert result["footprint"]["total"] == model.num_parameters()
    assert result["footprint"]["bytes_on_disk"] == (classifiers / "large" / "model.safetensors").stat().st_size


def test_labels_are_matched_by_name(classifiers, examples, tmp_path):  # noqa: F811
    original = BertForSequenceClassification.from_pretrained(classifiers / "large")
    swapped = save_classifier(tmp_path, labels=("positive", "negative"), layers=2)
    weights = original.state_dict()
    weights["classifier.weight"] = weights["classifier.weight"].flip(0)
    weights["classifier.bias"] = weights["classifier.bias"].flip(0)
    swapped.load_state_dict(weights)
    swapped.save_pretrained(tmp_path)
    sources = {"original": str(classifiers / "large"), "swapped": str(tmp_path)}
    models = measure(sources, examples, baseline="original", **QUICK)["models"]
    assert models["swapped"]["differences"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert models["swapped"]["scores"] == models["original"]["scores"]


def test_a_model_without_label_names_takes_their_order_from_the_data(classifiers, examples, tmp_path):  # noqa: F811
    save_classifier(tmp_path, labels=("LABEL_0", "LABEL_1"), layers=2)
    classes = examples.cast_column("label", ClassLabel(names=["negative", "positive"]))
    sources = {"unnamed": str(tmp_path), "named": str(classifiers / "large")}
    models = measure(sources, classes, baseline="unnamed", **QUICK)["models"]
    assert models["unnamed"]["scores"] == models["named"]["scores"]


def test_regression(examples, tmp_path):
    save_classifier(tmp_path, labels=("score",))
    numbered = examples.remove_columns("label").add_column("label", [0.5 * row for row in range(len(EXAMPLES))])
    result = measure({"a": str(tmp_path)}, numbered, baseline="a", **QUICK)
    assert result["models"]["a"]["scores"].keys() == {"pearson", "spearman"}


def test_result_is_json_that_says_how_it_was_measured(classifiers, examples):  # noqa: F811
    sources = {"large": str(classifiers / "large"), "small": str(classifiers / "small")}
    threads = torch.get_num_threads()
    result = measure(
        sources, examples, baseline="large", metrics=["accuracy", "f1"], max_examples=5, threads=1, seed=2, **QUICK
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["settings"]["examples"] == 5
    assert result["settings"]["latency_seq"] == 4
    assert result["environment"]["threads"] == 1
    assert torch.get_num_threads() == threads
    assert result["models"]["small"]["differences"].keys() == {"accuracy", "f1"}
    again = measure(sources, examples, baseline="large", metrics=["accuracy"], max_examples=5, seed=2, **QUICK)
    assert again["models"]["small"]["scores"]["accuracy"] == result["models"]["small"]["scores"]["accuracy"]


def test_refuses_models_that_cannot_be_compared(classifiers, examples, tmp_path):  # noqa: F811
    sources = {"large": str(classifiers / "large")}
    save_classifier(tmp_path / "other", labels=("negative", "neutral"))
    with pytest.raises(ValueError, match="'other' has .*'neutral'"):
        measure(sources | {"other": str(tmp_path / "other")}, examples, baseline="large", **QUICK)
    model = BertForSequenceClassification.from_pretrained(classifiers / "large")
    BertModel.from_pretrained(classifiers / "large").save_pretrained(tmp_path / "headless")
    assert model.config.num_labels == 2
    with pytest.raises(
        ValueError, match="headless', which has no head and no modules.json.* has to be fine-tuned first"
    ):
        measure({"large": str(tmp_path / "headless")}, examples, baseline="large", **QUICK)


def test_optimised_models_are_measured_beside_the_plain_ones(classifiers, examples):  # noqa: F811
    sources = {"large": str(classifiers / "large"), "small": str(classifiers / "small")}
    result = measure(sources, examples, baseline="large", optimized=["float32"], metrics=["accuracy"], **QUICK)
    assert list(result["models"]) == ["large", "small", "large, float32", "small, float32"]
    for name in sources:
        plain, optimized = result["models"][name], result["models"][f"{name}, float32"]
        assert (plain["optimized"], optimized["optimized"]) == (None, "float32")
        assert optimized["scores"] == plain["scores"]
        assert optimized["footprint"] == plain["footprint"]
        assert optimized["speed_up"]["rounds"] == QUICK["latency"].rounds


def test_refuses_a_model_with_the_name_of_an_optimised_one(classifiers, examples):  # noqa: F811
    sources = dict.fromkeys(("a", "a, float32"), str(classifiers / "large"))
    with pytest.raises(ValueError, match=r"must not have the names of optimised ones, got \['a, float32'\]"):
        measure(sources, examples, baseline="a", optimized=["float32"], **QUICK)


def test_refuses_a_model_without_its_tokenizer(classifiers, examples, tmp_path):  # noqa: F811
    save_classifier(tmp_path, layers=1)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"must hold the tokenizers .* knows 5 tokens, and the model 11\. Save it in"):
        measure({"a": str(tmp_path)}, examples, baseline="a", **QUICK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_are_measured_in_the_dtype_that_is_asked_for(classifiers, examples, tmp_path, dtype):  # noqa: F811
    source = str(classifiers / "large")
    BertForSequenceClassification.from_pretrained(source).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    models = {"half": str(tmp_path)}
    with pytest.raises(ValueError, match='load with `dtype="float32"`'):
        measure(models, examples, baseline="half", optimized=["float32"], **QUICK)
    optimized = ["float32"] if dtype == "float32" else []
    result = measure(models, examples, baseline="half", dtype=dtype, optimized=optimized, **QUICK)
    assert len(result["models"]) == 1 + len(optimized)
    assert result["settings"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "half"}, "`dtype` must be one of float32, bfloat16, float16, got 'half'"),
        ({"optimized": ["float16"]}, "`precision` must be one of .*, got 'float16'"),
        ({"baseline": "small"}, r"`baseline` must be one of \['large'\], got 'small'"),
        ({"max_examples": 0}, "`max_examples` must be at least 1, got 0"),
        ({"threads": 0}, "`threads` must be at least 1, got 0"),
        ({"columns": TextColumns()}, "`max_length` must be at most the 16 positions of .*, got 128"),
        ({"latency": Latency()}, "`seq_len` must be .* at most the model's 16 positions, got 128"),
        ({"latency": Latency(seq=4, rounds=1)}, "`rounds` must be at least 2, got 1"),
    ],
)
def test_refuses_bad_options(classifiers, examples, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        measure({"large": str(classifiers / "large")}, examples, **{"baseline": "large"} | QUICK | options)


def test_latency_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="`batch` must be at least 1, got 0"):
        Latency(batch=0)


def test_the_texts_themselves_are_timed(classifiers, examples, monkeypatch):  # noqa: F811
    """Each timed pass reads the first texts, in their order, padded to the longest of their batch."""
    source = str(classifiers / "large")
    tokenizer, seen = AutoTokenizer.from_pretrained(source), []
    original = BertForSequenceClassification.forward

    def watch(self, input_ids=None, **inputs):
        if "attention_mask" in inputs:  # not of the count of operations
            seen.append((input_ids, inputs["attention_mask"]))
        return original(self, input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", watch)
    latency = Latency(batch=3, seq=None, rounds=2)
    measure({"a": source}, examples, baseline="a", columns=TextColumns(max_length=8), latency=latency)
    texts = [row["text"] for row in EXAMPLES]
    for batch, start in zip(seen[:3], (0, 3, 6), strict=True):
        wanted = tokenizer(texts[start : start + 3], padding=True, return_tensors="pt")
        assert torch.equal(batch[0], wanted["input_ids"])
        assert torch.equal(batch[1], wanted["attention_mask"])


# Embedders and rerankers


SHIFTED = [row["text"] for row in EXAMPLES[3:] + EXAMPLES[:3]]
PAIRS = Dataset.from_dict(
    {"text": [row["text"] for row in EXAMPLES], "text_pair": SHIFTED, "label": [row / 2 for row in range(8)]}
)
OF_PAIRS = QUICK | {"columns": TextColumns(text_pair_column="text_pair", max_length=8)}


@pytest.fixture
def embedders(classifiers, tmp_path):  # noqa: F811
    """Two embedders, `large` with a prompt, and `small`."""
    sources = {}
    for name, form in (("large", {"prompts": {"query": "very "}, "default_prompt": "query"}), ("small", {})):
        model = BertModel.from_pretrained(classifiers / name)
        sources[name] = str(tmp_path / name)
        save_embedder(model, AutoTokenizer.from_pretrained(classifiers / name), sources[name], EmbeddingForm(**form))
    return sources


def cosines_of(source, prefix):
    """The embeddings of both sides of all pairs, text by text."""
    model, tokenizer, sides = BertModel.from_pretrained(source), AutoTokenizer.from_pretrained(source), []
    for column in ("text", "text_pair"):
        with torch.no_grad():
            states = [model(**tokenizer(prefix + text, return_tensors="pt"))[0][0].mean(0) for text in PAIRS[column]]
        sides.append(torch.stack(states))
    return torch.stack(sides)


def test_embedders_are_measured_by_the_cosines_of_pairs(embedders):
    models = measure(embedders, PAIRS, baseline="large", **OF_PAIRS)["models"]
    ours, theirs = cosines_of(embedders["small"], ""), cosines_of(embedders["large"], "very ")
    found = models["small"]["scores"]
    expected = spearmanr(torch.cosine_similarity(*ours, dim=-1), PAIRS["label"]).statistic
    assert found["spearman_cosine"]["value"] == pytest.approx(expected, abs=1e-6)
    expected = torch.cosine_similarity(ours, theirs, dim=-1).mean().item()
    assert found["cosine_to_baseline"]["value"] == pytest.approx(expected, abs=1e-5)
    assert models["large"]["scores"]["cosine_to_baseline"]["value"] == pytest.approx(1)
    assert models["small"]["differences"].keys() == found.keys()
    assert models["small"]["speed_up"]["rounds"] == 2


GROUPED = PAIRS.remove_columns("label").add_column("label", [0, 1, 0, 2, 0, 1, 0, 1])
GROUPED = GROUPED.add_column("query", [0, 0, 0, 1, 1, 1, 2, 2])
OF_GROUPS = QUICK | {"columns": TextColumns(text_pair_column="text_pair", max_length=12, group_column="query")}


def test_rerankers_are_measured_by_the_order_of_documents(tmp_path):
    model, tokenizer = save_classifier(tmp_path, labels=("score",), layers=2), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        scores = [model(**tokenizer(r["text"], r["text_pair"], return_tensors="pt")).logits.item() for r in GROUPED]
    gains, ranks = [], []
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7]):
        order = sorted(rows, key=lambda row: -scores[row])
        labels = [GROUPED["label"][row] for row in order]
        dcg, best = (sum(v / math.log2(i + 2) for i, v in enumerate(x)) for x in (labels, sorted(labels)[::-1]))
        gains.append(dcg / best)
        ranks.append(1 / (1 + next(i for i, v in enumerate(labels) if v)))
    result = measure({"a": str(tmp_path), "b": str(tmp_path)}, GROUPED, baseline="a", **OF_GROUPS)
    found = result["models"]["b"]
    assert found["scores"]["ndcg@10"]["value"] == pytest.approx(sum(gains) / 3)
    assert found["scores"]["mrr@10"]["value"] == pytest.approx(sum(ranks) / 3)
    assert found["differences"]["ndcg@10"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    sampled = measure({"a": str(tmp_path)}, GROUPED, baseline="a", max_examples=5, metrics=["mrr"], **OF_GROUPS)
    assert sampled["settings"]["examples"] in (3, 5)  # whole groups
    assert sampled["models"]["a"]["scores"].keys() == {"mrr@10"}


def test_embedders_are_measured_by_the_documents_that_queries_find(embedders):
    pairs = PAIRS.remove_columns("label").select(range(7))
    pairs = pairs.add_column("other", [*pairs["text_pair"][:6], pairs["text_pair"][0]])  # one document of two queries
    columns = TextColumns(text_pair_column="other", max_length=8)
    found = measure(embedders, pairs, baseline="large", **QUICK | {"columns": columns})["models"]["large"]["scores"]
    queries, documents = (side[:7] for side in cosines_of(embedders["large"], "very "))
    documents[6] = documents[0]
    cosines = torch.cosine_similarity(queries[:, None], documents[None, :6], dim=-1)  # (queries, documents)
    own = cosines[torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 5, 0])]
    ranks = (cosines > own[:, None] + 1e-6).sum(1) + ((cosines - own[:, None]).abs() < 1e-6).sum(1) / 2 + 0.5
    assert found["ndcg@10"]["value"] == pytest.approx((1 / (ranks + 1).log2()).mean().item(), abs=1e-5)
    assert found["recall@10"]["value"] == 1  # of six documents


# Heads that answer token by token, and several labels of a text


def save_as(folder, classifiers, model_class, **fields):  # noqa: F811
    """A tiny model with another head, with the tokenizer of the classifiers."""
    config = BertConfig.from_pretrained(classifiers / "large", **fields)
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifiers / "large").save_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


TAGS = {0: "O", 1: "B-place", 2: "I-place"}
TAGGED = Dataset.from_dict(
    {
        "tokens": [["good", "bad", "film"], ["a", "very", "good", "film"], ["not"]],
        "tags": [["B-place", "I-place", "O"], ["O", "O", "B-place", "B-place"], ["O"]],
    }
)


@pytest.mark.parametrize("decodes", [False, True], ids=["softmax", "crf"])
def test_taggers_are_measured_by_their_entities(classifiers, tmp_path, decodes):  # noqa: F811
    named = {"id2label": TAGS, "label2id": {name: index for index, name in TAGS.items()}}
    model, tokenizer = save_as(tmp_path, classifiers, BertForTokenClassification, **named)
    if decodes:
        model = CrfForTokenClassification.from_dense(model, tag_scheme="IOB2").eval()
        model.save_pretrained(tmp_path)
    tagged = []
    for words in TAGGED["tokens"]:
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        words_at = torch.zeros_like(encoded["input_ids"])
        words_at[:, 1:-1] = 1
        with torch.no_grad():
            outputs = model(**encoded, **({"word_mask": words_at.bool()} if decodes else {}))
        found = outputs.predictions if decodes else outputs.logits.argmax(-1)
        tagged.append([TAGS[tag] for tag in found[0, 1:-1].tolist()])
    sources = {"tagger": str(tmp_path)}
    scores = measure(sources, TAGGED, baseline="tagger", **QUICK)["models"]["tagger"]["scores"]
    assert scores["f1"]["value"] == pytest.approx(span_f1(tagged, TAGGED["tags"][:]))
    assert scores["strict f1"]["value"] == pytest.approx(span_f1(tagged, TAGGED["tags"][:], True, scheme="IOB2"))
    assert scores["illegal segments"]["value"] == count_illegal(tagged, "IOB2")
    cut = measure(sources, TAGGED, baseline="tagger", **QUICK | {"columns": TextColumns(max_length=4)})
    short = [row[:2] + ["O"] * len(row[2:]) for row in tagged]  # two words fit between the special tokens
    if not decodes:  # whose tags depend on all words
        assert cut["models"]["tagger"]["scores"]["f1"]["value"] == pytest.approx(span_f1(short, TAGGED["tags"][:]))


@pytest.mark.parametrize(
    ("names", "told", "scheme"),
    [
        (["O", "B-x", "I-x"], "auto", "IOB2"),
        (["O", "I-x", "B-x", "E-x", "S-x"], "auto", "IOBES"),
        (["O", "B-x", "I-x"], "IOB1", "IOB1"),
        (["O", "x", "y"], "auto", None),
        (["O", "I-x"], "auto", None),
    ],
)
def test_the_scheme_is_read_off_all_tags_of_a_model(names, told, scheme):
    assert find_scheme(names, told) == scheme


def test_answers_to_questions_are_measured_as_squad_does(classifiers, tmp_path):  # noqa: F811
    model, tokenizer = save_as(tmp_path, classifiers, BertForQuestionAnswering)
    contexts, wanted = ["a good film", "not very bad film"], []
    rows = {"question": ["good", "a film"], "context": contexts}
    for question, context in zip(rows["question"], contexts, strict=True):
        encoded = tokenizer(question, context, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**encoded)
        places = [place for place, part in enumerate(encoded.sequence_ids(0)) if part == 1]
        spans = {
            (i, j): outputs.start_logits[0, i] + outputs.end_logits[0, j] for i in places for j in places if i <= j
        }
        first, last = max(spans, key=spans.get)
        wanted.append(" ".join(context.split()[first - places[0] : last - places[0] + 1]))
    golds = [[wanted[0]], ["very"]]
    starts = [[context.index(gold[0])] for context, gold in zip(contexts, golds, strict=True)]
    answers = [{"text": gold, "answer_start": start} for gold, start in zip(golds, starts, strict=True)]
    asked = Dataset.from_dict(rows | {"answers": answers})
    options = QUICK | {"columns": TextColumns(max_length=12)}
    scores = measure({"a": str(tmp_path)}, asked, baseline="a", **options)["models"]["a"]["scores"]
    assert scores["exact match"]["value"] == (1 + (wanted[1] == "very")) / 2
    assert scores["f1"]["value"] == pytest.approx((1 + token_f1(wanted[1], "very")) / 2)


def test_language_models_are_measured_by_the_next_token(tmp_path, classifiers):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(classifiers / "large")
    torch.manual_seed(0)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 1.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    surprise, right, tokens, size = 0.0, 0, 0, 0
    for row in EXAMPLES:
        encoded = tokenizer(row["text"], return_tensors="pt")
        ids = encoded["input_ids"]  # (1, seq)
        with torch.no_grad():
            outputs = model(**encoded, labels=ids)
        surprise += outputs.loss.item() * (ids.shape[1] - 1)
        right += (outputs.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum().item()
        tokens += ids.shape[1] - 1
        size += len(tokenizer.decode(ids[0, 1:]).encode())
    texts = Dataset.from_list(EXAMPLES).remove_columns("label")
    scores = measure({"a": str(tmp_path)}, texts, baseline="a", **QUICK)["models"]["a"]["scores"]
    assert scores["next token"]["value"] == pytest.approx(right / tokens)
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(surprise / tokens), rel=1e-4)
    assert scores["perplexity by byte"]["value"] == pytest.approx(math.exp(surprise / size), rel=1e-4)


def test_several_labels_of_a_text_are_measured_each_on_its_own(tmp_path):
    names = ("good", "bad", "short")
    model = save_classifier(tmp_path, labels=names, layers=2, problem_type="multi_label_classification")
    tokenizer, right, overlap, total = AutoTokenizer.from_pretrained(tmp_path), 0, 0, 0
    wanted = [["good"], ["bad", "short"], [], ["good", "bad"], ["short"], ["bad"], ["good"], []]
    for row, labels in zip(EXAMPLES, wanted, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        found = {name for name, logit in zip(names, logits.tolist(), strict=True) if logit > 0}
        right += found == set(labels)
        overlap += len(found & set(labels))
        total += len(found) + len(labels)
    texts = Dataset.from_dict({"text": [row["text"] for row in EXAMPLES], "label": wanted})
    scores = measure({"a": str(tmp_path)}, texts, baseline="a", **QUICK)["models"]["a"]["scores"]
    assert scores["f1"]["value"] == pytest.approx(2 * overlap / total)
    assert scores["all labels right"]["value"] == right / 8
    strange = Dataset.from_dict({"text": ["good"], "label": [["long"]]})
    with pytest.raises(ValueError, match="'label' must hold lists of the labels .*'short'.*, got 'long'"):
        measure({"a": str(tmp_path)}, strange, baseline="a", **QUICK)


def test_data_of_another_task_are_refused(embedders, classifiers, tmp_path):  # noqa: F811
    large, classifier = {"large": embedders["large"]}, {"large": str(classifiers / "large")}
    save_classifier(tmp_path / "score", labels=("score",))
    score = {"large": str(tmp_path / "score")}
    alone, unsure = GROUPED.select(range(7)), GROUPED.select(range(3)).map(lambda row: {"label": 0})
    empty = PAIRS.map(lambda row: {"text": ""}, load_from_cache_file=False)
    save_as(tmp_path / "masked", classifiers, BertForMaskedLM)
    refusals = [
        ({"large": str(tmp_path / "masked")}, PAIRS, QUICK, "must classify texts or tokens, .* got a BertForMaskedLM"),
        (large, PAIRS, QUICK, "without a head, as BertModel, must be measured on pairs .* Name `text_pair_column`"),
        (classifier, GROUPED, OF_GROUPS, "`group_column` must be given for rerankers alone, .* got 2 labels of"),
        (score, alone, OF_GROUPS, "'query' must put at least two documents in every group, 2 has one"),
        (score, unsure, OF_GROUPS, "above 0 for a relevant document"),
        (large, PAIRS, OF_PAIRS | {"metrics": ["ndcg"]}, "`metrics` must be among spearman_cosine, cosine_to_base"),
        (large, empty, OF_PAIRS, "'text' must hold texts that are not empty, row 0 is"),
        (large, PAIRS, OF_PAIRS | {"pooling": "max"}, "`pooling` must be one of mean, cls, last for .*, got 'max'"),
        (large | {"other": score["large"]}, PAIRS, OF_PAIRS, "must all have the task of 'large', embeddings, 'oth"),
    ]
    for models, data, options, message in refusals:
        with pytest.raises(ValueError, match=message):
            measure(models, data, baseline="large", **options)
