"""Students and teachers without a head, and with one score: what they learn from texts without labels."""

import json

import pytest
import torch
from datasets import Dataset
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_similarity
from test_distillation_training import (
    FOUR_STEPS,
    LENGTHS,
    PLAIN_SGD,
    VOCAB,
    arguments,
    assert_equal_states,
    bert,
    collate,
    distil,
    gradients,
    rows,
    training_logs,
)
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, BertTokenizer, T5Config, T5Model

from hf_moebert.architectures.functional_pooling import POOLINGS, pool
from hf_moebert.architectures.pooling import read_embedding_form
from hf_moebert.methods.distillation import DistillationConfig, DistillationTrainer
from hf_moebert.methods.distillation.functional import hidden_state_loss
from hf_moebert.methods.distillation.functional_embeddings import embedding_loss, margin_loss, similarity_loss


MEAN = DistillationConfig(pooling="mean")
ALONE = DistillationConfig(pooling="mean", similarity_weight=0.0)  # the loss of a text is its own
GROUPS = (0, 0, 1, 1, 1, 2, 3, 3)


def embedder(seed=0, **config):
    return bert(seed, BertModel, **config)


def texts(**columns):
    return [
        row | {name: torch.tensor(values[i]) for name, values in columns.items()} for i, row in enumerate(rows(None))
    ]


def pair(*shape):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]


# Equations


def test_equal_embeddings_are_at_distance_zero():
    vectors = torch.randn(5, 7)
    for distance in ("cosine", "squared"):
        assert embedding_loss(vectors, vectors, distance).item() == 0
    for temperature in (None, 0.05):
        assert similarity_loss(vectors, vectors, temperature).item() == 0
    assert margin_loss(vectors[:, 0], vectors[:, 0], torch.zeros(5)) == (0, 10)


def test_losses_agree_with_trusted_libraries():
    student, teacher = (vectors.detach() for vectors in pair(5, 7))
    ours, theirs = cosine_similarity(student), cosine_similarity(teacher)
    cosines = [cosine_similarity(student[i : i + 1], teacher[i : i + 1]).item() for i in range(5)]
    assert embedding_loss(student, teacher).item() == pytest.approx(1 - sum(cosines) / 5)
    others = ~torch.eye(5, dtype=torch.bool).numpy()
    expected = ((ours - theirs)[others] ** 2).mean()
    assert similarity_loss(student, teacher).item() == pytest.approx(expected)
    rows_of = [(softmax(theirs[i][others[i]] / 0.1), softmax(ours[i][others[i]] / 0.1)) for i in range(5)]
    expected = sum(entropy(q, p) for q, p in rows_of) / 5
    assert similarity_loss(student, teacher, 0.1).item() == pytest.approx(expected)


def test_margins_are_those_of_the_pairs_of_a_group():
    student, teacher, groups = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0.0, 1.0, 4.0, 0.0]), [7, 7, 7, 8]
    # by hand: margins -2, -1, 1 against -1, -4, -3
    assert margin_loss(student, teacher, torch.tensor(groups)) == (pytest.approx((1 + 9 + 16) / 3), 3)
    assert margin_loss(student, teacher + 5, torch.arange(4)) == (0, 0)


@pytest.mark.parametrize(
    "loss",
    [
        embedding_loss,
        lambda s, t: embedding_loss(s, t, "squared"),
        similarity_loss,
        lambda s, t: similarity_loss(s, t, 0.5),
        lambda s, t: margin_loss(s[:, 0], t[:, 0], torch.tensor([0, 0, 1, 1]))[0],
        lambda s, t: pool(s[None] * t, torch.tensor([[1, 1, 0, 1]] * 4), "mean").square().sum(),
    ],
)
def test_gradients_in_float64(loss):
    torch.autograd.gradcheck(loss, pair(4, 3))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_has_no_part_in_an_embedding(pooling, side):
    states = [torch.randn(length, 4) for length in (3, 1, 5)]
    expected = {"mean": [s.mean(0) for s in states], "cls": [s[0] for s in states], "last": [s[-1] for s in states]}
    padded, mask = torch.full((3, 5, 4), float("nan")), torch.zeros(3, 5, dtype=torch.long)
    for row, state in enumerate(states):
        place = slice(0, len(state)) if side == "right" else slice(5 - len(state), 5)
        padded[row, place], mask[row, place] = state, 1
    torch.testing.assert_close(pool(padded, mask, pooling), torch.stack(expected[pooling]))


