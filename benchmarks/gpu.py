"""Try all that depends on a GPU at once, and print one table: correct results first, speed behind them.

    make gpu
    python benchmarks/gpu.py --smoke

One CUDA device, torch 2.11 or newer, at most ten minutes. Parity: outputs and gradients of every method in float32,
beside those of the same model on the CPU. Training: a few steps of a `Trainer` on drawn texts in bfloat16 and float16.
Speed: MoEBERT over dense BERT with sdpa (`moebert_scale.py`), what PLATON adds to a training step, and 2:4 weights.
`--smoke` runs the same on tiny models, on the CPU where there is no device: parity is then that of a copy, experts of
many batches are left out, and weights are 2:4 in CSR.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from moebert_scale import ScaleArguments, on_gpu
from packaging.version import Version
from platon_overhead import training_steps
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_moebert import (
    DistillationTrainer,
    MultiTaskModel,
    PlatonConfig,
    PlatonPruningCallback,
    compress_mpo,
    prune_structured,
)
from hf_moebert.inference.sparse import to_sparse_linears
from hf_moebert.measuring.latency import compare_times, environment, time_rounds
from hf_moebert.methods import masked_crf, mixture_of_masks, moebert, mpoe
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.reporting.tables import markdown_table


OLDEST_TORCH = "2.11"
TOLERANCE = 1e-3  # of the largest value, in float32 without TF32
TAGS = ["O", "B-PER", "I-PER"]
Row = dict[str, str]


@dataclass
class GpuArguments:
    """How much is tried."""

    steps: int = field(default=20, metadata={"help": "Steps of each Trainer run."})
    rounds: int = field(default=5, metadata={"help": "Timed rounds."})
    batches: list[int] = field(
        default_factory=lambda: [64, 256, 1024], metadata={"help": "Sequences of 128 tokens, for experts over dense."}
    )
    peak_tflops: float = field(default=989.0, metadata={"help": "The device's limit in bfloat16; an H200's is 989."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models, on the CPU if there is no device."})
    seed: int = field(default=0, metadata={"help": "Of weights, ids and labels."})

    def sizes(self) -> dict[str, Any]:
        """Return the sizes of the models: small ones for parity, and so that ten minutes are enough."""
        hidden, layers = (32, 1) if self.smoke else (768, 4)
        names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}
        fields = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 16}
        drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return fields | drop | names | {"intermediate_size": 4 * hidden, "vocab_size": 1000}


def make_batch(rows: int, tokens: int, *, tags: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Draw ids, a mask with padding in the last row, and labels."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, tokens // 2 :] = 0
    labels = torch.randint(2, (rows, tokens) if tags else (rows,), generator=generator)  # any order of O, B is legal
    labels = labels.masked_fill(mask == 0, -100) if tags else labels
    return {
        "input_ids": torch.randint(1, 1000, (rows, tokens), generator=generator),
        "attention_mask": mask,
        "labels": labels,
    }


def make_forms(args: GpuArguments) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """Return a model of every method, and a batch that it reads."""
    torch.manual_seed(args.seed)
    dense = BertForSequenceClassification(BertConfig(**args.sizes())).eval()
    tagger = BertForTokenClassification(BertConfig(**args.sizes())).eval()
    for model in (dense, tagger):
        model.config.frozen_layers = 0
        torch.nn.init.normal_(model.classifier.bias)  # as if it had been trained
    batch, tagged = make_batch(4, 16), make_batch(4, 16, tags=True)
    importance = torch.rand(dense.config.num_hidden_layers, dense.config.intermediate_size)
    examples = [{"input_ids": row, "attention_mask": [1] * 16} for row in make_batch(32, 16)["input_ids"].tolist()]
    experts = moebert.from_dense(dense, importance, num_experts=4)
    forms: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {
        "dense": (dense, batch),
        "MoEBERT": (experts, batch),
        "PLATON, units removed": (prune_structured(dense, examples, keep_ratio=0.5), batch),
        "mixture of masks": (mixture_of_masks.from_dense(dense, num_experts=2, group_size=8), batch),
        "MPO": (compress_mpo(dense, num_cores=3), batch),
        "MPOE": (mpoe.from_dense(dense, num_experts=2), batch),
        "masked CRF": (masked_crf.from_dense(tagger), tagged | {"word_mask": tagged["attention_mask"] == 1}),
        "many tasks": (MultiTaskModel.from_tasks({"a": dense}), {k: v for k, v in batch.items() if k != "labels"}),
    }
    return forms


def first_tensor(output: Any) -> Tensor:
    """Return the logits of an output, of the first task where there are many."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None else first_tensor(next(iter(output.values())))


