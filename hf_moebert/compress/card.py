"""The model card of a result, with the numbers of its report."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from hf_moebert.reporting.model_card import write_model_card
from hf_moebert.reporting.tables import measurement_rows

from .result import CompressionResult
from .tasks import TextData


LONGEST_NAME = 80  # characters, of the 96 that the Hub allows
PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
JUDGED_BY = {
    True: "labelled texts that nothing learned from",
    False: "texts without labels, compared with the predictions of the given model",
}


def write_card(result: CompressionResult, model: str, given: str, data: TextData) -> Path:
    """Write the README.md of the result.

    Args:
        result: The result, measured.
        model: The given model as it was named.
        given: Its folder, whose card tells license and language.
        data: The texts.
    """
    measurement, verdict = result.measurement, result.verdict
    config = result.load().config
    head = next((task for end, task in PIPELINES.items() if config.architectures[0].endswith(end)), None)
    facts = read_card(Path(given))
    return write_model_card(
        result.model_folder,
        repo_id=f"{as_repo_name(Path(model).name)}-compressed",
        base_model=model if not Path(model).is_dir() else Path(model).resolve().name,
        task=head or "feature-extraction",
        dataset="texts of the compression",
        split=JUDGED_BY[data.labelled],
        language=facts.get("language"),
        license=facts.get("license"),
        results={
            verdict.metric: measurement["models"][result.name]["scores"][verdict.metric]["value"],
            "speed-up": verdict.speedup,
        },
        tables={"Beside the given model": measurement_rows(measurement)},
        commands=[measurement["command"]],
    )


def as_repo_name(name: str) -> str:
    """Return a name that a repository can have, whatever a folder is called."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:LONGEST_NAME] or "model"


def read_card(folder: Path) -> dict[str, str]:
    """Return the single facts that the card of a folder tells; nothing if there is none that can be read."""
    try:
        facts = ModelCard.load(folder / "README.md").data.to_dict()
    except (OSError, ValueError, YAMLError):
        return {}
    return {name: fact for name, fact in facts.items() if isinstance(fact, str)}
