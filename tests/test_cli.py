"""The commands as a user types them: results, and bad use answered with one line and exit code 2."""

import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import fields
from importlib import metadata

import pytest
import typer
from huggingface_hub.errors import StrictDataclassClassValidationError
from pruned_models import SIZES, make_bert
from tiny_classifiers import EXAMPLES, classifiers  # noqa: F401
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from hf_moebert import cli
from hf_moebert.methods.platon import shrink
from hf_moebert.reporting import hub
from hf_moebert.serving import ServingLimits


QUICK = ["--latency-seq", "4", "--rounds", "2", "--max-length", "8"]
COMMANDS = typer.main.get_command(cli.app).commands


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def invoke_process(*arguments, code="import hf_moebert_main; hf_moebert_main.main()", **environment):
    """Run the console script in a process of its own, without a terminal."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "300"} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, timeout=100, check=False
    )


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


# Help


def test_every_command_has_help():
    assert COMMANDS.keys() == {
        "compress",
        "recipes",
        "inspect",
        "verify",
        "measure",
        "publish",
        "footprint",
        "pack",
        "export",
        "engine",
        "serve",
    }
    for command in ([], *([name] for name in COMMANDS)):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_is_written_with_dashes(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.param_type_name == "argument" or not any("_" in option for option in parameter.opts)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_least_value(name):
    """A number that is too small is refused before anything is loaded, by the name of its option."""
    numbers = [one for one in COMMANDS[name].params if one.type_descriptor.annotation in (int, float)]
    assert numbers or name in {"pack", "publish", "recipes", "inspect", "verify"}
    for number in numbers:
        assert number.min is not None, number.name
        line = one_line(invoke(name, number.opts[0], number.min - 1))
        assert f"Invalid value for '{number.opts[0]}'" in line


def test_the_limits_of_the_server_are_those_of_the_library():
    options = {parameter.name: parameter for parameter in COMMANDS["serve"].params}
    for field in fields(ServingLimits):
        option = options[field.name]
        assert (option.default, option.help) == (field.default, field.metadata["help"])


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"hf_moebert {metadata.version('hf_moebert')}\n")


HELP_ALONE = """
import sys
import hf_moebert_main
try:
    hf_moebert_main.main()
finally:
    assert not {"torch", "transformers", "transformers.models", "hf_moebert"} & sys.modules.keys()
