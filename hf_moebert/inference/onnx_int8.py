"""The int8 form of a graph, in which a row's result does not depend on the other rows.

ONNX Runtime's own quantiser gives all activations of a product one scale. Here every row has its own, which stands
outside of the product: that is exact in integers, and the scale and the bias of a row follow it. The order is ours, as
in `linears.Int8Linear`.
"""

from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from torch import Tensor

from hf_moebert.runtime.folders import make_options

from .linears import ONE_SIDED, SMALLEST_NORMAL, SYMMETRIC, Grid
from .smoothing import smoothing_factors


RUNTIME = "com.microsoft"  # domain of ONNX Runtime's own operators
OPSET = 21  # the first with scales for parts of a row; here the part is the row
NARROW = 32  # inputs or outputs: a smaller product takes as long in float32, as that of most heads
UNEVEN = 4.0  # the largest channel over the median one, from which on evening out is worth a pass over the input
ACTIVATIONS = ("Gelu", "Relu")  # what `linears.FUSIBLE` is in a graph


class Product(NamedTuple):
    """A product with a constant.

    Attributes:
        node: A MatMul or Gemm.
        weight: Shape `(in, out)`.
        bias: What a Gemm adds.
    """

    node: ir.Node
    weight: np.ndarray
    bias: ir.Value | None

    @property
    def name(self) -> str:
        """Return a name that products share that have the weight in common."""
        turned = " turned" if self.node.attributes.get_int("transB", 0) else ""
        return f"{name_of(self.node.inputs[1])}{turned}"


Products = dict[ir.Value, list[Product]]  # by what they read, in the order of the graph


class Int8Graph:
    """A graph whose products with weights, and lookups of rows, become int8.

    Args:
        graph: The graph, which is changed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.constants: dict[str, ir.Value] = {}

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a constant of the graph, the same for the same name."""
        if name not in self.constants:
            value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
            value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            self.graph.register_initializer(value)
            self.constants[name] = value
        return self.constants[name]

    def number(self, kind: type, value: float) -> ir.Value:
        """Return a constant of no dimension."""
        return self.constant(f"{kind.__name__} {value!r}", np.array(value, kind))

    def replace_products(self, products: list[Product], factors: np.ndarray | None) -> None:
        """Multiply in int8 in all products that read the same, `(..., in)`, which is quantised once."""
        tape, first = Tape(), products[0]
        x = input_of(first.node)
        grid = grid_of(x)
        group = "" if factors is None else f" for {' '.join(names_of(products))}"  # which share the factors
        read = x if factors is None else tape.op("Mul", [x, self.constant(f"factors{group}", factors)])
        sized = read if grid is ONE_SIDED else tape.op("Abs", [read])
        largest = tape.op("ReduceMax", [sized, self.constant("last axis", np.array([-1]))], {"keepdims": 1})
        largest = tape.op("Max", [largest, self.number(np.float32, grid.smallest)])
        scale = tape.op("Mul", [largest, self.number(np.float32, 1 / float(grid.steps))])  # (..., 1)
        zero, shape = self.number(np.uint8, grid.zero_point), tape.op("Shape", [scale])
        form = {"axis": -1, "block_size": len(first.weight)}
        values = tape.op("QuantizeLinear", [read, scale, tape.op("Expand", [zero, shape])], form)
        self.graph.insert_before(first.node, tape.nodes)
        for product in products:
            node, weight, bias = product
            even = weight if factors is None else weight / factors[:, None]
            stored, by_output = self.quantize_weight(f"{product.name}{group}", even, axis=0)
            none = self.constant(f"{weight.shape[1]} zeros", np.zeros(weight.shape[1], np.int8))
            tape, one = Tape(), self.number(np.float32, 1.0)
            inputs = [values, stored, one, by_output, zero, none]
            output = tape.op("Mul", [tape.op("MatMulIntegerToFloat", inputs, domain=RUNTIME), scale])
            self.replace(node, tape, output if bias is None else tape.op("Add", [output, bias]))

    def quantize_weight(self, name: str, weight: np.ndarray, *, axis: int) -> tuple[ir.Value, ir.Value]:
        """Return a weight in int8, and its scales, one for each place on the other axis, `(n,)`."""
        scale = np.maximum(np.abs(weight).max(axis) / np.float32(127), np.float32(SMALLEST_NORMAL))
        stored = np.round(weight / np.expand_dims(scale, axis)).astype(np.int8)
        return self.constant(f"{name} int8", stored), self.constant(f"{name} scale", scale)

    def replace_lookup(self, node: ir.Node, table: np.ndarray) -> None:
        """Look rows up in int8."""
        stored, scale = self.quantize_weight(f"{name_of(node.inputs[0])} table", table, axis=1)
        tape, column = Tape(), self.constant("last axis", np.array([-1]))
        rows, scales = (tape.op("Gather", [part, node.inputs[1]]) for part in (stored, scale))
        exact = tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})
        self.replace(node, tape, tape.op("Mul", [exact, tape.op("Unsqueeze", [scales, column])]))

    def replace(self, node: ir.Node, tape: Tape, output: ir.Value) -> None:
        """Put recorded nodes in the place of one."""
        old = node.outputs[0]
        name, output.shape, output.type = old.name, old.shape, old.type
        self.graph.insert_before(node, tape.nodes)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        output.name = name


