"""Token classifiers with a CRF: emissions of the stock model, tags, refusals, saving and loading."""

import copy
import json
import warnings

import pytest
import torch
from tiny_crf import FAMILIES, LABELS, labels_of, make, make_batch, make_config, make_dense, names, stock_logits
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from hf_moebert import BertCrfForTokenClassification, CrfForTokenClassification
from hf_moebert.methods.masked_crf import MaskedCRF, from_dense, modeling_masked_crf
from hf_moebert.methods.masked_crf.configuration_masked_crf import BertCrfConfig, CrfConfig
from hf_moebert.methods.masked_crf.functional_tags import count_breaks


KINDS = ("bert", "any bert")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


# Identity


@pytest.mark.parametrize("family", [*FAMILIES, "any bert"])
@torch.no_grad()
def test_the_emissions_are_the_stock_models_logits(family):
    dense, batch = make_dense(family.removeprefix("any ")), make_batch()
    assert torch.equal(make(family)(**batch).logits, stock_logits(dense, batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{"tag_scheme": "none"}, {"mask_transitions": "off"}])
@torch.no_grad()
def test_where_all_is_legal_and_scores_are_zero_the_tags_are_the_largest_logits(kind, fields):
    batch = make_batch()
    outputs = make(kind, scores=False, **fields)(**batch)
    words = batch["attention_mask"].bool()
    assert torch.equal(outputs.predictions[words], outputs.logits.argmax(2)[words])
    assert (outputs.predictions[~words] == -100).all()


@torch.no_grad()
def test_where_all_is_legal_and_scores_are_zero_the_loss_is_a_sum_of_cross_entropies():
    batch = make_batch(labels=True)
    outputs = make(scores=False, tag_scheme="none")(**batch)
    entropy = torch.nn.functional.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
    torch.testing.assert_close(outputs.loss, entropy.sum(1).mean())


# Oracle: the layer by itself, on the emissions


@pytest.mark.parametrize("family", [*FAMILIES, "any bert"])
def test_loss_tags_and_marginals_are_those_of_the_layer(family):
    model, batch = make(family), make_batch(labels=True)
    outputs = model(**batch, output_marginals=True)
    words = batch["labels"] != -100
    layer = MaskedCRF(LABELS)
    layer.load_state_dict(model.crf.state_dict())
    wanted = -layer.log_likelihood(outputs.logits, batch["labels"], words).mean()  # every row has words
    torch.testing.assert_close(outputs.loss, wanted)
    assert torch.equal(outputs.predictions, layer.decode(outputs.logits, words))
    torch.testing.assert_close(outputs.marginals, layer.marginals(outputs.logits, words))
    for row, chosen in zip(outputs.predictions, words, strict=True):
        assert count_breaks([LABELS[tag] for tag in row[chosen]], "IOB2") == 0
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.crf.parameters())


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES", "BILOU", "BMES", "IOB1", "IOE1", "IOE2"])
@torch.no_grad()
def test_every_scheme_is_found_and_obeyed(scheme):
    labels = labels_of(scheme)
    model = make("any bert", labels, tag_scheme=scheme if scheme in ("IOB1", "IOE1", "IOE2") else "auto")
    assert model.crf.tag_scheme == scheme
    for row in model(**make_batch(8, 12, pad=0)).predictions:
        assert count_breaks([labels[tag] for tag in row], scheme) == 0


@torch.no_grad()
def test_words_come_from_labels_then_from_word_mask():
    model, batch = make(), make_batch(labels=True)
    labels = batch.pop("labels")
    words = torch.zeros_like(labels, dtype=torch.bool)
    words[:, ::2] = True
    for given, wanted in (
        ({"labels": labels, "word_mask": words}, labels != -100),
        ({"word_mask": words}, words),
        ({"word_mask": words.long()}, words),
    ):
        assert torch.equal(model(**batch, **given).predictions != -100, wanted)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_where_nothing_says_which_tokens_are_words_there_are_no_tags(kind):
    model, batch = make(kind), make_batch()
    dense = stock_logits(make_dense(), batch)
    del batch["word_mask"]
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        with pytest.raises(ValueError, match="`word_mask`, or `labels` of any tag, must mark"):
            model(**inputs)
    model.train()
    torch.testing.assert_close(model(**batch).logits, dense)  # no tags, no need of words
    with pytest.raises(ValueError, match="`word_mask`, or `labels` of any tag, must mark"):
        model(**batch, output_marginals=True)


