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
from pathlib import Path
from typing import Any

from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from smoke import make_smoke_texts
from study import Run, Study, StudyOptions
from tasks import TextArguments, TextTask
from transformers import EvalPrediction, HfArgumentParser, PreTrainedModel, TrainingArguments

from hf_moebert import MPOConfig, MPOSqueezingCallback, MPOSqueezingConfig, compress_mpo
from hf_moebert.measuring.footprint import count_bytes
from hf_moebert.measuring.metrics.accuracy.accuracy import accuracy
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
class MPOPOptions(StudyOptions):
    """Runs of the study."""

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


class AdaptedStudy(Study):
    """Runs of which some train an adapter, and some a part of the weights."""

    def sizes(self, model: PreTrainedModel | PeftModel, run: Run, seed: int) -> dict[str, int]:
        """Count what was trained, and what has to be stored to run the model, the encoder of an adapter included."""
        stored = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"trained": trained, "stored": stored, "bytes": count_bytes(self.folder(run.name, seed))}

    def load(self, name: str, seed: int) -> PreTrainedModel | PeftModel:
        """Load what a run saved; an adapter is put on the encoder again."""
        folder = self.folder(name, seed)
        if (folder / "adapter_config.json").exists():
            return PeftModel.from_pretrained(self.task.new_model(), folder)
        return super().load(name, seed)


class MPOPStudy(AdaptedStudy):
    """Runs that differ in which tensors stand for a matrix, and which of them are trained."""

    def __init__(
        self, task: TextTask, args: TrainingArguments, options: MPOPOptions, squeezing: MPOSqueezingConfig
    ) -> None:
        super().__init__(task, args, options)
        self.squeezing = squeezing

    def arguments(self, run: Method) -> TrainingArguments:
        """Train every method with its own learning rate; squeeze at a constant one."""
        args = copy.deepcopy(self.args)
        args.learning_rate = run.learning_rate
        if run.kind == "squeezed":
            args.max_steps = self.options.squeezing_steps
            args.eval_strategy, args.lr_scheduler_type = "steps", "constant"
        return args

    def settings(self, run: Method) -> dict:
        """Add the method and its sizes."""
        settings = super().settings(run) | {"kind": run.kind, "start": run.start}
        if run.kind in ("lora", "lokr"):
            settings |= {"rank": getattr(self.options, f"{run.kind}_rank"), "factor": self.options.lokr_factor}
        if "half" in run.kind:
            settings["keep_ratio"] = self.options.keep_ratio
        return settings | (asdict(self.squeezing) if run.kind == "squeezed" else {})

    def start(self, run: Method, seed: int) -> PreTrainedModel | PeftModel:
        """Bring the encoder, or the model that squeezing goes on with, into the form that is trained."""
        model, half = super().start(run, seed), self.options.keep_ratio
        adapter: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
        lora, lokr, factor = self.options.lora_rank, self.options.lokr_rank, self.options.lokr_factor
        forms = {
            "adapter": lambda: get_peft_model(model, MPOConfig(**adapter)),
            "lora": lambda: get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, **adapter)),
            "lokr": lambda: get_peft_model(
                model, LoKrConfig(r=lokr, alpha=2 * lokr, decompose_factor=factor, **adapter)
            ),
            "mpop": lambda: compress_mpo(model),
            "mpop-half": lambda: compress_mpo(model, keep_ratio=half),
            "mpop-half-all": lambda: compress_mpo(model, keep_ratio=half, train_centre=True),
            "svd-half": lambda: compress_mpo(model, num_cores=2, keep_ratio=half),
        }
        return forms[run.kind]() if run.kind in forms else model

    def extras(self, run: Method, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Let squeezing see the examples that choose."""
        if run.kind != "squeezed":
            return {}

        def metrics(output: EvalPrediction) -> dict[str, float]:
            return {"accuracy": accuracy(output.predictions.argmax(-1), output.label_ids)}

        callback = MPOSqueezingCallback(self.squeezing)
        return {"callbacks": [callback], "eval_dataset": self.task.held_out, "compute_metrics": metrics}

    def choose_rate(self, kind: str, start: str | None) -> Method:
        """Return the run of a method with its best learning rate at the first seed."""
        rates = [self.options.squeezing_rate] if kind == "squeezed" else self.options.learning_rates
        runs = [Method(f"{kind}-{rate:g}", start=start, peer="", kind=kind, learning_rate=rate) for rate in rates]
        seed = self.options.seeds[0]
        if self.options.stage == "report":
            self.refuse_missing(runs, [seed])
        return self.choose(runs, seed, lambda run: self.task.score_held_out(self.load(run.name, seed)))


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
    parser = HfArgumentParser((TextArguments, MPOPOptions, TrainingArguments, MPOSqueezingConfig))
    arguments, options, args, squeezing = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy, args.max_steps, args.eval_steps = 1, "no", 4, 2
        options.held_out, options.squeezing_steps, options.rounds = 8, 4, 3
        options.lora_rank, options.lokr_rank, options.samples = 2, 2, 50
    task = TextTask(arguments, seed=args.seed, held_out=options.held_out)
    study = MPOPStudy(task, args, options, squeezing)

    runs: dict[str, Method] = {}
    for kind in options.methods:
        runs[kind] = study.choose_rate(kind, start=runs["mpop"].name if kind == "squeezed" else None)
        if options.stage == "report":
            study.refuse_missing([runs[kind]], options.seeds)
        study.make_all([runs[kind]], options.seeds)
    if options.stage == "train":
        return

    table = [replace(run, peer=runs["full"].name if "full" in runs else None) for run in runs.values()]
    draw_matrices(study.task.new_model(), study.output)
    timed = [run for run in table if run.kind != "squeezed"]
    speed = study.step_rows(timed, options.seeds[0], "time of a step at {shape}", rounds=options.rounds)
    study.report("Fine-tuning matrix product operators", ABOUT, table, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