"""


@pytest.mark.process
def test_help_errors_and_completion_import_no_model(tmp_path):
    result = invoke_process("--help", code=HELP_ALONE)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"Usage: hf-moebert" in result.stdout

    result = invoke_process(
        code=HELP_ALONE, _HF_MOEBERT_COMPLETE="complete_bash", COMP_WORDS="hf-moebert p", COMP_CWORD="1"
    )
    assert result.stdout.split() == [b"publish", b"pack"]

    file = tmp_path / "a b é\n.json"
    result = invoke_process("measure", tmp_path / "é", "--baseline", "b", "--validation-file", file, code=HELP_ALONE)
    assert result.returncode == 2
    assert result.stdout == b""
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("hf-moebert: Invalid value for '--validation-file'")


@pytest.mark.process
def test_an_output_that_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import hf_moebert_main; hf_moebert_main.main()", "--help"]
    with os.fdopen(writer) as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    closed = "import sys; sys.stdout = None; import hf_moebert_main; hf_moebert_main.main()"
    result = invoke_process("mesure", code=closed)
    assert (result.returncode, result.stderr.count(b"\n")) == (2, 1)


# Commands


def test_measure_prints_one_table_and_writes_everything(classifiers, few_resamples, tmp_path):  # noqa: F811
    output = tmp_path / "measurement.json"
    large, small = classifiers / "large", classifiers / "small"
    examples = classifiers / "examples.jsonl"
    result = invoke(
        *("measure", small, "--baseline", large, "--validation-file", examples),
        *("--metric", "accuracy", "--output", output, "--optimized", "float32", *QUICK),
    )
    assert result.exit_code == 0, result.output
    measurement = json.loads(output.read_text(encoding="utf-8"))
    assert measurement["baseline"] == "large"
    assert measurement["models"].keys() == {"large", "small", "large, float32", "small, float32"}
    assert measurement["models"]["small"]["source"] == str(small)
    assert measurement["settings"]["examples"] == len(EXAMPLES)
    assert measurement["seed"] == 0
    assert measurement["command"]
    stored = measurement["models"]["small"]["footprint"]["total"]
    for shown in ("large", "small", "accuracy difference", "speed-up", f"{stored:,}"):
        assert shown in result.stdout


@pytest.mark.process
def test_measure_in_a_poor_terminal(classifiers, tmp_path):  # noqa: F811
    folder = tmp_path / "päth with spaces"
    folder.symlink_to(classifiers)
    result = invoke_process(
        *("measure", folder / "small", folder / "small", "--baseline", folder / "large"),
        *("--validation-file", folder / "examples.jsonl", "--max-examples", 4, *QUICK),
        PYTHONIOENCODING="ascii",
        PYTHONUTF8="0",
        NO_COLOR="1",
        TERM="dumb",
    )
    assert (result.returncode, result.stderr) == (0, b"")  # no progress bar either
    assert b"\x1b" not in result.stdout
    assert b"| small" in result.stdout
    assert result.stdout.isascii()


# Errors


def one_line(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("hf-moebert: ")
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["mesure"], "No such command 'mesure'"),
        (["measure"], "Missing argument"),
        (["measure", "m"], "Missing option '--baseline'"),
        (["measure", "m", "--baseline", "b", "--rounds", "many"], "Invalid value for '--rounds'"),
        (["measure", "m", "--baseline", "b", "--speed"], "No such option"),
        (["measure", "m", "--baseline", "b"], "give exactly one of --validation-file and --dataset-name"),
        (
            ["measure", "m", "--baseline", "b", "--dataset-name", "d", "--output", "no/such/x.json"],
            "the folder of --output must exist and be writable",
        ),
        (
            ["measure", "m", "--baseline", "b", "--dataset-name", "d", "--output", "/"],
            "Invalid value for '--output': file '/' is a directory",
        ),
        (["measure", "m", "--baseline", "b", "--validation-file", "a é.csv"], "file 'a é.csv' does not exist"),
        (["measure", "m", "--baseline", "b", "--validation-file", "/"], "file '/' is a directory"),
        (["publish", "no such folder", "me/small"], "`folder` must hold config.json"),
        (
            ["footprint", "no such folder"],
            "must hold config.json and model.safetensors, got 'no such folder'",
        ),
        (["footprint", "f", "--threads", "0"], "Invalid value for '--threads'"),
        (["pack", "no such folder", "no output"], "`folder` must hold config.json"),
        (["pack", "f"], "Missing argument"),
        (["export", "no such folder", "no output"], "`folder` must hold config.json"),
    ],
)
def test_bad_use_is_answered_with_one_line(arguments, message):
    assert message in one_line(invoke(*arguments))


RAISED = {  # what may come from below, and what the line says of it
    "a strict configuration": (
        lambda: StrictDataclassClassValidationError("check", ValueError("`top_k` must be\nin [1, 4], got 9.")),
        (
            "StrictDataclassClassValidationError: Class validation error for validator 'check': ValueError: `top_k` "
            "must be in [1, 4], got 9. Use `hf-moebert --debug` to see where."
        ),
    ),
    "an attribute": (
        lambda: AttributeError("'NoneType' object has no attribute 'x'"),
        "AttributeError: 'NoneType' object has no attribute 'x'. Use `hf-moebert --debug` to see where.",
    ),
    "recursion": (
        lambda: RecursionError("maximum recursion depth exceeded"),
        "RecursionError: maximum recursion depth exceeded. Use `hf-moebert --debug` to see where.",
    ),
    "a key": (lambda: KeyError("bert"), "KeyError: 'bert'. Use `hf-moebert --debug` to see where."),
    "an error of the system": (lambda: OSError(28, "No space left", "a é\n"), "[Errno 28] No space left: 'a é\\n'"),
    "no words of the system": (OSError, "OSError. Use `hf-moebert --debug` to see where."),
    "no memory": (MemoryError, "MemoryError. Use `hf-moebert --debug` to see where."),
    "no words": (lambda: Exception(""), "Exception. Use `hf-moebert --debug` to see where."),
    "the end of a file": (EOFError, "EOFError. Use `hf-moebert --debug` to see where."),
    "several lines": (lambda: ValueError("a\n\tb\r\n\x1b[31mc\u2028d"), "a b [31mc d"),
    "a long list": (lambda: ValueError("x" * 100_000), "x" * 2000 + " …"),
    "no letter": (lambda: ValueError("a\udcff"), "a?"),
}
CALLED = {  # each command, and a function that it calls
    "compress": ("hf_moebert.compress.door.compress", ["m", "--output", "run", "--data"]),
    "inspect": ("hf_moebert.checkpoints.loading.load_model", ["m"]),
    "verify": ("hf_moebert.compress.verifying.verify", ["run"]),
    "recipes": ("hf_moebert.compress.recipe_file.shipped_recipes", []),
    "measure": ("hf_moebert.measuring.comparison.measure", ["m", "--baseline", "b", "--validation-file"]),
    "publish": ("hf_moebert.reporting.hub.publish", ["m", "me/m"]),
    "footprint": ("hf_moebert.checkpoints.loading.load_model", ["m"]),
    "pack": ("hf_moebert.checkpoints.packing.pack_folder", ["m", "packed"]),
    "export": ("hf_moebert.checkpoints.loading.load_model", ["m", "graphs"]),
    "engine": ("hf_moebert.measuring.engines.choose_engine", ["m", "--texts"]),
    "serve": ("hf_moebert.serving.app.build_app", ["m"]),
}


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run a command whose function below raises."""

    def run(command, error, *options):
        def fail(*args, **kwargs):
            raise error

        place, arguments = CALLED[command]
        monkeypatch.setattr(place, fail)
        monkeypatch.setattr("hf_moebert.serving.loading.load_predictor", lambda source, **options: None)
        if command in ("measure", "compress", "engine"):
            (tmp_path / "a.csv").write_text("text,label\na,b\n")
            arguments = [*arguments, tmp_path / "a.csv"]
        return invoke(*options, command, *arguments)

    return run