# Padding and odd shapes


@pytest.mark.parametrize("family", ["bert", "any bert", "deberta", "distilbert"])
@torch.no_grad()
def test_a_rows_tags_and_loss_do_not_depend_on_padding_or_on_other_rows(family):
    model, batch = make(family), make_batch(3, 9, pad=3, labels=True)
    alone = {name: value[-1:, :6] for name, value in batch.items()}
    together, single = model(**batch), model(**alone)
    torch.testing.assert_close(together.logits[-1:, :6], single.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(together.predictions[-1:, :6], single.predictions)
    losses = [model(**{name: value[row : row + 1] for name, value in batch.items()}).loss for row in range(3)]
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    model, batch = make(), make_batch(2, 8, pad=0, labels=True)
    padded = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in batch.items()}
    padded["labels"][:, :3] = -100
    padded["position_ids"] = torch.nn.functional.pad(torch.arange(8), (3, 0))[None]
    right, left = model(**batch), model(**padded)
    torch.testing.assert_close(left.loss, right.loss)
    assert torch.equal(left.predictions[:, 3:], right.predictions)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_words_count_for_nothing(kind):
    model, batch = make(kind), make_batch(labels=True)
    with_empty = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    with_empty["labels"][-1] = -100
    torch.testing.assert_close(model(**with_empty).loss, model(**batch).loss)
    batch["labels"][:] = -100
    outputs = model.train()(**batch)
    outputs.loss.backward()
    assert outputs.loss == 0
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_no_tags_and_tuples_are_those_of_transformers(kind):
    model, batch = make(kind), make_batch(labels=True)
    assert model.train()(**batch).predictions is None
    loss, logits, predictions = model.eval()(**batch, return_dict=False)
    model.set_attn_implementation("eager")  # the kernels return no attentions
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert torch.equal(outputs.predictions, predictions)
    torch.testing.assert_close(outputs.loss, loss)
    torch.testing.assert_close(outputs.logits, logits)
    assert len(outputs.hidden_states) == 2
    assert len(outputs.attentions) == 1


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_recursion_is_in_float32_whatever_the_model_is_in(dtype):
    model, batch = make().to(dtype), make_batch(2, 60, pad=0, labels=True)
    outputs = model(**batch)
    layer = copy.deepcopy(model.crf).float()
    wanted = -layer.log_likelihood(outputs.logits.float(), batch["labels"], batch["labels"] != -100).mean()
    assert outputs.logits.dtype == dtype
    torch.testing.assert_close(outputs.loss, wanted)
    outputs.loss.backward()
    assert model.crf.transitions.grad.isfinite().all()


def test_autocast_stops_at_the_crf():
    model, batch = make(), make_batch(2, 60, pad=0, labels=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
    words = batch["labels"] != -100
    assert outputs.logits.dtype == torch.bfloat16
    wanted = -model.crf.log_likelihood(outputs.logits.float(), batch["labels"], words).mean()
    torch.testing.assert_close(outputs.loss, wanted)
    assert torch.equal(outputs.predictions, model.crf.decode(outputs.logits.float(), words))


# Policies


def illegal_batch():
    batch = make_batch(labels=True)
    batch["labels"][1, 1:4] = torch.tensor([0, 4, 4])  # "O", "I-B-I-O"
    return batch


def test_policies_about_illegal_labels():
    batch = illegal_batch()
    kept = {name: value[[0, 2]] for name, value in batch.items()}
    repaired = {name: value.clone() for name, value in batch.items()}
    repaired["labels"][1, 2] = 3
    with pytest.raises(ValueError, match="row 1 of the batch is .*O I-B-I-O I-B-I-O.*Correct the data"):
        make().train()(**batch)
    torch.testing.assert_close(make(illegal_labels="ignore").train()(**batch).loss, make()(**kept).loss)
    torch.testing.assert_close(make(illegal_labels="repair").train()(**batch).loss, make()(**repaired).loss)
    soft = make(illegal_labels="soft", illegal_score=-1000).train()(**batch).loss
    assert 300 < soft < 400  # one illegal move in one of three rows
    for policy in ("ignore", "repair", "soft"):
        model = make(illegal_labels=policy).train()
        model(**batch).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), policy