# Training


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_copy_has_nothing_to_learn(tmp_path, pooling):
    student = embedder()
    trainer = distil(tmp_path, student, embedder(), DistillationConfig(pooling=pooling), texts())
    trainer.train()
    (logs,) = training_logs(trainer)[:1]
    names = ["loss_task", "loss_hidden", *[f"loss_hidden_{k}" for k in range(3)], "loss_embedding", "loss_similarity"]
    assert {name: logs[name] for name in ("loss", *names)} == dict.fromkeys(("loss", *names), 0.0)


def test_the_loss_is_the_sum_of_its_terms(tmp_path):
    student, teacher, batch = embedder(), embedder(1), collate(texts())
    recipe = DistillationConfig(weight=2.0, pooling="cls", similarity_weight=3.0, similarity_temperature=0.1)
    loss = distil(tmp_path, student, teacher, recipe, texts()).compute_loss(student.train(), dict(batch))
    ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    pooled = [outputs.last_hidden_state[:, 0] for outputs in (ours, theirs)]
    expected = embedding_loss(*pooled) + 3 * similarity_loss(*pooled, 0.1)
    for states in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        expected = expected + hidden_state_loss(*states, batch["attention_mask"].bool())
    torch.testing.assert_close(loss, 2 * expected)


def test_embeddings_approach_the_teachers_and_labels_are_left_alone(tmp_path):
    student, data = embedder(num_hidden_layers=1), texts(labels=range(8))
    recipe = DistillationConfig(hidden_states=False, pooling="mean")
    trainer = distil(tmp_path, student, embedder(1, num_hidden_layers=3), recipe, data, max_steps=30)
    trainer.train()
    first, *_, last = training_logs(trainer)
    assert last["loss_embedding"] < 0.5 * first["loss_embedding"]
    assert last["loss_similarity"] < first["loss_similarity"]
    assert first["loss_task"] == 0


SCORE = {"cls": BertForSequenceClassification, "num_labels": 1}


@pytest.mark.parametrize(
    ("options", "recipe", "columns"),
    [
        ({"cls": BertModel}, ALONE, {}),
        (
            {"cls": BertModel},
            DistillationConfig(pooling="last", similarity_weight=0, embedding_distance="squared"),
            {},
        ),
        (SCORE, DistillationConfig(), {}),
        ({"cls": BertForSequenceClassification, "problem_type": "multi_label_classification"}, None, {}),
        ({"cls": BertForMaskedLM}, DistillationConfig(hidden_states=False), {}),
    ],
)
def test_one_batch_of_eight_gives_the_gradients_of_four_batches_of_two(tmp_path, options, recipe, columns):
    found = []
    for size, steps in ((8, 1), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps} | PLAIN_SGD
        found.append(
            gradients(distil(tmp_path, bert(**options), bert(1, **options), recipe, texts(**columns), **split))
        )
    assert any(gradient.any() for gradient in found[0].values())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-5)


def test_scores_of_one_query_keep_their_margins(tmp_path):
    student, teacher, data = bert(**SCORE), bert(1, **SCORE), texts(query=GROUPS)
    recipe = DistillationConfig(group_column="query", hidden_states=False)
    trainer = distil(tmp_path, student, teacher, recipe, data)
    batch = collate(data)
    loss = trainer.compute_loss(student.train(), dict(batch))
    batch.pop("query")
    ours, theirs = (model(**batch).logits.squeeze(-1) for model in (student, teacher))
    expected = (ours - theirs).square().mean() + margin_loss(ours, theirs, torch.tensor(GROUPS))[0]
    torch.testing.assert_close(loss, expected)
    trainer.train()
    assert training_logs(trainer)[0]["loss_margin"] > 0
    assert trainer.predict(data).predictions.shape == (8, 1)  # which has no use for the column


