"""Fine-tune an encoder whose matrices are chains of small tensors, beside what one would use instead.

    python benchmarks/studies/mpop_text_classification.py --smoke --output_dir build/mpop-smoke
    python benchmarks/studies/mpop_text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence \
        --seeds 0 1 2 --learning_rates 2e-4 1e-3 --max_steps 300 --output_dir build/mpop-sst2
    python benchmarks/studies/mpop_text_classification.py … --stage report  # of the runs that are there

Every argument of `TrainingArguments` and `MPOSqueezingConfig` may be given; the others are below. All methods start
from the same pre-trained encoder and train for the same steps:

- `full`: every weight is trained, nothing is compressed;
- `adapter`: `MPOConfig`, the tuner for PEFT, with full bonds; `lora`, `lokr`: with about as many trained weights;
- `mpop`: all matrices decomposed with full bonds, central tensors frozen; `squeezed`: goes on from there by dimension
  squeezing;
- `mpop-half`: decomposed to `keep_ratio`, central tensors frozen; `mpop-half-all`: all of them trained;
- `svd-half`: truncated singular values at the same size, all factors trained.

The first seed tries every learning rate, and the best on a part of the training data that was held out is used for
all seeds; squeezing decides on that part too. Finished runs are not repeated when the command is run again.
"""

import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from low_rank import cut_to_low_rank, restore
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from platon_text_classification import ClassificationTask
from pruning_study import PruningStudy, Run
from text_task import TaskArguments, make_smoke_inputs
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments

from hf_moebert import MPOConfig, MPOSqueezingCallback, MPOSqueezingConfig, compress_mpo
from hf_moebert.measuring.footprint import count_bytes
from hf_moebert.measuring.latency import compare_latency
from hf_moebert.measuring.scores import predict_logits
from hf_moebert.methods.mpo.conversion import find_matrices
from hf_moebert.methods.mpo.functional_bonds import choose_bonds, entanglement_entropy, error_bound
from hf_moebert.methods.mpo.functional_decomposition import decompose
from hf_moebert.methods.mpo.functional_shapes import factor_matrix
from hf_moebert.reporting.pictures import plot_curves


METHODS = ("full", "adapter", "lora", "lokr", "mpop", "squeezed", "mpop-half", "mpop-half-all", "svd-half")
ABOUT = """\
All methods start from one pre-trained encoder and train for the same steps on the same data, each with the best of \
the learning rates that the first seed tried on held-out training examples. `stored` counts all weights that are \
needed to run the model, `on disk` what was saved: of an adapter its own file.\
"""
TARGETS = ["query", "key", "value", "dense"]  # of an encoder like BERT: attention, feed-forward networks, pooler