def test_masks_in_decoding_alone_take_any_labels_with_a_warning(monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_masked_crf.logger, "warning_once", warned.append)
    model = make(mask_transitions="decoding").train()
    assert model(**make_batch(labels=True)).loss.isfinite()
    assert not warned
    assert model(**illegal_batch()).loss.isfinite()
    assert "Some labels break the tag scheme IOB2" in warned[0]


def test_evaluation_leaves_illegal_rows_out_with_a_warning(monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_masked_crf.logger, "warning_once", warned.append)
    batch = illegal_batch()
    kept = {name: value[[0, 2]] for name, value in batch.items()}
    model = make()
    wanted = model(**kept).loss
    assert not warned
    torch.testing.assert_close(model(**batch).loss, wanted)
    assert "IOB2 are left out of the evaluation loss" in warned[0]


# Saving and loading


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "any bert"])
def test_saved_models_load_through_the_auto_class(family, tmp_path):
    model, batch = make(family, illegal_labels="repair", mask_transitions="decoding"), make_batch(labels=True)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    assert (loaded.crf.illegal_labels, loaded.crf.mask_transitions) == ("repair", "decoding")
    wanted, got = model(**batch, output_marginals=True), loaded(**batch, output_marginals=True)
    for name in ("loss", "logits", "predictions", "marginals"):
        assert torch.equal(wanted[name], got[name]), name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type


@torch.no_grad()
def test_the_masks_survive_building_without_values(tmp_path):
    with torch.device("meta"):
        model = BertCrfForTokenClassification(BertCrfConfig.from_dense(make_config("bert")))
    model.to_empty(device="cpu").init_weights()
    assert torch.equal(model.crf.legal, make().crf.legal)
    assert (model.crf.transitions == 0).all()


@torch.no_grad()
def test_a_checkpoint_of_a_stock_bert_loads_directly(tmp_path):
    """A pre-trained encoder, or a tagger, becomes a tagger with a CRF whose scores are zero."""
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "encoder")
    dense = make_dense()
    dense.save_pretrained(tmp_path / "tagger")
    batch = make_batch()
    for name, fields in (("encoder", names(LABELS)), ("tagger", {})):
        with pytest.raises(ValueError, match="must hold all weights .* not so for .*crf.end"):
            BertCrfForTokenClassification.from_pretrained(tmp_path / name, **fields)
        options = {"allow_missing": True, "allow_unexpected": True}  # a new head, no pooler
        model = BertCrfForTokenClassification.from_pretrained(tmp_path / name, **options, **fields)
        assert model.config.model_type == "bert_crf"
        assert model.crf.tag_scheme == "IOB2"
        assert (model.crf.transitions == 0).all()
    assert torch.equal(model(**batch).logits, stock_logits(dense, batch))
    with pytest.raises(ValueError, match="`model_type` of a CrfConfig must be 'crf', got 'bert'"):
        CrfForTokenClassification.from_pretrained(tmp_path / "tagger")


@torch.no_grad()
def test_copies_half_precision_and_new_words():
    model, batch = make("any bert"), make_batch()
    wanted = model(**batch).predictions
    assert torch.equal(copy.deepcopy(model)(**batch).predictions, wanted)
    assert model.half()(**batch).predictions.shape == wanted.shape
    model.float().resize_token_embeddings(70)
    assert model.config.tagger.vocab_size == 70
    assert model(torch.full((1, 3), 69), word_mask=torch.ones(1, 3)).predictions.shape == (1, 3)


