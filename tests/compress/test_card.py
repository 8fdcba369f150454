"""The card of a result: whatever the given folder is called, and whatever its own card says."""

import pytest
from huggingface_hub.utils import validate_repo_id

from hf_moebert.compress.card import as_repo_name, read_card


@pytest.mark.parametrize("name", ["", ".", "my model", "größe--v1..2", "a/b", "-x-", "x" * 200, "平"])
def test_every_folder_gives_a_name_of_a_repository(name):
    validate_repo_id(f"{as_repo_name(name)}-compressed")


@pytest.mark.parametrize(
    ("card", "facts"),
    [
        (None, {}),
        ("no metadata", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n", {"license": "apache-2.0"}),
    ],
)
def test_a_card_tells_what_can_be_read_of_it(tmp_path, card, facts):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_card(tmp_path) == facts
