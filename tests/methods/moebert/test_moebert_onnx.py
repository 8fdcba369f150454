"""An exported graph gives in ONNX Runtime what the model gives in torch, whatever the batch."""

import onnx
import pytest
import torch
import transformers
from tiny_families import IMAGES, UNITS, make_model as make_dense

from hf_moebert import MoEBertConfig, MoEBertForSequenceClassification, export_onnx, load_onnx
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.methods.moebert import from_dense


# An export takes four seconds, so each shows several things: a family, a routing, a head, a size, experts chosen.
ROUTINGS = {"hash-random": {}, "gate-token": {"gate_scaling": "reference"}}  # of BERT
# Of other families, each with another head; transformers exports all of them
FAMILIES = {
    "distilbert": ("AutoModelForTokenClassification", {"routing": "hash-balanced", "num_experts": 1}),
    "modernbert": (
        "AutoModelForSequenceClassification",
        # a size that grouped kernels refuse
        {
            "routing": "gate-token",
            "expert_size": 13,
            "num_shared_neurons": 8,
            "top_k": 2,
            "gate_scaling": "probability",
        },
    ),
    "mpnet": ("AutoModelForQuestionAnswering", {"routing": "gate-sentence", "top_k": 2}),
    "vit": ("AutoModelForImageClassification", {"routing": "gate-token"}),
}
PRECISIONS = ("float32", "int8") if unsupported_reason("int8", True) is None else ("float32",)
SHAPES = ((1, 1), (1, 7), (1, 32), (2, 5), (3, 16), (8, 128))
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]  # warnings of the exporter


def make_model(routing="hash-random", **options):
    torch.manual_seed(0)
    config = MoEBertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,  # what an exporter takes long for is the same in every layer
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.2,  # so that different routes give visibly different outputs
        num_labels=2,
        num_shared_neurons=0,
        num_experts=4,
        expert_size=32,
        routing=routing,
        **options,
    )
    return MoEBertForSequenceClassification(config).eval()


def make_family(family):
    """A mixture of another family than BERT."""
    auto, options = FAMILIES[family]
    fields = {"n_layers" if family == "distilbert" else "num_hidden_layers": 1}
    fields |= {} if family in IMAGES else {"vocab_size": 100}
    dense = make_dense(family, getattr(transformers, auto), num_labels=2, **fields)
    importance = torch.rand(1, UNITS, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(100) if options.get("routing") == "hash-balanced" else None
    return from_dense(dense, importance, token_counts=counts, **{"num_experts": 3} | options)


def make_inputs(rows, length, pad=0, side="right"):
    ids = torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    mask = torch.ones_like(ids)
    mask[-1, length - pad :] = 0
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def make_images(rows):
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))}


def export(model, folder, precisions=("float32",)):
    """Export once, from a batch whose shape is none of those that are run."""
    export_onnx(model, folder, precisions=precisions)
    return load_onnx(folder, precision=precisions[0])


@torch.no_grad()
def assert_same(found, model, inputs, atol=1e-4):
    for got, wanted in zip(found(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
        torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export the first case, and return the model and the folder of the graph."""
    model, folder = make_model(), tmp_path_factory.mktemp("exported")
    export(model, folder, PRECISIONS)
    return model, folder


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_export_serves_every_batch_and_padding(request, tmp_path, routing):
    if routing == "hash-random":
        model, folder = request.getfixturevalue("exported")
        session = load_onnx(folder)
    else:
        model = make_model(routing, **ROUTINGS[routing])
        session = export(model, tmp_path)
    for rows, length in SHAPES:
        assert_same(session, model, make_inputs(rows, length))
        assert_same(session, model, make_inputs(rows, length, pad=length // 3))
    for side in ("left", "right"):
        for pad in (3, 16):  # 16: a row of padding alone
            assert_same(session, model, make_inputs(3, 16, pad, side))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_export_of_another_family_serves_every_batch_and_padding(tmp_path, family):
    model = make_family(family)
    session = export(model, tmp_path)
    if family in IMAGES:
        batches = [make_images(rows) for rows in (1, 3, 8)]
    else:
        batches = [
            make_inputs(rows, length, pad) for rows, length, pad in ((1, 1, 0), (1, 7, 2), (3, 16, 16), (2, 5, 0))
        ]
    for batch in batches:
        assert_same(session, model, batch)


@torch.no_grad()
def test_experts_that_get_no_token(exported):
    model, folder = exported
    session = load_onnx(folder)
    table = model.base_model.router.table
    for expert in range(4):
        ids = (table[0] == expert).nonzero().flatten()[:6].view(2, 3)  # all tokens go to one expert
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert_same(session, model, inputs)


def test_the_graph_multiplies_each_expert_with_its_own_tokens_only(exported):
    kinds = [node.op_type for node in onnx.load(exported[1] / "float32" / "model.onnx").graph.node]
    assert kinds.count("NonZero") == 4
    assert kinds.count("ScatterND") == 1
    assert not {"TopK", "Loop", "If", "Scan"} & set(kinds)


@torch.no_grad()
def test_torchscript_does_not_freeze_the_routes():
    model = make_model(return_dict=False).base_model
    traced = torch.jit.trace(model, tuple(make_inputs(2, 9).values()))
    for rows, length in SHAPES:
        inputs = make_inputs(rows, length)
        torch.testing.assert_close(traced(*inputs.values()), model(**inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor lacks int8 products")
def test_int8_quantisation_finds_every_expert(exported):
    model, folder = exported
    kinds = [node.op_type for node in onnx.load(folder / "int8" / "model.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4 + 2 * 4 + 1  # attention, experts and pooler; the head is narrow
    session = load_onnx(folder, precision="int8")
    for rows, length in SHAPES:  # in the first, three experts get no token
        assert_same(session, model, make_inputs(rows, length), atol=0.1)
