"""Two processes that train together: one of them writes the manifest, once the files of both are there."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # a script has no conftest

from faults_runs import make_trainer
from two_processes import leave, read_both, run_in_two

from hf_moebert import last_complete_checkpoint
from hf_moebert.checkpoints.manifests import MANIFEST_FILE


def be_one_of_two(folder):
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    whole = make_trainer("pruning", folder / "run", **options)
    whole.train()
    resumed = make_trainer("pruning", folder / "run", **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    same = [torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)]
    leave({"same": torch.tensor(same)}, folder)


@pytest.mark.process
def test_the_manifest_lists_the_files_of_both(tmp_path):
    run_in_two(__file__, tmp_path)
    assert all(found["same"].all() for found in read_both(tmp_path))
    folder = Path(last_complete_checkpoint(tmp_path / "run"))
    assert folder.name == "checkpoint-4"
    listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "platon_state.safetensors"} <= listed.keys()


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
