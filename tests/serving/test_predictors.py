"""Predictors of single tasks: their answers are those of transformers' pipelines and of sentence-transformers."""

import json
import shutil

import new_process
import numpy as np
import pytest
import torch
from stacks import STAGES, make_dense
from tiny_classifiers import save_classifier
from tiny_tasks import KINDS, make_task, make_tokenizer, save_merged
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    TokenClassificationPipeline,
    pipeline,
)

from hf_moebert import EmbeddingForm, export_onnx, save_embedder, save_packed
from hf_moebert.architectures.protocols import AnswerOptions, OptimizedForInference, Predictor, UpdatablePredictor
from hf_moebert.checkpoints.json_files import save_json
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.measuring.engines import describe
from hf_moebert.methods.masked_crf.pipeline import CrfTokenClassificationPipeline
from hf_moebert.runtime import TextModel
from hf_moebert.serving.checkpoints import keep_in_memory
from hf_moebert.serving.loading import load_predictor, state_of


TEXTS = ["good film by ann lee", "bad", "is rome a good book ? not in ann ##a lee .", "", "film " * 12]
LONG = "ann lee is in rome . " * 20
PLAIN = AnswerOptions()
QUESTIONS = [{"question": "what is good ?", "context": text} for text in TEXTS if text]


def save_task(folder, name):
    make_task(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for name in KINDS:
        save_task(root / name, name)
    save_classifier(root / "relevance", labels=("score",))
    return root


def answer(predictor, inputs, options=PLAIN):
    for one in inputs:
        predictor.check(one, options)
    return predictor.answer([(one, options) for one in inputs])


def assert_same(found, wanted, tolerance=1e-6):
    """Compare answers, numbers up to a tolerance."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), [wanted[name] for name in found]
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=tolerance, rel=tolerance)
    else:
        assert found == wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sentiment", "classification"),
        ("topics", "multi-label"),
        ("stars", "regression"),
        ("relevance", "reranking"),
    ],
)
def test_classifiers_answer_as_the_pipeline_does(folders, name, kind):
    predictor = load_predictor(str(folders / name))
    assert isinstance(predictor, Predictor)
    assert predictor.describe()["kind"] == kind
    pipe = pipeline("text-classification", model=str(folders / name), top_k=None, device="cpu")
    inputs = [*TEXTS, {"text": "good", "text_pair": "bad film"}]
    assert_same(answer(predictor, inputs), pipe(inputs))
    raw = answer(predictor, inputs, AnswerOptions(raw_scores=True))
    assert_same(raw, pipe(inputs, function_to_apply="none"))


@pytest.mark.parametrize(("name", "task"), [("names", "token-classification"), ("slots", "masked-crf")])
def test_taggers_answer_as_their_pipelines_do(folders, name, task):
    """Long texts by strides, and lists of words, all in one batch."""
    predictor = load_predictor(str(folders / name))
    pipe = pipeline(task, model=str(folders / name), device="cpu", aggregation_strategy="simple", stride=4)
    words = ["ann", "lee", "is", "in", "rome"]
    wanted = [plain(pipe(text)) for text in (*TEXTS, LONG)]
    wanted += [plain(pipe([words], is_split_into_words=True, delimiter=" ")[0])]
    found = answer(predictor, [*TEXTS, LONG, {"tokens": words}])
    assert_same(found, wanted, 1e-6 if name == "names" else 5e-6)  # marginals are sums over all paths
    assert any(entity["start"] > 100 for entity in found[-2])


def plain(entities):
    return [{name: one.item() if hasattr(one, "item") else one for name, one in entity.items()} for entity in entities]


def test_questions_are_answered_in_the_likeliest_place(folders):
    """By brute force over all spans; in a long text, of all windows."""
    predictor, model = load_predictor(str(folders / "answers")), make_task("answers")
    for asked, found in zip(QUESTIONS, answer(predictor, QUESTIONS), strict=True):
        encoded = make_tokenizer()(asked["question"], asked["context"], return_tensors="pt", truncation="only_second")
        with torch.no_grad():
            outputs = model(**encoded)
        inside = [number for number, part in enumerate(encoded.encodings[0].sequence_ids) if part == 1]
        starts, ends = (logits[0, inside].softmax(-1) for logits in (outputs.start_logits, outputs.end_logits))
        best = max(float(starts[i] * ends[j]) for i in range(len(inside)) for j in range(i, len(inside)))
        if len(encoded["input_ids"][0]) < 16:
            assert found["score"] == pytest.approx(best, abs=1e-6)
        assert asked["context"][found["start"] : found["end"]] == found["answer"]
    (found,) = answer(predictor, [{"question": "what ?", "context": LONG}])
    assert LONG[found["start"] : found["end"]] == found["answer"]
    (found,) = answer(predictor, [{"question": "what is " * 9, "context": LONG}])
    assert "at most 12 tokens, got 21" in str(found)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A folder of sentence-transformers with prompts and a longest text of its own."""
    folder = tmp_path_factory.mktemp("embedder")
    form = EmbeddingForm("mean", True, {"query": "good ", "passage": "bad "}, "passage", 12)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, initializer_range=0.7, **sizes)
    save_embedder(BertModel(config).eval(), tokenizer, folder, form)
    return folder


