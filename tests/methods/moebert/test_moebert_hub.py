"""A MoEBERT on the Hub: pushed and loaded with the package, and without it by the code that travels along."""

import json

import new_process
import pytest
import torch
from loopback_hub import loopback_hub  # noqa: F401
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from hf_moebert.methods.moebert import from_dense


pytestmark = pytest.mark.process
SIZES = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}
PARTS = ("dense", "empty_losses", "experts", "export", "inputs", "layers", "moebert", "outputs", "routing", "strict")
CODE = {f"modeling_{part}.py" for part in (*PARTS, "surgery", "units")}
CODE |= {f"configuration_{part}.py" for part in ("families", "moebert", "paths", "strict", "widths")}
CODE |= {"functional.py", "functional_routing.py"}
START = """
import json, os, pathlib, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

folder, told = pathlib.Path(sys.argv[1]), {}
ids = torch.tensor(json.loads(sys.argv[2]))
"""
END = """
print()  # the question of transformers whether to trust stands on this line
print(json.dumps(told))
"""
PUBLISH = """
import hf_moebert

model = AutoModelForSequenceClassification.from_pretrained(folder / "classes")
first = model.push_to_hub("classes")
AutoTokenizer.from_pretrained(folder / "classes").push_to_hub("classes")
with torch.no_grad():
    model.classifier.bias.add_(1)
told["second"] = model.push_to_hub("classes").oid
told["first"] = first.oid
AutoModel.from_pretrained(folder / "body").push_to_hub("body")
AutoModelForTokenClassification.from_pretrained(folder / "tags").push_to_hub("tags")
AutoModelForQuestionAnswering.from_pretrained(folder / "spans").push_to_hub("spans")

for trust in (False, True):  # the package's own code comes first
    loaded = AutoModelForSequenceClassification.from_pretrained("tester/classes", trust_remote_code=trust)
    assert type(loaded) is hf_moebert.MoEBertForSequenceClassification
    told[f"trust {trust}"] = loaded(ids).logits.tolist()
"""
WITHOUT_PACKAGE = """
sys.modules["hf_moebert"] = None  # importing it fails
code = pathlib.Path(os.environ["HF_HOME"]) / "modules"
told["refusals"] = []
for options in ({}, {"trust_remote_code": False}):
    for name in ("tester/classes", folder / "classes"):
        try:
            AutoModelForSequenceClassification.from_pretrained(name, **options)
        except ValueError as error:
            told["refusals"].append(str(error))
told["code that ran"] = [str(path) for path in code.rglob("*moebert.py")]
told["code that ran"] += [name for name in sys.modules if name.endswith("modeling_moebert")]

def load(auto, name, **options):
    return auto.from_pretrained(name, trust_remote_code=True, **options)

first = load(AutoModelForSequenceClassification, "tester/classes", revision=sys.argv[3])
told["first"] = first(ids).logits.tolist()
model = load(AutoModelForSequenceClassification, "tester/classes")
told["second"] = model(ids).logits.tolist()
told["local"] = load(AutoModelForSequenceClassification, folder / "classes")(ids).logits.tolist()
told["implementations"] = [model.config._experts_implementation]
for name in ("eager", "grouped_mm", "batched_mm"):
    model.set_experts_implementation(name)
    told["implementations"].append(model.config._experts_implementation)
    told[name] = model(ids).logits.tolist()
told["body"] = load(AutoModel, "tester/body")(ids).last_hidden_state.tolist()
told["body of a head"] = load(AutoModel, "tester/classes")(ids).last_hidden_state.tolist()
told["tags"] = load(AutoModelForTokenClassification, "tester/tags")(ids).logits.tolist()
told["spans"] = load(AutoModelForQuestionAnswering, "tester/spans")(ids).start_logits.tolist()
told["new head"] = load(AutoModelForTokenClassification, "tester/classes", allow_unexpected=True)(ids).logits.shape[-1]
classify = pipeline("text-classification", model="tester/classes", trust_remote_code=True)
told["pipeline"] = classify("w1 w2")[0]["label"]
model.save_pretrained(folder / "again")
told["again"] = load(AutoModelForSequenceClassification, folder / "again")(ids).logits.tolist()
"""
TRAIN = """
from datasets import Dataset
from transformers import Trainer, TrainingArguments
import hf_moebert

data = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]], "labels": [0, 1]})
for name in ("plain", "prepared"):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "classes")
    args = TrainingArguments(
        str(folder / name), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        push_to_hub=True, hub_model_id=name, hub_strategy="every_save", hub_always_push=True,
    )
    if name == "prepared":
        model.save_pretrained(args.output_dir)
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    told[name] = model.eval()(ids).logits.tolist()
"""


