"""Transformers' own test suite, which its wheel leaves out: fetched from the source archive of the installed version.

Nothing of it is kept in this repository. `python tests/transformers_suite.py` fetches it ahead of the tests.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import SkipTest, TestCase
from unittest.mock import patch

import pytest
from filelock import FileLock


CACHE = Path(__file__).parents[1] / "build" / "transformers_suite"
PACKAGE = "transformers_tests"  # its own name: `tests` would clash with ours
# Marks that the suite puts on its tests; pytest is strict about unknown ones
MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "order",
    "slow",
    "torch_compile_test",
)
# What the suite provokes on purpose: everywhere else, a deprecation in transformers is an error
PROVOKED = pytest.mark.filterwarnings("default:`past_key_values` is deprecated:FutureWarning")
LENIENT = (
    "test_base_model_prefix_loads_base_weights",
    "test_can_init_all_missing_weights",
    "test_can_load_ignoring_mismatched_shapes",
    "test_correct_missing_keys",
    "test_load_with_mismatched_shapes",
    "test_model_weights_reload_no_missing_tied_weights",
)
# Of the 25 forms in which attention is compared, which is not ours, those that show each value of each parameter
ATTENTION = "test_eager_matches_sdpa_inference"
SHOWN = (
    "fp16_pad_left_no_attn_mask_sdpa_kernels",
    "fp32_pad_left_output_attentions",
    "fp32_pad_right",
    "bf16_pad_right_no_attn_mask",
)
# Of other modalities and machines, and skipped here without exception
ELSEWHERE = re.compile(r"test_(get_(text|image|audio|video)_features|flash_attn|.*_with_deepspeed)")
# Modules that the suite imports and the archive leaves out: two mixins for exporters and generation, which do not
# concern an encoder, and the values that its config test passes through every config.
STUBS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": """\
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "problem_type": "regression",
}
""",
}


class TransformersSuiteUnavailableError(RuntimeError):
    """The archive could not be fetched."""


def load(module: str) -> ModuleType:
    """Import a module of the suite, e.g. `test_modeling_common`; its relative imports work."""
    folder = str(fetch(version("transformers")))
    if folder not in sys.path:
        sys.path.append(folder)
    loaded = importlib.import_module(f"{PACKAGE}.{module}")
    if hasattr(loaded, "ModelTesterMixin"):
        loaded.ModelTesterMixin.subTest = run_part
        for name in LENIENT:
            setattr(loaded.ModelTesterMixin, name, leniently(getattr(loaded.ModelTesterMixin, name)))
        leave_out(loaded.ModelTesterMixin)
    return loaded


def leave_out(suite: type) -> None:
    """Remove what never runs here, and most forms of the comparison of attention, which take half of the time."""
    for name in list(vars(suite)):
        form = name.removeprefix(ATTENTION)[len("_00_") :]
        if ELSEWHERE.match(name) or (name.startswith(ATTENTION) and form not in SHOWN):
            delattr(suite, name)
    assert sum(name.startswith(ATTENTION) for name in vars(suite)) == len(SHOWN)


def leniently(test: Callable[..., None]) -> Callable[..., None]:
    """Wrap a test that loads checkpoints which ours refuse by design: without weights, or with another head."""

    @wraps(test)
    def run(self: TestCase) -> None:
        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("hf_moebert.") and hasattr(module, "refuse"):
                    stack.enter_context(patch.object(module, "refuse"))
            test(self)

    return run


@contextmanager
def run_part(test: TestCase, *args: object, **parameters: object) -> Iterator[None]:
    """Run a part of a test without a report of its own, for thousands of them take longer than the tests."""
    with suppress(SkipTest):  # of this part alone
        yield


def fetch(release: str) -> Path:
    """Return the folder that holds the suite as a package; the first process makes it, the others wait."""
    folder = CACHE / release
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{release}.lock"):
        if not folder.exists():
            with TemporaryDirectory(dir=CACHE) as scratch:
                made = unpack(download(release, Path(scratch)), Path(scratch) / "made")
                os.replace(made, folder)  # complete or not at all
    return folder


def download(release: str, scratch: Path) -> Path:
    """Let pip fetch the source archive and check its hash.

    Build isolation stays on: pip asks the archive for its metadata, and this environment need not have setuptools.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
    command += ["--no-deps", "--no-binary=transformers", f"--dest={scratch}", f"transformers=={release}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise TransformersSuiteUnavailableError(
            f"The test suite of transformers {release} is not in {CACHE} and pip could not fetch it: "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    return scratch / f"transformers-{release}.tar.gz"


def unpack(archive: Path, folder: Path) -> Path:
    """Extract the tests alone, and write the modules that they miss."""
    inside = f"{archive.name.removesuffix('.tar.gz')}/tests/"
    package = folder / PACKAGE
    with tarfile.open(archive) as tar:
        members = [x for x in tar.getmembers() if x.name.startswith(inside) and x.name.endswith(".py")]
        moved = [x.replace(name=x.name.removeprefix(inside), deep=False) for x in members]
        tar.extractall(package, moved, filter="data")
    for name, text in STUBS.items():
        path = package / name
        if not path.exists():  # a later archive may bring its own
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


if __name__ == "__main__":
    print(fetch(version("transformers")))