def run_both_ways(model: PreTrainedModel, batch: dict[str, Any]) -> list[Tensor]:
    """Return logits and gradients, on the CPU."""
    model.zero_grad(set_to_none=True)
    given = {name: tensor.to(model.device) for name, tensor in batch.items()}
    output = model(**given)
    logits, loss = first_tensor(output), getattr(output, "loss", None)
    (logits.square().mean() if loss is None else loss).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (logits, *gradients)]


def compare_devices(args: GpuArguments, device: str) -> list[Row]:
    """Compare every method on the device with itself on the CPU."""
    rows = []
    for name, (model, batch) in make_forms(args).items():
        wanted = run_both_ways(model, batch)
        found = run_both_ways(copy.deepcopy(model).to(device), batch)
        pairs = list(zip(found, wanted, strict=True))
        errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs]
        said = "equal" if max(errors) <= TOLERANCE else "DIFFERENT"
        rows.append({"part": "parity", "what": name, "found": f"{said}: {errors[0]:.0e}, {max(errors[1:]):.0e}"})
    return rows


def train(args: GpuArguments, device: str) -> list[Row]:
    """Train MoEBERT by its teacher, and dense BERT with PLATON, in both short precisions."""
    batch = make_batch(args.steps * 8, 32, seed=args.seed)
    data = Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})
    rows = []
    for precision in ("bf16", "fp16"):
        if device == "cpu" and precision == "fp16":
            continue  # which a Trainer refuses there
        for name in ("MoEBERT", "PLATON"):
            torch.manual_seed(args.seed)
            dense = BertForSequenceClassification(BertConfig(**args.sizes()))
            with TemporaryDirectory() as folder:
                short = {"max_steps": args.steps, "per_device_train_batch_size": 8, "logging_steps": 1}
                quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
                options = TrainingArguments(folder, **short, **quiet, use_cpu=device == "cpu", **{precision: True})
                trainer = make_trainer(name, dense, options, data)
                trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            said = "finite" if torch.tensor(losses).isfinite().all() else "NOT FINITE"
            rows.append({"part": f"Trainer, {precision}", "what": name, "found": f"{said}: {len(losses)} steps"})
    return rows


def make_trainer(name: str, dense: PreTrainedModel, options: TrainingArguments, data: Dataset) -> Trainer:
    """Return the trainer of a method."""
    if name == "PLATON":
        recipe = PlatonConfig(keep_ratio=0.5, initial_warmup=1, final_warmup=1, window=1)
        return Trainer(dense, options, train_dataset=data, callbacks=[PlatonPruningCallback(recipe)])
    torch.nn.init.normal_(dense.classifier.bias)  # as if it had been trained
    importance = torch.rand(dense.config.num_hidden_layers, dense.config.intermediate_size)
    student = moebert.from_dense(dense, importance, num_experts=4)
    return DistillationTrainer(student, options, teacher=dense, train_dataset=data)


def time_calls(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Any]:
    """Time calls in turns, each until the device is done."""

    def wait(call: Callable[[], object]) -> None:
        call()
        if device != "cpu":
            torch.cuda.synchronize()

    return time_rounds({name: partial(wait, call) for name, call in calls.items()}, rounds=rounds, warmup=2)


