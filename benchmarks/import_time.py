"""Compare the time of `import hf_moebert` with that of the torch and transformers that it extends.

Each import runs in a process of its own, in turns; the ratio is that of the medians. Run:

    python benchmarks/import_time.py --rounds 10
"""

import argparse
import statistics
import subprocess
import sys


IMPORTS = {
    "transformers": "import torch; import transformers.models.bert.modeling_bert",
    "package": "import hf_moebert",
}
TIMED = "import time; start = time.process_time(); {}; print(time.process_time() - start)"


def main() -> None:
    """Time both imports in turns, and print their medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="Processes for each import.")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            timed = [sys.executable, "-c", TIMED.format(code)]
            answer = subprocess.run(timed, capture_output=True, text=True, check=True)  # no input  # nosec B603
            seconds[name].append(float(answer.stdout))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, code in IMPORTS.items():
        print(f"{medians[name]:6.2f} s of processor time: {code}")
    print(f"{medians['package'] / medians['transformers']:6.2f} times as long")


if __name__ == "__main__":
    main()
