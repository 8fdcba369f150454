"""Predict what a recipe would leave before hours are spent on it: stand-ins of the right sizes, timed for a moment."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from transformers import PreTrainedModel

from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.architectures.surgery import find_feed_forwards, matrix_of
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.inference.linears import Precision
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.measuring.latency import compare_latency
from hf_moebert.methods.trimming import drop_layers

from .recipe import Distil, DropLayers, Experts, Optimize, Prune, Recipe, Search, Stage
from .running import cut_into_experts
from .searching import structures_for, timing
from .stages import shrink


GIVEN = "given"
ROUNDS = 5  # timed passes of each stand-in
USUAL_TOKENS = 32  # of a text in a training step, where nothing says more


@dataclass(frozen=True)
class Prediction:
    """A guess at what comes out, from a stand-in whose units were chosen without looking.

    Attributes:
        name: What was done.
        parameters: Parameters that it holds.
        speedup: Times as fast as the given model in plain torch, on this machine.
        training_seconds: How long its training runs would take here; 0 without one.
    """

    name: str
    parameters: int
    speedup: float
    training_seconds: float


def predict(model: PreTrainedModel, recipe: Recipe, *, examples: int) -> list[Prediction]:
    """Predict what a recipe would make of a model; of a search, what each structure is that the model can have.

    Which units go depends on texts, but not how many: so copies of the right sizes are made, and run. Stages of which
    that is not known (`trim_vocabulary`, zeros of single weights) are left out. Our own design.

    Args:
        model: The given model; it is not changed.
        recipe: Stages, and the shape of the passes that are timed.
        examples: Texts to learn from.

    Raises:
        ValueError: If a stage of the recipe cannot be done to the model.
    """
    if isinstance(recipe.stages[0], Search):
        distil = cast(Distil, recipe.stages[1])
        plans = {name: (*stages, distil) if stages else () for name, stages in structures_for(recipe.target).items()}
    else:
        plans = {", ".join(stage.name for stage in recipe.stages): recipe.stages}
    target = recipe.target
    tokens = target.tokens if isinstance(target.tokens, int) else USUAL_TOKENS
    calls, facts = {GIVEN: forward(model, target.batch, tokens)}, {}
    for name, stages in plans.items():
        try:
            form = stand_in(model, stages)
        except ValueError:
            if len(plans) == 1:
                raise
            continue  # a search leaves out what the family cannot have
        trained = (stage for stage in stages if isinstance(stage, Distil))
        facts[name] = form.num_parameters(), sum(training_time(model, form, stage, examples) for stage in trained)
        precision = next((stage.precision for stage in stages if isinstance(stage, Optimize)), None)
        if precision is not None:
            form = optimize_for_inference(form, precision=cast(Precision, precision))
        calls[name] = forward(form, target.batch, tokens)
    times = compare_latency(calls, baseline=GIVEN, rounds=ROUNDS, clock=timing(target, ROUNDS).clock)
    return [Prediction(name, size, times[name].median, seconds) for name, (size, seconds) in facts.items()]


def stand_in(model: PreTrainedModel, stages: Sequence[Stage]) -> PreTrainedModel:
    """Return a model of the sizes that stages would leave."""
    form = copy.deepcopy(model).eval()
    for stage in stages:
        if isinstance(stage, DropLayers):
            form = drop_layers(form, stage.count_layers(form.config.num_hidden_layers))
        elif isinstance(stage, Prune) and stage.granularity == "structured":
            ratio, kinds = stage.keep_ratio or 1 / cast(float, stage.speed_up), ("neurons", "heads")
            form = narrow_evenly(form, ratio, stage.multiple_of, kinds[: 1 if stage.method == "masks" else 2])
        elif isinstance(stage, Experts):
            widths = [network.num_units for network in find_feed_forwards(form)]
            balanced = stage.routing == "hash-balanced"
            counts = torch.ones(form.config.vocab_size, dtype=torch.long) if balanced else None
            form = cut_into_experts(stage, form, torch.ones(len(widths), max(widths)), counts)
    return form


@torch.no_grad()
def narrow_evenly(model: PreTrainedModel, ratio: float, multiple_of: int, kinds: Sequence[str]) -> PreTrainedModel:
    """Remove the last units of these kinds of every layer, so that this share of them stays."""
    model = copy.deepcopy(model)
    for group in (group for group in find_unit_groups(model) if group.kind in kinds):
        kept = max(1, round(ratio * group.num_units))
        matrix_of(group.writer)[:, kept * group.unit_size :] = 0
    return shrink(model, multiple_of=multiple_of)


def forward(model: PreTrainedModel, batch: int, tokens: int) -> Callable[[], object]:
    """Return a pass of drawn ids."""
    return torch.no_grad()(partial(model.eval(), **draw_batch(model, batch, tokens)))


def draw_batch(model: PreTrainedModel, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Draw ids, `(batch, tokens)`."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return complete_inputs(model, torch.randint(vocabulary, (batch, tokens), generator=generator))


def training_time(teacher: PreTrainedModel, student: PreTrainedModel, stage: Distil, examples: int) -> float:
    """Time a step of distillation on drawn ids, and return the seconds of a training run of such steps."""
    inputs = draw_batch(student, stage.batch_size, USUAL_TOKENS)
    student = copy.deepcopy(student).train()
    times = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with torch.no_grad():
            teacher(**inputs)
        outputs = student(**inputs)
        (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float().square().mean().backward()
        times.append(time.perf_counter() - start)
    return stage.count_steps(examples) * times[-1]
