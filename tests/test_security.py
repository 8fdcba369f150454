"""Every sentence of SECURITY.md, each with the check that holds it."""

import ast
import inspect
import json
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
import test_api
import torch
from datasets import Dataset
from echo_server import Echo, running
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from test_cli import COMMANDS, invoke, one_line
from tiny_classifiers import EXAMPLES, save_classifier
from tiny_tasks import make_task, save_merged
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_moebert import MoEBertConfig, MoEBertForSequenceClassification
from hf_moebert.checkpoints.folders import list_files
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.packing import pack_folder
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.compress.verifying import write_golden
from hf_moebert.measuring.comparison import measure
from hf_moebert.reporting.hub import publish
from hf_moebert.reporting.model_card import TEMPLATE
from hf_moebert.serving import ServingLimits, build_app, load_predictor, run_server


ROOT = Path(__file__).parents[1]
TREES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "hf_moebert").rglob("*.py"))}
CALLS = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
HELD = set()


def holds(sentence):
    """Note that a test checks a sentence."""
    HELD.add(sentence)
    return lambda test: test


def test_every_sentence_has_a_check():
    *bullets, report = (ROOT / "SECURITY.md").read_text().removeprefix("# Security\n\n- ").split("\n- ")
    last, _, report = report.partition("\n\n")
    assert report.startswith("Please report a weakness privately")
    text = " ".join(" ".join([*bullets, last]).split())
    assert set(re.split(r"(?<=\.) (?=[A-Z`])", text)) == HELD


# The folders, and what opens them


def update(file, change):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | change))


def bring_code(folder, kind, canary):
    """Add code to a folder, which transformers must run to load its tokenizer or its model."""
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    if kind == "tokenizer":
        own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        update(folder / "tokenizer_config.json", own)
    elif kind == "kernel":
        update(folder / "config.json", {"tagger": {"attn_implementation": {"": "own/kernel@main"}}})
    else:
        names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
        update(folder / "config.json", {"model_type": "own", "auto_map": dict.fromkeys(names, "own.Own")})


