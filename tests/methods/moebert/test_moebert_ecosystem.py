"""Everything that transformers, PEFT and the Trainer do with a model, they do with a MoEBERT."""

import copy
import json

import new_process
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moebert import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
)


SIZES = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}
ROUTINGS = ("hash-random", "gate-token", "gate-sentence")
IMPLEMENTATIONS = ("sorted_mm", "eager", "grouped_mm", "batched_mm")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *[f"w{i}" for i in range(95)]]


@pytest.fixture
def convert(dense, importance):
    def from_dense(routing="hash-random", **options):
        return MoEBertForSequenceClassification.from_dense(dense, importance, routing=routing, **{**SIZES, **options})

    return from_dense


@pytest.fixture
def inputs(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=32)


def make_inputs(rows, length):
    """Ids and masks of random lengths; the last of several rows is padding alone."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(1, 100, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
    if rows > 1:
        mask[-1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one, other, atol=1e-4, rtol=1e-3):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("auto", "cls", "dense_cls"),
    [
        (AutoModel, MoEBertModel, BertModel),
        (AutoModelForSequenceClassification, MoEBertForSequenceClassification, BertForSequenceClassification),
        (AutoModelForTokenClassification, MoEBertForTokenClassification, BertForTokenClassification),
        (AutoModelForQuestionAnswering, MoEBertForQuestionAnswering, BertForQuestionAnswering),
    ],
)
def test_the_auto_classes_give_back_what_was_saved(tmp_path, dense_config, importance, inputs, auto, cls, dense_cls):
    if dense_cls is BertForQuestionAnswering:
        dense_config.num_labels = 2
    model = cls.from_dense(dense_cls(dense_config).eval(), importance, layers=[0, 2], seed=7, **SIZES)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MoEBertConfig
    assert (config.layers, config.expert_size, config.routing_seed) == ([0, 2], 16, 7)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is cls
    assert not loaded.training
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded(**inputs)[:2], model(**inputs)[:2], strict=True))


def test_body_and_heads_are_interchangeable(tmp_path, student, inputs):
    student.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    wanted = student(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(body(**inputs).last_hidden_state, wanted)
    tagger = AutoModelForTokenClassification.from_pretrained(
        tmp_path, id2label=dict.fromkeys(range(5), "tag"), ignore_mismatched_sizes=True, allow_unexpected=True
    )
    assert tagger(**inputs).logits.shape == (4, 11, 5)
    assert torch.equal(tagger.bert(**inputs).last_hidden_state, wanted)


def test_a_fresh_model_draws_the_tables_its_config_names(student, inputs):
    fresh = AutoModelForSequenceClassification.from_config(student.config)
    assert torch.equal(fresh.bert.router.table, student.bert.router.table)
    assert fresh(**inputs).logits.isfinite().all()


STRANGER = """
import json, pathlib, sys
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

torch.manual_seed(99)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
for stock in (BertModel, BertForSequenceClassification):  # what transformers keeps of them must not reach our models
    stock(BertConfig(vocab_size=9, **sizes))

import hf_moebert

ALL_EXPERTS_FUNCTIONS.register("nothing", lambda experts, hidden_states, *args, **kwargs: hidden_states * 0)
inputs = {name: torch.tensor(value) for name, value in json.loads(sys.argv[2]).items()}
told = {}
for path in pathlib.Path(sys.argv[1]).iterdir():
    model = AutoModelForSequenceClassification.from_pretrained(path)
    eager = AutoModelForSequenceClassification.from_pretrained(path, experts_implementation="eager")
    names = [model.config._experts_implementation, eager.config._experts_implementation]
    logits = model(**inputs).logits
    model.set_experts_implementation("nothing")
    change = (model(**inputs).logits - logits).abs().max().item()
    names.append(model.config._experts_implementation)
    table = [] if model.bert.router is None else model.bert.router.table.tolist()
    told[path.name] = {"logits": logits.tolist(), "table": table, "implementations": names, "change": change}