def quantize_program(program: ir.Model, drawn: dict[str, Tensor] | None) -> ir.Model:
    """Return the int8 form of a graph: its products with weights, and its tables of embeddings.

    Args:
        program: The graph in float32.
        drawn: Inputs that show which channels are large, as for `smoothing.measure_inputs`, if such are known.
    """
    program = program.clone()
    graph, products = program.graph, find_products(program.graph)
    factors = find_factors(products, {} if drawn is None else measure_peaks(program, products, drawn))
    quantized = Int8Graph(graph)
    for node in list(graph):
        table = weight_of(node, 0) if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 else None
        if table is not None:
            quantized.replace_lookup(node, table)
    for readers in products.values():
        quantized.replace_products(readers, factors[names_of(readers)])
    RemoveUnusedNodesPass()(program)
    program.opset_imports[""] = max(program.opset_imports[""], OPSET)
    program.opset_imports[RUNTIME] = 1
    return program


def find_products(graph: ir.Graph) -> Products:
    """Return the products that are worth int8."""
    found: Products = {}
    for node in graph:
        weight = weight_of(node, 1)
        if weight is None or not (node.op_type == "MatMul" or is_plain_gemm(node)):
            continue
        if node.attributes.get_int("transB", 0):
            weight = weight.T
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        found.setdefault(input_of(node), []).append(Product(node, weight, bias))
    return found


def weight_of(node: ir.Node, place: int) -> np.ndarray | None:
    """Return an input of a node if it is a matrix in float32 that is worth int8, otherwise None."""
    value = node.inputs[place] if place < len(node.inputs) else None
    constant = None if value is None else value.const_value
    if constant is None or constant.dtype != ir.DataType.FLOAT or len(constant.shape) != 2:
        return None
    matrix = constant.numpy()
    return matrix if min(matrix.shape) >= NARROW else None


def is_plain_gemm(node: ir.Node) -> bool:
    """Check whether a node is a product and a sum alone."""
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return node.op_type == "Gemm" and factors == [1.0, 1.0] and not node.attributes.get_int("transA", 0)


def grid_of(x: ir.Value) -> Grid:
    """Return the grid for the rows of a value, by the operator that it comes from."""
    source = x.producer()
    return ONE_SIDED if source is not None and source.op_type in ACTIVATIONS else SYMMETRIC


def input_of(node: ir.Node) -> ir.Value:
    """Return the first input of a node."""
    assert node.inputs[0] is not None
    return node.inputs[0]


def name_of(value: ir.Value | None) -> str:
    """Return the name of a value, which all have in a graph that was exported."""
    assert value is not None
    assert value.name is not None
    return value.name


def names_of(products: list[Product]) -> tuple[str, ...]:
    """Return the names of the weights of products."""
    return tuple(product.name for product in products)


def measure_peaks(program: ir.Model, products: Products, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the largest absolute value of each channel that products read, by the name of the value, `(in,)`."""
    import onnxruntime

    watched = program.clone()
    names = [name_of(x) for x in products]
    values = {name_of(value): value for node in watched.graph for value in node.outputs}
    watched.graph.outputs.extend(values[name] for name in names if not values[name].is_graph_output())
    with TemporaryDirectory() as folder:
        ir.save(watched, f"{folder}/model.onnx", external_data="model.onnx.data")
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", make_options(1))
        given = {name_of(value): drawn[name_of(value)].numpy() for value in program.graph.inputs}
        found = dict(zip(names, session.run(names, given), strict=True))
    flat = {name: np.abs(array.reshape(-1, array.shape[-1])) for name, array in found.items()}
    return {name: torch.from_numpy(rows.max(axis=0)) for name, rows in flat.items() if len(rows)}


def find_factors(products: Products, peaks: dict[str, Tensor]) -> dict[tuple[str, ...], np.ndarray | None]:
    """Return what int8 multiplies inputs by, and divides weights by, where channels are far from even.

    Layers that share their weights, as those of ALBERT do, share these factors.
    """
    shared: dict[tuple[str, ...], Any] = {names_of(readers): None for readers in products.values()}
    for x, readers in products.items():
        peak, known = peaks.get(name_of(x)), shared[names_of(readers)]
        if peak is not None and grid_of(x) is SYMMETRIC:
            shared[names_of(readers)] = peak if known is None else torch.maximum(known, peak)
    weights = {names_of(readers): [product.weight for product in readers] for readers in products.values()}
    for names, peak in shared.items():
        even = peak is None or float(peak.max()) < UNEVEN * float(peak.median())
        factors = None if even else smoothing_factors(peak, torch.from_numpy(np.hstack(weights[names]).T))
        shared[names] = None if factors is None else factors.numpy()
    return shared