def test_embedders_answer_as_sentence_transformers_does(embedder):
    library = pytest.importorskip("sentence_transformers").SentenceTransformer(str(embedder), device="cpu")
    predictor = load_predictor(str(embedder))
    short = TEXTS[:2]
    for options, wanted in (
        (PLAIN, library.encode(short)),
        (AnswerOptions(prompt_name="query"), library.encode(short, prompt_name="query")),
    ):
        found = answer(predictor, short, options)
        np.testing.assert_allclose([one.vector for one in found], wanted, atol=1e-6)
        assert [one.tokens for one in found] == [8, 4]
    cut = answer(predictor, [LONG], AnswerOptions(truncate=True))
    np.testing.assert_allclose([cut[0].vector], library.encode([LONG]), atol=1e-6)
    (long,) = answer(predictor, ["good"], AnswerOptions(normalize=False))
    assert np.linalg.norm(long.vector) != pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"`prompt_name` must be one of \['passage', 'query'\], got 'other'"):
        predictor.check("good", AnswerOptions(prompt_name="other"))


def test_a_text_that_is_too_long_is_refused_alone(folders, embedder):
    for folder in (folders / "sentiment", embedder):
        predictor = load_predictor(str(folder))
        fine, long, again = answer(predictor, ["good", LONG, "good"])
        assert isinstance(long, ValueError)
        assert "A text must have at most" in str(long)
        assert str(fine) == str(again)
        (cut,) = answer(predictor, [LONG], AnswerOptions(truncate=True))
        assert not isinstance(cut, Exception)


def test_numbers_that_are_not_finite_are_an_error_of_their_text_alone(folders):
    for name in ("sentiment", "names", "slots", "answers"):
        predictor = load_predictor(str(folders / name))
        inputs = QUESTIONS[:2] if name == "answers" else TEXTS[:2]
        with torch.no_grad():
            word = predictor.rows.tokenizer.token_to_id("bad")
            predictor.engine.model.get_input_embeddings().weight[word] = torch.nan
        fine, broken = answer(predictor, inputs)
        assert isinstance(broken, RuntimeError)
        assert not isinstance(fine, Exception)


def test_a_folder_that_changes_later_changes_no_answer(folders, tmp_path):
    shutil.copytree(folders / "sentiment", tmp_path / "model")
    predictor = load_predictor(str(tmp_path / "model"))
    before = answer(predictor, TEXTS)
    weights = tmp_path / "model" / "model.safetensors"
    with open(weights, "r+b") as stream:
        stream.truncate(0)
        stream.write(b"\xff" * 100_000)
    assert_same(answer(predictor, TEXTS), before)