def time_pruner(args: GpuArguments, device: str) -> list[Row]:
    """Time whole training steps with pruning and without it."""
    model = BertForSequenceClassification(BertConfig(**args.sizes())).train().to(device)
    pruner = Pruner(model, PlatonConfig(keep_ratio=0.5, initial_warmup=0, final_warmup=1), 10_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = {name: tensor.to(device) for name, tensor in make_batch(2 if args.smoke else 32, 128).items()}

    def backward() -> None:
        with torch.autocast(device, torch.bfloat16):
            model(**batch).loss.backward()

    calls = training_steps(pruner, optimizer, backward)
    ratio = compare_times(time_calls(calls, device, 10 * args.rounds), baseline="pruned", clock="wall")["plain"]
    found = f"a step takes {ratio.median:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"
    return [{"part": "pruner", "what": "PLATON over none", "found": found}]


@torch.no_grad()
def time_sparse(args: GpuArguments, device: str) -> list[Row]:
    """Time a model with two of every four weights beside its dense form."""
    dtype, layout = (torch.float32, "csr") if device == "cpu" else (torch.bfloat16, "2:4")
    dense = BertForSequenceClassification(BertConfig(**args.sizes())).eval().to(device, dtype)
    for name, parameter in dense.named_parameters():
        if "encoder" in name and parameter.dim() == 2:
            parameter.view(-1, 4)[:, 2:] = 0
    sparse = copy.deepcopy(dense)
    to_sparse_linears(sparse, layout)  # type: ignore[arg-type]
    batch = {name: tensor.to(device) for name, tensor in make_batch(2 if args.smoke else 64, 128).items()}
    calls = {"dense": partial(dense, **batch), "sparse": partial(sparse, **batch)}
    ratio = compare_times(time_calls(calls, device, args.rounds), baseline="dense", clock="wall")["sparse"]
    error = float((calls["sparse"]().logits - calls["dense"]().logits).abs().max())
    found = f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}], difference {error:.0e}"
    return [{"part": "2:4", "what": f"{layout} over dense", "found": found}]


@torch.no_grad()
def grow(args: GpuArguments, device: str) -> list[Row]:
    """Time experts over dense BERT, eager, compiled and with CUDA graphs."""
    if device == "cpu":
        return [{"part": "experts", "what": "over dense BERT", "found": "left out: needs a CUDA device"}]
    chosen = ScaleArguments("cuda", gpu_batches=args.batches, rounds=args.rounds, peak_tflops=args.peak_tflops)
    chosen.tiny = args.smoke
    (points,) = on_gpu(chosen).values()
    return [
        {
            "part": f"experts, batch {point['size']}",
            "what": f"{point['model']} over dense",
            "found": f"{point['speed_up']['median']:.2f}x, {point['share']['median']:.0%} of the limit",
        }
        for point in points
    ]


def find_device(args: GpuArguments) -> str | None:
    """Return where to run, or None where nothing can be tried."""
    if torch.cuda.is_available() and Version(torch.__version__).release >= Version(OLDEST_TORCH).release:
        return "cuda"
    return "cpu" if args.smoke else None


def main(args: GpuArguments) -> int:
    """Print one table; return 1 if a method computes something else there, or does not train."""
    device = find_device(args)
    if device is None:
        print(f"Skipped: needs a CUDA device and torch {OLDEST_TORCH}, got torch {torch.__version__}. Try --smoke.")
        return 0
    print(markdown_table([{"what": key, "value": str(value)} for key, value in environment().items()]))
    rows = []
    for part in (compare_devices, train, time_pruner, time_sparse, grow):
        rows += part(args, device)
    print(f"\n{markdown_table(rows)}")
    return int(any(row["found"].startswith(("DIFFERENT", "NOT")) for row in rows))


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(GpuArguments).parse_args_into_dataclasses()[0]))