print(json.dumps(told))
"""


@pytest.mark.process
def test_a_new_process_finds_the_same_model(tmp_path, convert, inputs):
    models = {routing: convert(routing) for routing in ROUTINGS}
    models["hash-balanced"] = convert("hash-balanced", token_counts=torch.arange(100))
    for routing, model in models.items():
        model.save_pretrained(tmp_path / routing)
    done = new_process.run(STRANGER, tmp_path, json.dumps({k: v.tolist() for k, v in inputs.items()}))
    told = json.loads(done.stdout.splitlines()[-1])
    for routing, model in models.items():
        with torch.no_grad():
            assert torch.equal(torch.tensor(told[routing]["logits"]), model(**inputs).logits)
        saved = load_file(tmp_path / routing / "model.safetensors")
        if routing.startswith("hash"):
            assert torch.equal(saved["bert.router.table"], model.bert.router.table)
            assert told[routing]["table"] == model.bert.router.table.tolist()
        else:
            assert "bert.router.table" not in saved
        assert told[routing]["implementations"] == ["sorted_mm", "eager", "nothing"]
        assert told[routing]["change"] > 0.1  # the implementation that was set has run
    fresh = copy.deepcopy(models["hash-random"])
    fresh.bert.router.table.zero_()
    fresh.load_state_dict(load_file(tmp_path / "hash-random" / "model.safetensors"))
    assert_equal_states(fresh.state_dict(), models["hash-random"].state_dict())


# ------------------------------------------------------------------------------------------------------ pipelines


def test_pipelines(student, dense_config, importance, tokenizer, tmp_path):
    texts = ["w1 w2 w3", "w90", "w4 w4 w7 w11 w30 w2"]
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    for text, together in zip(texts, classify(texts, batch_size=3), strict=True):
        wanted = student(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        scores = {entry["label"]: entry["score"] for entry in together}
        assert scores == pytest.approx(dict(zip(["bad", "so so", "good"], wanted.tolist(), strict=True)), abs=1e-4)

    dense = BertForTokenClassification(dense_config).eval()
    tagger = MoEBertForTokenClassification.from_dense(dense, importance, **SIZES)
    tags = pipeline("token-classification", model=tagger, tokenizer=tokenizer)(texts[0])
    wanted = tagger(**tokenizer(texts[0], return_tensors="pt")).logits[0, 1:-1].argmax(-1)
    assert [tag["entity"] for tag in tags] == [tagger.config.id2label[i] for i in wanted.tolist()]

    vectors = pipeline("feature-extraction", model=student.bert, tokenizer=tokenizer)(texts[0])
    wanted = student.bert(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state
    np.testing.assert_allclose(vectors, wanted.tolist(), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def one_layer(dense_config, importance):
    """Make a model of one layer: a compiler takes long, and every layer is the same to it."""

    def from_dense(routing, **options):
        dense_config.num_hidden_layers, dense_config.initializer_range = 1, 0.2
        dense = BertForSequenceClassification(dense_config)
        fields = {"routing": routing, **SIZES, **options}
        return MoEBertForSequenceClassification.from_dense(dense, importance[:1], **fields)

    return from_dense


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # it counts recompilations over all models
    yield
    torch._dynamo.reset()


@pytest.mark.process
@torch.no_grad()
@pytest.mark.parametrize("routing", ROUTINGS)
def test_compiled_in_one_graph(fresh_compiler, one_layer, routing):
    model = one_layer(routing)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows, length in ((4, 11), (3, 32)):  # a batch of one would be compiled anew
        inputs = make_inputs(rows, length)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.process
@pytest.mark.parametrize(
    ("routing", "backend"),
    [("hash-random", "eager"), ("gate-token", "aot_eager")],  # the second compiles the backward pass, too: slowly
)
def test_compiled_training_with_records(fresh_compiler, one_layer, batch, routing, backend):
    """Of any size by the first, of one size by the second."""
    model = one_layer(routing, router_aux_loss_coef=0.1)
    model.config.problem_type = "single_label_classification"  # or it is inferred, and compiled again
    records = {"output_expert_load": True, "output_router_logits": routing == "gate-token"}
    model(**batch, **records)  # hooks for records are added at the first call, and cannot be while it compiles
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=backend == "eager")
    other = make_inputs(3, 9) | {"labels": torch.tensor([2, 0, 1])}
    for inputs in (batch, other) if backend == "eager" else (batch,):
        got, wanted = compiled(**inputs, **records), model(**inputs, **records)
        torch.testing.assert_close(got.to_tuple(), wanted.to_tuple(), atol=1e-4, rtol=1e-3)
        found = []
        for outputs in (got, wanted):
            model.zero_grad()
            outputs.loss.backward()
            found.append(gradients(model))
        assert_close(*found)


@pytest.mark.process
@pytest.mark.parametrize("routing", ROUTINGS)
def test_exported_with_any_batch_and_length(one_layer, batch, routing):
    model = one_layer(routing)
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=32)}
    program = torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, shape)).module()
    for rows, length in ((1, 1), (1, 7), (3, 32)):
        inputs = make_inputs(rows, length)
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, convert, batch, routing, dtype):
    model = convert(routing, router_aux_loss_coef=0.1)
    probabilities = model(**batch).logits.softmax(-1)
    model.save_pretrained(tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype
    if routing == "hash-random":
        assert torch.equal(half.bert.router.table, model.bert.router.table)
    outputs = half(**batch)
    assert outputs.logits.dtype == dtype
    torch.testing.assert_close(outputs.logits.softmax(-1).float(), probabilities, atol=0.1, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(half(**batch).logits, outputs.logits, atol=0.1, rtol=0.1)
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_autocast(convert, batch, routing):
    model = convert(routing, router_aux_loss_coef=0.1)
    plain = model(**batch)
    for grad in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            mixed = model(**batch)
        torch.testing.assert_close(mixed.logits.softmax(-1).float(), plain.logits.softmax(-1), atol=0.1, rtol=0)
        if grad:
            mixed.loss.backward()
            assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ switches


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(convert, batch, routing, use_reentrant):
    plain = convert(routing, router_aux_loss_coef=0.5).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = []
    for model in (plain, saving):
        torch.manual_seed(5)  # the same dropout
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert_close(gradients(saving), gradients(plain), atol=1e-5, rtol=1e-4)
    if routing != "hash-random":  # the balance loss alone reaches the gates
        saving.zero_grad()
        saving(**batch).aux_loss.backward()
        for layer in saving.bert.encoder.layer:
            assert layer.output.dense.gate.weight.grad.abs().sum() > 1e-3


@pytest.mark.parametrize("options", [{}, {"routing": "gate-token"}, {"routing": "gate-token", "top_k": 2}])
def test_all_experts_implementations_agree(convert, batch, options):
    model = convert(**options)
    found = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        with torch.no_grad():
            found[name] = {"logits": outputs.logits, "inference": model(**batch).logits, **gradients(model)}
    for name in IMPLEMENTATIONS[1:]:
        assert_close(found[name], found["sorted_mm"])


def test_batched_mm_is_never_chosen(monkeypatch, tmp_path, convert, batch):
    def refuse(*args, **kwargs):
        raise AssertionError("batched_mm ran")

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "batched_mm", refuse)  # undone without a trace
    chosen = convert()
    chosen.set_experts_implementation("batched_mm")
    with pytest.raises(AssertionError, match="batched_mm ran"):
        chosen(**batch)
    one = {name: value[:1] for name, value in batch.items()}
    for model in (convert(), convert("gate-token", top_k=2), convert(expert_size=15), convert().double()):
        model.save_pretrained(tmp_path)
        for same in (model, AutoModelForSequenceClassification.from_pretrained(tmp_path)):
            for inputs in (batch, one):
                same(**inputs).loss.backward()
                with torch.no_grad():
                    same(**inputs)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    same(**inputs).loss.backward()


@pytest.mark.parametrize("through", ["head", "body"])
@pytest.mark.parametrize("size", [130, 60])
@pytest.mark.parametrize("routing", ["hash-random", "hash-balanced", "gate-token"])
def test_the_tables_follow_the_vocabulary(tmp_path, convert, routing, size, through):
    model = convert(routing, token_counts=torch.arange(100) if routing == "hash-balanced" else None)
    before = copy.deepcopy(model)
    (model if through == "head" else model.bert).resize_token_embeddings(size)
    assert model.config.vocab_size == size
    known = torch.arange(min(size, 100)).view(-1, 10)
    torch.testing.assert_close(model(known).logits, before(known).logits)
    if routing != "gate-token":
        table = model.bert.router.table
        assert table.shape == (3, size)
        assert torch.equal(table[:, :100], before.bert.router.table[:, :size])
        assert table.max() == 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_equal_states(loaded.state_dict(), model.state_dict())
    every = torch.arange(size).view(-1, 10)
    torch.testing.assert_close(loaded(every).logits, model(every).logits)
    with pytest.raises(ValueError, match=rf"`input_ids` must be in \[0, {size}\)"):
        loaded(torch.tensor([[1, size]]))


# ----------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_lora_on_attention_and_experts(tmp_path, convert, batch, routing):
    model = convert(routing)
    recipe = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["query", "value"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
        modules_to_save=["classifier", "gate"] if routing != "hash-random" else ["classifier"],
    )
    adapted = get_peft_model(copy.deepcopy(model), recipe)
    before = model(**batch).loss
    torch.testing.assert_close(adapted.eval()(**batch).loss, before)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()
    trained = [n for n, p in adapted.named_parameters() if "experts" in n and "lora_B" in n and p.abs().sum() > 0]
    assert len(trained) == 6  # two projections in each of three layers
    logits = {}
    for name in ("grouped_mm", "sorted_mm"):
        adapted.base_model.model.set_experts_implementation(name)
        with torch.no_grad():
            logits[name] = adapted(**batch).logits
    torch.testing.assert_close(logits["sorted_mm"], logits["grouped_mm"], atol=1e-4, rtol=1e-4)
    assert adapted(**batch).loss < before

    def without_experts():
        for name, p in adapted.named_parameters():
            if "experts" in name and "lora_B" in name:
                p.data.zero_()
        return adapted(**batch).logits

    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    merged = copy.deepcopy(loaded).merge_and_unload()
    assert merged.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, logits["sorted_mm"])
        torch.testing.assert_close(merged(**batch).logits, logits["sorted_mm"], atol=1e-4, rtol=1e-4)
        assert (without_experts() - logits["sorted_mm"]).abs().max() > 0.01


# -------------------------------------------------------------------------------------------------------- Trainer


@pytest.fixture
def train(tmp_path, tokenizer):
    """Make a stock Trainer on sentences of various lengths."""
    generator = np.random.default_rng(3)
    texts = [" ".join(generator.choice(WORDS[5:], size=generator.integers(1, 12))) for _ in range(20)]
    data = Dataset.from_dict({"text": texts, "label": [len(text) % 3 for text in texts], **tokenizer(texts)})

    def trainer(model, folder="run", **options):
        quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
        defaults = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
        return Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path / folder), **quiet, **(defaults | options)),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda told: {"accuracy": float((told.predictions.argmax(-1) == told.label_ids).mean())},
        )

    return trainer


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_stock_trainer_evaluates_and_predicts(train, convert, routing):
    model = convert(routing, router_aux_loss_coef=0.01, output_router_logits=True, output_expert_load=True)
    trainer = train(model, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="no")
    trainer.train()
    metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(metrics) == 2
    told = trainer.predict(trainer.eval_dataset)
    assert told.predictions.shape == (20, 3)  # records of the routing are not stacked
    assert told.metrics["test_accuracy"] == metrics[-1]["eval_accuracy"]


@pytest.mark.parametrize("routing", ["hash-random", "gate-token"])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_same_run(tmp_path, train, convert, routing):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}  # five steps are an epoch
    model = convert(routing, router_aux_loss_coef=0.01)
    whole, resumed = train(copy.deepcopy(model), **options), train(copy.deepcopy(model), **options)
    whole.train()
    torch.rand(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_equal_states(resumed.model.state_dict(), whole.model.state_dict())
    name = "bert.encoder.layer.0.output.dense.experts.up_proj"
    assert not torch.equal(whole.model.state_dict()[name], model.state_dict()[name])


def test_the_best_model_comes_back_with_its_experts(tmp_path, train, convert):
    schedule = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # an early one
    trainer = train(convert(), max_steps=6, **schedule, **best)
    trainer.train()
    assert trainer.state.best_global_step < 6
    best, last = (load_file(path / "model.safetensors") for path in sorted((tmp_path / "run").iterdir())[::2])
    assert_equal_states(trainer.model.state_dict(), best)
    name = "bert.encoder.layer.0.output.dense.experts.up_proj"
    assert not torch.equal(best[name], last[name])


def test_accumulated_steps_are_the_large_batch(train, convert):
    moved = []
    for size, steps in ((8, 1), (2, 4)):
        model = convert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        train(model, max_steps=1, optim="sgd", max_grad_norm=0.0, save_strategy="no", **shape).train()
        moved.append(dict(model.state_dict()))
    assert_close(*moved, atol=1e-6, rtol=1e-4)
