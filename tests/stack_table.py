"""What works on what: `python tests/stack_table.py` runs every pair of methods, and writes the table of them."""

import re
import sys
from pathlib import Path


README = Path(__file__).parents[1] / "hf_moebert" / "compress" / "README.md"
MARKS = ("<!-- stacks: written by tests/stack_table.py -->\n", "<!-- stacks: end -->\n")
AGAIN = "again"


def outcome(models: dict, first: str, second: str) -> str:
    """Run a pair: `yes`, `again` if the second stage undoes the first one, or the message that refuses it.

    Args:
        models: What the stages make of the dense model.
        first: Name of a stage.
        second: Likewise.
    """
    from stacks import check_pair

    try:
        return AGAIN if check_pair(models[first], first, second) else "yes"
    except ValueError as error:
        return said(error)


def said(error: Exception) -> str:
    """Return the last sentence of a message, the order that works; of PEFT's own, that there is one."""
    message = str(error)
    if message.startswith("Target module MPO"):
        return "PEFT does not know chains: call `to_dense(model)` first"
    assert message.startswith("`model` must "), message
    return message.partition(". ")[2].removesuffix(".")


def table(found: dict) -> str:
    """Return the table in Markdown, and the orders that work behind it."""
    stages = list(dict.fromkeys(first for first, _ in found))
    orders = list(dict.fromkeys(text for text in found.values() if text not in {"yes", AGAIN}))
    lines = [["first, then", *stages], ["---", *(":-:" for _ in stages)]]
    for first in stages:
        cells = [found[first, second] for second in stages]
        lines.append([f"**{first}**", *(f"no {orders.index(x) + 1}" if x in orders else x for x in cells)])
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{rows}\n{' '.join(f'**{number}** {order}.' for number, order in enumerate(orders, 1))}\n"


def read_table(text: str) -> dict:
    """Return the outcome of each pair as a text has it."""
    inside = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in inside.splitlines() if line[:1] == "|"]
    orders = dict(re.findall(r"\*\*(\d+)\*\* (.*?)\.(?= \*\*\d|$)", inside, re.MULTILINE))
    stages = rows[0][1:]
    return {
        (first, second): orders[cell.removeprefix("no ")] if cell.startswith("no ") else cell
        for first, *cells in rows[2:]
        for second, cell in zip(stages, cells, strict=True)
    }


def with_table(text: str, found: dict) -> str:
    """Return a text with the table between its marks."""
    start, end = MARKS
    pattern = f"{re.escape(start)}.*?{re.escape(end)}"
    return re.sub(pattern, lambda _: f"{start}{table(found)}{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    from stacks import STAGES, make_dense

    dense = make_dense()
    made = {name: make(dense) for name, make in STAGES.items()}
    seen = {(first, second): outcome(made, first, second) for first in STAGES for second in STAGES}
    README.write_text(with_table(README.read_text(), seen))
    sys.stdout.write(table(seen))
