"""Read recipes: by name, from a YAML file, and changed from the command line."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from .recipe import FORMAT_VERSION, STAGES, Recipe, Stage, Target


LARGEST_FILE = 100_000  # bytes of a recipe
PARTS = ("version", "target", "stages", "export", "seed")
LOCKED = ("model", "data", "versions")  # what `recipe.lock.yaml` adds, for readers
SHIPPED = Path(__file__).parent / "recipes"


def shipped_recipes() -> dict[str, str]:
    """Return what each recipe that comes with the package is for, by name: the first line of its file."""
    files = sorted(SHIPPED.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for file in files}


def read_recipe(source: str | os.PathLike[str], *, changes: Iterable[str] = (), **target: Any) -> Recipe:
    """Read a recipe by its name, or from a YAML file.

    Args:
        source: Name of a recipe that comes with the package, or a file.
        changes: Changes such as `prune.keep_ratio=0.3`; the value is YAML.
        **target: Fields of `Target` that replace those of the file, unless they are `None`.

    Raises:
        ValueError: If it is not known or not a recipe, or if a change does not fit.
    """
    file = Path(source)
    if file.suffix not in (".yaml", ".yml"):
        if str(source) not in (known := shipped_recipes()):
            raise ValueError(f"`recipe` must be a .yaml file or one of {', '.join(known)}, got {str(source)!r}.")
        file = SHIPPED / f"{source}.yaml"
    if not file.is_file():
        raise ValueError(f"`recipe` must be an existing file, got {str(file)!r}. Check the path.")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"`recipe` must have at most {LARGEST_FILE:,} bytes, {str(file)!r} has more. Shorten it.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`recipe` must be YAML, {str(file)!r} is not: {' '.join(str(error).split())}.") from error
    recipe = parse_recipe(content)
    for change in changes:
        recipe = change_recipe(recipe, change)
    target = {name: value for name, value in target.items() if value is not None}
    return replace(recipe, target=replace(recipe.target, **target))


def parse_recipe(content: Any) -> Recipe:
    """Build a recipe of what a file says.

    Raises:
        ValueError: If a part is missing, unknown or breaks its rule.
    """
    if not isinstance(content, Mapping) or "stages" not in content:
        raise ValueError(
            f"`recipe` must be a mapping with `stages`, got {type(content).__name__}. See the shipped ones."
        )
    _check_names([name for name in content if name not in LOCKED], PARTS, "recipe")
    if content.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(f"`version` must be {FORMAT_VERSION}, got {content['version']!r}. Update hf_moebert.")
    if not isinstance(content["stages"], list):
        raise ValueError(f"`stages` must be a list, got {content['stages']!r:.80}. Begin each with a dash.")  # noqa: TRY004
    stages = tuple(_parse_stage(entry) for entry in content["stages"])
    seed = content.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}. Use 0.")
    export = content.get("export") or []
    if not isinstance(export, list):
        raise ValueError(f"`export` must be a list, got {export!r:.80}. Use [onnx].")  # noqa: TRY004
    return Recipe(stages, _build(Target, content.get("target") or {}, "target"), tuple(export), seed)


def change_recipe(recipe: Recipe, change: str) -> Recipe:
    """Change one option of a stage, of all stages of that name, or of the target.

    Args:
        recipe: It is not changed.
        change: Such as `prune.keep_ratio=0.3`, `target.max_drop=0.02` or `seed=1`.

    Raises:
        ValueError: If there is no such stage or option, or the value breaks its rule.
    """
    found = re.fullmatch(r"(?:(\w+)\.)?(\w+)=(.*)", change, re.DOTALL)
    if not found:
        raise ValueError(f"`set` must be of the form stage.option=value, got {change!r}. Use prune.keep_ratio=0.3.")
    stage, option, text = found.groups()
    content = recipe.as_dict()
    places = [content] if stage is None else [content["target"]] if stage == "target" else []
    places += [entry[stage] for entry in content["stages"] if stage in entry]
    if not places:
        names = ", ".join(["target", *(stage.name for stage in recipe.stages)])
        raise ValueError(f"`set` must change one of {names}, got {change!r}. Add the stage to a recipe of your own.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`set` must give a value in YAML, got {change!r}. Quote it.") from error
    for place in places:
        place[option] = value
    if stage == "prune" and value is not None and option in ("keep_ratio", "speed_up"):
        for place in places:  # one replaces the other
            place["speed_up" if option == "keep_ratio" else "keep_ratio"] = None
    return parse_recipe(content)


def _parse_stage(entry: Any) -> Stage:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"`stages` must hold one name with its options each, got {entry!r}. Use `- experts: {{}}`.")
    ((name, options),) = entry.items()
    _check_names([name], STAGES, "stages")
    return _build(STAGES[name], options or {}, name)


def _build(kind: Any, options: Any, owner: str) -> Any:
    if not isinstance(options, Mapping):
        raise ValueError(f"`{owner}` must have options, each with a value, got {options!r}.")  # noqa: TRY004
    _check_names(options, [entry.name for entry in fields(kind)], owner)
    return kind(**options)


def _check_names(names: Iterable[Any], known: Iterable[str], owner: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            remedy = f"Did you mean {near[0]}?" if near else f"It knows {', '.join(known) or 'no options'}."
            raise ValueError(f"`{owner}` must not hold the unknown name {name!r}. {remedy}")
