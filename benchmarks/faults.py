"""Damage files, kill processes and fill disks, and count what is lost.

    python benchmarks/faults.py --parts damage kill full --damages 50 --kills 20 --sizes 20

- damage: flip bytes of, cut, and swap parts of every kind of file whose format is this package's own. Then read it: it
  is refused with its path, or what is read is what was written (harmless), or something else (silent), or an error
  does not name the file (unnamed).
- kill: end tiny training runs of every callback, a sweep and a recipe by SIGKILL at random moments, resume them, and
  compare the weights at the end with those of a run that nobody killed, bit by bit; and processes that save a packed
  model over another one again and again, of which the old or the new one must be left.
- full: let no file grow beyond a size (RLIMIT_FSIZE) while a run goes on from a checkpoint, and resume it without that
  limit; and write every kind of file over an older one, of which the old or the new one must be left.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from faults_files import ARTEFACTS, Artefact
from faults_runs import KINDS, find_checkpoint, train
from transformers.utils import logging as transformers_logging

from hf_moebert.checkpoints.tensor_files import digest


RUNS = (*KINDS, "sweep", "recipe")


def in_child(work: Callable[[], None], output: Path, *, seconds: float | None = None) -> bool | None:
    """Work in a fork of this process, which has imported everything.

    Args:
        work: What to do.
        output: File for all that it prints, and for the error it ends with.
        seconds: When to kill it; never by default.

    Returns:
        Whether it came to its end; None if it was killed.
    """
    child = os.fork()
    if not child:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        transformers_logging.disable_progress_bar()  # forks share its lock: who is killed with it stops the others
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the process ends here
            traceback.print_exc()
        finally:
            os._exit(code)
    end = None if seconds is None else time.monotonic() + seconds
    while end is not None and time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)
    if end is not None:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code == 0


# Damage


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip a byte, cut the end, or swap two parts; the result differs from the content."""
    damaged = bytearray(content)
    while bytes(damaged) == content and content:
        kind = chance.choice(["flip", "cut", "swap"])
        place, other = sorted(chance.randrange(len(content)) for _ in range(2))
        if kind == "flip":
            damaged[place] ^= chance.randrange(1, 256)
        elif kind == "cut":
            del damaged[place:]
        else:
            length = min(chance.choice([1, 8, 64]), other - place, len(content) - other)
            damaged[place : place + length], damaged[other : other + length] = (
                damaged[other : other + length],
                damaged[place : place + length],
            )
    return bytes(damaged)


def judge(artefact: Artefact, folder: Path, file: Path, expected: str) -> str:
    """Read a damaged artefact, and return what that does to a user."""
    try:
        return "harmless" if artefact.read(folder) == expected else "silent"
    except (ValueError, OSError) as error:
        named = str(folder) in str(error) and any(path.name in str(error) for path in file.parent.iterdir())
    except Exception:  # noqa: BLE001 - what is to be counted
        named = False
    return "refused" if named else "unnamed"


def try_damages(name: str, folder: Path, number: int, seed: int) -> Counter[str]:
    """Damage files of an artefact, one at a time, and count the outcomes."""
    artefact, chance, found = ARTEFACTS[name], random.Random(f"{seed} {name}"), Counter[str]()
    whole = folder / "whole"
    write_new(artefact, whole)
    files = sorted(path for path in whole.glob(artefact.files) if path.is_file() and path.stat().st_size)
    expected = artefact.read(whole)
    for _ in range(number):
        file = chance.choice(files)
        content = file.read_bytes()
        file.write_bytes(damage(content, chance))
        outcome = judge(artefact, whole, file, expected)
        found[outcome] += 1
        if outcome in ("silent", "unnamed"):
            shutil.copyfile(file, folder / f"{outcome}-{found[outcome]}-{file.name}")
        file.write_bytes(content)
    return found


# Kills


def finish(kind: str, folder: Path) -> None:
    """Begin or resume a run, and leave a fingerprint of the weights at its end beside its folder."""
    folder.with_suffix(".end").write_text(digest(train(kind, folder)), encoding="utf-8")


def run_whole(kind: str, folder: Path) -> tuple[str, float]:
    """Make a run that nobody kills; return the fingerprint of its end, and how long it took."""
    begun = time.monotonic()
    if not in_child(lambda: finish(kind, folder), folder.with_suffix(".log")):
        raise RuntimeError(folder.with_suffix(".log").read_text(encoding="utf-8"))
    return folder.with_suffix(".end").read_text(encoding="utf-8"), time.monotonic() - begun


def try_kills(kind: str, folder: Path, number: int, seed: int) -> Counter[str]:
    """Kill runs again and again until each ends, and count those that end as the one that nobody killed."""
    chance, found = random.Random(f"{seed} {kind}"), Counter[str]()
    whole, seconds = run_whole(kind, folder / "whole")
    while found["kills"] < number:
        killed = folder / f"killed-{found['kills']}"
        end = None
        while end is None:
            limit = chance.uniform(0, seconds) if found["kills"] < number else None
            end = in_child(lambda: finish(kind, killed), killed.with_suffix(".log"), seconds=limit)  # noqa: B023
            found["kills"] += end is None
        same = end and killed.with_suffix(".end").read_text(encoding="utf-8") == whole
        found["bit-equal" if same else "lost"] += 1
    return found


