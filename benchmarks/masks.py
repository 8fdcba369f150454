"""Time masked decoders: what learning masks adds to a training step, and what compact models save.

    python benchmarks/masks.py
    python benchmarks/masks.py --cases prefill decode --dtypes bfloat16 --output build/masks.json
    python benchmarks/masks.py --cases prefill decode --model COMPACT --dense DENSE

Models have the layers of Qwen2.5-0.5B, but fewer, and a vocabulary of 8000, so that embeddings and head do not hide
the layers. Weights are random: nothing here speaks of quality. What is compared runs interleaved in one process;
ratios are paired by round. One thread is timed by its own CPU time, which others on the machine disturb less; more
threads, and a GPU, by elapsed time.

A training step is forward, backward, clipping and AdamW, fused as the stock Trainer's; with masks also all that
`MaskSparsityCallback` does in a step, with the optimizer that it makes.

Compact models use half of their units for each token. Masks are drawn to resemble learned ones: a share `specific` of
the units is open in half of the experts each, others in all experts or in none. Prefill runs the head on the last
token only, as `generate` does; it promises what the operations of these inputs say, dense over compact. Decoding
appends a token to a cache of `seq` others; it promises what the parameters that a token meets say. `half width` is a
dense model with half of the units, for which nothing is routed.
"""

import copy
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    HfArgumentParser,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.measuring.latency import SpeedUp, compare_times, environment, time_rounds
from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, from_dense, shrink
from hf_moebert.reporting.tables import markdown_table


Row = dict[str, Any]
Models = dict[str, PreTrainedModel]
IMPLEMENTATIONS = ("eager", "grouped_mm", "sliced_mm")
STEPS = 1000  # of the run that the training steps are the first of
MOST_OVERHEAD, LEAST_SHARE = 1.10, 0.9


@dataclass
class MaskBenchmarkArguments:
    """Cases of the benchmark, and how they are timed."""

    cases: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": "Any of the tables."})
    layers: int = field(default=4, metadata={"help": "Of the models; Qwen2.5-0.5B has 24."})
    experts: int = field(default=4, metadata={"help": "Masks of the models that have a router."})
    top_k: int = field(default=1, metadata={"help": "Masks that a token uses."})
    specific: float = field(default=0.25, metadata={"help": "Share of the units that only some experts use."})
    model: Path | None = field(default=None, metadata={"help": "Compact checkpoint to time instead of drawn ones."})
    dense: Path | None = field(default=None, metadata={"help": "The dense checkpoint that it came from."})
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "For inference."})
    train_batch: int = field(default=2, metadata={"help": "Sequences of a training step."})
    train_seq: int = field(default=128, metadata={"help": "Tokens of each of them."})
    batch: int = field(default=8, metadata={"help": "Sequences of a prefill."})
    seq: int = field(default=512, metadata={"help": "Tokens of each of them, and of the cache while decoding."})
    rounds: int = field(default=7, metadata={"help": "Timed prefills and training steps of each model."})
    decode_rounds: int = field(default=50, metadata={"help": "Timed tokens of each model."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models, to see that everything runs."})
    seed: int = field(default=0, metadata={"help": "Of weights, masks, ids and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file, written anew after every table."})

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - CASES.keys():
            raise ValueError(f"`cases` must be among {list(CASES)}, got {sorted(unknown)}.")
        if (self.model is None) != (self.dense is None):
            raise ValueError("`model` and `dense` must be given together.")
        if not 0 <= self.specific <= 1:
            raise ValueError(f"`specific` must be in [0, 1], got {self.specific}. Use 0.25.")

    @property
    def clock(self) -> str:
        """The clock of this device and number of threads."""
        return "cpu" if self.threads == 1 and self.device == "cpu" else "wall"

    @property
    def config(self) -> Qwen2Config:
        """Of Qwen2.5-0.5B's layers, or of something tiny."""
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "vocab_size": 8000}
        if self.smoke:
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 60}
        shared = {"num_key_value_heads": 2, "num_hidden_layers": self.layers, "tie_word_embeddings": True}
        return Qwen2Config(**sizes, **shared)

    def compare(self, calls: dict[str, Callable[[], None]], rounds: int, *baselines: str) -> list[dict[str, SpeedUp]]:
        """Return how many times faster each call is than the baselines."""
        ready = {name: partial(finish, call, self.device) for name, call in calls.items()}
        times = time_rounds(ready, rounds=rounds, warmup=2, clock=self.clock)
        return [compare_times(times, baseline=name, clock=self.clock, seed=self.seed) for name in baselines]


