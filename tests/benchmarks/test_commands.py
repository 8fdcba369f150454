"""The commands beside the tables name programs and options that there are."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from transformers import HfArgumentParser


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGES = sorted(BENCHMARKS.rglob("*.md"))


def commands():
    """Return the programs of studies that the pages name, and all options given to each."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += [" ".join(code.split()) for code in re.findall(r"`(python [^`]*)`", text)]
        for line in lines:
            if match := re.match(r"python benchmarks/studies/(\w+)\.py\b(.*)", line):
                options = [word[2:] for word in shlex.split(match[2]) if word.startswith("--")]
                found.setdefault(match[1], set()).update(options)
    return found


@pytest.mark.parametrize(("program", "options"), sorted(commands().items()))
def test_options_of_commands_exist(monkeypatch, program, options):
    class Found(Exception):
        pass

    def stop(parser, *args, **kwargs):
        raise Found({name.lstrip("-") for action in parser._actions for name in action.option_strings})

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop)
    with pytest.raises(Found) as known:
        importlib.import_module(program).main()
    assert options <= known.value.args[0]


@pytest.mark.parametrize("program", sorted(path.stem for path in BENCHMARKS.rglob("*.py")))
def test_every_program_can_be_imported(program):
    if program == "serving_litserve":
        pytest.importorskip("litserve")
    importlib.import_module(program)


def test_every_study_stands_beside_a_table():
    named = "".join(page.read_text() for page in PAGES)
    for path in (BENCHMARKS / "studies").glob("*.py"):
        if "def main(" in path.read_text():
            assert path.stem in named or path.stem.startswith("platon_"), path