def test_a_folder_that_changes_while_it_is_loaded_is_refused(folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "sentiment", tmp_path / "model")

    def write(model):
        (tmp_path / "model" / "config.json").touch()
        return keep_in_memory(model)

    monkeypatch.setattr("hf_moebert.serving.checkpoints.keep_in_memory", write)
    with pytest.raises(ValueError, match="changed while it was loaded"):
        load_predictor(str(tmp_path / "model"))
    assert state_of(tmp_path / "model").keys() >= {"config.json", "model.safetensors"}


def test_tied_weights_stay_tied():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = keep_in_memory(AutoModelForMaskedLM.from_config(config))
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_what_cannot_be_served_is_refused(folders, tmp_path, embedder):
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    for model, name in ((BertForMaskedLM(config), "writer"), (BertModel(config), "body")):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for source, options, message in (
        (tmp_path / "writer", {}, "must be one for .*, embedding or multi-task, got BertForMaskedLM"),
        (tmp_path / "body", {}, "no modules.json that says how it makes embeddings. Give `--pooling mean`"),
        (tmp_path / "body", {"pooling": "max"}, "`pooling` must be one of"),
        (embedder, {"pooling": "cls"}, "holds an embedder of the pooling 'mean'"),
        (folders / "sentiment", {"pooling": "cls"}, "a BertForSequenceClassification, which has a head"),
        (folders / "sentiment", {"engine": "onnx"}, "holds no graphs. Use `hf-moebert export` or `engine`"),
        (folders / "sentiment", {"engine": "jax"}, "`engine` must be one of torch, onnx"),
        (folders / "sentiment", {"precision": "int4"}, "`precision` must be one of float32, bfloat16, int8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictor(str(source), **options)
    assert load_predictor(str(tmp_path / "body"), pooling="cls").describe()["pooling"] == "cls"
    (folders / "sentiment" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folders / "sentiment" / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        load_predictor(str(folders / "sentiment"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(folders / "sentiment" / name)


def test_descriptions_are_json(folders, embedder):
    for folder in (*folders.iterdir(), embedder):
        said = load_predictor(str(folder)).describe()
        assert json.loads(json.dumps(said)) == said
        assert said["max_length"] in {12, 16}


FORMS = ("units", "weights", "experts", "masks", "MPO", "packed", "CRF")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_this_package_is_served(form, tmp_path):
    """By the same answers as the model itself gives in a pipeline."""
    dense = make_dense()
    if form == "packed":
        save_packed(STAGES["weights"](dense), tmp_path)
    else:
        STAGES[form](dense).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    predictor = load_predictor(str(tmp_path))
    cls = CrfTokenClassificationPipeline if form == "CRF" else TokenClassificationPipeline
    pipe = cls(model=load_model(tmp_path), tokenizer=make_tokenizer(), task="token-classification", device="cpu")
    wanted = [plain(pipe(text, aggregation_strategy="simple", stride=4)) for text in (*TEXTS, LONG)]
    assert_same(answer(predictor, [*TEXTS, LONG]), wanted, 2e-5)


def test_int8_answers_do_not_depend_on_the_others(folders):
    predictor = load_predictor(str(folders / "sentiment"), precision="int8")
    together = answer(predictor, TEXTS)
    assert_same(together, [one for text in TEXTS for one in answer(predictor, [text])])
    assert str(together) != str(answer(load_predictor(str(folders / "sentiment")), TEXTS))


EXPORTED = {"sentiment": TEXTS, "slots": [*TEXTS, LONG], "answers": QUESTIONS, "embedder": TEXTS}
WITHOUT_TORCH = """
import json, sys
for name in ("torch", "transformers", "safetensors.torch", "datasets"):
    sys.modules[name] = None  # importing it fails
from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.serving import build_app, load_predictor
folders, inputs, checkpoint = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
models = {name: load_predictor(folder, threads=1) for name, folder in folders.items()}
build_app(models)
options = AnswerOptions(truncate=True)
answers = {name: model.answer([(one, options) for one in inputs[name]]) for name, model in models.items()}
print(json.dumps(answers, default=lambda array: array.tolist()))
try:
    load_predictor(checkpoint)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def exports(folders, embedder, tmp_path_factory):
    """Return the folder of an export by the name of its task."""
    root = tmp_path_factory.mktemp("exports")
    for name in EXPORTED:
        folder = embedder if name == "embedder" else folders / name
        export_onnx(load_model(folder), root / name, tokenizer=AutoTokenizer.from_pretrained(folder))
    return {name: str(root / name) for name in EXPORTED}


@pytest.mark.process
@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_served(folders, embedder, exports, name):
    options = AnswerOptions(truncate=True)
    found = answer(load_predictor(exports[name], engine="onnx"), EXPORTED[name], options)
    wanted = answer(load_predictor(str(embedder if name == "embedder" else folders / name)), EXPORTED[name], options)
    if name == "embedder":
        np.testing.assert_allclose([one.vector for one in found], [one.vector for one in wanted], atol=1e-5)
    else:
        assert_same(found, wanted, 1e-4)
    with pytest.raises(ValueError, match="`precision` must be one that was exported"):
        load_predictor(exports[name], precision="int8")
    with pytest.raises(ValueError, match="holds an export. Leave `--engine` out"):
        load_predictor(exports[name], engine="torch")


@pytest.mark.process
def test_an_export_that_changes_later_changes_no_answer(exports, tmp_path):
    """Its weights are mapped: where a file is cut, the process would end."""
    shutil.copytree(exports["sentiment"], tmp_path / "graphs")
    predictor = load_predictor(str(tmp_path / "graphs"))
    before = answer(predictor, TEXTS)
    for file in tmp_path.rglob("*.*"):
        file.write_bytes(b"\xff" * 10)
    assert answer(predictor, TEXTS) == before


@pytest.mark.process
def test_exports_are_served_where_no_torch_is(folders, exports):
    asked = (json.dumps(exports), json.dumps(EXPORTED), folders / "sentiment")
    answers, refusal = new_process.run(WITHOUT_TORCH, *asked).stdout.splitlines()
    for name, found in json.loads(answers).items():
        wanted = answer(load_predictor(exports[name]), EXPORTED[name], AnswerOptions(truncate=True))
        assert_same(found, json.loads(json.dumps(wanted, default=lambda array: array.tolist())))
    assert "holds a checkpoint, which needs torch, and there is none here" in refusal


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_tasks_that_are_added_compute_in_the_precision_of_the_others(tmp_path, precision):
    predictor = load_predictor(str(save_merged(tmp_path, ("sentiment", "names"))), precision=precision)
    assert isinstance(predictor, UpdatablePredictor)
    predictor.put_task("stars", make_task("stars"))
    (found,) = answer(predictor, ["good film by ann"])
    assert found["answers"].keys() == {"sentiment", "names", "stars"}
    for branch in predictor.pipeline.model.branches.values():
        optimised = any(isinstance(module, OptimizedForInference) for module in branch.modules())
        assert optimised == (precision == "int8")
    predictor.remove_task("names")
    assert predictor.describe()["tasks"].keys() == {"sentiment", "stars"}


@pytest.mark.process
def test_the_engine_that_was_chosen_is_taken(folders, tmp_path):
    """As long as all is as it was when it was measured."""
    folder = tmp_path / "model"
    shutil.copytree(folders / "sentiment", folder)
    export_onnx(load_model(folder), folder / "onnx", tokenizer=AutoTokenizer.from_pretrained(folder))
    assert not isinstance(load_predictor(str(folder)).engine.model, TextModel)
    assert isinstance(load_predictor(str(folder), engine="onnx").engine.model, TextModel)
    conditions = describe(folder, (), 8, 0.01)
    choice = {"engine": "onnx", "precision": "float32"}
    for changed, chosen in (({}, True), ({"threads": 99}, False), ({"weights": {}}, False)):
        save_json(folder / "engine.json", {"conditions": conditions | changed, "choice": choice})
        assert isinstance(load_predictor(str(folder)).engine.model, TextModel) == chosen