def test_a_data_set_keeps_its_groups_and_a_stream_is_learned_from(tmp_path):
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in texts()]).add_column("query", GROUPS)
    recipe, found = DistillationConfig(group_column="query"), []
    for stream in (data, data.to_iterable_dataset()):
        stream = stream.with_format("torch")
        student = bert(**SCORE)
        trainer = distil(
            tmp_path,
            student,
            bert(1, **SCORE),
            recipe,
            stream,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
        )
        trainer.train()
        found.append(student)
        assert training_logs(trainer)[0]["loss_margin"] > 0
    assert_equal_states(*found)
    trainer = distil(
        tmp_path,
        embedder(),
        embedder(1),
        MEAN,
        data.to_iterable_dataset().with_format("torch"),
        dataloader_pin_memory=False,
    )
    trainer.train()
    assert training_logs(trainer)[0]["loss_embedding"] > 0


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole, resumed = embedder(), embedder(5)
    distil(tmp_path, whole, embedder(1), MEAN, texts(), **FOUR_STEPS).train()
    distil(tmp_path, resumed, embedder(1), MEAN, texts(), **FOUR_STEPS).train(str(tmp_path / "checkpoint-2"))
    assert_equal_states(whole, resumed)


# A projection between hidden sizes


PROJECTED = DistillationConfig(pooling="mean", projection=True)


def test_a_projection_of_equal_sizes_begins_as_the_identity(tmp_path):
    trainer = distil(tmp_path, embedder(), embedder(), PROJECTED, texts())
    trainer.train()
    assert training_logs(trainer)[0]["loss"] == 0
    assert torch.equal(trainer._projection.weight, torch.eye(8))


@pytest.mark.parametrize("size", [4, 12])
def test_a_student_of_another_size_learns_through_a_projection(tmp_path, size):
    student, teacher, batch = embedder(hidden_size=size), embedder(1), collate(texts())
    trainer = distil(tmp_path, student, teacher, PROJECTED, texts(), max_steps=30)
    loss = trainer.compute_loss(student.train(), dict(batch))
    ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    pooled = [pool(outputs.last_hidden_state, batch["attention_mask"], "mean") for outputs in (ours, theirs)]
    weight = torch.eye(8, size)
    expected = embedding_loss(pooled[0] @ weight.T, pooled[1]) + similarity_loss(*pooled)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        expected = expected + hidden_state_loss(a @ weight.T, b, batch["attention_mask"].bool())
    torch.testing.assert_close(loss, expected)
    trainer.train()
    first, *_, last = training_logs(trainer)
    assert last["loss_hidden"] < first["loss_hidden"]
    assert not torch.equal(trainer._projection.weight, weight)
    assert not any("projection" in name for name in student.state_dict())


def test_a_projection_is_resumed_from_and_accumulates(tmp_path):
    def run(student, resume=None, **options):
        recipe = DistillationConfig(pooling="mean", projection=True, similarity_weight=0.0)
        trainer = distil(tmp_path, student, embedder(1), recipe, texts(), **options)
        trainer.train(resume)
        return trainer._projection.weight

    whole, resumed = embedder(hidden_size=4), embedder(5, hidden_size=4)
    weights = run(whole, **FOUR_STEPS), run(resumed, str(tmp_path / "checkpoint-2"), **FOUR_STEPS)
    assert_equal_states(whole, resumed)
    assert torch.equal(*weights)
    split = [{"per_device_train_batch_size": n, "gradient_accumulation_steps": 8 // n} | PLAIN_SGD for n in (8, 2)]
    torch.testing.assert_close(*(run(embedder(hidden_size=4), **options) for options in split))
    (tmp_path / "checkpoint-2/distillation_state.safetensors").unlink()
    with pytest.raises(ValueError, match="must be as it was saved to resume from it"):
        run(resumed, str(tmp_path / "checkpoint-2"), **FOUR_STEPS)


def test_a_projection_that_nothing_passes_is_refused(tmp_path):
    recipe = DistillationConfig(hidden_states=False, projection=True)
    with pytest.raises(ValueError, match="`projection` must be False when predictions alone are compared, got True"):
        distil(tmp_path, bert(), bert(1), recipe)


# The folder of the teacher


def save_form(folder, *, pooling=None, kinds=("Transformer", "Pooling"), **flags):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": 0, "type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, "3")} for kind in kinds
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text(json.dumps(flags if pooling is None else {"pooling_mode": pooling}))
    return folder


