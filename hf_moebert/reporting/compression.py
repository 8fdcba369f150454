"""Write the report of a compression: a page for whoever decides, with the facts for whoever checks."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .drawings import draw_front, draw_layers, draw_losses
from .tables import escape_markdown, markdown_table, measurement_rows, short_number


TEMPLATES = Path(__file__).parent
HEADLINES = {
    "met": "All targets are met.",
    "quality dropped": "Too much quality was lost.",
    "too few examples": "The quality may be kept, but the examples are too few to be sure.",
    "speed or size missed": "The quality is kept, but speed or size is not reached.",
}


def write_compression_report(folder: str | PathLike[str], result: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `report.md` and `report.html`, one file that needs no network, of one compression.

    Args:
        folder: Folder to write to.
        result: What `report.json` holds: "verdict", "stages", "recipe", "measurement", "layers", "experts" and
            "labelled"; "candidates" if several recipes were tried.

    Returns:
        The two files.
    """
    facts = page_facts(result)
    markdown, page = Path(folder) / "report.md", Path(folder) / "report.html"
    markdown.write_text(as_markdown(facts), encoding="utf-8")
    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    page.write_text(templates.get_template("compression_template.html").render(facts), encoding="utf-8")
    return markdown, page


def page_facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what both forms of the report show, as text and numbers."""
    verdict, measurement = result["verdict"], result["measurement"]
    models = measurement["models"]
    given, chosen = models[measurement["baseline"]], models[result["chosen"]]
    scores = [model["scores"][verdict["metric"]]["value"] for model in (given, chosen)]
    judge = "labels" if result["labelled"] else "predictions of the given model, for there were no labels"
    facts = {"command": measurement["command"], "seed": measurement["seed"]}
    facts |= measurement["settings"] | measurement["environment"]
    candidates = result.get("candidates", [])
    seen = (measurement["baseline"], result["chosen"], verdict["metric"], candidates)
    trained = {stage["stage"]: stage["losses"] for stage in result["stages"] if len(stage.get("losses", ())) > 1}
    return {
        "headline": HEADLINES[verdict["outcome"]],
        "met": verdict["outcome"] == "met",
        "reasons": verdict["reasons"],
        "judge": f"Scores compare with the {judge}; nothing that is scored was seen by a stage.",
        "pairs": [
            compare("time of a forward pass", 1.0, 1 / verdict["speedup"], "{:.0%}"),
            compare("bytes on disk", given["footprint"]["bytes_on_disk"], verdict["size"], "{}"),
            compare("parameters used for a token", given["footprint"]["active"], chosen["footprint"]["active"], "{}"),
            compare(verdict["metric"], scores[0], scores[1], "{:.4f}"),
        ],
        "rows": measurement_rows(measurement),
        "stages": [stage_row(stage) for stage in result["stages"]],
        "candidates": candidates,
        "front": draw_front(models, *seen),
        "experts": [expert_row(layer, shares) for layer, shares in enumerate(result["experts"])],
        "layers": draw_layers(result["layers"]) if result["layers"]["given"] else None,
        "losses": {name: draw_losses(losses) for name, losses in trained.items()},
        "facts": [{"what": key, "value": str(value)} for key, value in facts.items()],
    }


def compare(name: str, before: float, after: float, form: str) -> dict[str, Any]:
    """Return two numbers to be shown as bars, the longer one whole."""
    longest = max(before, after) or 1
    values = [short_number(value) if form == "{}" else form.format(value) for value in (before, after)]
    return {"name": name, "before": values[0], "after": values[1], "bars": (before / longest, after / longest)}


def stage_row(stage: Mapping[str, Any]) -> dict[str, str]:
    """Return what a stage was told and took."""
    told = ", ".join(f"{name}: {value}" for name, value in stage["options"].items() if value is not None)
    return {
        "stage": stage["stage"],
        "options": told or "-",
        "parameters": f"{stage['parameters']:,}",
        "seconds": f"{stage['seconds']:.0f}",
    }


def expert_row(layer: int, shares: Sequence[float]) -> dict[str, str]:
    """Return which share of the tokens each expert of a layer processes."""
    return {"layer": str(layer)} | {f"expert {expert}": f"{share:.0%}" for expert, share in enumerate(shares)}


def as_markdown(facts: Mapping[str, Any]) -> str:
    """Write the report for a terminal or a repository."""
    pairs = [{"": pair["name"], "given": pair["before"], "compressed": pair["after"]} for pair in facts["pairs"]]
    parts = [f"# {facts['headline']}", "\n".join(f"- {escape_markdown(reason)}" for reason in facts["reasons"])]
    parts += [markdown_table(pairs), facts["judge"], "## All that was measured", markdown_table(facts["rows"])]
    parts.append("Intervals (95 %) are bootstrapped over examples for scores, over interleaved rounds for speed-ups.")
    if facts["stages"]:
        parts += ["## Stages", markdown_table(facts["stages"])]
    if facts["experts"]:
        parts += ["## Tokens of each expert", markdown_table(facts["experts"])]
    if facts["candidates"]:
        parts += ["## Recipes that were tried", markdown_table(facts["candidates"])]
    parts += ["## How it was measured", markdown_table(facts["facts"])]
    return "\n\n".join(parts) + "\n"
