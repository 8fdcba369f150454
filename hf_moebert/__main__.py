"""Run the command line: `python -m hf_moebert` is `hf-moebert`."""

import sys

from .cli import app


sys.argv[0] = "hf-moebert"  # the name that usage and measurements show
app(prog_name="hf-moebert")
