"""Write a tiny checkpoint of every form that this release saves: `python tests/golden/write.py FOLDER`."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from read import DEPTH, MASKS, MOVING, PRUNING, SQUEEZING, STOP, answer, assert_same, read, tensors_of, train
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, TrainerCallback

from hf_moebert import (
    BertCrfForTokenClassification,
    CrfForTokenClassification,
    MaskSparsityCallback,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
    MPOConfig,
    MPOSqueezingCallback,
    MultiTaskBertModel,
    PlatonPruningCallback,
    compress_mpo,
    save_packed,
)
from hf_moebert.architectures.surgery import matrix_of
from hf_moebert.inference.onnx_export import write_chain
from hf_moebert.methods import mixture_of_masks, platon
from hf_moebert.methods.moebert.conversion import save_importance
from hf_moebert.methods.mpoe import (
    MPOEBertForSequenceClassification,
    MPOEGPT2LMHeadModel,
    MPOET5ForConditionalGeneration,
)
from hf_moebert.methods.multitask.training_states import cache_states
from hf_moebert.methods.platon.modeling_units import find_unit_groups


BODY, CLASSIFIER, TAGGER = "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ANSWERER, SPEAKER, TRANSLATOR = "AutoModelForQuestionAnswering", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
FILLER, VIEWER = "AutoModelForMaskedLM", "AutoModelForImageClassification"
HIDDEN, UNITS, VOCAB = 8, 16, 30
ENDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": HIDDEN, "intermediate_size": UNITS, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {**ENDS, "max_position_embeddings": 16}
SMALL = {
    "distilbert": {"dim": HIDDEN, "hidden_dim": UNITS, "n_layers": 1, "n_heads": 2, **ENDS},
    "gpt2": {"n_embd": HIDDEN, "n_inner": UNITS, "n_layer": 1, "n_head": 2, "n_positions": 16, **ENDS},
    "t5": {"d_model": HIDDEN, "d_ff": UNITS, "d_kv": 4, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    "vit": {**SIZES, "image_size": 4, "patch_size": 2},
}
SMALL["distilbert"]["max_position_embeddings"] = 16
SMALL["t5"] |= ENDS
DROPOUTS = {"dropout", "attention_dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
DROPOUTS |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}
TWO = {"num_hidden_layers": 2}
GROUPED = {"num_key_value_heads": 1}
TAGS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}


@torch.no_grad()
def dense(family: str, auto: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Make a random model without dropout, so lively that its outputs differ."""
    config = AutoConfig.for_model(family, **SMALL.get(family, SIZES) | fields)
    for name in DROPOUTS & vars(config).keys():
        setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config).eval()
    return scatter(model, 0.2, seed)


@torch.no_grad()
def scatter(model: PreTrainedModel, std: float, seed: int = 0) -> PreTrainedModel:
    """Add noise to all weights, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def draw_inputs(family: str) -> dict[str, Tensor]:
    """Draw three rows, of which the second is padded; or pictures."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 4, 4, generator=generator)}
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    more = {"decoder_input_ids": ids[:, :4].contiguous()} if family == "t5" else {}
    return {"input_ids": ids * mask, "attention_mask": mask, **more}


def write_example(folder: Path, kind: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], auto: str) -> None:
    """Write what a form is, what it is asked, and what it must answer."""
    said = {"kind": kind, "auto": auto} if auto else {"kind": kind}
    (folder / "example.json").write_text(json.dumps(said) + "\n", encoding="utf-8")
    tensors = {f"input.{name}": x.clone() for name, x in inputs.items()}
    tensors |= {f"output.{name}": x.clone() for name, x in outputs.items()}
    save_file(tensors, folder / "example.safetensors")


def model(
    make: Callable[[], PreTrainedModel], auto: str, family: str = "bert", *, packed: bool = False
) -> Callable[[Path], None]:
    """Say how a model is written: saved, with the outputs it had before that."""

    def write(folder: Path) -> None:
        made, inputs = make(), draw_inputs(family)
        save_packed(made, folder) if packed else made.save_pretrained(folder)
        write_example(folder, "model", inputs, answer(made, inputs), auto)

    return write