@pytest.mark.process
def test_compiled_models_give_the_same_and_learn():
    model, batch = make("any bert"), make_batch(labels=True)
    compiled = torch.compile(model, backend="eager")
    wanted, got = model(**batch, output_marginals=True), compiled(**batch, output_marginals=True)
    for name in ("loss", "logits", "predictions", "marginals"):
        torch.testing.assert_close(got[name], wanted[name])
    inputs = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(got.loss, inputs), torch.autograd.grad(wanted.loss, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


@torch.no_grad()
def test_from_dense_finds_the_class_by_the_model():
    for family, head in (("bert", BertCrfForTokenClassification), ("roberta", CrfForTokenClassification)):
        dense, batch = make_dense(family), make_batch()
        model = from_dense(dense, mask_transitions="decoding")
        assert type(model) is head
        assert model.crf.mask_transitions == "decoding"
        assert torch.equal(model(**batch).logits, stock_logits(dense, batch))
        with pytest.raises(ValueError, match="is one with a CRF. It has one already"):
            from_dense(model)
    with pytest.raises(ValueError, match="`model` must be a token classifier, got BertModel"):
        from_dense(BertModel(BertConfig(**SIZES, **names(LABELS))))


def test_from_dense_copies():
    dense = make_dense()
    model = BertCrfForTokenClassification.from_dense(dense)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert dense.classifier.weight.abs().sum() > 0
    assert not model.training
    assert BertCrfForTokenClassification.from_dense(dense.train()).training
    assert CrfForTokenClassification.from_dense(dense.half()).dtype == torch.float16


# Refusals


def test_what_is_no_tagger_is_refused():
    bert = BertConfig(**SIZES, **names(LABELS))
    for head in (BertCrfForTokenClassification, CrfForTokenClassification):
        for model in (BertForSequenceClassification(bert), BertModel(bert)):
            with pytest.raises(ValueError, match="`model` must be a token classifier, got Bert"):
                head.from_dense(model)
    with pytest.raises(ValueError, match="`model` must be a BERT, got 'roberta'. Use `CrfForTokenClassification`"):
        BertCrfForTokenClassification.from_dense(make_dense("roberta"))
    with pytest.raises(ValueError, match="`model` must have no CRF yet, got BertCrfForTokenClassification"):
        CrfForTokenClassification.from_dense(make())
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_config(make().config)


@pytest.mark.parametrize("config", [BertCrfConfig, CrfConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tag_scheme": "BIOUS"}, "`tag_scheme` must be one of auto, IOB2"),
        ({"mask_transitions": "always"}, "`mask_transitions` must be one of training, decoding, off"),
        ({"illegal_labels": "drop"}, "`illegal_labels` must be one of error, ignore, repair, soft"),
        ({"illegal_score": 3.0}, "`illegal_score` must be in"),
        ({"illegal_score": float("nan")}, "`illegal_score` must be in"),
        ({"tag_scheme": 3}, "tag_scheme"),
    ],
)
def test_options_that_do_not_exist(config, fields, message):
    with pytest.raises(Exception, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        (["LABEL_0", "LABEL_1"], {}, "`id2label` must name the tags"),
        (["O", "B-X", "PER"], {}, "PER"),
        (["O", "B-X", "I-X"], {"tag_scheme": "IOBES"}, "let every tag lead to the end"),
        (["O", "B-X", "E-X"], {"tag_scheme": "IOB2"}, "must hold tags of the scheme IOB2"),
    ],
)
def test_labels_that_do_not_fit(labels, fields, message):
    with pytest.raises(ValueError, match=message):
        make("any bert", labels, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_masks_of_a_batch_are_checked(kind):
    model, batch = make(kind), make_batch(labels=True)
    wrong = batch | {"labels": batch["labels"].clone().fill_(5)}
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 5\) or -100, got 5"):
        model(**wrong)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(3, 9\)"):
        model(**batch | {"labels": batch["labels"][:, 1:]})
    with pytest.raises(ValueError, match=r"`word_mask` must have the shape \(3, 9\)"):
        model(batch["input_ids"], word_mask=torch.ones(3, 8))


# Gradients


def test_gradients_in_float64():
    model = make(labels=["O", "B-X", "I-X"]).double()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 1, 2, 0]])}

    def loss(transitions, start, end, weight):
        values = {"crf.transitions": transitions, "crf.start": start, "crf.end": end, "classifier.weight": weight}
        return torch.func.functional_call(model, values, kwargs=batch).loss

    inputs = (model.crf.transitions, model.crf.start, model.crf.end, model.classifier.weight)
    assert torch.autograd.gradcheck(loss, [value.detach().clone().requires_grad_() for value in inputs])


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()(**make_batch(labels=True))
