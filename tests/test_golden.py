"""What every release has saved since 0.1.0 is loaded, and answers as it did; see `golden/README.md`."""

import json
import runpy
from pathlib import Path

import pytest
from golden.read import assert_same, example_of, load, read, tensors_of
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_moebert


GOLDEN = Path(__file__).parent / "golden"
PACKAGE = Path(hf_moebert.__file__).parent
FORMS = sorted(path.parent for path in GOLDEN.glob("*/*/example.json"))
MODELS = [folder for folder in FORMS if "auto" in example_of(folder)]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def name(folder):
    return f"{folder.parent.name}/{folder.name}"


def configs(folder):
    return [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("config.json")]


@pytest.mark.parametrize("folder", FORMS, ids=name)
def test_it_answers_as_it_did(folder):
    found, stored = read(folder), tensors_of(folder, "output")
    if name(folder) == "0.1.0/masks-run":  # its multipliers closed fewer masks in the same steps than the exact budget
        found, stored = ({"clock": tensors["clock"]} for tensors in (found, stored))
    assert_same(found, stored)


@pytest.mark.parametrize("folder", MODELS, ids=name)
def test_it_is_of_the_class_that_it_names(folder):
    (config,) = configs(folder)
    model = load(folder)
    assert config["architectures"] == [type(model).__name__]
    assert config["model_type"] == model.config.model_type


@pytest.mark.parametrize("folder", FORMS, ids=name)
def test_the_code_that_it_names_is_here(folder):
    files = {path.stem for path in PACKAGE.rglob("*.py")}
    for config in configs(folder):
        places = [place for place in config.get("auto_map", {}).values() if "--" not in place]
        # The code of 0.1 lies beside the checkpoints that it saved: one file has no counterpart here
        assert {place.partition(".")[0] for place in places} <= files | {"modeling_heads"}


@pytest.mark.parametrize("folder", FORMS, ids=name)
def test_it_holds_texts_and_safetensors_alone(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def registered():
    """Types of models that `import hf_moebert` makes known to transformers; of those that the table makes, a few."""
    found = CONFIG_MAPPING._extra_content.items()
    kinds = {kind for kind, config in found if config.__module__.split(".")[0] == hf_moebert.__name__}
    made = {kind for kind in kinds if kind.partition("_")[0] in ("shrunk", "mom", "moe", "multitask")}
    kept = {f"shrunk_{family}" for family in ("bert", "roberta", "distilbert", "vit")}
    kept |= {f"mom_{family}" for family in ("bert", "gpt2", "llama", "mistral", "qwen2", "qwen3", "t5")}
    kept |= {"multitask_bert"}
    return kinds - (made - kept)


def test_every_type_of_model_is_there():
    assert registered()
    assert registered() <= {config["model_type"] for config in configs(GOLDEN)}


@pytest.mark.process
def test_this_release_can_write_its_own(tmp_path, monkeypatch):
    """`write.py` reads back each form that it wrote."""
    monkeypatch.syspath_prepend(GOLDEN)
    runpy.run_path(str(GOLDEN / "write.py"))["write_all"](tmp_path / "next")
    assert registered() <= {config["model_type"] for config in configs(tmp_path)}