def finish(call: Callable[[], None], device: str) -> None:
    """Run a call until its work is done."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()


def draw_masks(shape: tuple[int, int, int], specific: float, seed: int) -> Tensor:
    """Draw masks that open half of the units for each expert on average; with one expert, there are no specific ones.

    Args:
        shape: `(layers, experts, units)`.
        specific: Share of the units of each layer that half of the experts use; of an odd number the smaller half,
            which leaves too few open if almost all units are specific.
        seed: Of the draw.

    Returns:
        Bool, of this shape.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, experts, units = shape
    holders = experts // 2
    num_specific = round(specific * units) if holders else 0
    num_shared = round(units / 2 - num_specific * holders / experts)
    kinds = torch.rand(layers, units, generator=generator).argsort(dim=1)[:, None]  # (layers, 1, units)
    ranks = torch.rand(shape, generator=generator).argsort(dim=1)  # of the experts, for each unit
    return (kinds < num_shared) | ((kinds < num_shared + num_specific) & (ranks < holders))


def time_training(args: MaskBenchmarkArguments) -> list[Row]:
    """Time training steps of models that learn masks against the dense model's."""
    dense = Qwen2ForCausalLM(args.config)
    models = {"dense": dense}
    for experts in (1, args.experts):
        models[label(experts)] = from_dense(dense, num_experts=experts, top_k=min(args.top_k, experts), seed=args.seed)
    ids = torch.randint(args.config.vocab_size, (args.train_batch, args.train_seq), device=args.device)
    batch = {"input_ids": ids, "labels": ids}
    calls = {name: make_step(model.to(args.device).train(), batch, args) for name, model in models.items()}
    (ratios,) = args.compare(calls, args.rounds, "dense")
    shape = {"input": f"{args.train_batch}x{args.train_seq}", "dtype": "float32"}
    return [
        shape
        | {"model": name, "over dense": ratio, "time over dense": round(1 / ratio.median, 3)}
        | {"target": f"at most {MOST_OVERHEAD}"}
        for name, ratio in ratios.items()
    ]