@dataclass
class ExampleArguments:
    """Which runs to make."""

    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Runs of everything."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Rows of the table."})
    learning_rates: list[float] = field(
        default_factory=lambda: [2e-4, 1e-3], metadata={"help": "Tried by each method."}
    )
    keep_ratio: float = field(default=0.5, metadata={"help": "Size of what is made smaller."})
    held_out: int = field(default=1000, metadata={"help": "Training examples that choose, and are not trained on."})
    squeezing_rate: float = field(default=2e-4, metadata={"help": "Learning rate while squeezing."})
    squeezing_steps: int = field(default=300, metadata={"help": "Steps of squeezing, after those of `mpop`."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA: choose it for as many weights as `adapter`."})
    lokr_rank: int = field(default=8, metadata={"help": "Rank of LoKr: likewise."})
    lokr_factor: int = field(default=-1, metadata={"help": "`decompose_factor` of LoKr: likewise."})
    stage: str = field(default="all", metadata={"help": "What to do.", "choices": ("all", "train", "report")})
    rounds: int = field(default=8, metadata={"help": "Training steps of each method that are timed in turns."})


@dataclass(frozen=True)
class Method(Run):
    """A way to fine-tune, and its learning rate."""

    kind: str = "full"
    learning_rate: float = 0.0


class MPOPTask(ClassificationTask):
    """The same texts with some of the training examples held out."""

    def __init__(self, arguments: TaskArguments, *, held_out: int, seed: int) -> None:
        super().__init__(arguments, seed=seed)
        # The library's accuracy checks its arguments for a hundred times as long, and intervals ask for it often.
        self.metrics = {"accuracy": lambda predictions, references: float(np.mean(predictions == references))}
        parts = self.data["train"].train_test_split(held_out, seed=seed)
        self.train_dataset, self.held_out = parts["train"], parts["test"]

    def score_held_out(self, model: PreTrainedModel) -> float:
        """Return the accuracy on the examples that choose."""
        predictions = predict_logits(model, self.held_out, data_collator=self.collator).argmax(-1)
        return float(np.mean(predictions == np.asarray(self.held_out["labels"])))


class MPOPStudy(PruningStudy):
    """Runs that differ in which tensors stand for a matrix, and which of them are trained."""

    def __init__(
        self, task: MPOPTask, args: TrainingArguments, example: ExampleArguments, squeezing: MPOSqueezingConfig
    ) -> None:
        super().__init__(task, args)
        self.example, self.squeezing = example, squeezing

    def arguments(self, run: Method) -> TrainingArguments:
        """Train every method with its own learning rate; squeeze at a constant one."""
        args = copy.deepcopy(self.args)
        args.learning_rate = run.learning_rate
        if run.kind == "squeezed":
            args.max_steps, args.eval_strategy, args.lr_scheduler_type = (
                self.example.squeezing_steps,
                "steps",
                "constant",
            )
        return args

    def settings(self, run: Method) -> dict:
        """Say what decides how a run ends."""
        settings = super().settings(run) | {"kind": run.kind, "start": run.start}
        if run.kind in ("lora", "lokr"):
            settings |= {"rank": getattr(self.example, f"{run.kind}_rank"), "factor": self.example.lokr_factor}
        if "half" in run.kind:
            settings["keep_ratio"] = self.example.keep_ratio
        return settings | (asdict(self.squeezing) if run.kind == "squeezed" else {})

    def start(self, run: Method, seed: int) -> PreTrainedModel | PeftModel:
        """Bring the encoder, or the model that squeezing goes on with, into the form that is trained."""
        model, half = super().start(run, seed), self.example.keep_ratio
        adapter: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
        lora, lokr, factor = self.example.lora_rank, self.example.lokr_rank, self.example.lokr_factor
        forms = {
            "adapter": lambda: get_peft_model(model, MPOConfig(**adapter)),
            "lora": lambda: get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, **adapter)),
            "lokr": lambda: get_peft_model(
                model, LoKrConfig(r=lokr, alpha=2 * lokr, decompose_factor=factor, **adapter)
            ),
            "mpop": lambda: compress_mpo(model),
            "mpop-half": lambda: compress_mpo(model, keep_ratio=half),
            "mpop-half-all": lambda: compress_mpo(model, keep_ratio=half, train_centre=True),
            "svd-half": lambda: cut_to_low_rank(model, keep_ratio=half),
        }
        return forms[run.kind]() if run.kind in forms else model

    def extras(self, run: Method) -> dict[str, Any]:
        """Let squeezing see the examples that choose."""
        if run.kind != "squeezed":
            return {}
        metrics = lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))}  # noqa: E731
        callback = MPOSqueezingCallback(self.squeezing)
        return {"callbacks": [callback], "eval_dataset": self.task.held_out, "compute_metrics": metrics}

    def save(self, model: PreTrainedModel | PeftModel, run: Method, folder: Path) -> None:
        """Save what was trained; the baseline that stock classes cannot load is multiplied out, in a copy."""
        (restore(copy.deepcopy(model)) if run.kind == "svd-half" else model).save_pretrained(folder)

    def sizes(self, model: PreTrainedModel | PeftModel, run: Method, seed: int) -> dict[str, int]:
        """Count what was trained, and what has to be stored to run the model, the encoder of an adapter included."""
        stored = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = count_bytes(self.folder(run.name, seed)) if run.kind != "svd-half" else 4 * stored
        return {"trained": trained, "stored": stored, "bytes": size}

    def choose_rates(self, kind: str, start: str | None) -> Method:
        """Run a method with every learning rate at the first seed, and return the best."""
        rates = [self.example.squeezing_rate] if kind == "squeezed" else self.example.learning_rates
        runs = [Method(f"{kind}-{rate:g}", start=start, peer="", kind=kind, learning_rate=rate) for rate in rates]
        seed = self.example.seeds[0]
        for run in runs:
            self.make(run, seed)
        if len(runs) == 1:
            return runs[0]
        scores = [self.task.score_held_out(self.load(run.name, seed)) for run in runs]
        print(f"{kind}: {dict(zip(rates, scores, strict=True))}", flush=True)
        return runs[int(np.argmax(scores))]

    def load(self, name: str, seed: int) -> PreTrainedModel | PeftModel:
        """Load what a run saved; an adapter is put on the encoder again."""
        folder = self.folder(name, seed)
        if (folder / "adapter_config.json").exists():
            return PeftModel.from_pretrained(self.task.new_model(), folder)
        return super().load(name, seed)

    def step_rows(self, runs: list[Method], seed: int) -> list[dict[str, str]]:
        """Time one training step of each method on one batch, in turns, on one thread of the processor."""
        torch.set_num_threads(1)
        size = self.args.per_device_train_batch_size
        batch = self.task.collator([self.task.train_dataset[index] for index in range(size)])
        steps = {run.name: partial(train_step, *prepare(self.start(run, seed)), batch) for run in runs}
        ratios = compare_latency(steps, baseline=runs[0].name, rounds=self.example.rounds, warmup=1, clock="cpu")
        shape = f"{batch['input_ids'].shape[0]}x{batch['input_ids'].shape[1]}"
        return [
            {"run": name, f"time of a step at {shape}": f"{1 / r.median:.2f}x [{1 / r.high:.2f}, {1 / r.low:.2f}]"}
            for name, r in ratios.items()
        ]


