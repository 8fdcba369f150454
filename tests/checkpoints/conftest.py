"""The tiny runs of `benchmarks/faults_runs.py` serve these tests, too."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
