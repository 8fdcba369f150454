"""Methods that stack: every pair does what the table says, and what is refused names the order that works."""

import pytest
from stack_table import README, outcome, read_table
from stacks import STAGES, make_dense


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
TABLE = read_table(README.read_text())


@pytest.fixture(scope="module")
def models():
    dense = make_dense()
    return {name: make(dense) for name, make in STAGES.items()}


def test_the_table_has_every_pair():
    assert list(TABLE) == [(first, second) for first in STAGES for second in STAGES]


@pytest.mark.parametrize(("first", "second"), TABLE, ids=" then ".join)
def test_a_pair_does_what_the_table_says(models, first, second):
    assert outcome(models, first, second) == TABLE[first, second]