def prepare(model: PreTrainedModel | PeftModel) -> tuple[PreTrainedModel | PeftModel, torch.optim.Optimizer]:
    """Put a model in training, with the Trainer's default optimizer."""
    return model.train(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    """Make one step in float32."""
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def draw_matrices(model: PreTrainedModel, folder: Path) -> None:
    """Draw what every matrix of a dense model would lose by its size, and how entangled its bonds are."""
    errors, entropies = {}, {}
    for path in [group[0] for group in find_matrices(model)]:
        weight = model.get_parameter(f"{path}.weight").detach()
        factors = factor_matrix(weight.shape[0], weight.shape[1], 5)
        _, values = decompose(weight, *factors, gauge="left")
        sizes = [i * j for i, j in zip(*factors, strict=True)]
        curve = []
        for share in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
            (bonds,) = choose_bonds([values], [sizes], max_parameters=share * weight.numel())
            curve.append((share, error_bound(values, bonds) / float(weight.norm())))
        errors[path] = tuple(zip(*curve, strict=True))
        entropies[path] = (range(1, 5), [entanglement_entropy(spectrum) for spectrum in values])
    plot_curves(errors, folder / "error_by_size.png", x="size, share of dense", y="relative error, bound")
    plot_curves(entropies, folder / "entropy.png", x="bond", y="entanglement entropy, nats")


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TaskArguments, ExampleArguments, TrainingArguments, MPOSqueezingConfig))
    arguments, example, args, squeezing = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_inputs(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy, args.max_steps, args.eval_steps = 1, "no", 4, 2
        example.held_out, example.squeezing_steps, example.rounds = 8, 4, 3
        example.lora_rank = example.lokr_rank = 2
    study = MPOPStudy(MPOPTask(arguments, held_out=example.held_out, seed=args.seed), args, example, squeezing)

    runs: dict[str, Method] = {}
    for kind in example.methods:
        start = runs["mpop"].name if kind == "squeezed" else None
        runs[kind] = study.choose_rates(kind, start)
        if example.stage != "report":
            for seed in example.seeds:
                study.make(runs[kind], seed)
    if example.stage == "train":
        return

    table = [replace(run, peer=runs["full"].name if "full" in runs else None) for run in runs.values()]
    draw_matrices(study.task.new_model(), study.output)
    speed = study.step_rows([run for run in table if run.kind != "squeezed"], example.seeds[0])
    study.report("Fine-tuning matrix product operators", ABOUT, table, example.seeds, speed=speed)


if __name__ == "__main__":
    main()
