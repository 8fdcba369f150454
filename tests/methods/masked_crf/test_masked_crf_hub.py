"""New processes load and publish taggers, and users without the package run model and pipeline by the code in them."""

import json

import new_process
import pytest
import torch
from loopback_hub import loopback_hub  # noqa: F401
from tiny_crf import labels_of, make, make_batch, make_tokenizer

from hf_moebert.methods.masked_crf import CrfTokenClassificationPipeline


CODE = {"configuration_masked_crf.py", "modeling_masked_crf.py", "modeling_crf.py", "pipeline.py"}
CODE |= {"configuration_strict.py", "modeling_rates.py", "modeling_strict.py", "modeling_words.py"}
CODE |= {f"functional{name}.py" for name in ("", "_decoding", "_numpy", "_passes", "_schemes", "_tags", "_words")}
TEXT = "New Yorkers in the London and New York"
PUBLISH = """
from hf_moebert.methods.masked_crf import CrfTokenClassificationPipeline
from transformers import AutoModelForTokenClassification, AutoTokenizer

for name in ("bert", "roberta"):
    model = AutoModelForTokenClassification.from_pretrained(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    CrfTokenClassificationPipeline(model=model, tokenizer=tokenizer).push_to_hub(name)
    results[name] = model(ids, word_mask=torch.ones_like(ids)).predictions.tolist()
"""
WITHOUT_PACKAGE = """
sys.modules["hf_moebert"] = None  # importing it fails
from transformers import AutoModelForTokenClassification, pipeline

for name in ("bert", "roberta"):
    for place in (f"tester/{name}", str(folder / name)):
        try:
            AutoModelForTokenClassification.from_pretrained(place)
        except ValueError as error:
            results.setdefault("refusals", []).append(str(error))
        model = AutoModelForTokenClassification.from_pretrained(place, trust_remote_code=True).eval()
        found = model(ids, word_mask=torch.ones_like(ids)).predictions.tolist()
        results[place.rsplit("/")[-1] + str(place.startswith("tester"))] = found
    pipe = pipeline("masked-crf", model=f"tester/{name}", trust_remote_code=True)
    results[f"text {name}"] = pipe(sys.argv[3], aggregation_strategy="simple")
"""


def run(code, *values):
    """Run Python in a process that uses the loopback server as the Hub, and return the `results` it prints."""
    start = "import json, pathlib, sys, torch\nfolder, results = pathlib.Path(sys.argv[1]), {}\n"
    start += "ids = torch.tensor(json.loads(sys.argv[2]))\n"
    done = new_process.run(start + code + "\nprint()\nprint(json.dumps(results))", *values)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.process
@torch.no_grad()
def test_new_processes_find_the_same_tags_with_the_package_and_without(loopback_hub, tmp_path):  # noqa: F811
    ids, found, texts = make_batch()["input_ids"], {}, {}
    for name in ("bert", "roberta"):
        model = make(name, labels_of("IOBES"))
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        pipe = CrfTokenClassificationPipeline(model=model, tokenizer=make_tokenizer())
        found[name], texts[name] = (
            model(ids, word_mask=torch.ones_like(ids)).predictions.tolist(),
            pipe(TEXT, aggregation_strategy="simple"),
        )
        assert texts[name]
    values = (tmp_path, json.dumps(ids.tolist()), TEXT)
    assert run(PUBLISH, *values) == found
    for name in found:
        files = loopback_hub.files(f"tester/{name}")
        assert {file for file in files if file.endswith(".py")} >= CODE
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
    results = run(WITHOUT_PACKAGE, *values)
    assert len(results["refusals"]) == 4
    assert all("trust_remote_code=True" in refusal for refusal in results["refusals"])
    for name, tags in found.items():
        assert results[f"{name}True"] == results[f"{name}False"] == tags
        for ours, theirs in zip(texts[name], results[f"text {name}"], strict=True):
            assert theirs == ours | {"score": pytest.approx(ours["score"], abs=1e-5)}