@pytest.mark.parametrize(
    ("saved", "pooling"),
    [
        ({"pooling": "mean"}, "mean"),
        ({"pooling": "lasttoken"}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_the_pooling_is_that_of_the_teachers_folder(tmp_path, saved, pooling):
    embedder(1).save_pretrained(tmp_path)
    save_form(tmp_path, **saved)
    trainer = distil(tmp_path, embedder(), BertModel.from_pretrained(tmp_path), None, texts())
    assert trainer._pooling == pooling == read_embedding_form(tmp_path).pooling


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"pooling": "max"}, r"The pooling of .* must be one of mean, cls, last over all tokens, got \['max'\]"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, r"got \['cls_token', 'mean_tokens'\]"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "without the prompt"),
        ({"kinds": ("Transformer", "Pooling", "Dense")}, "must name a Transformer .*Dense"),
        ({"kinds": ("Transformer",)}, "must name a Transformer"),
    ],
)
def test_poolings_that_are_not_known_are_refused(tmp_path, saved, message):
    with pytest.raises(ValueError, match=message):
        read_embedding_form(save_form(tmp_path, **saved))


# Refusals


@pytest.mark.parametrize(
    ("make", "recipe", "options", "message"),
    [
        (embedder, None, {}, "`pooling` must be given for a BertModel without head, one of mean, cls, last"),
        (embedder, MEAN, {"per_device_train_batch_size": 1}, "`per_device_train_batch_size` must be at least 2"),
        (lambda: embedder(hidden_size=12), MEAN, {}, "`hidden_size` must be equal.*projection=True"),
        (
            lambda: embedder(hidden_size=12),
            DistillationConfig(pooling="mean", hidden_states=False),
            {},
            "`hidden_size` must be equal",
        ),
        (
            bert,
            MEAN,
            {},
            "`model` and `teacher` must both have a head or both none, got BertForSequenceClassification",
        ),
        (embedder, DistillationConfig(pooling="mean", group_column="q"), {}, "`group_column` must be None but for"),
    ],
)
def test_models_and_recipes_that_do_not_fit_are_refused(tmp_path, make, recipe, options, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, make(), embedder(1), recipe, texts(), **options)


def test_a_model_of_two_stacks_is_refused(tmp_path):
    sizes = {"vocab_size": VOCAB, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    student, teacher = (T5Model(T5Config(**sizes)) for _ in range(2))
    with pytest.raises(ValueError, match="`model` must be an encoder if it has no head, got T5Model"):
        distil(tmp_path, student, teacher, MEAN, texts())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (list(range(8)), "must put several texts in a group, but those of 'query' all have one"),
        (["a", "a", *"bcdefg"], "must hold whole numbers"),
        (None, r"must be one of the columns \['input_ids'\], got 'query'"),
    ],
)
def test_groups_without_margins_are_refused(tmp_path, groups, message):
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in texts()])
    data = data if groups is None else data.add_column("query", groups)
    with pytest.raises(ValueError, match=f"`group_column` {message}"):
        distil(tmp_path, bert(**SCORE), bert(1, **SCORE), DistillationConfig(group_column="query"), data)


def test_groups_that_share_no_batch_are_refused(tmp_path):
    recipe, data = DistillationConfig(group_column="query"), texts(query=(0, 1, 2, 3, 0, 1, 2, 3))
    options = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match="must put two texts of a group into a batch"):
        distil(tmp_path, bert(**SCORE), bert(1, **SCORE), recipe, data, **options).train()
    with pytest.raises(ValueError, match="`group_column` must be a column of the batches"):
        distil(tmp_path, bert(**SCORE), bert(1, **SCORE), recipe, texts()).train()


def test_texts_without_a_token_are_refused(tmp_path):
    data = texts()
    trainer = distil(tmp_path, embedder(), embedder(1), MEAN, data)
    trainer.data_collator = lambda batch: (
        (full := collate(batch))
        | {"attention_mask": full["attention_mask"] * (torch.arange(len(LENGTHS)) > 1)[:, None]}
    )
    with pytest.raises(ValueError, match="must hold texts of at least one token, 2 had none"):
        trainer.train()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{i}" for i in range(VOCAB - len(special))]
    own, other = (BertTokenizer(vocab={w: i for i, w in enumerate(special + order)}) for order in (words, words[::-1]))
    embedder(1).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    teacher, options = BertModel.from_pretrained(tmp_path), {"distillation": MEAN, "train_dataset": texts()}
    DistillationTrainer(embedder(), arguments(tmp_path), teacher=teacher, processing_class=own, **options)
    with pytest.raises(
        ValueError, match="must number its tokens as the tokenizer of the teacher .* 'w0' is 39 and not 5"
    ):
        DistillationTrainer(embedder(), arguments(tmp_path), teacher=teacher, processing_class=other, **options)