def make_step(model: PreTrainedModel, batch: dict[str, Tensor], args: MaskBenchmarkArguments) -> Callable[[], None]:
    """Return one optimiser step, with the callback's part if there are masks to learn."""
    training = TrainingArguments(learning_rate=1e-5, seed=args.seed, use_cpu=args.device == "cpu", report_to="none")
    if not hasattr(model.config, "mask_stage"):
        return partial(take_step, model, batch, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    callback = MaskSparsityCallback()
    optimizer = callback.make_optimizer(model, training)
    event = (training, TrainerState(max_steps=STEPS), TrainerControl())
    callback.on_train_begin(*event, model=model, optimizer=optimizer)

    def step() -> None:
        callback.on_step_begin(*event, optimizer=optimizer)
        take_step(model, batch, optimizer)
        callback.on_optimizer_step(*event, optimizer=optimizer)

    return step


def take_step(model: PreTrainedModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Train on a batch as the Trainer does."""
    optimizer.zero_grad()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def make_models(args: MaskBenchmarkArguments, dtype: torch.dtype) -> Models:
    """Build or load the dense model, one of half the width, and compact ones."""
    if args.dense is None:
        dense = Qwen2ForCausalLM(args.config)
        compacts = {}
        for experts in (args.experts, 1):
            masks = draw_masks((args.layers, experts, dense.config.intermediate_size), args.specific, args.seed)
            masked = from_dense(
                dense, num_experts=experts, top_k=min(args.top_k, experts), masks=masks, seed=args.seed
            )
            compacts[label(experts)] = shrink(masked)
    else:
        dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=dtype)
        compacts = {"compact": AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)}
    halved = copy.deepcopy(dense.config)
    halved.intermediate_size //= 2
    models = {"dense": dense, "half width": type(dense)(halved)}
    for name, model in compacts.items():
        for implementation in IMPLEMENTATIONS if getattr(model, "networks", dict)() else ():
            models[f"{name}, {implementation}"] = with_implementation(model, implementation)
        if name not in {of.partition(",")[0] for of in models}:
            models[name] = model
    return {name: model.to(args.device, dtype).eval() for name, model in models.items()}


def label(experts: int) -> str:
    """Name a model with so many masks."""
    return "1 expert" if experts == 1 else f"{experts} experts"


def with_implementation(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Return a copy that shares the weights and runs its experts in another way."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    shared.set_experts_implementation(implementation)
    return shared


def time_inference(args: MaskBenchmarkArguments, *, decode: bool) -> list[Row]:
    """Time a prefill or one token of all models in each dtype."""
    rows = []
    for dtype in args.dtypes:
        models = make_models(args, getattr(torch, dtype))
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(models["dense"].config.vocab_size, (args.batch, args.seq), generator=generator)
        make_call, cost = (make_decode, active_parameters) if decode else (make_prefill, partial(operations, args.seq))
        calls = {name: make_call(model, ids.to(args.device)) for name, model in models.items()}
        ratios, over_half = args.compare(calls, args.decode_rounds if decode else args.rounds, "dense", "half width")
        costs = {name.removesuffix(", eager"): cost(model) for name, model in models.items()}
        for name, ratio in ratios.items():
            # of `eager` for all implementations: others multiply padding too, which is no merit
            promised = costs["dense"] / costs[name.partition(",")[0]]
            reached = {"promised": round(promised, 3), "share of it": round(ratio.median / promised, 3)}
            row = {"input": "1x1" if decode else f"{args.batch}x{args.seq}", "dtype": dtype, "model": name}
            row |= {"over dense": ratio, "over half width": over_half.get(name)} | reached
            rows.append(row | {"target": "over dense 1" if decode else f"share {LEAST_SHARE}"})
    return rows


def make_prefill(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Return what `generate` does with a prompt."""
    return partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)


def make_decode(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Return what `generate` does with one token, whose traces in the cache are removed."""
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    token = ids[:1, :1]
    model(input_ids=ids[:1], **{name: cache})

    def call() -> None:
        model(input_ids=token, **{name: cache}, logits_to_keep=1)
        cache.crop(-1)

    return call


def operations(seq: int, model: PreTrainedModel) -> float:
    """Count the floating point operations of a prefill, per token: the head meets only the last one."""
    head = 2 * model.get_output_embeddings().weight.numel()
    return measure_footprint(model, seq_len=seq).flops_per_token - head * (1 - 1 / seq)


def active_parameters(model: PreTrainedModel) -> int:
    """Count the parameters that a token meets, which have to be read for it."""
    return measure_footprint(model).active


CASES: dict[str, Callable[[MaskBenchmarkArguments], list[Row]]] = {
    "training": time_training,
    "prefill": torch.no_grad()(partial(time_inference, decode=False)),
    "decode": torch.no_grad()(partial(time_inference, decode=True)),
}


def written(value: object) -> str:
    """Write a value, a ratio with its 95 % interval."""
    if isinstance(value, SpeedUp):
        return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"
    return "-" if value is None else str(value)


def main(args: MaskBenchmarkArguments) -> None:
    """Print a table for each case."""
    torch.set_num_threads(args.threads)
    facts = {"command": " ".join(["python", *sys.argv])} | environment()
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    results: dict[str, list[Row]] = {}
    for case in args.cases:
        torch.manual_seed(args.seed)
        rows = CASES[case](args)
        table = markdown_table([{key: written(value) for key, value in row.items()} for row in rows])
        print(f"\n{case}, {args.threads} thread(s), {args.clock} clock\n\n{table}", flush=True)
        results[case] = [
            {key: asdict(value) if isinstance(value, SpeedUp) else value for key, value in row.items()} for row in rows
        ]
        if args.output is not None:
            args.output.write_text(
                json.dumps({"environment": facts, "results": results}, indent=2) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main(HfArgumentParser(MaskBenchmarkArguments).parse_args_into_dataclasses()[0])