def try_kills_of_saves(name: str, folder: Path, number: int, seed: int) -> Counter[str]:
    """Kill processes that write an artefact over its other version, and count what is left."""
    artefact, chance, found = ARTEFACTS[name], random.Random(f"{seed} {name}"), Counter[str]()
    place = folder / "saved"
    known = write_versions(artefact, place)

    def save() -> None:
        for attempt in range(1000):  # until it is killed, or orphaned
            artefact.write(place, attempt % 2)

    for _ in range(number):
        in_child(save, folder / "log", seconds=chance.uniform(0, 0.3))
        found["kills"] += 1
        found["old or new" if read_or_none(artefact, place) in known else "lost"] += 1
    return found


# Full disks


def with_limit(size: int, work: Callable[[], None]) -> Callable[[], None]:
    """Return work that is done while no file may grow beyond a size."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return limited


def sizes_of(folder: Path, number: int) -> Iterator[int]:
    """Yield sizes from an empty file to the largest one below a folder."""
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for index in range(number):
        yield largest * index // max(number - 1, 1)


def try_full_disks(kind: str, folder: Path, number: int, seed: int) -> Counter[str]:
    """Let a run meet a full disk halfway, then go on with room, and count the ends that are as they should be."""
    whole, seconds = run_whole(kind, folder / "whole")
    found, chance = Counter[str](), random.Random(f"{seed} {kind}")
    for size in sizes_of(folder / "whole", number):
        full = folder / f"full-{size}"
        in_child(lambda: finish(kind, full), folder / "log", seconds=seconds * chance.uniform(0.3, 0.8))  # noqa: B023
        before = count_steps(full)
        done = in_child(with_limit(size, lambda: finish(kind, full)), Path(os.devnull))  # noqa: B023 - a log grows
        found["finished" if done else "stopped"] += 1
        lost = count_steps(full) < before
        end, _ = run_whole(kind, full)
        found["bit-equal" if end == whole and not lost else "lost"] += 1
    return found


def count_steps(folder: Path) -> int:
    """Return the step of the last complete checkpoint."""
    checkpoint = find_checkpoint(folder) if folder.is_dir() else None
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


def try_full_disks_of_saves(name: str, folder: Path, number: int, seed: int) -> Counter[str]:
    """Write the second version of an artefact over the first on a full disk, and count what is left."""
    artefact, found = ARTEFACTS[name], Counter[str]()
    known = write_versions(artefact, folder / "saved")
    for size in sizes_of(folder / "saved", number):
        place = folder / f"full-{size}"
        write_new(artefact, place)
        done = in_child(with_limit(size, lambda: artefact.write(place, 1)), Path(os.devnull))  # noqa: B023
        found["finished" if done else "stopped"] += 1
        found["old or new" if read_or_none(artefact, place) == known[bool(done)] else "lost"] += 1
    return found


def write_versions(artefact: Artefact, place: Path) -> list[str]:
    """Write both versions of an artefact, and return what is read from each."""
    known = []
    place.mkdir()
    for version in (0, 1):
        artefact.write(place, version)
        known.append(artefact.read(place))
    return known


def write_new(artefact: Artefact, place: Path) -> None:
    """Write the first version of an artefact into a new folder."""
    place.mkdir()
    artefact.write(place, 0)


def read_or_none(artefact: Artefact, place: Path) -> str | None:
    """Read an artefact, or return None if it is refused."""
    try:
        return artefact.read(place)
    except (ValueError, OSError):
        return None


SAVES = ("importance", "packed weights", "many tasks")  # of which a second version may take the place of the first
PARTS = {
    "damage": [(try_damages, name) for name in ARTEFACTS],
    "kill": [*((try_kills, kind) for kind in RUNS), *((try_kills_of_saves, name) for name in SAVES)],
    "full": [*((try_full_disks, kind) for kind in RUNS), *((try_full_disks_of_saves, name) for name in SAVES)],
}
COLUMNS = {
    "damage": ("refused", "harmless", "silent", "unnamed"),
    "kill": ("kills", "bit-equal", "old or new", "lost"),
    "full": ("stopped", "finished", "bit-equal", "old or new", "lost"),
}


def main() -> None:
    """Try all faults that were asked for, and print a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Kinds of faults.")
    parser.add_argument("--names", nargs="+", default=None, help="Rows of the tables; by default all.")
    parser.add_argument("--damages", type=int, default=50, help="Damages to each kind of file.")
    parser.add_argument("--kills", type=int, default=20, help="Kills of each kind of run.")
    parser.add_argument("--sizes", type=int, default=20, help="Sizes at which the disk is full.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all random choices.")
    parser.add_argument("--folder", type=Path, default=None, help="Folder to keep; by default one that is deleted.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_moebert").setLevel(logging.ERROR)
    numbers = {"damage": args.damages, "kill": args.kills, "full": args.sizes}
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.parts:
            print(f"{part:16}" + "".join(f"{column:>12}" for column in COLUMNS[part]), flush=True)
            for attempt, name in PARTS[part]:
                if args.names is None or name in args.names:
                    folder = (args.folder or Path(temporary)) / part / name.replace(" ", "-")
                    folder.mkdir(parents=True)
                    with contextlib.redirect_stdout(io.StringIO()):  # what the Trainer prints
                        found = attempt(name, folder, numbers[part], args.seed)
                    print(f"{name:16}" + "".join(f"{found[column]:12}" for column in COLUMNS[part]), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
