"""Cards that no text can break out of, and uploads that leave behind what must not be published."""

import json

import new_process
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from loopback_hub import loopback_hub  # noqa: F401
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from hf_moebert.reporting.hub import publish
from hf_moebert.reporting.model_card import write_model_card


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Owned",
    '"]\ntags: [owned]\n#',
    "<script>alert(1)</script>",
    "</code><img src=x onerror=alert(1)>",
    "![owned](http://evil) [owned](javascript:alert(1))",
    "a | b |\n| --- | --- |",
    "```\n# Owned\n```",
    "*owned* **owned** _owned_ ~~owned~~ `owned` $owned$",
    "{{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x00",
    *("- a list", "+ a list", "1. a list", "12) a list", "-", "---", "- - -", "===", "> a quotation", "    code"),
]
CARD = {
    "repo_id": "tester/small",
    "base_model": "bert-base-uncased",
    "task": "text-classification",
    "dataset": "sst2",
    "language": "en",
    "license": "apache-2.0",
    "results": {"accuracy": 0.9375},
    "tables": {"Cost": [{"model": "small", "speed-up": "1.50x"}]},
}


@pytest.fixture
def checkpoint(tmp_path):
    """The smallest folder that may be published."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"model_type": "moebert", "id2label": {"0": "bad", "1": "good"}, "auto_map": {"AutoModel": "m.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_small.py").write_text("# code\n")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_card_says_how_to_load_and_what_was_reached(checkpoint):
    (checkpoint / "load map.png").write_bytes(b"png")
    path = write_model_card(
        checkpoint, **CARD, pictures={"load": checkpoint / "load map.png"}, commands=["hf-moebert measure a"]
    )
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "bert-base-uncased"
    assert card.data.tags == ["hf_moebert", "moebert"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("sst2", "validation")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9375)
    text = card.text
    assert text.index("import hf_moebert") < text.index("trust_remote_code=True, revision=")
    assert 'pipeline("text-classification", model="tester/small")' in text
    for part in ("Labels: bad, good.", "| accuracy | 0.9375 |", "| small | 1.50x |", "![load](load%20map.png)"):
        assert part in text
    rendered = MarkdownIt("commonmark").render(text)
    assert "<code>hf-moebert measure a\n</code>" in rendered


def test_card_of_a_stock_model_does_not_speak_of_remote_code(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    assert "trust_remote_code" not in write_model_card(checkpoint, **CARD).read_text()


def outline(text):
    """Return the structure that a reader sees: every kind of markup but plain text, code and their contents."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = [child for token in tokens for child in (token.children or [])]
    return [token.type for token in tokens + inline if token.type != "text"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_adds_markup_or_metadata(checkpoint, text):
    def write(word):
        config = {"model_type": word, "id2label": {"0": word}}
        (checkpoint / "config.json").write_text(json.dumps(config))
        (checkpoint / "picture.png").write_bytes(b"png")
        card = CARD | {"task": word, "dataset": word, "base_model": word, "language": word, "license": word}
        table = {word: [{word: word, "other": word}]}
        pictures = {word: checkpoint / "picture.png"}
        extra = {"commands": [word], "limitations": word, "split": word, "tags": [word], "pictures": pictures}
        return write_model_card(checkpoint, **card | {"results": {word: 0.5}, "tables": table}, **extra).read_text()

    harmless, hostile = write("two words"), write(text)
    metadata = [yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n")) for card in (harmless, hostile)]
    assert metadata[0].keys() == metadata[1].keys()
    assert metadata[1]["pipeline_tag"] == metadata[1]["language"] == " ".join(text.translate(BLANKS).split())
    assert outline(hostile.split("\n---\n", 1)[1]) == outline(harmless.split("\n---\n", 1)[1])
    assert "\x1b" not in hostile
    assert "49" not in hostile


BLANKS = str.maketrans("\n\x1b\x00", "   ")


def test_card_refuses_what_it_cannot_state(checkpoint, tmp_path):
    (tmp_path / "outside.png").write_bytes(b"png")
    with pytest.raises(ValueError, match="`pictures` must be files inside"):
        write_model_card(checkpoint, **CARD, pictures={"load": tmp_path / "outside.png"})
    with pytest.raises(ValueError, match="`results` must hold at least one metric"):
        write_model_card(checkpoint, **CARD | {"results": {}})
    with pytest.raises(ValueError, match="Repo id must"):
        write_model_card(checkpoint, **CARD | {"repo_id": "a b"})
    with pytest.raises(ValueError, match=r"`folder` must hold a config.json"):
        write_model_card(tmp_path, **CARD)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_publish_refuses_an_unfinished_folder(checkpoint, missing):
    (checkpoint / missing).unlink()
    with pytest.raises(ValueError, match=r"`folder` must hold config.json and model.safetensors"):
        publish(checkpoint, "tester/small")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "notes.pkl", "more/weights.pt"])
def test_publish_refuses_pickle_by_name(checkpoint, name):
    (checkpoint / "more").mkdir()
    (checkpoint / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"must not hold pickle files.*{name}"):
        publish(checkpoint, "tester/small")


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_publish_refuses_pickle_by_its_first_bytes(checkpoint, protocol):
    torch.save([1], checkpoint / "vocab.json", _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(ValueError, match=r"must not hold pickle files.*vocab.json"):
        publish(checkpoint, "tester/small")


def test_publish_refuses_links_out_of_the_folder(checkpoint, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"must not link out of itself, got 'notes.txt'"):
        publish(checkpoint, "tester/small")


PUBLISH = """
import pathlib, sys
from hf_moebert.cli import app
from hf_moebert.reporting.hub import publish
folder = pathlib.Path(sys.argv[1])
print(publish(folder, "tester/small"))
(folder / "README.md").write_text("better")
publish(folder, "tester/small", revision="draft")
try:
    publish(folder, "tester/open", private=True)
except ValueError as error:
    print(error)
app(["publish", str(folder), "closed", "--private"])
"""


@pytest.mark.process
def test_published_folders_come_back_whole_and_private_ones_stay_private(loopback_hub, checkpoint, tmp_path):  # noqa: F811
    # 640 bytes of header: the file then starts like a pickle of protocol 2
    save_file({"weight": torch.ones(2)}, checkpoint / "model.safetensors", {"note": "x" * 548})
    assert (checkpoint / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    for name in ("README.md", "picture[1].png", "picture1.png", "a [b] *.txt"):
        (checkpoint / name).write_text(name)
    published = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    (checkpoint / "checkpoint-5").mkdir()
    for name in (
        "training_args.bin",
        "trainer_state.json",
        "optimizer.pt",
        "platon_state.safetensors",
        "rng_state.pth",
        ".env",
    ):
        (checkpoint / "checkpoint-5" / name).write_text("stays behind")
        (checkpoint / name).write_text("stays behind")
    loopback_hub.create("tester/open", private=False)
    done = new_process.run(PUBLISH, checkpoint)
    first, refusal, last = done.stdout.splitlines()

    assert first.startswith(f"{loopback_hub.address}/tester/small/commit/")
    assert loopback_hub.files("tester/small", first.rpartition("/")[2]) == published
    assert loopback_hub.files("tester/small") == published
    better = published | {"README.md": b"better"}
    assert loopback_hub.files("tester/small", "draft") == better

    assert "`private` cannot be had: 'tester/open' exists" in refusal
    assert loopback_hub.files("tester/open") == {}
    assert loopback_hub.files("tester/closed", last.rpartition("/")[2]) == better
    assert loopback_hub.repositories["tester/closed"]["private"] is True
