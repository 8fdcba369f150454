"""Language models cut out of larger ones, and labelled texts mixed into their text."""

import copy
import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_text import LabelledText, LabelledTextArguments
from language_task import train_tokenizer
from slice_language_model import slice_model, slice_tokenizer
from tiny_language import make_task
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_moebert.measuring.scores import paired_bootstrap


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SENTENCES = "".join(f"The cat number {n} saw {n * n} mice.\n" for n in range(200))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_blocks_of_text_and_of_labelled_texts_are_mixed(tmp_path, share):
    task = make_task(tmp_path, task_share=share)
    text = task.cut(Path(task.arguments.train_file).read_text())
    labelled = task.cut(task.labelled.as_text())
    rows = task.train_dataset["input_ids"]
    of_text = round((1 - share) * len(rows))
    assert abs(len(rows) - min(len(text) / (1 - share), len(labelled) / share)) <= 1  # no more could be used
    assert rows[:of_text] == text["input_ids"][:of_text]
    assert rows[of_text:] == labelled["input_ids"][: len(rows) - of_text]
    written = task.tokenizer.decode([token for row in labelled["input_ids"] for token in row])
    assert task.labelled.as_text().startswith(written)
    for line in written.splitlines()[:-1]:
        said, word = line.split(" => ")
        assert word == ("positive" if "good" in said else "negative")


def test_without_labelled_texts_there_is_the_perplexity_only(tmp_path):
    task = make_task(tmp_path, labelled=False)
    assert list(task.metrics) == ["perplexity"]
    assert len(task.predict(task.new_model().eval())) == len(task.references) == 5
    text = task.cut(Path(task.arguments.train_file).read_text())
    assert task.train_dataset["input_ids"] == text["input_ids"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_predictions_are_losses_of_blocks_then_answers(tmp_path, kind):
    task = make_task(tmp_path, kind, max_task_examples=24)
    torch.manual_seed(0)
    model = task.new_model().eval()
    predictions = np.array(task.predict(model))
    assert task.references.tolist() == [0] * 5 + [1] * 24

    losses = [
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
        for row in task.validation
    ]
    assert predictions[:5] == pytest.approx(losses, rel=1e-5)
    scores = {name: score(predictions, task.references) for name, score in task.metrics.items()}
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)

    pad, right = task.tokenizer.eos_token_id, []
    space = "" if kind == "t5" else " "
    first = [task.tokenizer(space + word)["input_ids"][0] for word in ("negative", "positive")]
    rows = [json.loads(line) for line in Path(task.arguments.task_validation_file).read_text().splitlines()[:24]]
    for row in rows:  # one by one, padded on the right
        ids = task.tokenizer(row["text"] + " =>")["input_ids"]
        more = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
        padded = torch.tensor([ids + [pad] * 3])
        mask = torch.tensor([[1] * len(ids) + [0] * 3])
        with torch.no_grad():
            logits = model(input_ids=padded, attention_mask=mask, **more).logits[0, -1 if more else len(ids) - 1]
        right.append(float(logits[first].argmax() == row["label"]))
    assert predictions[5:].tolist() == right
    assert scores["accuracy"] == np.mean(right)


def test_the_bootstrap_resamples_both_kinds(tmp_path):
    task = make_task(tmp_path)
    rng, count = np.random.default_rng(0), len(task.references)
    one, other = (np.where(task.references, rng.random(count) < p, rng.random(count) + 2) for p in (0.9, 0.4))
    gain = paired_bootstrap(task.metrics["accuracy"], one, other, task.references)
    assert gain.value == pytest.approx(one[5:].mean() - other[5:].mean())
    assert 0 < gain.low < gain.value < gain.high < 1
    assert math.exp(2) < task.metrics["perplexity"](one, task.references) < math.exp(3)


def test_padding_changes_no_loss_of_an_encoder_decoder(tmp_path):
    task = make_task(tmp_path, "t5")
    model = task.new_model().eval()
    row = task.train_dataset[-1]
    tokens, words = sum(row["attention_mask"]), sum(label != -100 for label in row["labels"])
    assert tokens < len(row["input_ids"]) == len(row["labels"]) == 24
    assert row["labels"][words - 1] == task.tokenizer.eos_token_id
    batch = task.collator([task.train_dataset[0], row])
    assert batch["attention_mask"].sum().item() == 24 + tokens
    padded = model(**task.collator([row])).loss
    alone = model(
        input_ids=torch.tensor([row["input_ids"][:tokens]]), labels=torch.tensor([row["labels"][:words]])
    ).loss
    torch.testing.assert_close(padded, alone)
    said = task.tokenizer.decode(row["input_ids"][:tokens])
    word = task.tokenizer.decode(row["labels"][: words - 1])
    assert (said.endswith(" =>"), word) == (True, "positive" if "good" in said else "negative")


