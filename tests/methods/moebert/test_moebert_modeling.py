"""MoEBERT as a model: the identity, the routes, the independence of rows, and the refusals."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
)

from hf_moebert import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
)
from hf_moebert.methods.moebert.conversion import classes_to_cut, from_dense
from hf_moebert.methods.moebert.functional import assign_neurons
from hf_moebert.methods.moebert.modeling_moebert import moe_class


SIZES = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}
ROUTINGS = ("hash-random", "hash-balanced", "gate-token", "gate-sentence")
COUNTS = torch.arange(100).flip(0)


def convert(dense, importance, routing="hash-random", **options):
    counts = COUNTS if routing == "hash-balanced" else None
    fields = {**SIZES, "routing": routing, "token_counts": counts, **options}
    return MoEBertForSequenceClassification.from_dense(dense, importance, **fields)


# ---------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_expert_with_all_neurons_is_the_dense_model_bit_for_bit(dense, importance, batch, routing):
    whole = {"num_experts": 1, "expert_size": 64, "num_shared_neurons": 0}
    student = convert(dense, importance, routing, **whole)
    for grad in (True, False):  # inference and training take different ways
        with torch.set_grad_enabled(grad):
            wanted = dense(**batch, output_hidden_states=True)
            got = student(**batch, output_hidden_states=True)
        assert torch.equal(got.loss, wanted.loss)
        assert torch.equal(got.logits, wanted.logits)
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True))


def test_one_expert_trains_like_the_dense_model(dense, importance, batch):
    student = convert(dense, importance, num_experts=1, expert_size=64, num_shared_neurons=0)
    losses = []
    for model in (dense, student):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)  # the same dropout
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        losses.append(loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("dense_class", classes_to_cut(BertConfig).values())
def test_every_head_finds_its_moebert(dense_config, importance, batch, dense_class):
    dense_config.num_labels = 2
    dense = dense_class(dense_config).eval()
    student = from_dense(dense, importance, num_experts=1, expert_size=64, num_shared_neurons=0, layers=[0, 2])
    assert type(student) is moe_class(dense_class)
    assert student.config.layers == [0, 2]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if dense_class is BertForMultipleChoice:
        inputs = {name: value[None] for name, value in inputs.items()}
    assert all(torch.equal(a, b) for a, b in zip(dense(**inputs)[:2], student(**inputs)[:2], strict=True))


def test_heads_without_a_mixture_are_refused(dense_config, importance):
    with pytest.raises(ValueError, match="`model` must be one of .*'BertModel'.*, got BertForNextSentence"):
        from_dense(BertForNextSentencePrediction(dense_config), importance)
    with pytest.raises(ValueError, match="got 'Linear', of which they cannot, because no row"):
        from_dense(torch.nn.Linear(2, 2), importance)


# ------------------------------------------------------------------------------------------- oracle and routing


@pytest.mark.parametrize("routing", ["hash-random", "hash-balanced"])
def test_converted_model_is_the_dense_one_without_the_other_neurons(dense, importance, batch, routing):
    student = convert(dense, importance, routing)
    table = student.bert.router.table
    masks = torch.zeros(3, 4, 64)
    for layer in range(3):
        dealt = assign_neurons(importance[layer], 4, 16, 8)
        masks[layer].scatter_(1, dealt, 1.0)  # (experts, intermediate)
    for index, layer in enumerate(dense.bert.encoder.layer):

        def keep(module, args, index=index):
            return (args[0] * masks[index][table[index][batch["input_ids"]].long()],)

        layer.output.dense.register_forward_pre_hook(keep)
    torch.testing.assert_close(student(**batch).logits, dense(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("implementation", ["sorted_mm", "eager", "grouped_mm", "batched_mm"])
def test_every_implementation_equals_a_loop_over_tokens(dense, importance, implementation, top_k):
    student = convert(dense, importance, "gate-token", top_k=top_k)
    student.set_experts_implementation(implementation)
    experts = student.bert.encoder.layer[0].output.dense.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 32, generator=generator, requires_grad=True)
    index = torch.rand(7, 4, generator=generator).argsort(dim=1)[:, :top_k]
    index[0] = 3
    weights = torch.rand(7, top_k, generator=generator, requires_grad=True)
    rows = []
    for token in range(7):
        row = 0
        for slot in range(top_k):
            e = int(index[token, slot])
            hidden = F.gelu(F.linear(x[token], experts.up_proj[e], experts.up_proj_bias[e]))
            row += weights[token, slot] * F.linear(hidden, experts.down_proj[e], experts.down_proj_bias[e])
        rows.append(row)
    wanted = torch.stack(rows)
    inputs = (x, weights, *experts.parameters())
    got = experts(x, index, weights)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    probe = torch.randn(7, 32, generator=generator)
    for a, b in zip(torch.autograd.grad(got, inputs, probe), torch.autograd.grad(wanted, inputs, probe), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, weights), wanted, rtol=1e-4, atol=1e-4)


def test_experts_gradcheck():
    sizes = {"num_experts": 4, "expert_size": 5, "num_shared_neurons": 0, "intermediate_size": 20}
    config = MoEBertConfig(hidden_size=6, num_attention_heads=1, num_hidden_layers=1, **sizes)
    experts = MoEBertModel(config).encoder.layer[0].output.dense.experts.double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    index, weights = torch.tensor([[0], [2], [2], [3], [0]]), torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: experts(x, index, w), (x, weights))


def test_an_expert_without_tokens_gets_a_zero_gradient(dense, importance, batch):
    student = convert(dense, importance)
    student.bert.router.table.fill_(2)
    student(**batch).loss.backward()
    gradient = student.bert.encoder.layer[1].output.dense.experts.up_proj.grad
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3]].abs().sum() == 0


def test_experts_share_rows_at_first_and_part_in_training(dense, importance, batch):
    student = convert(dense, importance, num_shared_neurons=16)  # all neurons shared: all experts equal
    stack = student.bert.encoder.layer[0].output.dense.experts.up_proj
    assert all(torch.equal(stack[0], stack[e]) for e in range(4))
    before = student(**batch).logits
    student.bert.router.table.copy_(student.bert.router.table.flip(1))
    torch.testing.assert_close(student(**batch).logits, before, rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(stack[0], stack[1])


def test_tables_differ_between_layers_and_follow_the_seed_alone(dense, importance):
    tables = convert(dense, importance, seed=5).bert.router.table
    assert tables.shape == (3, 100)
    assert not torch.equal(tables[0], tables[1])
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(convert(dense, importance, seed=5).bert.router.table, tables)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's randomness is used up
    assert not torch.equal(convert(dense, importance, seed=6).bert.router.table, tables)
    gates = [
        convert(dense, importance, "gate-token", seed=s).bert.encoder.layer[0].output.dense.gate.weight
        for s in (5, 5, 6)
    ]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_row_does_not_depend_on_neighbours_or_padding(dense, importance, batch, routing, grad):
    student = convert(dense, importance, routing)
    with torch.set_grad_enabled(grad):
        together = student(**batch).logits
        for row, length in enumerate((11, 6, 11, 9)):
            ids = batch["input_ids"][row : row + 1]
            alone = student(input_ids=ids[:, :length]).logits
            padded = F.pad(ids, (0, 5))
            mask = F.pad(batch["attention_mask"][row : row + 1], (0, 5))
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-5)
            torch.testing.assert_close(
                student(padded, attention_mask=mask).logits[0], together[row], rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_subset_of_layers(dense, importance, batch, routing):
    student = convert(dense, importance, routing, layers=[1])
    assert list(student.networks()) == ["bert.encoder.layer.1.output.dense"]
    got = student(**batch, output_hidden_states=True, output_expert_load=True)
    wanted = dense(**batch, output_hidden_states=True)
    assert torch.equal(got.hidden_states[1], wanted.hidden_states[1])
    assert not torch.equal(got.hidden_states[2], wanted.hidden_states[2])
    assert len(got.expert_load) == 1
    assert len(got.hidden_states) == 4


def test_gate_scalings(dense, importance, batch):
    states = {}
    for scaling in ("straight-through", "probability", "reference"):
        student = convert(dense, importance, "gate-token", gate_scaling=scaling, layers=[0])
        output = student(**batch, output_hidden_states=True, output_router_logits=True)
        states[scaling] = output.hidden_states[1]
    p = output.router_logits[0].softmax(-1).amax(-1, keepdim=True)  # (batch, seq, 1)
    torch.testing.assert_close(states["reference"], states["straight-through"] * p)
    assert not torch.allclose(states["probability"], states["straight-through"], atol=1e-3)
    student.zero_grad()
    student(**batch).loss.backward()
    assert student.bert.encoder.layer[0].output.dense.gate.weight.grad.abs().sum() > 0


def test_sentence_gate_scales_alike_at_every_batch_size(dense, importance, batch):
    student = convert(dense, importance, "gate-sentence", gate_scaling="reference")
    together = student(**batch).logits
    alone = student(batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1]).logits
    torch.testing.assert_close(alone[0], together[0], rtol=0, atol=1e-5)


def test_a_collapsed_gate_is_reported_and_training_goes_on(dense, importance, batch, caplog, monkeypatch):
    monkeypatch.setattr("hf_moebert.methods.moebert.modeling_moebert.MAX_IDLE_STEPS", 3)
    monkeypatch.setattr("transformers.utils.logging.get_verbosity", lambda: 10)
    student = convert(dense, importance, "gate-token", layers=[0, 2]).train()
    with torch.no_grad():
        student.bert.encoder.layer[2].output.dense.gate.weight.zero_()  # ties go to expert 0
    for _ in range(2):
        student(**batch)
    assert "no token" not in caplog.text
    student(**batch)
    assert "experts had no token for 3 steps" in caplog.text
    assert "[1, 1], [1, 2], [1, 3]" in caplog.text
    caplog.clear()
    student.eval()(**batch)
    assert student.bert.steps == 3


def test_a_reloaded_gate_trains(dense, importance, batch, tmp_path):
    convert(dense, importance, "gate-sentence").save_pretrained(tmp_path)
    student = MoEBertForSequenceClassification.from_pretrained(tmp_path).train()  # was built on the meta device
    student(**batch).loss.backward()
    assert student.bert.encoder.layer[0].output.dense.gate.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("routing", ROUTINGS)
def test_expert_load_counts_each_real_token_once_per_layer(dense, importance, batch, routing):
    student = convert(dense, importance, routing)
    load = torch.stack(student(**batch, output_expert_load=True).expert_load)
    assert load.shape == (3, 4)
    assert load.sum(dim=1).tolist() == [int(batch["attention_mask"].sum())] * 3
    assert student(**batch).expert_load is None


def test_nothing_of_a_pass_outlives_its_output(dense, importance, batch):
    student = convert(dense, importance, "gate-token", router_aux_loss_coef=0.1).train()
    output = student(**batch, output_router_logits=True)
    logits = weakref.ref(output.router_logits[0])
    del output
    gc.collect()
    assert logits() is None


def test_balance_loss_is_part_of_the_loss(dense, importance, batch):
    plain, balanced = (
        convert(dense, importance, "gate-token", router_aux_loss_coef=coefficient)(**batch, output_router_logits=True)
        for coefficient in (0.0, 0.5)
    )
    assert plain.aux_loss is None
    assert plain.router_logits[0].shape == (4, 11, 4)
    torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * balanced.aux_loss)


@pytest.mark.parametrize("routing", ["hash-random", "hash-balanced"])
def test_tables_are_drawn_on_the_cpu_whatever_the_default_device(routing):
    router = MoEBertModel(MoEBertConfig(num_hidden_layers=1, routing=routing)).router
    with torch.device("meta"):
        assert torch.equal(router.draw_table(30522), router.table)


def test_parameter_counts_of_bert_base():
    with torch.device("meta"):
        model = MoEBertModel(MoEBertConfig())
        gated = MoEBertModel(MoEBertConfig(routing="gate-token"))
    count = sum(p.numel() for p in model.parameters())
    assert count == 109_509_888  # dense 109,482,240 and three more output biases of 768 in each of 12 layers
    assert sum(p.numel() for p in gated.parameters()) - count == 36_864


@pytest.mark.parametrize("kind", ["classes", "several", "regression", "nothing"])
def test_losses_of_the_sequence_head(dense_config, kind):
    dense_config.num_labels = 1 if kind == "regression" else 3
    dense_config.problem_type = None
    model = MoEBertForSequenceClassification(MoEBertConfig.from_dense(dense_config, **SIZES)).eval()
    ids = torch.arange(1, 13).view(2, 6)
    logits = model(ids).logits
    if kind == "nothing":
        assert model(ids).loss is None
        missing = model(ids, labels=torch.tensor([-100, -100]))
        assert missing.loss.item() == 0
        missing.loss.backward()
        return
    labels, wanted = {
        "classes": (torch.tensor([0, 2]), F.cross_entropy),
        "several": (torch.tensor([[0.0, 1, 1], [1, 0, 0]]), F.binary_cross_entropy_with_logits),
        "regression": (torch.tensor([0.3, -2.0]), lambda x, y: F.mse_loss(x.squeeze(-1), y)),
    }[kind]
    torch.testing.assert_close(model(ids, labels=labels).loss, wanted(logits, labels))


def test_token_and_span_heads_give_the_stock_losses(dense_config, importance, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = {"num_experts": 1, "expert_size": 64, "num_shared_neurons": 0}
    dense = BertForTokenClassification(dense_config).eval()
    tags = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
    student = MoEBertForTokenClassification.from_dense(dense, importance, **whole)
    assert torch.equal(student(**inputs, labels=tags).loss, dense(**inputs, labels=tags).loss)
    assert student(**inputs, labels=torch.full_like(tags, -100)).loss.item() == 0

    dense_config.num_labels = 2
    dense = BertForQuestionAnswering(dense_config).eval()
    ends = {"start_positions": torch.tensor([0, 2, 3, 1]), "end_positions": torch.tensor([4, 2, 5, 8])}
    student = MoEBertForQuestionAnswering.from_dense(dense, importance, **whole)
    torch.testing.assert_close(student(**inputs, **ends).loss, dense(**inputs, **ends).loss)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_empty_batch_is_refused_and_a_row_of_padding_is_not(dense, importance, routing):
    student = convert(dense, importance, routing, router_aux_loss_coef=0.1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match="A batch must have at least one row, got none"):
                student(torch.zeros(0, 5, dtype=torch.long))
            padding = student(torch.zeros(1, 5, dtype=torch.long), attention_mask=torch.zeros(1, 5, dtype=torch.long))
            assert padding.logits.isfinite().all()


def test_every_form_of_the_attention_mask_means_the_same(student, batch):
    mask = batch["attention_mask"]
    square = mask.bool()[:, None, None, :].expand(-1, 1, 11, 11)
    forms = [mask, mask.bool(), mask.float(), square]
    outputs = [student(batch["input_ids"], attention_mask=m, output_expert_load=True) for m in forms]
    for output in outputs[1:]:
        torch.testing.assert_close(output.logits, outputs[0].logits, rtol=0, atol=1e-5)
        assert torch.equal(torch.stack(output.expert_load), torch.stack(outputs[0].expert_load))
    full = student(batch["input_ids"], attention_mask=torch.ones_like(mask)).logits
    torch.testing.assert_close(student(batch["input_ids"]).logits, full)


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("grad", [True, False])
def test_bad_inputs_are_refused(student, batch, grad):
    ids = batch["input_ids"]
    with torch.set_grad_enabled(grad):
        for wrong in (100, -1):
            bad = ids.clone()
            bad[2, 7] = wrong
            with pytest.raises(
                ValueError, match=rf"`input_ids` must be in \[0, 100\), got {wrong} at row 2, position 7"
            ):
                student(bad)
        with pytest.raises(ValueError, match="Sequences must have 1 to 32 tokens, got 33"):
            student(torch.ones(1, 33, dtype=torch.long))
        with pytest.raises(ValueError, match="Sequences must have 1 to 32 tokens, got 0"):
            student(torch.ones(2, 0, dtype=torch.long))
        with pytest.raises(ValueError, match="`input_ids` must be integers, got torch.float32"):
            student(ids.float())
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            student()
        with pytest.raises(ValueError, match="`inputs_embeds` cannot be routed by `routing` 'hash-random'"):
            student(inputs_embeds=torch.rand(1, 4, 32))
        with pytest.raises(ValueError, match=r"`labels` must be in \[0, 3\) or -100, got 3"):
            student(ids, labels=torch.tensor([0, 1, 2, 3]))


def test_embeddings_are_routed_by_gates(dense, importance, batch):
    student = convert(dense, importance, "gate-token")
    embeddings = student.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    got = student(inputs_embeds=embeddings, attention_mask=mask).logits
    torch.testing.assert_close(got, student(batch["input_ids"], attention_mask=mask).logits)


def test_bad_conversions_are_refused(dense, importance):
    with pytest.raises(ValueError, match=r"`importance` must hold .* shape \(3, 64\) .* got shape \(3, 63\)"):
        convert(dense, importance[:, :63])
    broken = importance.clone()
    broken[1, 1] = float("nan")
    with pytest.raises(ValueError, match="`importance` must hold a finite score .* finite: False"):
        convert(dense, broken)
    with pytest.raises(ValueError, match=r"`token_counts` must have shape \(100,\) .* got None"):
        convert(dense, importance, "hash-balanced", token_counts=None)
    with pytest.raises(ValueError, match="must be a dense BertForTokenClassification to become a MoEBertForToken"):
        MoEBertForTokenClassification.from_dense(dense, importance, **SIZES)
    with pytest.raises(ValueError, match="must be a dense BertForSequenceClassification to become"):
        convert(convert(dense, importance), importance)


def test_conversion_leaves_the_dense_model_alone(dense, importance, batch):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    student = convert(dense, importance)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert dense.config.model_type == "bert"


def test_default_sizes_are_the_papers(dense_config):
    dense = BertModel(BertConfig(**{**dense_config.to_dict(), "intermediate_size": 96}))
    config = MoEBertModel.from_dense(dense, torch.rand(3, 96)).config
    assert (config.num_experts, config.expert_size, config.num_shared_neurons) == (4, 24, 16)


# -------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_without_its_experts_is_refused(dense, student, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"must hold all weights of .*convert a dense model with `from_dense`"):
        MoEBertForSequenceClassification.from_pretrained(tmp_path / "dense", config=student.config)
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("bert.router.table", "bert.encoder.layer.1.output.dense.experts.down_proj_bias"):
        save_file(
            {key: w for key, w in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(ValueError, match=rf"not so for {name}\."):
            MoEBertForSequenceClassification.from_pretrained(tmp_path)


def test_a_checkpoint_with_a_new_head_loads(student, tmp_path):
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold no weights but those of .* not so for bert.pooler"):
        MoEBertForTokenClassification.from_pretrained(tmp_path)
    model = MoEBertForTokenClassification.from_pretrained(tmp_path, allow_unexpected=True)
    assert torch.equal(model.bert.router.table, student.bert.router.table)


def test_broken_weights_are_refused(student, tmp_path):
    with torch.no_grad():
        student.bert.encoder.layer[2].output.dense.experts.up_proj[1, 0, 0] = float("inf")
    student.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="finite weights of .* not so for bert.encoder.layer.2.output.dense.experts.up_proj"
    ):
        MoEBertForSequenceClassification.from_pretrained(tmp_path)
    MoEBertForSequenceClassification.from_pretrained(tmp_path, allow_nonfinite=True)


@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_a_truncated_checkpoint_is_refused(student, tmp_path, keep):
    student.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="must be of complete safetensors files, got '.*model.safetensors'"):
        MoEBertForSequenceClassification.from_pretrained(tmp_path)


def test_tensors_of_another_shape_are_refused(student, tmp_path):
    student.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        MoEBertForSequenceClassification.from_pretrained(tmp_path, expert_size=8)


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence", "hash-random"])
def test_a_balance_loss_that_nothing_trains_is_named(dense, importance, routing, monkeypatch):
    said = []
    monkeypatch.setattr("hf_moebert.methods.moebert.modeling_moebert.logger.warning_once", said.append)
    sizes = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}
    sizes["router_aux_loss_coef"] = 0.01
    model = MoEBertForSequenceClassification.from_dense(dense, importance, routing=routing, **sizes)
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=torch.tensor([0, 1]))
    model.eval()(input_ids=ids)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert not said
    model(input_ids=ids)
    assert ["`label_smoothing_factor`" in text for text in said] == [True] * routing.startswith("gate")