def test_every_command_is_made_to_fail():
    assert CALLED.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", CALLED)
@pytest.mark.parametrize("kind", RAISED)
def test_whatever_is_raised_is_one_line(call, command, kind):
    make, message = RAISED[kind]
    assert one_line(call(command, make())) == f"hf-moebert: {message}\n"


@pytest.mark.parametrize("command", CALLED)
def test_ctrl_c_and_a_closed_pipe_are_no_errors(call, command):
    for error, code in ((KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 1)):
        result = call(command, error)
        assert (result.exit_code, result.output) == (code, "")


@pytest.mark.parametrize("command", CALLED)
def test_a_stack_trace_is_shown_to_those_who_ask(call, command, monkeypatch):
    for options, value in ((["--debug"], "0"), ([], "1")):
        monkeypatch.setenv("HF_MOEBERT_DEBUG", value)
        result = call(command, KeyError("bert"), *options)
        assert (result.exit_code, result.stdout) == (2, "")
        first, *_, last = result.stderr.splitlines()
        assert first == "Traceback (most recent call last):"
        assert last.startswith("hf-moebert: KeyError: 'bert'")
    monkeypatch.setenv("HF_MOEBERT_DEBUG", "0")
    one_line(call(command, KeyError("bert")))


def test_an_underscore_in_an_option_is_a_dash():
    line = one_line(invoke("serve", "m", "--max_batch", "0", "--queue-size", "1"))
    assert "Invalid value for '--max-batch'" in line


