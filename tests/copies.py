"""Files that travel to the Hub with a method are copies of shared ones: `python tests/copies.py` writes them anew."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
METHODS = "hf_moebert/methods"
TRAVELLERS = ("masked_crf", "mixture_of_masks", "moebert", "platon")  # methods whose code is saved with a checkpoint
# Where each shared file is copied to. Imports of its neighbours are rewritten to the names that these have there.
COPIES = {
    "hf_moebert/checkpoints/strict_config.py": tuple(f"{METHODS}/{x}/configuration_strict.py" for x in TRAVELLERS),
    "hf_moebert/checkpoints/strict_model.py": tuple(f"{METHODS}/{x}/modeling_strict.py" for x in TRAVELLERS),
    "hf_moebert/data/words.py": (f"{METHODS}/masked_crf/modeling_words.py",),
    "hf_moebert/architectures/functional_numpy.py": (f"{METHODS}/masked_crf/functional_numpy.py",),
    "hf_moebert/architectures/empty_losses.py": (
        f"{METHODS}/moebert/modeling_empty_losses.py",
        f"{METHODS}/platon/modeling_empty_losses.py",
    ),
    "hf_moebert/architectures/families.py": (
        f"{METHODS}/mixture_of_masks/configuration_families.py",
        f"{METHODS}/moebert/configuration_families.py",
        f"{METHODS}/platon/configuration_families.py",
    ),
    "hf_moebert/architectures/paths.py": (
        f"{METHODS}/mixture_of_masks/configuration_paths.py",
        f"{METHODS}/moebert/configuration_paths.py",
        f"{METHODS}/platon/configuration_paths.py",
    ),
    "hf_moebert/architectures/stock.py": (
        f"{METHODS}/mixture_of_masks/modeling_stock.py",
        f"{METHODS}/platon/modeling_stock.py",
    ),
    "hf_moebert/architectures/surgery.py": (
        f"{METHODS}/mixture_of_masks/modeling_surgery.py",
        f"{METHODS}/moebert/modeling_surgery.py",
        f"{METHODS}/platon/modeling_surgery.py",
    ),
    "hf_moebert/architectures/functional_routing.py": (
        f"{METHODS}/mixture_of_masks/functional_routing.py",
        f"{METHODS}/moebert/functional_routing.py",
    ),
    "hf_moebert/architectures/routing.py": (
        f"{METHODS}/mixture_of_masks/modeling_routing.py",
        f"{METHODS}/moebert/modeling_routing.py",
    ),
    "hf_moebert/architectures/units.py": (
        f"{METHODS}/moebert/modeling_units.py",
        f"{METHODS}/platon/modeling_units.py",
    ),
    "hf_moebert/architectures/widths.py": (
        f"{METHODS}/mixture_of_masks/configuration_widths.py",
        f"{METHODS}/moebert/configuration_widths.py",
        f"{METHODS}/platon/configuration_widths.py",
    ),
}
TARGETS = {target: source for source, targets in COPIES.items() for target in targets}


def wanted_text(target: str) -> str:
    """Return what a copy must hold."""
    source = Path(TARGETS[target])
    text = (ROOT / source).read_text()
    for name in re.findall(r"^from \.(\w+) import", text, re.MULTILINE):
        copy = find_copy(source.with_name(f"{name}.py"), Path(target).parent)
        text = re.sub(rf"^from \.{name} import", f"from .{copy.stem} import", text, flags=re.MULTILINE)
    return f"# Copied from {source} by `make copies`; edit there.\n{text}"


def find_copy(source: Path, folder: Path) -> Path:
    """Return the copy of a shared file in a folder."""
    for target in COPIES.get(str(source), ()):
        if Path(target).parent == folder:
            return Path(target)
    raise ValueError(f"{source} must be copied to {folder}, too: a copy there imports it. Add it to `COPIES`.")


if __name__ == "__main__":
    for target in TARGETS:
        (ROOT / target).write_text(wanted_text(target))