@pytest.mark.process
def test_a_small_llama_learns_its_text_and_its_task(tmp_path):
    task = make_task(tmp_path)
    set_seed(0)
    model = task.new_model()
    assert model.config.intermediate_size == 64  # the multiple of 64 next to 8/3 of 32
    before = np.array(task.predict(model.eval()))
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=300,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        warmup_steps=20,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, args, train_dataset=task.train_dataset, data_collator=task.collator).train()
    after = np.array(task.predict(model.eval()))
    perplexity, accuracy = task.metrics["perplexity"], task.metrics["accuracy"]
    assert perplexity(after, task.references) < perplexity(before, task.references) / 10
    assert accuracy(after, task.references) > 0.9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"task_share": 1.0}, r"`task_share` must be in \(0, 1\), got 1.0"),
        ({"label_words": ["good", "good enough"]}, "differ in their first token, got"),
        ({"label_words": ["negative"]}, "`label_words` must name every label"),
    ],
)
def test_labelled_texts_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        make_task(tmp_path, **settings)


def test_columns_of_labelled_texts_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"sentence": "a", "label": 0}\n' * 4)
    with pytest.raises(ValueError, match="must have the columns text and label, got sentence, label"):
        LabelledText(LabelledTextArguments(task_train_file=str(file), task_validation_file=str(file)))


def make_whole(kind, *, tied):
    tokenizer = train_tokenizer(SENTENCES, 400)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    extra = {} if kind == "llama" else {"num_key_value_heads": 1}
    extra |= {"head_dim": 16} if kind == "qwen3" else {}
    config = config_class(vocab_size=len(tokenizer) + 3, tie_word_embeddings=tied, **SIZES, **extra)
    torch.manual_seed(0)
    return model_class(config).eval(), tokenizer


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)])
def test_a_slice_computes_what_the_first_layers_do(tmp_path, kind, tied):
    model, tokenizer = make_whole(kind, tied=tied)
    small_tokenizer, rows = slice_tokenizer(tokenizer, 300)
    small = slice_model(model, rows, 2)
    small.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert small.config.num_hidden_layers == 2
    assert len(getattr(small.config, "layer_types", None) or [0] * 2) == 2
    assert (small.config.vocab_size, small.config.eos_token_id) == (300, 299)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied

    names = tokenizer.convert_ids_to_tokens(rows)
    assert small_tokenizer.convert_ids_to_tokens(range(300)) == names
    ids = small_tokenizer(SENTENCES[:300], return_tensors="pt")["input_ids"]  # (1, tokens)
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:2]
    with torch.no_grad():
        expected = shallow(input_ids=torch.tensor(rows)[ids], use_cache=False).logits[..., rows]
        torch.testing.assert_close(small(input_ids=ids).logits, expected)


def test_a_slice_of_everything_is_the_whole(tmp_path):
    model, tokenizer = make_whole("llama", tied=False)
    small_tokenizer, rows = slice_tokenizer(tokenizer, len(tokenizer))
    assert set(rows) == set(range(len(tokenizer)))
    ids = tokenizer(SENTENCES)["input_ids"]
    assert [rows[index] for index in small_tokenizer(SENTENCES)["input_ids"]] == ids
    small = slice_model(model, rows, 3)
    with torch.no_grad():
        inputs = torch.tensor([small_tokenizer(SENTENCES[:200])["input_ids"]])
        expected = model(input_ids=torch.tensor(rows)[inputs]).logits[..., rows]
        torch.testing.assert_close(small(input_ids=inputs).logits, expected)


@pytest.mark.parametrize("size", [257, 300])
def test_any_text_is_read_and_written_by_a_part_of_the_byte_pairs(size):
    _, tokenizer = make_whole("llama", tied=True)
    small, rows = slice_tokenizer(tokenizer, size)
    assert len(small) == len(rows) == size
    assert small.eos_token_id == size - 1
    rng = np.random.default_rng(0)
    apart = unicodedata.normalize("NFD", "na\u00efve")
    odd = "".join(chr(n) for n in rng.integers(1, 0xD7FF, 500))
    for text in (
        SENTENCES,
        "  two  spaces\n\t\r\n tail ",
        "naïve ☃ 🙂👍🏽 한국어",
        apart,
        odd,
    ):
        ids = small(text)["input_ids"]
        assert small.decode(ids) == text
        assert max(ids) < size - 1  # the end of text is no text
    assert small("a" + small.eos_token)["input_ids"][-1] == size - 1


@pytest.mark.process
def test_slice_language_model(tmp_path, run_study):
    output = run_study("slice_language_model", "--smoke", "--output_dir", tmp_path)
    assert "300 tokens" in output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert (len(tokenizer), model.config.num_hidden_layers) == (300, 2)
    assert tokenizer.decode(tokenizer(SENTENCES)["input_ids"]) == SENTENCES
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)


def test_what_cannot_be_cut_is_refused():
    model, tokenizer = make_whole("llama", tied=True)
    with pytest.raises(ValueError, match=r"`vocab_size` must be in \[257, 400\], got 256"):
        slice_tokenizer(tokenizer, 256)
    with pytest.raises(ValueError, match=r"`vocab_size` must be in \[257, 400\], got 401"):
        slice_tokenizer(tokenizer, 401)
    with pytest.raises(ValueError, match=r"`num_layers` must be in \[1, 3\], got 4"):
        slice_model(model, list(range(300)), 4)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1})))
    with pytest.raises(ValueError, match="must use byte pairs on the level of bytes, got WordLevel"):
        slice_tokenizer(words, 300)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=16, n_embd=8, n_layer=3, n_head=2))
    with pytest.raises(ValueError, match="must have its layers at model.layers, got GPT2LMHeadModel"):
        slice_model(gpt2, list(range(300)), 2)