def test_a_model_that_is_not_there(classifiers, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    examples = classifiers / "examples.jsonl"
    line = one_line(invoke("measure", "no/model", "--baseline", "no/model", "--validation-file", examples))
    assert "'no/model' cannot be loaded" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a é.bin", b"", "`--validation-file` must end in .json"),
        ("a.jsonl", b"", "a.jsonl' cannot be read: it is empty"),
        ("a.csv", b"text,label\n", "`--validation-file` must hold rows of one shape as csv"),
        ("a.json", b"[" * 100_000, "`--validation-file` must hold rows of one shape as json"),
        ("a.parquet", b"PAR1", "`--validation-file` must hold rows of one shape as parquet"),
    ],
)
def test_files_that_hold_no_examples(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    line = one_line(invoke("measure", "m", "--baseline", "b", "--validation-file", tmp_path / name))
    assert message in line
    assert "--debug" not in line


def test_unknown_labels(classifiers, tmp_path):  # noqa: F811
    file = tmp_path / "labels.csv"
    file.write_text("text,label\na film,neutral\n")
    large = classifiers / "large"
    assert "neutral" in one_line(invoke("measure", large, "--baseline", large, "--validation-file", file, *QUICK))


def test_models_of_one_name_are_told_apart(classifiers, few_resamples, tmp_path):  # noqa: F811
    (tmp_path / "small").symlink_to(classifiers / "large")
    output = tmp_path / "out.json"
    examples = classifiers / "examples.jsonl"
    result = invoke(
        *("measure", tmp_path / "small", "--baseline", classifiers / "small", "--validation-file", examples),
        *("--output", output, *QUICK),
    )
    assert result.exit_code == 0, result.output
    assert set(json.loads(output.read_text())["models"]) == {str(tmp_path / "small"), str(classifiers / "small")}


def test_publish_prints_the_commit(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(hub, "publish", lambda *args, **kwargs: calls.append((args, kwargs)) or "https://hub/commit/1")
    result = invoke("publish", tmp_path, "small", "--private", "--revision", "draft")
    assert (result.exit_code, result.stdout) == (0, "https://hub/commit/1\n")
    assert calls == [((tmp_path, "small"), {"private": True, "revision": "draft"})]


def test_footprint_of_a_packed_copy_is_that_of_the_model(tmp_path):
    model = make_bert()
    model.save_pretrained(tmp_path / "dense")
    result = invoke("pack", tmp_path / "dense", tmp_path / "packed")
    assert result.exit_code == 0, result.output
    dense, packed = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "packed"))
    assert f"{packed:,} bytes of weights, {packed / dense:.0%} of {dense:,}" in result.stdout
    total = sum(weight.numel() for weight in model.parameters())
    nonzero = sum(int(weight.count_nonzero()) for weight in model.parameters())
    for name in ("dense", "packed"):
        result = invoke("footprint", tmp_path / name, "--seq", 8, "--rounds", 2, "--threads", 1)
        assert result.exit_code == 0, result.output
        assert f"parameters      {total:,}" in result.stdout
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("not zero")]
        assert f"{nonzero:,}; sparsity: 9" in line
        assert f"% of pruned matrices, {1 - nonzero / total:.1%} of the model" in line
        for shown in ("dense", "packed", "csr", "2:4", "needs CUDA", "same speed", "inference"):
            assert shown in result.stdout


def test_footprint_of_a_shrunk_model_and_of_one_that_sees(tmp_path):
    dense = BertForSequenceClassification(BertConfig(**SIZES))
    layer = dense.bert.encoder.layer[0]
    for removed in (layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight.T):
        removed.data[:64] = 0
    shrink(dense).save_pretrained(tmp_path / "narrow")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit")
    for name in ("narrow", "vit"):
        result = invoke("footprint", tmp_path / name, "--seq", 8, "--rounds", 2, "--threads", 1)
        assert result.exit_code == 0, result.output
        assert "sparsity: nothing pruned" in result.stdout
        assert "nothing to gain" in result.stdout
        assert "Prune the model first" not in result.stdout
        assert (f"{SIZES['intermediate_size'] - 64} of {SIZES['intermediate_size']}" in result.stdout) == (
            name == "narrow"
        )
        assert (f"{dense.num_parameters():,} parameters, of which" in result.stdout) == (name == "narrow")


def test_measure_loads_in_the_dtype_that_is_asked_for(classifiers, few_resamples, tmp_path):  # noqa: F811
    BertForSequenceClassification.from_pretrained(classifiers / "small").bfloat16().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifiers / "small").save_pretrained(tmp_path)
    command = ["measure", tmp_path, "--baseline", classifiers / "large", "--optimized", "float32", *QUICK]
    command += ["--validation-file", classifiers / "examples.jsonl"]
    assert "float32" in one_line(invoke(*command))
    result = invoke(*command, "--dtype", "float32")
    assert result.exit_code == 0, result.output


def test_footprint_of_damaged_weights(tmp_path):
    make_bert().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert str(tmp_path) in one_line(invoke("footprint", tmp_path))


def test_libraries_do_not_report_what_they_raise(tmp_path, monkeypatch):
    model = make_bert()
    weights = model.state_dict()
    weights.pop("classifier.weight")
    model.save_pretrained(tmp_path, state_dict=weights)
    examples = tmp_path / "examples.jsonl"
    examples.write_bytes(b"\xff")
    reported = io.StringIO()
    loggers = [logging.getLogger(name) for name in cli.LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(reported)])
    assert "classifier.weight" in one_line(invoke("footprint", tmp_path))
    assert "cannot be read" in one_line(
        invoke("measure", tmp_path, "--baseline", tmp_path, "--validation-file", examples)
    )
    assert reported.getvalue() == ""
    assert [logger.level for logger in loggers] == levels
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    one_line(invoke("footprint", tmp_path))
    assert "MISSING" in reported.getvalue()


def test_pack_into_a_folder_in_use(tmp_path):
    make_bert().save_pretrained(tmp_path)
    assert "`output` must be a new or empty folder" in one_line(invoke("pack", tmp_path, tmp_path))