def moebert(cls: type, auto: str, routing: str, **fields: Any) -> Callable[[Path], None]:
    """A BERT cut into experts."""

    def make() -> PreTrainedModel:
        sizes = {"num_experts": 3, "num_shared_neurons": 2, "expert_size": 6, "routing": routing}
        importance = torch.rand(2, UNITS, generator=torch.Generator().manual_seed(2))
        return cls.from_dense(dense("bert", auto, **TWO), importance, **sizes, **fields)

    return model(make, auto)


@torch.no_grad()
def narrow(family: str, auto: str, **fields: Any) -> PreTrainedModel:
    """Shrink a model of which a head of the first layer and some neurons of both have no way out."""
    pruned = dense(family, auto, **fields)
    for group in find_unit_groups(pruned):
        units = {"heads": [1][group.layer :], "neurons": range(3, 9 + group.layer)}[group.kind]
        matrix_of(group.writer).unflatten(1, (group.num_units, group.unit_size))[:, list(units)] = 0
    return platon.shrink(pruned)


@torch.no_grad()
def prune(pruned: PreTrainedModel) -> PreTrainedModel:
    """Zero all but the largest weights of each matrix."""
    for parameter in pruned.parameters():
        if parameter.dim() == 2:
            parameter[parameter.abs() < parameter.abs().quantile(0.8)] = 0
    return pruned


@torch.no_grad()
def learned(family: str, auto: str, num_experts: int = 3, **fields: Any) -> PreTrainedModel:
    """Add masks, open and closed ones, and routers that tell tokens apart."""
    made = mixture_of_masks.from_dense(dense(family, auto, **fields), num_experts=num_experts)
    generator = torch.Generator().manual_seed(3)
    for network in made.masked_networks().values():
        network.masks.learned.normal_(0, 4, generator=generator)
        if network.router is not None:
            network.router.weight.normal_(generator=generator)
    return made


def fixed(family: str, auto: str, num_experts: int = 3, **fields: Any) -> Callable[[Path], None]:
    """A model with masks that are closed for good."""
    return model(lambda: learned(family, auto, num_experts, **fields).fix_masks(0.5), auto, family)


def compacted(family: str, auto: str, num_experts: int = 3, **fields: Any) -> Callable[[Path], None]:
    """A model without what its masks closed."""
    return model(
        lambda: mixture_of_masks.shrink(learned(family, auto, num_experts, **fields).fix_masks(0.5)), auto, family
    )


def calibrated(teacher: PreTrainedModel) -> PreTrainedModel:
    """Make a model of two factors, and of a chain of scaled rows for its table, that knows some inputs."""
    ids = torch.randint(VOCAB, (8, 8), generator=torch.Generator().manual_seed(3))
    options = {"num_cores": 2, "table_cores": 3, "keep_ratio": 0.7}
    return compress_mpo(teacher, calibration=[{"input_ids": ids}], **options)


def mpoe(cls: type, family: str, auto: str) -> Callable[[Path], None]:
    """A model whose experts share central tensors."""
    options = {"num_experts": 2, "num_cores": 3, "bond": 4}
    return model(lambda: scatter(cls.from_dense(dense(family, auto), **options), 0.1), auto, family)


def tagger(cls: type, family: str, **fields: Any) -> PreTrainedModel:
    """A tagger whose CRF has learned something."""
    return scatter(cls.from_dense(dense(family, TAGGER, **TAGS), **fields), 0.2)


def multitask(*names: str) -> PreTrainedModel:
    """Put tasks of different kinds and depths on one trunk."""
    tagged = BertCrfForTokenClassification.from_dense(dense("bert", TAGGER, **TAGS, **TWO))
    tasks = {"mood": dense("bert", CLASSIFIER), "names": tagged, "answers": dense("bert", ANSWERER, **TWO)}
    trunk = dense("bert", BODY).state_dict()
    for frozen, task in enumerate(tasks.values()):
        task.base_model.load_state_dict(trunk, strict=False)
        task.config.frozen_layers = min(frozen, 1)
    return MultiTaskBertModel.from_tasks({name: tasks[name] for name in names})


