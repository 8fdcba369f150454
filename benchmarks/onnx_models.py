"""ONNX Runtime at its best, for the models that a benchmark compares: dense BERT and everything exported like it.

What is best differs by processor, shape and precision, so nobody chooses: every graph known here runs on the batch,
and the quickest becomes the call. For a dense BERT these are the graph of the TorchScript exporter, as it is, and with
attention fused by the runtime's own optimiser for transformers; for others the graph of `transformers.exporters`.
Each runs with and without the fusion of residual and LayerNorm, which does not pay everywhere.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter

from hf_moebert.measuring.latency import time_rounds


TOLERANCE = 1e-4  # between torch and ONNX Runtime in float32
SLOW_FUSION = "SkipLayerNormFusion"


def ort_call(
    model: PreTrainedModel, batch: dict[str, Tensor], folder: Path, *, precision: str = "float32", threads: int
) -> Callable[[], object]:
    """Prepare the quickest run of a model on a batch in ONNX Runtime.

    Args:
        model: A body or a model with a head, in float32 and on the CPU.
        batch: Its inputs.
        folder: Where graphs are written, or taken from: one folder for each model.
        precision: "float32", or "int8" for weights of one scale per channel and activations quantised on the fly.
        threads: Threads to compute with; one computes in the thread that calls.

    Raises:
        ValueError: If the precision is unknown, or a float32 graph does not compute what the model does.
    """
    if precision not in ("float32", "int8"):
        raise ValueError(f'`precision` must be "float32" or "int8", got {precision!r}.')
    graphs = write_graphs(model, batch, folder)
    if precision == "int8":
        graphs = [quantized(graph) for graph in graphs]
    inputs = {name: value.numpy() for name, value in batch.items()}
    calls = {}
    for graph in graphs:
        for fuses in (True, False):
            call = partial(open_session(graph, threads, fuses).run, None, inputs)
            if precision == "float32":
                check_parity(model, batch, call)
            calls[f"{graph.stem}, {fuses}"] = call
    times = time_rounds(calls, rounds=5, clock="cpu" if threads == 1 else "wall")
    return calls[min(times, key=lambda name: float(np.median(times[name])))]


def open_session(graph: Path, threads: int, fuses_norms: bool) -> onnxruntime.InferenceSession:
    """Load a graph with all optimisations of the runtime, or all but the one that may not pay."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes a core from whoever runs next
    options.log_severity_level = 3
    disabled = {} if fuses_norms else {"disabled_optimizers": [SLOW_FUSION]}
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], **disabled)


@torch.no_grad()
def check_parity(model: PreTrainedModel, batch: dict[str, Tensor], call: Callable[[], Any]) -> None:
    """Refuse a graph whose first output is not the model's."""
    error = np.abs(call()[0] - model(**batch)[0].numpy()).max()
    if not error <= TOLERANCE:
        raise ValueError(f"ONNX Runtime must give what torch gives up to {TOLERANCE}, got a difference of {error}.")


def write_graphs(model: PreTrainedModel, batch: dict[str, Tensor], folder: Path) -> list[Path]:
    """Write the forms of a model that may be the quickest, of any batch size and length, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, fused = folder / "model.onnx", folder / "fused.onnx"
    dense = type(model) is BertModel  # and no mixture of its experts
    if not plain.exists():
        with eager_attention(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of exporters, about themselves
            (trace_dense if dense else export_stock)(model, sample(batch), plain)
    if dense and not fused.exists():
        fuse_attention(model, plain, fused)
    return [plain, fused] if dense else [plain]


@contextmanager
def eager_attention(model: PreTrainedModel) -> Any:
    """Export attention as plain products, which the runtime takes less time for, and its optimiser knows."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def sample(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make inputs whose sizes no exporter takes for constants: two rows of sixteen tokens."""
    return {name: value.new_ones(2, 16) for name, value in batch.items()}


def export_stock(model: PreTrainedModel, batch: dict[str, Tensor], graph: Path) -> None:
    """Export with transformers' tool, as any user would."""
    OnnxExporter().export(model, batch, OnnxConfig(dynamic=True)).save_pretrained(graph.parent)


class FirstOutputs(nn.Module):
    """A model by the tensors it returns, from inputs in a fixed order."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model."""
        return self.model(**dict(zip(self.names, inputs, strict=True))).to_tuple()


@torch.no_grad()
def trace_dense(model: BertModel, batch: dict[str, Tensor], graph: Path) -> None:
    """Export with TorchScript: the newer exporter's graph hides attention from the runtime's optimiser."""
    names, outputs = list(batch), ["last_hidden_state", "pooler_output"][: 1 + (model.pooler is not None)]
    torch.onnx.export(
        FirstOutputs(model, names).eval(),
        tuple(batch.values()),
        graph,
        dynamo=False,
        opset_version=17,  # the last one whose LayerNormalization and GELU the optimiser finds in this form
        input_names=names,
        output_names=outputs,
        dynamic_axes={name: {0: "batch", 1: "seq"} for name in [*names, outputs[0]]},
    )


def fuse_attention(model: BertModel, plain: Path, fused: Path) -> None:
    """Let the runtime's optimiser for transformers fuse what it can, and see that it did."""
    layers, options = model.config.num_hidden_layers, FusionOptions("bert")
    options.enable_skip_layer_norm = False  # left to the session, which does with and without
    sizes = {"num_heads": model.config.num_attention_heads, "hidden_size": model.config.hidden_size}
    optimized = optimize_model(str(plain), "bert", **sizes, opt_level=0, optimization_options=options)
    counts = optimized.get_fused_operator_statistics()
    if counts["Attention"] != layers or counts["BiasGelu"] != layers:
        raise ValueError(f"Attention and GELU of {layers} layers must be fused, got {counts}.")
    optimized.save_model_to_file(str(fused))


def quantized(graph: Path) -> Path:
    """Write the int8 form of a graph, unless it is there."""
    target = graph.with_name(f"{graph.stem}_int8.onnx")
    if not target.exists():
        unknown = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # what fused attention returns
        quantize_dynamic(graph, target, per_channel=True, extra_options=unknown)
    return target
