"""What each method takes of each family: `python tests/family_table.py` writes the table into its README anew."""

import re
from pathlib import Path

from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.methods.mixture_of_masks.configuration_mixture_of_masks import why_not_masked
from hf_moebert.methods.moebert.configuration_moebert import why_not_experts
from hf_moebert.methods.mpo.modeling_tuner import TARGETS


README = Path(__file__).parents[1] / "hf_moebert" / "architectures" / "README.md"
MARKS = ("<!-- families: written by tests/family_table.py -->\n", "<!-- families: end -->\n")
COLUMNS = ("family", "importance, MPO", "PLATON whole units", "MoEBERT", "masks", "trunk of many tasks", "unpadded")


def rows() -> list[tuple[str, ...]]:
    """Return the cells of each row, families of one kind together."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for family, row in sorted(ARCHITECTURES.items()):
        grouped = row.heads == "num_key_value_heads"
        units = [f"{kind}, by key" if kind == "heads" and grouped else kind for kind in row.units]
        masked = why_not_masked(family)
        masks = "yes" if not masked or family == "t5" else f"no: {masked}"
        cells = (
            "yes" if family in TARGETS else "no",
            "; ".join(units) if units else f"no: {row.kept}",
            f"no: {reason}" if (reason := why_not_experts(family)) else "yes",
            masks,
            "yes" if row.trunk is not None else "no",
            "yes" if row.bert_like else "no",
        )
        kinds.setdefault(cells, []).append(family)
    return [(", ".join(families), *cells) for cells, families in kinds.items()]


def table() -> str:
    """Return the table in Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def with_table(text: str) -> str:
    """Return a text with the table between its marks."""
    start, end = MARKS
    pattern = f"{re.escape(start)}.*?{re.escape(end)}"
    return re.sub(pattern, lambda _: f"{start}{table()}{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