def write_adapter(folder: Path) -> None:
    """Write an adapter, and the model that it is for."""
    base, inputs = dense("bert", CLASSIFIER), draw_inputs("bert")
    base.save_pretrained(folder / "base")
    made = get_peft_model(base, MPOConfig(num_cores=3, target_modules=["query", "output.dense"])).eval()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    made.save_pretrained(folder)
    write_example(folder, "adapter", inputs, answer(made, inputs), CLASSIFIER)


def write_importance(folder: Path) -> None:
    """Write the importance of neurons, and the model that it was measured on."""
    teacher, inputs = dense("bert", CLASSIFIER), draw_inputs("bert")
    importance = torch.rand(1, UNITS, generator=torch.Generator().manual_seed(2))
    teacher.save_pretrained(folder)
    save_importance(folder / "importance.safetensors", importance, teacher, dataset="none")
    write_example(folder, "importance", inputs, answer(teacher, inputs) | {"importance": importance}, CLASSIFIER)


def write_decoder(folder: Path) -> None:
    """Write what decodes beside an exported tagger; the graph is transformers'."""
    made, inputs = tagger(BertCrfForTokenClassification, "bert"), draw_inputs("bert")
    made.config.save_pretrained(folder)
    write_chain(made.crf, folder)
    found = answer(made, inputs)
    asked = {"emissions": found["logits"], "mask": inputs["attention_mask"]}
    write_example(folder, "crf-decoder", asked, {"tags": found["predictions"]}, "")


def write_states(folder: Path) -> None:
    """Write the states after a layer of a trunk, and the model that it belongs to."""
    made, inputs = multitask("answers"), draw_inputs("bert")
    made.save_pretrained(folder)
    rows = Dataset.from_dict({name: x.tolist() for name, x in inputs.items()})
    states = cache_states(made.trunk, rows, folder, depths=[DEPTH])[DEPTH]
    write_example(folder, "states", inputs, {"states": torch.stack([row["inputs_embeds"] for row in states])}, BODY)


def run(
    make: Callable[[], PreTrainedModel], callback: Callable[[], TrainerCallback], kind: str, **options: Any
) -> Callable[[Path], None]:
    """Say how a run's checkpoint is written: all that is no pickle, and how the run ends that goes on from it."""

    def write(folder: Path) -> None:
        inputs = draw_inputs("bert") | {"labels": torch.tensor([0, 1, 1])}
        with tempfile.TemporaryDirectory() as out:
            train(make(), inputs, callback(), folder=Path(out), **options)
            for path in (Path(out) / f"checkpoint-{STOP}").iterdir():
                if path.suffix in (".json", ".safetensors"):
                    shutil.copy(path, folder)
        write_example(folder, kind, inputs, {}, CLASSIFIER)
        write_example(folder, kind, inputs, read(folder), CLASSIFIER)

    return write


