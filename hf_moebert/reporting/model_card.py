"""Write the model card of a compressed model."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .report import picture_link
from .tables import Rows, escape_markdown, markdown_table, one_line


TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_model_card(
    folder: str | PathLike[str],
    *,
    repo_id: str,
    base_model: str,
    task: str,
    dataset: str,
    language: str | None = None,
    license: str | None = None,
    results: Mapping[str, float],
    tables: Mapping[str, Rows],
    split: str = "validation",
    limitations: str = "Measured on this data set alone; whatever the base model gets wrong, this model does as well.",
    pictures: Mapping[str, str | PathLike[str]] | None = None,
    commands: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Path:
    """Write the README.md of a checkpoint folder: how to load the model, its results and its limitations.

    All texts are escaped: none can add markup, HTML or metadata to the card.

    Args:
        folder: Checkpoint of the model, with its `config.json`.
        repo_id: Repository it will be published in, "name" or "owner/name".
        base_model: Hub id (or local name) of the model that was compressed.
        task: Pipeline task, such as "text-classification".
        dataset: Hub id (or plain name) of the data set that the results were measured on.
        language: ISO 639 code, if it is known.
        license: Identifier known to the Hub, such as "apache-2.0", if it is known.
        results: Value of each metric, by the metric's name.
        tables: Rows of further tables, by heading.
        split: Split of the data set that was measured.
        limitations: Uses the model is not fit for.
        pictures: Caption and file (inside the folder) of each picture.
        commands: Shell commands that reproduce the model and its numbers.
        tags: Further Hub tags.

    Returns:
        The written file.

    Raises:
        ValueError: If the folder has no `config.json`, if `repo_id` cannot be a repository's name, if there are no
            results, or if a picture lies outside the folder.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` must hold a config.json, got {str(folder)!r}. Call `save_pretrained` on it first.")
    if not results:
        raise ValueError("`results` must hold at least one metric, got none. Evaluate the model first.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts = {"task": task, "data": f"{dataset} ({split})", **{key: f"{value:.4g}" for key, value in results.items()}}
    card = ModelCard.from_template(
        ModelCardData(
            language=language and one_line(language),
            license=license and one_line(license),
            library_name="transformers",
            pipeline_tag=one_line(task),
            tags=["hf_moebert", one_line(config.get("model_type")), *map(one_line, tags)],
            metrics=list(map(one_line, results)),
            model_name=repo_id.rpartition("/")[2],
            eval_results=[_eval_result(metric, value, task, dataset, split) for metric, value in results.items()],
            # The Hub refuses a card whose links lead nowhere, so only what can be a Hub id becomes one.
            base_model=base_model if _is_repo_id(base_model) else None,
            datasets=[dataset] if _is_repo_id(dataset) else None,
        ),
        template_path=str(TEMPLATE),
        title=escape_markdown(repo_id.rpartition("/")[2]),
        summary=f"{escape_markdown(base_model)}, compressed with hf\\_moebert for {escape_markdown(task)}.",
        task_name=task,
        repo_id=repo_id,
        has_code="auto_map" in config,
        labels=[escape_markdown(label) for label in config.get("id2label", {}).values()],
        results=markdown_table([{"what": key, "value": value} for key, value in facts.items()]),
        tables={escape_markdown(heading): markdown_table(rows) for heading, rows in tables.items()},
        pictures=[picture_link(folder, caption, file) for caption, file in (pictures or {}).items()],
        commands=list(map(one_line, commands)),
        limitations=escape_markdown(limitations),
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def _eval_result(metric: str, value: float, task: str, dataset: str, split: str) -> EvalResult:
    task, dataset, metric, split = map(one_line, (task, dataset, metric, split))
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_name=metric,
        metric_value=value,
    )


def _is_repo_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
