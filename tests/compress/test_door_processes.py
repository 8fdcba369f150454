"""A recipe that two processes run together; run as a script, this file is one of them."""

import os
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from door_runs import STACK, run
from safetensors.torch import load_file
from tiny_classifiers import save_classifier
from torch.testing import assert_close
from two_processes import run_in_two

from hf_moebert.compress.door import refuse_uneven_parts
from hf_moebert.compress.recipe_file import parse_recipe, read_recipe


PLAIN = {"batch_size": 8, "dropout": False, "learning_rate": 0.01}
RECIPES = {
    "stack": [*STACK[:2], {"distil": {"steps": 6} | PLAIN}, STACK[3]],
    "platon": [
        {"prune": {"method": "platon", "keep_ratio": 0.5, "multiple_of": 1}},
        {"distil": {"steps": 12} | PLAIN},
    ],
}
# AdamW moves a weight whose gradient is zero but for rounding as far as any other
TRAINING = {"optim": "sgd"}


def run_all(folder, place):
    """Run all recipes on the model of a folder; return how each was judged."""
    lines, verdicts = [], []
    for name, stages in RECIPES.items():
        result = run(folder / "given", folder / place / name, stages, training=TRAINING, tell=lines.append)
        verdicts.append(result.verdict)
    assert bool(lines) == PartialState().is_main_process  # the others are silent
    return verdicts


@pytest.mark.process
def test_two_processes_make_what_one_makes(tmp_path):
    save_classifier(tmp_path / "given", layers=2)
    run_in_two(__file__, tmp_path)
    verdicts = run_all(tmp_path, "one")
    for name, verdict in zip(RECIPES, verdicts, strict=True):
        ours, theirs = (tmp_path / place / name for place in ("two", "one"))
        alone, together = (load_file(folder / "model/model.safetensors") for folder in (theirs, ours))
        for tensor, value in alone.items():
            assert_close(together[tensor], value, atol=1e-5, rtol=1e-4)
        found, wanted = ({path.relative_to(root) for path in root.rglob("*")} for root in (ours, theirs))
        assert found == wanted  # no draft, no checkpoint, nothing twice
        for rank in range(2):
            assert (tmp_path / f"{name}-{rank}").read_text() == verdict.outcome


def test_what_processes_cannot_share_is_refused():
    recipe = parse_recipe({"stages": RECIPES["stack"]})
    refuse_uneven_parts(recipe, 2)
    with pytest.raises(ValueError, match=r"`batch_size` must be a multiple of the 3 processes, got 8. Use 9\."):
        refuse_uneven_parts(recipe, 3)
    with pytest.raises(ValueError, match="`search` must run in one process, got 2"):
        refuse_uneven_parts(read_recipe("auto"), 2)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    del os.environ["ACCELERATE_USE_CPU"]  # which torchrun does not set
    for name, verdict in zip(RECIPES, run_all(folder, "two"), strict=True):
        state = PartialState()
        (folder / f"{name}-{state.process_index}").write_text(verdict.outcome)
    state.destroy_process_group()
