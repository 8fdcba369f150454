"""Was the choice right? Train all that a search could have chosen to the end, and compare it with what was chosen."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser

from hf_moebert.compress.door import compress, fingerprint, load_given
from hf_moebert.compress.recipe import Optimize, Recipe, Stage
from hf_moebert.compress.recipe_file import read_recipe
from hf_moebert.compress.result import GIVEN, CompressionResult, read_result
from hf_moebert.compress.running import Workshop
from hf_moebert.compress.searching import Hunt, timing
from hf_moebert.compress.tasks import find_metrics, prepare
from hf_moebert.data import read_file
from hf_moebert.measuring.comparison import TextColumns, measure
from hf_moebert.reporting.tables import markdown_table


@dataclass
class ChoiceOptions:
    """A search, and how it is checked."""

    model: str = field(metadata={"help": "Folder of the given model."})
    data: str = field(metadata={"help": "Texts to learn from."})
    eval: str = field(metadata={"help": "Texts for the verdict, and for the check."})
    output: str = field(metadata={"help": "Folder of the search; one that is there goes on."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the label."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column with the second text of a pair."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is truncated."})
    speedup: float = field(default=2.0, metadata={"help": "Asked of the search."})
    max_drop: float = field(default=0.01, metadata={"help": "Asked of the search."})
    steps: int = field(default=150, metadata={"help": "Steps of a training run to the end."})
    short: float = field(default=0.2, metadata={"help": "Share of them in a short run."})
    rounds: int = field(default=20, metadata={"help": "Timed passes."})
    tokens: int = field(default=128, metadata={"help": "Tokens of a timed text."})


def check_choice(
    model: str,
    recipe: Recipe,
    data: Dataset,
    evaluation: Dataset,
    folder: Path,
    columns: TextColumns,
    *,
    rounds: int = 20,
) -> tuple[list[dict[str, str]], bool]:
    """Search, train all that could have been chosen to the end, and compare it with the choice.

    Scores are those of plain torch, on the texts of the verdict; speed-ups are in the precision that was chosen.

    Args:
        model: Folder of the given model.
        recipe: A search.
        data: Texts to learn from.
        evaluation: Texts of the verdict.
        folder: Of the search, which goes on if it is there.
        columns: Of both.
        rounds: Timed passes.

    Returns:
        A row for each structure, and whether the choice was right: nothing that is as fast as it, or as fast as was
        asked, is better by an interval above zero.
    """
    result = compress(
        model,
        recipe,
        data=data,
        eval_data=evaluation,
        output_dir=folder,
        columns=columns,
        resume=True,
        threads=1,
        rounds=rounds,
        tell=print,
    )
    tokenizer, teacher = load_given(model, recipe, columns)
    prepared = prepare(teacher, tokenizer, data, evaluation, columns=columns, selects=True, seed=recipe.seed)
    shop = Workshop(teacher, tokenizer, prepared, recipe, folder / "stages", {}, (), print)
    hunt = Hunt(shop, model, fingerprint(model, prepared), 1, rounds)
    ends = hunt.train_all(share=1.0)
    chosen = next(name for name in ends if hunt.shop_of(name, "float32").recipe.stages[:-1] == stages_of(result))
    precision = result.recipe.precision or "float32"
    models = measure(
        {GIVEN: model} | {name: str(place) for name, place in ends.items()},
        prepared.evaluation,
        baseline=chosen,
        optimized=[precision],
        metrics=find_metrics(teacher, recipe.target.metric, prepared.columns),
        columns=prepared.columns,
        latency=timing(recipe.target, rounds),
        threads=1,
        seed=recipe.seed,
    )["models"]
    metric, rows, right = result.verdict.metric, [], True
    over_given = models[GIVEN]["speed_up"]["median"]
    speed = {name: models[f"{name}, {precision}"]["speed_up"]["median"] / over_given for name in ends}
    needed = min(speed[chosen], recipe.target.speedup or speed[chosen])
    for name in (GIVEN, *ends):
        score, difference = models[name]["scores"][metric]["value"], "the choice"
        if name != chosen:
            found = models[name]["differences"][metric]
            difference = f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
            right &= name == GIVEN or speed[name] < needed or found["low"] <= 0
        fast = f"{speed[name]:.2f}x" if name in speed else "1"
        rows.append(
            {"trained to the end": name, metric: f"{score:.4f}", "to the choice": difference, "speed-up": fast}
        )
    return rows, right


def stages_of(result: CompressionResult) -> tuple[Stage, ...]:
    """Return the stages of what was chosen, without its precision."""
    return tuple(stage for stage in result.recipe.stages if not isinstance(stage, Optimize))


def count_steps(candidates: list[dict[str, str]]) -> int:
    """Return how many steps a search trained; each structure has a row in every precision."""
    return sum(steps for _, steps in {(row["tried"].rpartition(", ")[0], int(row["steps"])) for row in candidates})


def main() -> None:
    """Search and check."""
    (options,) = HfArgumentParser(ChoiceOptions).parse_args_into_dataclasses()
    recipe = read_recipe(
        "auto",
        changes=[f"distil.steps={options.steps}", f"search.short={options.short}"],
        speedup=options.speedup,
        max_drop=options.max_drop,
        tokens=options.tokens,
    )
    columns = TextColumns(
        text_pair_column=options.text_pair_column, label_column=options.label_column, max_length=options.max_length
    )
    rows, right = check_choice(
        options.model,
        recipe,
        read_file(options.data),
        read_file(options.eval),
        Path(options.output),
        columns,
        rounds=options.rounds,
    )
    print(markdown_table(rows))
    searched, everything = count_steps(read_result(options.output).candidates), options.steps * (len(rows) - 2)
    print("The choice is", "right." if right else "wrong.", f"It trained {searched} steps, all would be {everything}.")


if __name__ == "__main__":
    main()
