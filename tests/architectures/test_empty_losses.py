"""Batches in which no label counts: a loss of zero with gradients of zero, in every kind of model and run of ours."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)

from hf_moebert import (
    CheckpointManifestCallback,
    DistillationConfig,
    DistillationTrainer,
    MPOConfig,
    PlatonConfig,
    PlatonPruningCallback,
    compress_mpo,
    shrink,
    to_dense,
)
from hf_moebert.methods import mixture_of_masks, moebert
from hf_moebert.methods.platon.modeling_units import find_unit_groups


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 16, "pad_token_id": 0}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
    "gpt2": GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2),
}
HEADS = {
    "classes": AutoModelForSequenceClassification,
    "tags": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "words": AutoModelForMaskedLM,
    "next": AutoModelForCausalLM,
}
ENCODERS = [(family, head) for family in ("bert", "roberta", "distilbert") for head in ("tags", "answers", "words")]
ALL = [*ENCODERS, ("bert", "classes"), ("gpt2", "next"), ("llama", "next"), ("gpt2", "tags"), ("llama", "answers")]
SHRUNK = [*ENCODERS, ("bert", "classes")]


def make(family, head):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    if head == "classes":
        config.problem_type = "single_label_classification"
    return HEADS[head].from_config(config)


def inputs(head, case="none"):
    """A batch of two rows: without a label, or with one label."""
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    if head == "answers":
        places = {"none": ([6, 9], [7, 6]), "end": ([6, 9], [2, 6]), "some": ([1, 9], [2, 6])}[case]
        return {"input_ids": ids, "start_positions": torch.tensor(places[0]), "end_positions": torch.tensor(places[1])}
    labels = torch.full((2,) if head == "classes" else (2, 6), -100)
    if case != "none":
        labels[1 if head == "classes" else (1, 3)] = 1
    return {"input_ids": ids, "labels": labels}


def narrow(model):
    """Make one neuron zero, and shrink."""
    with torch.no_grad():
        for group in find_unit_groups(model):
            group.writer.weight.unflatten(1, (group.num_units, group.unit_size))[:, :1] = 0
    return shrink(model)


def adapt(model):
    return get_peft_model(model, MPOConfig(target_modules="all-linear", num_cores=3))


def assert_empty(model, head):
    loss = model(**inputs(head)).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert loss == 0
    assert any(gradient is not None for gradient in gradients)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize(("family", "head"), ALL)
@pytest.mark.parametrize("change", [lambda m: compress_mpo(m, num_cores=3), adapt], ids=["chains", "adapters"])
def test_no_label_is_no_loss_in_stock_classes(family, head, change):
    dense = make(family, head)
    model = change(copy.deepcopy(dense)).eval()
    assert_empty(model, head)
    for twin in (copy.deepcopy(model), model.train()):
        assert_empty(twin, head)
    labelled = inputs(head, "some")
    torch.testing.assert_close(model.eval()(**labelled).loss, dense.eval()(**labelled).loss)


@pytest.mark.parametrize(("family", "head"), SHRUNK)
def test_no_label_is_no_loss_in_shrunk_classes(family, head):
    model = narrow(make(family, head))
    assert_empty(model, head)
    assert model(**inputs(head, "some")).loss > 0


@pytest.mark.parametrize("head", ["classes", "tags", "answers"])
def test_no_label_is_no_loss_in_moebert(head):
    options = {"num_experts": 2, "expert_size": 16, "num_shared_neurons": 0, "routing": "hash-random"}
    assert_empty(moebert.from_dense(make("bert", head), torch.rand(1, 32), **options), head)


@pytest.mark.parametrize(("family", "head"), [("bert", "classes"), ("gpt2", "next"), ("llama", "next")])
def test_no_label_is_no_loss_in_models_with_masks(family, head):
    assert mixture_of_masks.from_dense(make(family, head)).eval()(**inputs(head)).loss == 0


@pytest.mark.parametrize("change", [narrow, lambda m: compress_mpo(m, num_cores=3)])
def test_one_end_without_a_place_adds_nothing(change):
    model = change(make("bert", "answers")).eval()
    batch = inputs("answers", "end")
    outputs = model(**batch)
    expected = nn.functional.cross_entropy(outputs.end_logits[:1], batch["end_positions"][:1]) / 2
    torch.testing.assert_close(outputs.loss, expected)


def test_other_losses_that_are_no_number_stay():
    model = compress_mpo(make("bert", "tags"), num_cores=3).eval()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    assert model(**inputs("tags", "some")).loss.isnan()
    regression = compress_mpo(HEADS["classes"].from_config(BertConfig(**SIZES, num_labels=1)), num_cores=3)
    assert regression(input_ids=inputs("tags")["input_ids"], labels=torch.full((2,), torch.nan)).loss.isnan()


def test_a_model_that_is_dense_again_is_as_it_was(tmp_path):
    model = compress_mpo(make("bert", "tags"), num_cores=3)
    model.save_pretrained(tmp_path)
    loaded = HEADS["tags"].from_pretrained(tmp_path)
    assert_empty(loaded, "tags")
    assert_empty(pickle.loads(pickle.dumps(loaded)), "tags")
    for compressed in (model, loaded):
        assert to_dense(compressed)(**inputs("tags")).loss.isnan()
        assert_empty(compressed, "tags")


# Runs


def rows(head):
    names = ("labels",) if head != "answers" else ("start_positions", "end_positions")
    batch = inputs(head)
    return [{"input_ids": batch["input_ids"][k]} | {n: batch[n][k] for n in names} for k in (0, 1)] * 2


def options(folder, **more):
    common = {"report_to": "none", "use_cpu": True, "logging_nan_inf_filter": False, "logging_steps": 1}
    return TrainingArguments(folder, max_steps=4, disable_tqdm=True, **common, **more)


@pytest.mark.parametrize("head", ["classes", "tags", "answers", "words"])
def test_runs_with_callbacks_log_no_loss(tmp_path, head):
    callback = PlatonPruningCallback(PlatonConfig(criterion="magnitude", initial_warmup=0, final_warmup=1, window=1))
    for callbacks in ([callback], [CheckpointManifestCallback()]):
        model = make("bert", head)
        trainer = Trainer(model, options(tmp_path), train_dataset=rows(head), eval_dataset=rows(head))
        for each in callbacks:
            trainer.add_callback(each)
        trainer.train()
        assert all(log["loss"] == 0 for log in trainer.state.log_history if "loss" in log)
        assert model(**inputs(head)).loss.isnan()  # the model itself is as it was


@pytest.mark.parametrize("head", ["classes", "tags", "answers"])
def test_students_follow_their_teacher_without_labels(tmp_path, head):
    student, teacher = make("bert", head), make("bert", head)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trainer = DistillationTrainer(
        student, options(tmp_path), train_dataset=rows(head), teacher=teacher, distillation=DistillationConfig()
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss_task" in log]
    assert logs
    assert all(log["loss_task"] == 0 and log["loss_hidden"] > 0 for log in logs)


@pytest.mark.parametrize("criterion", ["platon", "movement"])
@pytest.mark.parametrize("head", ["tags", "answers"])
def test_runs_without_labels_do_not_prune(tmp_path, head, criterion):
    config = PlatonConfig(criterion=criterion, initial_warmup=0, final_warmup=1, window=1)
    model = make("bert", head)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, options(tmp_path), train_dataset=rows(head), callbacks=[PlatonPruningCallback(config)])
    with pytest.raises(ValueError, match="Gradients must tell weights apart to prune them, but all were zero up to"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
