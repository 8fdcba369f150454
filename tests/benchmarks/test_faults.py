"""A few damages, kills and full disks; `benchmarks/faults.py` itself tries many."""

import random
import sys

import faults
import pytest
import torch
from faults_files import ARTEFACTS, Artefact


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Let forks of this process compute: threads do not survive a fork."""
    torch.set_num_threads(1)


def test_a_damaged_file_differs_and_a_seed_decides_how():
    content = bytes(range(256)) * 4
    first, again = ([faults.damage(content, random.Random(seed)) for seed in range(40)] for _ in range(2))
    assert first == again
    assert content not in first
    assert {len(damaged) < len(content) for damaged in first} == {True, False}


def read_text(folder):
    text = (folder / "file").read_text(encoding="ascii")
    if len(text) < 3:
        raise ValueError(f"{folder / 'file'} is too short.")
    return text.lower()


@pytest.mark.parametrize(
    ("content", "outcome"),
    [(b"abc", "harmless"), (b"aBc", "harmless"), (b"abd", "silent"), (b"ab", "refused"), (b"\xff", "unnamed")],
)
def test_outcomes_are_told_apart(tmp_path, content, outcome):
    (tmp_path / "file").write_bytes(content)
    artefact = Artefact(lambda folder, version: None, read_text, "file")
    assert faults.judge(artefact, tmp_path, tmp_path / "file", "abc") == outcome


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.process] if n == "CRF" else []) for n in ARTEFACTS]
)
def test_no_damage_goes_unnoticed(tmp_path, name):
    found = faults.try_damages(name, tmp_path, 6, seed=1)
    assert found["refused"] + found["harmless"] == 6
    assert found["refused"] >= 5


@pytest.mark.process
@pytest.mark.parametrize("kind", faults.RUNS)
def test_a_killed_run_ends_as_any_other(tmp_path, kind):
    found = faults.try_kills(kind, tmp_path, 1, seed=1)
    assert found == {"kills": 1, "bit-equal": found["bit-equal"]}
    assert found["bit-equal"] > 0


@pytest.mark.process
@pytest.mark.parametrize("name", faults.SAVES)
def test_a_killed_save_leaves_the_old_or_the_new_file(tmp_path, name):
    assert faults.try_kills_of_saves(name, tmp_path, 2, seed=1) == {"kills": 2, "old or new": 2}


@pytest.mark.process
@pytest.mark.parametrize("kind", ["squeezing", "sweep"])
def test_a_full_disk_loses_nothing(tmp_path, kind):
    found = faults.try_full_disks(kind, tmp_path, 2, seed=1)
    assert found == {"stopped": 1, "finished": 1, "bit-equal": 2}


@pytest.mark.process
@pytest.mark.parametrize("name", faults.SAVES)
def test_a_save_on_a_full_disk_leaves_the_old_file(tmp_path, name):
    found = faults.try_full_disks_of_saves(name, tmp_path, 3, seed=1)
    assert found == {"stopped": 2, "finished": 1, "old or new": 3}


def test_the_table_has_a_row_for_each_name(monkeypatch, capsys):
    options = ["--parts", "damage", "--damages", "2", "--names", "importance", "packed weights"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/faults.py", *options])
    faults.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["damage", "refused", "harmless", "silent", "unnamed"]
    assert [row.split()[-4:] for row in rows] == [["2", "0", "0", "0"]] * 2
