"""How texts become embeddings."""

from dataclasses import dataclass, field


POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True)
class EmbeddingForm:
    """How texts become embeddings, as a folder of sentence-transformers says it.

    Args:
        pooling: `mean`, `cls` or `last`.
        normalize: Whether embeddings have the length 1.
        prompts: What is put before a text, by name.
        default_prompt: Name of the prompt for texts of no stated kind, if there is one.
        max_length: Tokens after which a text is cut, if the folder says so.
    """

    pooling: str = "mean"
    normalize: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None

    @property
    def prefix(self) -> str:
        """Return what is put before a text of no stated kind."""
        return self.prompts[self.default_prompt] if self.default_prompt else ""
