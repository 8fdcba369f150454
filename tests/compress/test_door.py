"""The door from end to end on a tiny classifier: what it leaves, how it goes on after a crash, what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset
from door_runs import COLUMNS, SENTENCES, STACK, TAGGED, StopAt, Stopped, recipe_of, run, save_tagger, texts, weights
from huggingface_hub import ModelCard
from tiny_classifiers import WORDS, save_classifier
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.checkpoints.embedders import save_embedder
from hf_moebert.compress import searching
from hf_moebert.compress.recipe_file import read_recipe
from hf_moebert.compress.tasks import UnsupportedModelError
from hf_moebert.compress.verifying import verify
from hf_moebert.measuring.comparison import TextColumns


def test_a_stack_leaves_a_model_and_its_proof(finished, given):
    assert [stage["stage"] for stage in finished.stages] == ["1-prune", "2-experts", "3-distil"]
    model = AutoModelForSequenceClassification.from_pretrained(finished.model_folder)
    assert model.config.num_experts == 2
    assert model.num_parameters() < AutoModelForSequenceClassification.from_pretrained(given).num_parameters()
    report = json.loads((finished.folder / "report.json").read_text())
    assert report["verdict"]["outcome"] == "met"
    assert report["verdict"]["examples"] == 43  # a fifth of the texts
    assert [len(report["layers"][name]) for name in ("given", "chosen")] == [2, 2]
    assert [sum(shares) for shares in report["experts"]] == pytest.approx([1, 1])
    assert [step for step, _ in report["stages"][2]["losses"]] == [1, 2, 3, 4]
    assert set(report["measurement"]["models"]) == {"given", "compressed", "given, float32", "compressed, float32"}
    card = ModelCard.load(finished.model_folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.eval_results[0].metric_value == finished.measurement["models"][finished.name]["scores"][
        "accuracy"
    ]["value"]  # fmt: skip
    lock = yaml.safe_load((finished.folder / "recipe.lock.yaml").read_text())
    assert [next(iter(stage)) for stage in lock["stages"]] == ["prune", "experts", "distil", "optimize"]
    assert read_recipe(finished.folder / "recipe.lock.yaml") == finished.recipe
    assert {path.name for path in finished.folder.iterdir()} == {
        "model", "stages", "report.json", "report.md", "report.html",
        "recipe.lock.yaml", "verify.safetensors", "_training.lock",
    }  # fmt: skip


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(finished, given, tmp_path, step):
    with pytest.raises(Stopped):
        run(given, tmp_path / "run", STACK, callbacks=[StopAt(step)])
    assert not (tmp_path / "run" / "model").exists()
    lines = []
    result = run(given, tmp_path / "run", STACK, resume=True, tell=lines.append)
    assert lines[:2] == ["1-prune: found finished", "2-experts: found finished"]
    assert weights(result.model_folder) == weights(finished.model_folder)


def test_a_stage_that_was_told_something_else_is_done_again(finished, given, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    changed = [*STACK[:2], {"distil": {"steps": 5, "batch_size": 8}}]
    lines = []
    run(given, tmp_path / "run", changed, resume=True, tell=lines.append)
    assert lines[:3] == ["1-prune: found finished", "2-experts: found finished", "3-distil: begins"]


def test_a_damaged_stage_is_done_again(finished, given, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    (file,) = tmp_path.glob("run/stages/2-experts-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    lines = []
    result = run(given, tmp_path / "run", STACK, resume=True, tell=lines.append)
    assert "2-experts: begins" in lines
    assert weights(result.model_folder) == weights(finished.model_folder)


def test_without_labels_the_given_model_is_the_judge(given, tmp_path):
    result = run(given, tmp_path / "run", [{"optimize": {"precision": "float32"}}], texts(labelled=False))
    assert result.measurement["models"]["given"]["scores"]["accuracy"]["value"] == 1
    assert result.verdict.difference["value"] == 0
    assert not json.loads((tmp_path / "run/report.json").read_text())["labelled"]


def test_platon_prunes_while_the_next_stage_trains(given, tmp_path):
    stages = [
        {"prune": {"method": "platon", "keep_ratio": 0.5, "multiple_of": 1}},
        {"distil": {"steps": 12, "batch_size": 8}},
    ]
    result = run(given, tmp_path / "run", stages)
    assert [stage["stage"] for stage in result.stages] == ["2-distil"]
    assert result.load().num_parameters() < AutoModelForSequenceClassification.from_pretrained(given).num_parameters()


@pytest.mark.parametrize("keep", [{"keep": [1]}, {"keep": 0.5}, {"keep": 0.5, "by": "importance"}])
def test_layers_that_are_left_follow_the_last_one_of_the_teacher(given, tmp_path, keep):
    lines = []
    result = run(given, tmp_path / "run", [{"drop_layers": keep}, {"distil": {"steps": 2}}], tell=lines.append)
    assert result.load().config.num_hidden_layers == 1
    assert any(line.startswith("2-distil: ") and " s" in line for line in lines)


def test_single_weights_are_packed(given, tmp_path):
    stages = [
        {"prune": {"method": "platon", "granularity": "unstructured", "keep_ratio": 0.2}},
        {"distil": {"steps": 12, "batch_size": 8}},
        "pack",
    ]
    model = run(given, tmp_path / "run", stages).load()
    matrix = model.bert.encoder.layer[0].intermediate.dense.weight
    assert (matrix == 0).float().mean() > 0.5


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_regression_is_compressed_by_the_score_that_counts(tmp_path, metric):
    save_classifier(tmp_path / "given", labels=("score",), layers=2)
    data = Dataset.from_list([{"text": text, "label": float(text.count("good"))} for text in SENTENCES])
    wanted = {} if metric == "pearson" else {"metric": metric}
    result = run(tmp_path / "given", tmp_path / "run", recipe_of(STACK[:1], **wanted), data)
    assert result.verdict.metric == metric


@pytest.mark.parametrize("columns", [("tokens", "tags"), ("tokens",), ("text",)])
def test_a_tagger_is_compressed_with_tags_and_without(given, tmp_path, columns):
    save_tagger(tmp_path / "given", given)
    data = Dataset.from_list(TAGGED).add_column("text", SENTENCES).select_columns(list(columns))
    result = run(tmp_path / "given", tmp_path / "run", [*STACK[:1], STACK[2]], data)
    scores = result.measurement["models"]["given"]["scores"]
    assert result.verdict.metric == "f1"
    assert (scores["f1"]["value"] == 1) == ("tags" not in columns)
    assert result.load().config.id2label[1] == "B-thing"
    assert max(verify(tmp_path / "run").values()) < 1e-4


@pytest.mark.parametrize("labelled", [True, False])
def test_a_reranker_is_judged_by_the_order_of_its_documents(tmp_path, labelled):
    save_classifier(tmp_path / "given", labels=("score",), layers=2)
    rows = [{"text": SENTENCES[row // 4], "other": text, "query": row // 4} for row, text in enumerate(SENTENCES)]
    if labelled:
        rows = [row | {"label": float(row["other"] == SENTENCES[4 * row["query"]])} for row in rows]
    columns = TextColumns(text_pair_column="other", max_length=12, group_column="query")
    mixed = Dataset.from_list(rows).shuffle(seed=0)
    result = run(tmp_path / "given", tmp_path / "run", [*STACK[:1], STACK[2]], mixed, columns=columns)
    assert result.verdict.metric == "ndcg@10"
    assert result.verdict.examples == 11  # queries of four documents, a fifth of the rows
    assert "on 11 queries, allowed" in result.verdict.reasons[0]
    if not labelled:
        assert result.measurement["models"]["given"]["scores"]["mrr@10"]["value"] == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_a_model_of_several_labels_is_compressed(tmp_path, labelled):
    names = ("good", "bad", "film")
    save_classifier(tmp_path / "given", labels=names, layers=2, problem_type="multi_label_classification")
    data = Dataset.from_list([{"text": t, "label": [n for n in names if n in t.split()]} for t in SENTENCES])
    result = run(tmp_path / "given", tmp_path / "run", STACK[:3], data if labelled else data.remove_columns("label"))
    assert result.verdict.metric == "f1"
    assert (result.measurement["models"]["given"]["scores"]["f1"]["value"] == 1) == (not labelled)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_model_that_answers_questions_is_compressed(given, tmp_path, labelled):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(AutoConfig.from_pretrained(given))
    torch.nn.init.normal_(model.qa_outputs.bias)  # a trained head
    for part in (model, AutoTokenizer.from_pretrained(given)):
        part.save_pretrained(tmp_path / "given")
    rows = [{"question": text.split()[0], "context": text} for text in SENTENCES]
    if labelled:
        rows = [row | {"answers": {"text": [row["question"]], "answer_start": [0]}} for row in rows]
    result = run(tmp_path / "given", tmp_path / "run", STACK[:3], Dataset.from_list(rows))
    assert result.verdict.metric == "f1"
    assert (result.measurement["models"]["given"]["scores"]["exact match"]["value"] == 1) == (not labelled)
    assert max(verify(tmp_path / "run").values()) < 1e-4


def test_a_language_model_is_compressed(given, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(given, model_input_names=["input_ids", "attention_mask"])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **size))
    for folder in (dense, tokenizer):
        folder.save_pretrained(tmp_path / "given")
    masks = {"prune": {"method": "masks", "keep_ratio": 0.5, "multiple_of": 4}}
    stages = [masks, {"distil": {"steps": 10, "batch_size": 8, "hidden_states": False}}]
    result = run(tmp_path / "given", tmp_path / "run", stages, texts(labelled=False))
    assert result.verdict.metric == "next token"
    found = sum(p.numel() for name, p in result.load().named_parameters() if "proj" in name and "mlp" in name)
    assert found == sum(p.numel() for p in dense.model.layers.parameters() if 32 in p.shape) // 2  # half of the units
    assert result.measurement["models"]["given"]["scores"]["perplexity"]["value"] > 1
    assert max(verify(tmp_path / "run").values()) < 1e-4


def test_the_vocabulary_is_trimmed_to_the_texts(tmp_path):
    pieces = [*"very", *(f"##{letter}" for letter in "very")]  # so that "very" can still be written without its token
    save_classifier(tmp_path / "given", layers=2, words=[*WORDS, *pieces])
    few = Dataset.from_list([row for row in texts() if "very" not in row["text"].split()])
    stages = [{"distil": {"steps": 2, "batch_size": 8}}, "trim_vocabulary", {"optimize": {"precision": "float32"}}]
    result = run(tmp_path / "given", tmp_path / "run", stages, few)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "given", result.model_folder))
    assert set(before.get_vocab()) - set(after.get_vocab()) == {"very"}
    assert len(after) == result.load().config.vocab_size == len(before) - 1
    distilled = next((tmp_path / "run/stages").glob("1-distil-*"))
    text = "a good film"
    with torch.no_grad():
        answers = [
            AutoModelForSequenceClassification.from_pretrained(folder)(**tokenizer(text, return_tensors="pt")).logits
            for folder, tokenizer in ((distilled, before), (result.model_folder, after))
        ]
    torch.testing.assert_close(*answers)
    assert max(verify(tmp_path / "run").values()) < 1e-4


def test_texts_themselves_can_be_timed(given, tmp_path):
    recipe = recipe_of([{"optimize": {"precision": "float32"}}], tokens="real")
    result = run(given, tmp_path / "run", recipe)
    assert result.measurement["settings"]["latency_seq"] is None


@pytest.fixture(scope="module")
def embedder(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(given).bert
    save_embedder(
        model, AutoTokenizer.from_pretrained(given), folder, EmbeddingForm(prompts={"all": "a "}, default_prompt="all")
    )
    return folder


@pytest.mark.parametrize("pairs", [False, True])
def test_an_embedder_is_compressed_without_labels(embedder, tmp_path, pairs):
    data, columns = texts(labelled=False), COLUMNS
    if pairs:
        data = data.add_column("other", SENTENCES[1:] + SENTENCES[:1])
        columns = replace(COLUMNS, text_pair_column="other")
    result = run(embedder, tmp_path / "run", STACK[:3], data, columns=columns)
    assert result.verdict.metric == "spearman_cosine"
    assert result.measurement["models"]["given"]["scores"]["spearman_cosine"]["value"] == pytest.approx(1, abs=1e-6)
    assert 0 < result.measurement["models"]["compressed"]["scores"]["cosine_to_baseline"]["value"] < 1
    assert read_embedding_form(result.model_folder) == read_embedding_form(embedder)
    assert max(verify(tmp_path / "run").values()) < 1e-4


def test_an_embedder_is_judged_by_numbers_where_there_are_some(embedder, tmp_path):
    rows = [{"text": text, "other": SENTENCES[-row], "label": float(row % 5)} for row, text in enumerate(SENTENCES)]
    columns = replace(COLUMNS, text_pair_column="other")
    result = run(embedder, tmp_path / "run", STACK[:1], Dataset.from_list(rows), columns=columns)
    assert result.measurement["models"]["given"]["scores"]["spearman_cosine"]["value"] < 0.9


def test_a_folder_of_another_run_is_refused(finished, given):
    with pytest.raises(ValueError, match=r"`output_dir` must be an empty folder, .* Resume the run"):
        run(given, finished.folder, STACK)


def test_what_was_learned_by_heart_is_not_judged(given, tmp_path):
    with pytest.raises(ValueError, match=r"`eval_data` must hold texts that are not in `data`, but 216 of 216 are"):
        run(given, tmp_path / "run", STACK, eval_data=texts())


def test_too_few_texts_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match="`data` must hold at least 100 texts to hold some out, got 40"):
        run(given, tmp_path / "run", STACK, texts().select(range(40)))
    with pytest.raises(ValueError, match="`data` must hold at least 20 texts, got 0"):
        run(given, tmp_path / "run", STACK, texts().select([]), eval_data=texts())
    with pytest.raises(ValueError, match="`eval_data` must hold at least 20 texts, got 8"):
        run(given, tmp_path / "run", STACK, texts().select(range(8, 216)), eval_data=texts().select(range(8)))


@pytest.mark.parametrize(
    ("target", "columns", "message"),
    [
        ({"metric": "spearman"}, COLUMNS, "`metric` must be one of accuracy, f1, .* got 'spearman'"),
        ({"tokens": 17}, COLUMNS, "`tokens` must be at most the model's 16 positions, got 17"),
        ({}, replace(COLUMNS, max_length=20), "`max_length` must be at most the model's 16 positions, got 20"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_any_work(given, tmp_path, target, columns, message):
    with pytest.raises(ValueError, match=message):
        run(given, tmp_path / "run", recipe_of(STACK, **target), columns=columns)
    assert not (tmp_path / "run").exists()


def test_other_tasks_are_refused_by_their_name(given, tmp_path):
    body = AutoModelForSequenceClassification.from_pretrained(given).bert
    for name, model, message in (
        ("body", body, "must say by modules.json how it makes embeddings, got a BertModel without"),
        (
            "filler",
            BertForMaskedLM(body.config),
            "fine-tuned to classify texts or their words .* BertForMasked",
        ),
    ):
        shutil.copytree(given, tmp_path / name)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(UnsupportedModelError, match=message):
            run(tmp_path / name, tmp_path / f"run-{name}", STACK)


def test_the_same_seed_gives_the_same_bytes(finished, given, tmp_path):
    torch.rand(3)
    assert weights(run(given, tmp_path / "run", STACK).model_folder) == weights(finished.model_folder)


def test_another_machine_is_verified(finished, tmp_path):
    assert max(verify(finished.folder).values()) < 1e-4
    shutil.copytree(finished.folder, tmp_path / "run")
    model = finished.load()
    model.classifier.weight.data *= 1.1
    model.save_pretrained(tmp_path / "run/model")
    with pytest.raises(ValueError, match=r"The outputs in float32 must be within .* of those of verify.safetensors"):
        verify(tmp_path / "run")


def test_the_best_recipe_is_searched_for(given, tmp_path, monkeypatch):
    some = {name: searching.STRUCTURES[name] for name in ("as it is", "half of the layers", "pruned to 50 %")}
    monkeypatch.setattr(searching, "STRUCTURES", some)
    monkeypatch.setattr(searching, "FEWEST_STEPS", 2)
    search = [{"search": {"short": 0.5}}, {"distil": {"steps": 4, "batch_size": 8}}]
    lines = []
    result = run(given, tmp_path / "run", recipe_of(search, max_size=12_000, max_drop=0.5), tell=lines.append)
    assert {stage.name for stage in result.recipe.stages} <= {"drop_layers", "prune", "distil", "optimize"}
    tried = [(row["tried"], row["steps"]) for row in result.candidates]
    assert ("as it is, float32", "0") in tried
    assert tried[-1][1] == "4"  # what was tried for a short time was trained to the end
    assert (tried[-1][0], "2") in tried
    assert len(list(tmp_path.glob("run/stages/1-prune-*"))) == 1
    assert "Recipes that were tried" in (tmp_path / "run/report.html").read_text()
    assert any(line.startswith("search: half of the layers, 2 steps") for line in lines)
