"""Bodies of requests: those of text-embeddings-inference, of OpenAI's client and huggingface_hub's, and our own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from hf_moebert.architectures.protocols import AnswerOptions


FAIL_FAST = Field(fail_fast=True)  # a message for each of a million wrong elements would waste time
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Texts = Annotated[list[str], FAIL_FAST]
Input = str | Annotated[dict[Name, str | Texts], Field(fail_fast=True, max_length=4)]
FORMS = '"a text", {"text": …, "text_pair": …}, {"tokens": ["a", "text"]} or {"question": …, "context": …}'

MODEL = Field(default=None, description="Name of the model; not needed where one alone can answer.")
TRUNCATE = Field(default=False, description="Cut a text that is longer than the model takes, instead of refusing it.")


class Body(BaseModel):
    """Base of all bodies, which hold nothing unknown and of which nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PredictRequest(Body):
    """Body of POST /predict."""

    inputs: Input | Annotated[list[Input | Texts], FAIL_FAST] = Field(
        description=f"One input or a list of them, each {FORMS}. A classifier reads a list of one or two strings as "
        'one input, a text or a pair, and a list of such lists as several: [["a text"], ["a text", "its pair"]].'
    )
    model: Name | None = MODEL
    tasks: Annotated[list[Name], Field(fail_fast=True, min_length=1)] | None = Field(
        default=None, description="Tasks of a multi-task model; all by default."
    )
    truncate: bool = TRUNCATE
    raw_scores: bool = Field(default=False, description="Answer with logits.")

    @property
    def options(self) -> AnswerOptions:
        """Return how the inputs are answered."""
        tasks = None if self.tasks is None else tuple(self.tasks)
        return AnswerOptions(tasks=tasks, truncate=self.truncate, raw_scores=self.raw_scores)


class EmbedRequest(Body):
    """Body of POST /embed."""

    inputs: str | Texts = Field(description="One text or a list of them.")
    model: Name | None = MODEL
    truncate: bool = TRUNCATE
    truncation_direction: Literal["right", "Right"] = Field(default="right", description="Texts are cut at their end.")
    normalize: bool | None = Field(default=None, description="Length 1; by default as the model's folder says.")
    prompt_name: Name | None = Field(default=None, description="Prompt to put before the texts.")
    dimensions: int | None = Field(default=None, ge=1, description="Keep the first so many numbers.")

    @property
    def options(self) -> AnswerOptions:
        """Return how the inputs are answered."""
        return AnswerOptions(truncate=self.truncate, normalize=self.normalize, prompt_name=self.prompt_name)


class Sentences(Body):
    """A sentence, and those that it is compared with."""

    source_sentence: str
    sentences: Texts


class SimilarityRequest(Body):
    """Body of POST /similarity."""

    inputs: Sentences
    parameters: dict[Name, Any] = Field(default={}, max_length=0)
    model: Name | None = MODEL
    truncate: bool = TRUNCATE


class RerankRequest(Body):
    """Body of POST /rerank."""

    query: str
    texts: Texts
    model: Name | None = MODEL
    truncate: bool = TRUNCATE
    raw_scores: bool = Field(default=False, description="Logits instead of numbers between 0 and 1.")
    return_text: bool = Field(default=False, description="Answer with the texts, too.")


class EmbeddingsRequest(Body):
    """Body of POST /v1/embeddings, as OpenAI's client sends it. A longer text than the model takes is refused."""

    input: str | Texts = Field(description="One text or a list of them.")
    model: Name
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="Keep the first so many numbers.")
    user: str | None = Field(default=None, max_length=1000, description="Not read.")


class UpdateRequest(Body):
    """Body of PUT /tasks/{name}."""

    folder: str = Field(description="Folder below the directory of updates.")


class HubParameters(Body):
    """Parameters that the client of huggingface_hub may send beside inputs."""

    top_k: int | None = Field(default=None, ge=1)
    function_to_apply: Literal["none"] | None = None
    aggregation_strategy: Literal["simple"] | None = None


class HubRequest(EmbedRequest):
    """Body of POST /, as `huggingface_hub.InferenceClient(base_url)` sends it."""

    inputs: Input | Annotated[list[Input | Texts], FAIL_FAST]  # type: ignore[assignment]
    parameters: HubParameters = HubParameters()