def bring_pickle(folder):
    """Keep the weights of a folder in a pickle."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    for index in folder.glob("*.safetensors.index.json"):
        index.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a classifier of ours, a run that ended with it, a merged model, and updates with one task."""
    root = tmp_path_factory.mktemp("sound")
    dense = save_classifier(root / "classifier").config.to_dict() | {"model_type": "moebert"}
    config = MoEBertConfig(**dense, num_experts=2, expert_size=8, num_shared_neurons=0)
    MoEBertForSequenceClassification(config).save_pretrained(root / "classifier")
    save_merged(root / "merged", ["sentiment"])
    make_task("sentiment").save_pretrained(root / "updates" / "task")
    shutil.copytree(root / "classifier", root / "run" / "model")
    write_golden(root / "run", root / "run" / "model", {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]])}, None)
    (root / "examples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in EXAMPLES))
    return root


@pytest.fixture
def root(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Answer yes to whoever asks, and return the questions."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return questions


def command(*arguments):
    result = invoke(*arguments)
    if result.exit_code:
        raise ValueError(one_line(result))


def measure_on_the_command_line(root):
    folder, examples = root / "classifier", root / "examples.jsonl"
    command("measure", folder, "--baseline", folder, "--validation-file", examples, "--rounds", 2)


def put(root):
    predictor = load_predictor(str(root / "merged"))
    with TestClient(build_app(predictor, allow_updates=root / "updates")) as client:
        answer = client.put("/tasks/other", json={"folder": "task"})
    if answer.status_code != 200:
        raise ValueError(answer.text)


DOORS = {  # a folder, what it may bring code for, and what loads it
    "hf-moebert measure": ("classifier", ("config", "kernel", "tokenizer"), measure_on_the_command_line),
    "hf-moebert footprint": (
        "classifier",
        ("config", "kernel"),
        lambda root: command("footprint", root / "classifier"),
    ),
    "hf-moebert pack": (
        "classifier",
        ("config", "kernel"),
        lambda root: command("pack", root / "classifier", root / "packed"),
    ),
    "hf-moebert compress": (
        "classifier",
        ("config", "kernel", "tokenizer"),
        lambda root: command(
            "compress", root / "classifier", "--data", root / "examples.jsonl", "--output", root / "packed" / "run"
        ),
    ),
    "hf-moebert inspect": ("classifier", ("config", "kernel"), lambda root: command("inspect", root / "classifier")),
    "hf-moebert verify": ("run/model", ("config", "kernel"), lambda root: command("verify", root / "run")),
    "hf-moebert export": (
        "classifier",
        ("config", "kernel", "tokenizer"),
        lambda root: command("export", root / "classifier", root / "packed"),
    ),
    "hf-moebert engine": (
        "classifier",
        ("config", "kernel", "tokenizer"),
        lambda root: command("engine", root / "classifier", "--texts", root / "examples.jsonl"),
    ),
    "hf-moebert serve": ("merged", ("config", "kernel", "tokenizer"), lambda root: command("serve", root / "merged")),
    "measure": (
        "classifier",
        ("config", "kernel", "tokenizer"),
        lambda root: measure({"m": str(root / "classifier")}, Dataset.from_list(EXAMPLES), baseline="m"),
    ),
    "load_model": ("classifier", ("config", "kernel"), lambda root: load_model(root / "classifier")),
    "pack_folder": (
        "classifier",
        ("config", "kernel"),
        lambda root: pack_folder(root / "classifier", root / "packed"),
    ),
    "an update": ("updates/task", ("config", "kernel"), put),
}


def test_every_command_that_loads_a_folder_is_tried():
    assert {f"hf-moebert {name}" for name in COMMANDS if name not in ("publish", "recipes")} <= DOORS.keys()


# Pickle


@holds("This package writes no pickle: its own files are safetensors and JSON.")
def test_nothing_is_written_as_pickle():
    called = {ast.unparse(call.func) for _, call in CALLS}
    assert not called & {"torch.save", "np.save", "np.savez", "numpy.save", "pickle.dump", "pickle.dumps"}


@pytest.mark.parametrize("door", DOORS)
@holds(
    "No command reads a pickle, nor do `measure`, `load_model`, `pack_folder` and the updates of a server: they "
    "refuse a `pytorch_model.bin` and an `adapter_model.bin`."
)
def test_pickles_are_refused(door, root, monkeypatch):
    monkeypatch.setattr("hf_moebert.serving.server.run_server", lambda *args, **kwargs: None)
    folder, _, call = DOORS[door]
    bring_pickle(root / folder)
    with pytest.raises((ValueError, OSError), match="safetensors|`folder` must hold a model of one task"):
        call(root)
    assert not (root / "packed").exists()


@pytest.mark.parametrize("door", DOORS)
def test_adapters_in_pickles_are_refused(door, root, monkeypatch):
    monkeypatch.setattr("hf_moebert.serving.server.run_server", lambda *args, **kwargs: None)
    folder, _, call = DOORS[door]
    (root / folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    torch.save({}, root / folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match="must hold its adapter as adapter_model.safetensors|`folder` must hold a model"
    ):
        call(root)
    assert not (root / "packed").exists()


@pytest.mark.parametrize("folder", ["classifier", "merged"])
@holds("The classes of this package read a `pytorch_model.bin` only with `use_safetensors=False`.")
def test_classes_read_no_pickle(folder, root):
    bring_pickle(root / folder)
    for auto in (AutoModel, AutoModelForSequenceClassification) if folder == "classifier" else (AutoModel,):
        with pytest.raises(OSError, match="safetensors"):
            auto.from_pretrained(root / folder)


def test_all_loading_asks_for_safetensors():
    no_weights = re.compile(r"super\(\)|AutoConfig|AutoTokenizer|type\(tokenizer\)|cls\b|ExportedModel")
    for path, call in CALLS:
        name = ast.unparse(call.func)
        if name.endswith(".from_pretrained") and not no_weights.match(name):
            given = {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert given.get("use_safetensors") == "True", f"{path}: {ast.unparse(call)}"


STATE = ("optimizer.pt", "training_args.bin", "rng_state.pth", "trainer_state.json", "checkpoint-5/model.safetensors")


@holds(
    "What a Trainer keeps to resume a run (`optimizer.pt`, `training_args.bin`, `rng_state.pth`) is written and read "
    "by transformers, partly as pickle: resume only your own runs."
)
def test_no_pickle_is_opened_here():
    assert not {ast.unparse(call.func) for _, call in CALLS} & {"torch.load", "np.load", "pickle.load", "pickle.loads"}


@holds("`publish` and `pack` leave it behind.")
def test_state_stays_behind(root):
    folder = root / "classifier"
    before = list_files(folder)
    for name in STATE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert list_files(folder) == before  # what `publish` uploads
    pack_folder(folder, root / "packed")
    assert not [name for name in STATE if (root / "packed" / name).exists()]


# Code


def test_the_trap_works(root, asked):
    canary = root / "canary"
    bring_code(root / "classifier", "config", canary)
    with pytest.raises(AttributeError, match="Own"):
        AutoConfig.from_pretrained(root / "classifier")
    assert len(asked) == 1
    assert canary.exists()


@pytest.mark.parametrize(("door", "kind"), [(door, kind) for door, (_, kinds, _) in DOORS.items() for kind in kinds])
@holds(
    "No command runs code from a folder or a repository, and none asks whether to: `trust_remote_code` is False in "
    "every call, and a config.json that names kernels of the Hub is refused."
)
def test_no_code_of_a_folder_is_run(door, kind, root, asked, monkeypatch):
    monkeypatch.setattr("hf_moebert.serving.server.run_server", lambda *args, **kwargs: None)
    canary = root / "canary"
    folder, _, call = DOORS[door]
    bring_code(root / folder, kind, canary)
    with pytest.raises(ValueError, match="must load without code of its own|`folder` must hold a model of one task"):
        call(root)
    assert not asked
    assert not canary.exists()
    assert not (root / "packed").exists()


def test_the_base_of_an_adapter_is_checked(root):
    (root / "adapter").mkdir()
    update(root / "adapter" / "adapter_config.json", {"base_model_name_or_path": str(root / "classifier")})
    (root / "adapter" / "adapter_model.safetensors").touch()
    with refuse_code(root / "adapter"):
        pass
    update(root / "classifier" / "config.json", {"experts_implementation": "paged|own/kernel"})
    with (
        pytest.raises(ValueError, match=r"names the kernels \['paged\|own/kernel'\]"),
        refuse_code(root / "adapter"),
    ):
        pass


def test_every_call_says_that_code_is_not_trusted():
    found = 0
    for path, call in CALLS:
        name = ast.unparse(call.func)
        if re.fullmatch(r"(Auto\w+|loader)\.from_pretrained|pipeline", name):
            given = {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert given.get("trust_remote_code") == "False", f"{path}: {ast.unparse(call)}"
            found += 1
    assert found >= 6


@holds("`import hf_moebert` registers the model types, so that checkpoints of this package do not need that code.")
def test_a_checkpoint_of_ours_loads_by_the_package(root, asked):
    copies = list((root / "classifier").glob("*.py"))
    assert copies
    for path in copies:
        path.write_text(f"open({str(root / 'canary')!r}, 'w')\n")
    model = AutoModelForSequenceClassification.from_pretrained(root / "classifier")
    assert type(model) is MoEBertForSequenceClassification
    assert not asked
    assert not (root / "canary").exists()


@holds(
    "Users without the package may choose `trust_remote_code=True`; our cards name `pip install hf_moebert` first, "
    "and a `revision` to pin."
)
@pytest.mark.parametrize("card", [TEMPLATE, *(ROOT / "model_cards").glob("*/README.md")], ids=lambda p: p.parent.name)
def test_cards_name_the_package_first(card):
    text = card.read_text()
    if "trust_remote_code" in text:
        assert 0 < text.index("pip install hf_moebert") < text.index("trust_remote_code=True, revision=")


# Folders


def leave_by_publish(folder):
    publish(folder, "me/small")


def leave_by_pack(folder):
    pack_folder(folder, folder.parent / "packed")


LEAVING = pytest.mark.parametrize("leave", [leave_by_publish, leave_by_pack])


@LEAVING
@pytest.mark.parametrize("place", ["tokenizer.model", "1_Pooling/config.json", "more"])
@holds("`publish` and `pack` refuse links that lead out of the folder, and leave hidden files behind.")
def test_links_are_refused(leave, place, root):
    (root / "secret").mkdir()
    folder = root / "classifier"
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(root / "secret")
    with pytest.raises(ValueError, match=f"`folder` must not link out of itself, got '{place}'"):
        leave(folder)
    assert not (root / "packed").exists()


def test_hidden_files_stay_behind(root):
    folder = root / "classifier"
    (folder / ".cache").mkdir()
    for name in (".env", ".cache/token"):
        (folder / name).write_text("secret")
    assert not [file for file in list_files(folder) if file.parts[0].startswith(".")]
    pack_folder(folder, root / "packed")
    assert not list((root / "packed").rglob(".*"))


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"]
)
@pytest.mark.parametrize("name", ["notes.pkl", "more/pytorch_model.bin", "vocab.json"])
@holds(
    "`publish` refuses pickles, by their names and by the first bytes that `pickle` and `torch.save` write; `pack` "
    "leaves them behind."
)
def test_pickles_do_not_leave(name, write, root):
    folder = root / "classifier"
    (folder / name).parent.mkdir(exist_ok=True)
    write([1], folder / name)
    with pytest.raises(ValueError, match=f"must not hold pickle files.*{name}"):
        publish(folder, "me/small")
    pack_folder(folder, root / "packed")
    assert not (root / "packed" / name).exists()


# Connections

holds("Importing the package opens no connection.")(
    test_api.test_an_import_opens_no_connection_draws_no_random_number_and_needs_little
)
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}


@holds("There is no telemetry.")
def test_nothing_calls_home():
    for path, tree in TREES.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        allowed = {"socket"} if path.match("serving/server.py") else {"urllib.parse"}
        assert not {name for name in names - allowed if name.split(".")[0] in NETWORK}, path
    assert not [call for _, call in CALLS if "telemetry" in ast.unparse(call.func)]


@holds("No token is read or written here: huggingface_hub keeps them.")
def test_tokens_are_left_alone():
    for path, call in CALLS:
        assert not {one.arg for one in call.keywords} & {"token", "use_auth_token"}, path
        assert "get_token" not in ast.unparse(call.func), path
    assert not [path for path in TREES if "HF_TOKEN" in path.read_text()]


# The server


@holds("The server listens on 127.0.0.1 by default, and authenticates nobody without `--api-key-file`.")
def test_the_server_listens_on_this_machine():
    (host,) = [parameter for parameter in COMMANDS["serve"].params if parameter.name == "host"]
    assert host.default == "127.0.0.1"
    assert inspect.signature(run_server).parameters["host"].default is inspect.Parameter.empty
    with TestClient(build_app(Echo())) as client:
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


@holds(
    "It loads tasks only with `--allow-updates`, from folders inside that directory that neither are nor hold links."
)
def test_the_server_loads_tasks_from_its_directory_alone(root):
    (root / "updates" / "link").symlink_to(root / "updates" / "task")
    (root / "updates" / "linked").mkdir()
    (root / "updates" / "linked" / "format.txt").symlink_to(root / "examples.jsonl")
    for allowed, status in ((None, 403), (root / "updates", 422)):
        with TestClient(build_app(Echo(), allow_updates=allowed)) as client:
            for folder in ("../classifier", str(root / "classifier"), "link", "linked", "."):
                assert client.put("/tasks/new", json={"folder": folder}).status_code == status, folder


@holds("No text of a request is in its log.")
def test_the_server_logs_no_text(caplog):
    with TestClient(build_app(Echo())) as client, caplog.at_level("DEBUG", logger="hf_moebert"):
        assert client.post("/predict", json={"inputs": "trap"}).status_code == 500
    assert "RuntimeError" in caplog.text
    assert not re.search("trap|secret", caplog.text)


@holds("It redirects nobody.")
@pytest.mark.parametrize("path", ["/tasks/", "/predict/", "/health/", "//other.example"])
def test_the_server_redirects_nobody(path):
    with TestClient(build_app(Echo()), follow_redirects=False) as client:
        answer = client.get(path)  # that of the last path is the page at "/"
        assert answer.status_code == (200 if path.startswith("//") else 404)
        assert "location" not in answer.headers


@holds(
    "It closes connections whose headers are not whole in `--header-timeout-s`, and it gives up bodies that are not "
    "whole in `--timeout-s`."
)
@pytest.mark.parametrize("sent", [b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"])
def test_the_server_closes_slow_connections(sent):
    assert {"header_timeout_s", "timeout_s"} <= {parameter.name for parameter in COMMANDS["serve"].params}
    limits = ServingLimits(header_timeout_s=0.2, timeout_s=0.2)
    with running(build_app(Echo(), limits=limits)) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(sent)
            found = connection.makefile("rb").read()
    assert found.startswith(b"HTTP/1.1 408") if sent.endswith(b"{") else found == b""