def run(code, *arguments):
    """Run Python in a process that takes the loopback server for the Hub, and return what it tells."""
    return json.loads(new_process.run(START + code + END, *arguments).stdout.splitlines()[-1])


def make_models():
    """Return one model of each kind."""
    names = ("bad", "so so", "good")
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    importance = torch.rand(3, 64, generator=torch.Generator().manual_seed(1))
    models = {"classes": from_dense(BertForSequenceClassification(config), importance, **SIZES)}
    spans = BertConfig(**config.to_dict() | {"num_labels": 2})
    for name, dense in (
        ("body", BertModel(config)),
        ("tags", BertForTokenClassification(config)),
        ("spans", BertForQuestionAnswering(spans)),
    ):
        models[name] = from_dense(dense, importance, routing="gate-token", **SIZES)
    return models


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 100, (3, 7), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def published(loopback_hub, tmp_path_factory, ids):  # noqa: F811
    """Push everything in one process with the package: the models, their folder, and what the process told."""
    folder, models = tmp_path_factory.mktemp("published"), make_models()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *[f"w{i}" for i in range(95)]]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder / "classes")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return models, folder, run(PUBLISH + TRAIN, folder, ids.tolist())


@torch.no_grad()
def test_pushed_models_load_with_and_without_the_package(loopback_hub, published, ids):  # noqa: F811
    models, folder, told = published

    def same(values, wanted):
        torch.testing.assert_close(torch.tensor(values), wanted, atol=1e-5, rtol=1e-5)

    first = models["classes"](ids).logits
    same(told["trust False"], first + 1)
    same(told["trust True"], first + 1)
    assert loopback_hub.resolve("tester/classes", "main") == told["second"]
    for name in ("classes", "body"):
        files = loopback_hub.files(f"tester/{name}")
        assert {file for file in files if file.endswith(".py")} == CODE
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]

    told = run(WITHOUT_PACKAGE, folder, ids.tolist(), told["first"])
    assert len(told["refusals"]) == 4
    assert all("trust_remote_code=True" in refusal for refusal in told["refusals"])
    assert told["code that ran"] == []
    for name in ("first", "local"):
        same(told[name], first)
    for name in ("second", "again", "eager", "grouped_mm", "batched_mm"):
        same(told[name], first + 1)
    assert told["implementations"] == ["sorted_mm", "eager", "grouped_mm", "batched_mm"]
    same(told["body"], models["body"](ids).last_hidden_state)
    same(told["body of a head"], models["classes"].bert(ids).last_hidden_state)
    same(told["tags"], models["tags"](ids).logits)
    same(told["spans"], models["spans"](ids).start_logits)
    assert told["new head"] == 3
    assert told["pipeline"] in ("bad", "so so", "good")


def test_a_stock_trainer_pushes_what_loads(loopback_hub, published, tmp_path, ids):  # noqa: F811
    """Pushes amid training take the weights alone, unless the code was saved to the run's folder before."""
    _, _, told = published
    for name in ("plain", "prepared"):
        commits = loopback_hub.repositories[f"tester/{name}"]["commits"].values()
        pushed = [files for files in commits if "model.safetensors" in files]
        whole = [CODE <= files.keys() for files in pushed]
        assert len(whole) >= 3
        assert all(whole) if name == "prepared" else whole[-1]
        fetched = tmp_path / name
        fetched.mkdir()
        for file, content in pushed[-1].items():
            (fetched / file).write_bytes(content)
        loaded = AutoModelForSequenceClassification.from_pretrained(fetched)
        torch.testing.assert_close(loaded(ids).logits, torch.tensor(told[name]), atol=1e-5, rtol=1e-5)
