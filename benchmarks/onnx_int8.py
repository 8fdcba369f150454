"""Time int8 with a scale for each row, as exports have it, beside ONNX Runtime's own with one for all rows.

    python benchmarks/onnx_int8.py
    python benchmarks/onnx_int8.py --model ENCODER

Without a model, BERT and MoEBERT of BERT-base's shape with four layers and random weights. One thread, timed by its
own processor time, interleaved; sequences x tokens without padding.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from transformers import AutoModel, BertConfig, BertModel, HfArgumentParser, PreTrainedModel
from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from hf_moebert import MoEBertConfig, MoEBertModel
from hf_moebert.inference.onnx_export import trace
from hf_moebert.inference.onnx_int8 import quantize_program
from hf_moebert.inference.onnx_parity import EXAMPLE, make_batch
from hf_moebert.inference.smoothing import DRAWN
from hf_moebert.measuring.latency import compare_times, time_rounds
from hf_moebert.reporting.tables import markdown_table
from hf_moebert.runtime.folders import make_options


@dataclass
class Int8Arguments:
    """What is timed, and how often."""

    model: str | None = field(default=None, metadata={"help": "Folder of an encoder."})
    layers: int = field(default=4, metadata={"help": "Layers of the drawn models."})
    cases: list[str] = field(default_factory=lambda: ["1x32", "1x128", "8x32", "8x128"], metadata={"help": "Shapes."})
    rounds: int = field(default=10, metadata={"help": "Timed passes."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model, to try the benchmark itself."})


def make_models(args: Int8Arguments) -> dict[str, PreTrainedModel]:
    """Load the model, or draw two."""
    if args.model:
        return {Path(args.model).name: AutoModel.from_pretrained(args.model).eval()}
    sizes = {"num_hidden_layers": 1, "hidden_size": 96} if args.smoke else {"num_hidden_layers": args.layers}
    torch.manual_seed(0)
    dense = {"BERT": BertModel(BertConfig(**sizes)).eval()}
    return dense if args.smoke else dense | {"MoEBERT": MoEBertModel(MoEBertConfig(**sizes)).eval()}


def open_forms(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write the graph of a model in float32 and in both forms of int8, and open them."""
    example, (texts, tokens) = make_batch(model, *EXAMPLE), DRAWN
    ((_, component),) = trace(model, example).components.items()
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    usual = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, extra_options=options))
    forms = {
        "float32": component.program,
        "one scale": usual.quantize(component.program, example, "onnx"),
        "scales of rows": quantize_program(component.program, make_batch(model, texts, tokens, 0)),
    }
    sessions = {}
    for name, program in forms.items():
        path = folder / f"{name}.onnx"
        onnx_ir.save(program, path, external_data=f"{name}.data")
        sessions[name] = onnxruntime.InferenceSession(path, make_options(1))
    return sessions


def compare(sessions: dict[str, Any], model: PreTrainedModel, case: str, rounds: int) -> dict[str, str]:
    """Time the forms of one model on one shape."""
    rows, tokens = map(int, case.split("x"))
    drawn = make_batch(model, rows, tokens, 0)
    inputs = {one.name: np.asarray(drawn[one.name]) for one in sessions["float32"].get_inputs()}
    times = time_rounds(
        {name: partial(session.run, None, inputs) for name, session in sessions.items()}, rounds=rounds, clock="cpu"
    )
    found = {"case": case}
    for mine, rival in (("scales of rows", "one scale"), ("scales of rows", "float32"), ("one scale", "float32")):
        ratio = compare_times(times, baseline=rival, clock="cpu")[mine]
        found[f"{mine} over {rival}"] = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    return found


@torch.no_grad()
def main(args: Int8Arguments) -> None:
    """Print one table."""
    torch.set_num_threads(1)
    rows = []
    for name, model in make_models(args).items():
        with TemporaryDirectory() as folder:
            sessions = open_forms(model, Path(folder))
            rows += [{"model": name} | compare(sessions, model, case, args.rounds) for case in args.cases]
    print(markdown_table(rows))


if __name__ == "__main__":
    main(HfArgumentParser(Int8Arguments).parse_args_into_dataclasses()[0])