FORMS: dict[str, Callable[[Path], None]] = {
    "moebert-hash-random": moebert(MoEBertForSequenceClassification, CLASSIFIER, "hash-random"),
    "moebert-hash-balanced": moebert(
        MoEBertForTokenClassification, TAGGER, "hash-balanced", token_counts=torch.arange(VOCAB)
    ),
    "moebert-gate-token": moebert(
        MoEBertForQuestionAnswering,
        ANSWERER,
        "gate-token",
        top_k=2,
        router_aux_loss_coef=0.1,
        output_router_logits=True,
    ),
    "moebert-gate-sentence": moebert(MoEBertModel, BODY, "gate-sentence", layers=[1]),
    "shrunk-bert": model(lambda: narrow("bert", ANSWERER, **TWO), ANSWERER),
    "shrunk-roberta": model(lambda: narrow("roberta", TAGGER, **TWO), TAGGER),
    "shrunk-distilbert": model(lambda: narrow("distilbert", FILLER, n_layers=2), FILLER),
    "shrunk-vit": model(lambda: narrow("vit", VIEWER, **TWO), VIEWER, "vit"),
    "shrunk-llama": model(lambda: narrow("llama", SPEAKER, **TWO | {"num_attention_heads": 4}), SPEAKER),
    "shrunk-modernbert": model(lambda: narrow("modernbert", FILLER, **TWO), FILLER),
    "shrunk-gpt2": model(lambda: narrow("gpt2", SPEAKER, n_layer=2), SPEAKER),
    "packed": model(lambda: prune(dense("bert", CLASSIFIER)), CLASSIFIER, packed=True),
    "packed-shrunk": model(lambda: prune(narrow("bert", CLASSIFIER, **TWO)), CLASSIFIER, packed=True),
    "mpo": model(lambda: compress_mpo(dense("bert", FILLER), num_cores=3), FILLER),
    "mpo-size-ratio": model(lambda: compress_mpo(dense("gpt2", SPEAKER), keep_ratio=0.7), SPEAKER),
    "mpo-two-factors": model(lambda: compress_mpo(dense("bert", CLASSIFIER), num_cores=2, keep_ratio=0.7), CLASSIFIER),
    "mpo-calibrated": model(lambda: calibrated(dense("gpt2", SPEAKER)), SPEAKER),
    "mpo-adapter": write_adapter,
    "mpoe-bert": mpoe(MPOEBertForSequenceClassification, "bert", CLASSIFIER),
    "mpoe-gpt2": mpoe(MPOEGPT2LMHeadModel, "gpt2", SPEAKER),
    "mpoe-t5": mpoe(MPOET5ForConditionalGeneration, "t5", TRANSLATOR),
    "masks-bert-learned": model(lambda: learned("bert", CLASSIFIER), CLASSIFIER),
    "masks-bert-fixed": fixed("bert", CLASSIFIER),
    "masks-bert-compact": compacted("bert", CLASSIFIER, **TWO),
    "masks-gpt2-fixed": fixed("gpt2", SPEAKER),
    "masks-llama-fixed": fixed("llama", SPEAKER, **GROUPED),
    "masks-llama-narrow": compacted("llama", SPEAKER, num_experts=1, **GROUPED, **TWO),
    "masks-mistral-fixed": fixed("mistral", SPEAKER, sliding_window=4, **GROUPED),
    "masks-qwen2-fixed": fixed("qwen2", SPEAKER, **GROUPED),
    "masks-qwen3-fixed": fixed("qwen3", SPEAKER, head_dim=6, **GROUPED),
    "masks-t5-fixed": fixed("t5", TRANSLATOR),
    "masks-t5-compact": compacted("t5", TRANSLATOR, feed_forward_proj="gated-gelu"),
    "crf-bert": model(lambda: tagger(BertCrfForTokenClassification, "bert"), TAGGER),
    "crf-distilbert": model(
        lambda: tagger(CrfForTokenClassification, "distilbert", mask_transitions="decoding"), TAGGER
    ),
    "crf-decoder": write_decoder,
    "multitask": model(lambda: multitask("mood", "names", "answers"), BODY),
    "multitask-states": write_states,
    "importance": write_importance,
    "pruning": run(lambda: dense("bert", CLASSIFIER), lambda: PlatonPruningCallback(PRUNING), "pruning"),
    "pruning-movement": run(
        lambda: dense("bert", CLASSIFIER), lambda: PlatonPruningCallback(MOVING), "pruning-movement"
    ),
    "squeezing": run(
        lambda: compress_mpo(dense("bert", CLASSIFIER), num_cores=3, target_modules=["query", "output.dense"]),
        lambda: MPOSqueezingCallback(SQUEEZING),
        "squeezing",
        eval_strategy="steps",
        eval_steps=STOP,
    ),
    "masks-run": run(lambda: learned("bert", CLASSIFIER), lambda: MaskSparsityCallback(MASKS), "masks"),
}


def write_all(folder: Path) -> None:
    """Write all forms; the code that some of them bring along is not theirs to keep."""
    for name, write in FORMS.items():
        place = folder / name
        place.mkdir(parents=True)
        write(place)
        for path in [*place.rglob("*.py"), *place.rglob("README.md")]:
            path.unlink()
        assert_same(read(place), tensors_of(place, "output"))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
