"""Mixtures of every family of encoders: the identity, the oracle, training, threads, files and refusals."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import new_process
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft_support import NEEDS_PEFT
from tiny_families import HIDDEN, IMAGES, VOCAB, make_inputs, make_model
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moebert import measure_importance, shrink
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.surgery import find_feed_forwards, find_linear
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.methods.moebert import from_dense
from hf_moebert.methods.moebert.configuration_moebert import ENCODERS
from hf_moebert.methods.moebert.conversion import classes_to_cut
from hf_moebert.methods.moebert.functional import assign_neurons
from hf_moebert.methods.moebert.modeling_moebert import moe_class
from hf_moebert.methods.moebert.modeling_routing import recording


FROM_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # it asks for it
CASES = {
    **{family: (family, {}) for family in ENCODERS},
    "dinov2 gated": ("dinov2", {"use_swiglu_ffn": True}),
    "albert with groups": ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}),
    "deberta-v2, own keys": ("deberta-v2", {"share_att_key": False}),
    "modernbert with biases": ("modernbert", {"mlp_bias": True}),
}
HEADS = [
    (family, auto)
    for family in ENCODERS
    for auto in classes_to_cut(CONFIG_MAPPING[family])
    if auto != "AutoModelForCausalLM"
]


def convert(dense, **options):
    """Cut a dense model by random scores."""
    found = find_feed_forwards(dense)
    scores = torch.rand(len(found), found[0].num_units, generator=torch.Generator().manual_seed(2))
    return from_dense(dense, scores, **options), scores


def inputs_of(model, auto="AutoModel"):
    """Inputs and labels of a head; the second text ends with padding."""
    given = make_inputs(model)
    ids = given.get("input_ids")
    if ids is not None:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, 4:] = 0
    if auto == "AutoModelForMultipleChoice":
        return {name: value[None] for name, value in given.items()} | {"labels": torch.tensor([1])}
    if auto == "AutoModelForQuestionAnswering":
        return given | {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    if auto in ("AutoModelForTokenClassification", "AutoModelForMaskedLM"):
        return given | {"labels": ids % 2}
    return given if auto == "AutoModel" else given | {"labels": torch.tensor([0, 1])}


@pytest.mark.parametrize(("family", "auto"), HEADS)
def test_one_expert_of_all_neurons_is_the_dense_model(family, auto):
    dense = make_model(family, getattr(transformers, auto))
    student, _ = convert(dense, num_experts=1)
    inputs = inputs_of(dense, auto)
    for grad in (True, False):  # training and inference take different ways
        with torch.set_grad_enabled(grad):
            wanted, got = dense(**inputs), student(**inputs)
        for name, value in wanted.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(got[name], value, rtol=1e-6, atol=5e-6)
    assert type(student) is moe_class(type(dense))
    assert type(student.base_model) is moe_class(type(dense.base_model))
    assert student.config.expert_size == student.config.width == find_feed_forwards(dense)[0].num_units


@torch.no_grad()
@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_the_dense_model_without_the_other_neurons(case, routing):
    family, fields = CASES[case]
    if family in IMAGES and routing == "hash-random":
        pytest.skip("Images have no token ids.")
    dense = make_model(family, **fields)
    student, scores = convert(dense, routing=routing, num_experts=3)
    inputs = inputs_of(dense)
    with recording() as records:
        got = student(**inputs)[0]
    config, found = student.config, find_feed_forwards(dense)
    for index, network in enumerate(found):
        dealt = assign_neurons(scores[index], 3, config.expert_size, config.num_shared_neurons)
        masks = torch.zeros(3, scores.shape[1]).scatter_(1, dealt, 1.0)  # (experts, intermediate)
        chosen = iter([record.chosen[:, 0] for record in records if record.network.index == index])

        def keep(module, args, masks=masks, chosen=chosen):
            return (args[0] * masks[next(chosen)].view_as(args[0]),)

        find_linear(network.layer, network.paths.down).register_forward_pre_hook(keep)
    assert routing == "gate-sentence" or len({int(x) for record in records for x in record.chosen.flatten()}) > 1
    torch.testing.assert_close(got, dense(**inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_checkpointed_activations_give_the_same_gradients_and_training_reaches_everything(case):
    family, fields = CASES[case]
    auto = "AutoModelForImageClassification" if family in IMAGES else "AutoModelForSequenceClassification"
    if auto not in classes_to_cut(CONFIG_MAPPING[family]):
        auto = "AutoModelForMaskedLM"
    dense = make_model(family, getattr(transformers, auto), **fields)
    plain, _ = convert(dense, routing="gate-token", router_aux_loss_coef=0.1, num_experts=3)
    plain, inputs = plain.train(), inputs_of(dense, auto)
    gradients = []
    for reentrant in (None, True, False) if plain.supports_gradient_checkpointing else (None,):
        model = copy.deepcopy(plain)
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)  # the same dropout
        model(**inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, wanted in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], wanted, rtol=1e-4, atol=1e-5)
    assert all(gradients[0][f"{path}.gate.weight"].abs().sum() > 0 for path in plain.networks())

    optimizer, losses = torch.optim.SGD(plain.eval().parameters(), lr=0.01), []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(plain(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
def test_two_threads_never_see_each_others_routes(family):
    routing = "gate-sentence" if family in IMAGES else "hash-random"
    student, _ = convert(make_model(family), routing=routing)
    batches = [{name: value[row : row + 1] for name, value in make_inputs(student, 8).items()} for row in range(8)]
    wanted = [student(**batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: student(**batch)[0], batches * 4))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted * 4, strict=True))


@pytest.mark.parametrize("family", sorted(set(ENCODERS) - set(IMAGES)))
@NEEDS_PEFT
@FROM_PEFT
def test_vocabularies_grow_and_adapters_reach_attention_and_experts(family):
    student, _ = convert(make_model(family))
    table = student.router.table.clone()
    student.resize_token_embeddings(VOCAB + 3)
    assert torch.equal(student.router.table[:, :VOCAB], table)
    assert student(torch.tensor([[VOCAB + 2, 4]]))[0].isfinite().all()
    writer = next(iter(find_feed_forwards(make_model(family)))).layer_path  # of a dense model: names are the same
    stacks = [f"{path}.experts.{name}" for path, network in student.networks().items() for name in names_of(network)]
    attention = student.get_submodule(writer)
    linear = next(name for name, module in attention.named_modules() if type(module) is torch.nn.Linear)
    config = LoraConfig(r=2, target_modules=[linear.split(".")[-1]], target_parameters=stacks, lora_dropout=0.0)
    adapted = get_peft_model(student, config)
    adapted(**make_inputs(student))[0].sum().backward()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in found)
    assert all(gradient is not None for gradient in found.values())


def names_of(network):
    """The names of the stacked weights of a network."""
    return [name for name, _ in network.experts.named_parameters() if not name.endswith("bias")]


@pytest.mark.parametrize("family", ENCODERS)
def test_copies_pickles_and_half_precision(family):
    student, _ = convert(make_model(family))
    inputs = make_inputs(student)
    with torch.no_grad():
        wanted = student(**inputs)[0]
        for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            assert torch.equal(twin(**inputs)[0], wanted)
        half = student.to(torch.bfloat16)
        inputs = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in inputs.items()}
        assert half(**inputs)[0].dtype == torch.bfloat16


RELOAD = """
import json, pathlib, sys
import torch
from transformers import AutoModel
trust = sys.argv[2] == "trust"
if not trust:
    import hf_moebert
told = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    ids = torch.tensor(json.loads((folder / "inputs.json").read_text()))
    with torch.no_grad():
        told[folder.name] = [type(model).__name__, model(ids)[0].tolist()]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of every family, and what each is and gives."""
    folder, wanted = tmp_path_factory.mktemp("saved"), {}
    for family in ENCODERS:
        student, _ = convert(make_model(family))
        student.save_pretrained(folder / family)
        inputs = make_inputs(student)[student.main_input_name]
        (folder / family / "inputs.json").write_text(json.dumps(inputs.tolist()))
        with torch.no_grad():
            wanted[family] = [type(student).__name__, student(inputs)[0]]
    return folder, wanted


@pytest.mark.process
@pytest.mark.parametrize("way", ["package", "trust"])
def test_new_processes_find_the_same_models_with_and_without_the_package(saved, way):
    folder, wanted = saved
    cwd = None if way == "package" else folder
    told = json.loads(new_process.run(RELOAD, folder, way, cwd=cwd).stdout.splitlines()[-1])
    for family, (name, output) in wanted.items():
        assert told[family][0] == name
        torch.testing.assert_close(torch.tensor(told[family][1]), output, rtol=1e-5, atol=1e-5)


@pytest.mark.process
@torch.no_grad()
@pytest.mark.parametrize("family", ["deberta-v2", "distilbert", "mpnet", "modernbert", "albert", "vit"])
def test_compiled_and_exported(family):
    """The others are exported for ONNX."""
    torch._dynamo.reset()
    layers = {} if family == "albert" else {"n_layers" if family == "distilbert" else "num_hidden_layers": 1}
    student, _ = convert(make_model(family, **layers), num_experts=3)  # of 8 or 16 neurons: `grouped_mm` can take them
    inputs = make_inputs(student)
    compiled = torch.compile(student, backend="eager", fullgraph=family not in ("deberta-v2",))
    torch.testing.assert_close(compiled(**inputs)[0], student(**inputs)[0], rtol=1e-5, atol=1e-5)
    if family in ("albert", "deberta-v2"):
        program = torch.export.export(student, (), inputs).module()
        torch.testing.assert_close(program(**inputs)[0], student(**inputs)[0], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- refusals


@FROM_PEFT
def test_what_cannot_be_a_mixture_is_refused():
    dense = make_model("roberta")
    student, scores = convert(dense)
    with pytest.raises(ValueError, match="to be cut into experts, but MoERobertaModel is a mixture of experts"):
        from_dense(student, scores)
    with pytest.raises(ValueError, match="cut into experts, got 'llama', .* because its models are no encoders"):
        from_dense(make_model("llama"), scores)
    with pytest.raises(ValueError, match="got 'Linear', .* because no row says where"):
        from_dense(torch.nn.Linear(2, 2), scores)
    with pytest.raises(
        ValueError, match="`gate_scaling` 'reference' needs layers that compute as BERT's do, got a MoEMPNet"
    ):
        convert(make_model("mpnet"), routing="gate-token", gate_scaling="reference")
    with pytest.raises(ValueError, match="`routing` must be one of .* for images, which have no token ids"):
        convert(make_model("vit"), routing="hash-random")
    dense.config.chunk_size_feed_forward = 2
    with pytest.raises(
        ValueError, match="`chunk_size_feed_forward` must be 0, because a route is that of a whole batch"
    ):
        convert(dense)
    adapted = get_peft_model(make_model("electra"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="but PeftModel is one with an adapter of PEFT"):
        from_dense(adapted, scores)
    with pytest.raises(ValueError, match="A layer of experts must run within its model"):
        student.networks()["encoder.layer.0.output.dense"](torch.zeros(1, 2, HIDDEN))


# ------------------------------------------------------------------------------------------ narrowed layers


def pruned(family, **options):
    """A model whose first layer lost half of its neurons and whose last lost a third, and one head where one can."""
    model = make_model(family, **options)
    with torch.no_grad():
        for group in find_unit_groups(model):
            keep = group.num_units // 2 if group.layer == 0 else group.num_units - group.num_units // 3
            if group.kind == "heads":
                keep = max(group.num_units - 1, 1)
            group.writer.weight[:, keep * group.unit_size :] = 0
    return model


def narrowed(family):
    """The same without what it lost."""
    return shrink(pruned(family))


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in ENCODERS if ARCHITECTURES[family].units])
def test_narrowed_layers_are_cut_by_their_own_widths(tmp_path, family):
    small = narrowed(family)
    found = find_feed_forwards(small)
    widths = [network.num_units for network in found]
    assert len(set(widths)) > 1
    scores = torch.rand(len(found), max(widths), generator=torch.Generator().manual_seed(2))
    inputs = inputs_of(small)
    whole = from_dense(small, scores, num_experts=1)
    torch.testing.assert_close(whole(**inputs)[0], small(**inputs)[0], rtol=1e-6, atol=5e-6)
    student = from_dense(small, scores, num_experts=2, routing="gate-token")
    sizes = [network.experts.down_proj.shape[2] for network in student.networks().values()]
    assert sizes == [width // 2 for width in widths]
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs)[0], student(**inputs)[0])
    assert loaded.config.widths == small.config.widths


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_the_importance_of_narrowed_layers_is_that_of_the_neurons_that_are_left(family):
    dense = pruned(family, auto=AutoModelForSequenceClassification, num_labels=2)
    small, inputs = shrink(dense), inputs_of(dense, "AutoModelForSequenceClassification")
    examples = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    wanted, found = measure_importance(dense, examples), measure_importance(small, examples)
    assert found.shape == (2, 16)
    for row, network in enumerate(find_feed_forwards(small)):
        torch.testing.assert_close(found[row, : network.num_units], wanted[row, : network.num_units])
        assert not found[row, network.num_units :].any()


def test_what_narrowed_layers_cannot_have_is_refused():
    small = narrowed("bert")
    scores = torch.rand(2, 16)
    with pytest.raises(ValueError, match="`expert_size` .* must be left out where layers differ in width, got 4"):
        from_dense(small, scores, expert_size=4)
    with pytest.raises(ValueError, match="encoder.layer.0.* must have at least 13 neurons for 13 experts, got 12"):
        from_dense(small, scores, num_experts=13)
    with pytest.raises(ValueError, match=r"of shape \(2, 16\) \(layers, intermediate\), got shape \(2, 24\)"):
        from_dense(small, torch.rand(2, 24))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_tables_that_do_not_fit_are_refused(tmp_path, family):
    student, _ = convert(make_model(family))
    ids = make_inputs(student)["input_ids"]
    student.router.table[0, 7] = 4
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`router.table` of '.*' must name experts in \[0, 4\), got 4"):
        type(student).from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="must hold weights of the model's sizes"):
        type(student).from_pretrained(tmp_path, vocab_size=VOCAB + 3)
    student.router.table = student.router.table[:, :20]
    with pytest.raises(ValueError, match="`router.table` must have a column for each of 50 token ids, got 20"):
        student(ids)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "vit"])
def test_chunks_are_refused_wherever_they_are_set(tmp_path, family):
    student, _ = convert(make_model(family))
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`chunk_size_feed_forward` must be 0, because a route is that of a whole"):
        type(student).from_pretrained(tmp_path, chunk_size_feed_forward=2)
    student.config.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="`chunk_size_feed_forward` must be 0"):
        type(student)(student.config)
    with pytest.raises(ValueError, match="`chunk_size_feed_forward` must be 0"):
        student.save_pretrained(tmp_path)
    chunked = [layer for layer in student.modules() if hasattr(layer, "chunk_size_feed_forward")]
    if family == "bert":  # the layers of the others do not compute in chunks
        for layer in chunked:
            layer.chunk_size_feed_forward = 1
        with pytest.raises(ValueError, match="must get all 14 tokens of its batch at once, got .*chunk_size_feed"):
            student(**make_inputs(student))
