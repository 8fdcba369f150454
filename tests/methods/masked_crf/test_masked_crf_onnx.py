"""An exported tagger: emissions of ONNX Runtime, and tags and probabilities of numpy, are those of torch."""

import json
from itertools import chain
from shutil import copy

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_crf import labels_of, make, make_dense, make_tokenizer
from transformers import pipeline

from hf_moebert import export_onnx, load_onnx
from hf_moebert.inference.onnx_export import write_chain
from hf_moebert.inference.onnx_runtime import OnnxModel
from hf_moebert.runtime import TextModel, load
from hf_moebert.runtime.chains import load_chain
from hf_moebert.runtime.folders import read_manifest


pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]  # warnings of the exporter


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and the folder of its export."""
    folder = tmp_path_factory.mktemp("exported")
    model = make("bert", labels_of("IOBES")).train()
    export_onnx(model, folder, tokenizer=make_tokenizer())
    assert model.training
    return model.eval(), folder


@pytest.fixture(scope="module", params=["training", "off"])
def written(request, tmp_path_factory):
    """A model and the folder of its scores, without a graph."""
    folder = tmp_path_factory.mktemp("written")
    model = make("distilbert", labels_of("IOBES"), mask_transitions=request.param).eval()
    model.config.save_pretrained(folder)
    write_chain(model.crf, folder)
    return model, folder


@torch.no_grad()
def test_fifty_batches_are_tagged_as_in_torch(exported):
    model, found = exported[0], load_onnx(exported[1])
    generator = torch.Generator().manual_seed(0)
    for number in range(50):
        rows, length = 1 + number % 4, int(torch.randint(1, 60, (), generator=generator))
        ids = torch.randint(5, 60, (rows, length), generator=generator)
        mask = torch.rand(rows, length, generator=generator) < 0.8
        mask[-1] &= number % 3 > 0  # a row of padding alone
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "word_mask": mask, "output_marginals": True}
        wanted, got = model(**inputs), found(**inputs)
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.marginals, wanted.marginals, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.predictions, wanted.predictions)


def test_the_chain_is_the_layer_on_any_emissions(written):
    model, crf = written[0], load_chain(written[1])
    tags = len(model.crf.labels)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1e3, 1e30):
        emissions = scale * torch.randn(4, 11, tags, generator=generator)
        mask = torch.rand(4, 11, generator=generator) < 0.7
        got = crf.marginals(emissions.numpy(), mask.numpy())
        np.testing.assert_allclose(got, model.crf.marginals(emissions, mask), atol=1e-5)
        emissions[0, 3, 1], emissions[1, 2, 0], emissions[2, 5] = torch.inf, -torch.inf, torch.nan
        np.testing.assert_array_equal(crf.decode(emissions.numpy(), mask.numpy()), model.crf.decode(emissions, mask))
    for shape in ((0, 5), (2, 0), (2, 5)):
        empty, mask = np.zeros((*shape, tags), np.float32), np.zeros(shape, bool)
        assert (crf.decode(empty, mask) == -100).all()
        assert crf.decode(empty, mask).shape == shape
        assert not crf.marginals(empty, mask).any()


def test_the_pipeline_takes_it(exported):
    model, folder = exported
    texts = ["new york lon", "the yorkers and london"]
    options = {"tokenizer": make_tokenizer(), "device": "cpu", "aggregation_strategy": "simple", "ignore_labels": []}
    wanted = pipeline("masked-crf", model=model, **options)(texts)
    found = pipeline("masked-crf", model=load_onnx(folder), **options)(texts)
    for got, one in zip(chain.from_iterable(found), chain.from_iterable(wanted), strict=True):
        assert got.pop("score") == pytest.approx(one.pop("score"), abs=1e-5)
        assert got == one
    with pytest.raises(ValueError, match='`word_mask` must mark .* "token-classification" knows no CRF'):
        pipeline("token-classification", model=load_onnx(folder), tokenizer=make_tokenizer(), device="cpu")(texts)


def test_the_pipeline_of_dense_taggers_takes_a_graph_without_crf(exported):
    model, tagger = exported[0], load_onnx(exported[1])
    dense = make_dense("bert", labels_of("IOBES")).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    options = {"tokenizer": make_tokenizer(), "device": "cpu", "ignore_labels": []}
    text = "new yorkers in london"
    wanted = pipeline("token-classification", model=dense, **options)(text)
    found = pipeline("token-classification", model=OnnxModel(tagger.exported, tagger.max_length), **options)(text)
    for got, one in zip(found, wanted, strict=True):
        assert got.pop("score") == pytest.approx(one.pop("score"), abs=1e-5)
        assert got == one


@torch.no_grad()
def test_words_are_tagged_without_torch(exported):
    model, folder = exported
    answers, tokenizer = load(folder), make_tokenizer()
    texts = ["new yorkers in london and  new york .", ["the", "\x00", "yorker"], "london " * 9, "", "the lon"]
    emissions = TextModel(answers.session, folder, *read_manifest(folder, None))
    emissions.chain = None
    for text, found, plain in zip(texts, answers.tag(texts, batch_size=2), emissions.tag(texts), strict=True):
        words = [
            word if word.isprintable() else "[UNK]" for word in (text if isinstance(text, list) else text.split())
        ]
        batch = tokenizer([words], is_split_into_words=True, truncation=True, return_tensors="pt")
        places = {word: place for place, word in reversed(list(enumerate(batch.word_ids()))) if word is not None}
        mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        mask[0, list(places.values())] = True
        outputs = model(**batch, word_mask=mask, output_marginals=True)
        assert len(found) == len(plain) == len(places)
        for word, got, alone in zip(sorted(places), found, plain, strict=True):
            tag = int(outputs.predictions[0, places[word]])
            assert got["tag"] == model.config.id2label[tag]
            assert got["score"] == pytest.approx(float(outputs.marginals[0, places[word], tag]), abs=1e-5)
            shares = outputs.logits[0, places[word]].softmax(-1)
            assert alone["tag"] == model.config.id2label[int(shares.argmax())]
            assert alone["score"] == pytest.approx(float(shares.max()), abs=1e-5)
            whole = text if isinstance(text, str) else " ".join(text)
            assert whole[got["start"] : got["end"]] == got["word"]
    assert answers.tag([]) == []


def test_the_folder_explains_itself(written):
    model, folder = written
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == model.crf.labels
    scores = load_file(folder / "crf.safetensors")
    masked = model.config.mask_transitions != "off"
    assert np.isneginf(scores["transitions"]).any() == masked
    assert np.isneginf(scores["start"]).any() == masked
    legal = model.crf.legal.numpy() if masked else np.ones_like(model.crf.legal.numpy())
    np.testing.assert_array_equal(scores["transitions"][legal], model.crf.transitions.detach().numpy()[legal])
    assert load_chain(folder).scheme == model.crf.tag_scheme


def test_damaged_scores_are_refused(written, tmp_path):
    for name in ("config.json", "crf.safetensors"):
        copy(written[1] / name, tmp_path)
    content = (tmp_path / "crf.safetensors").read_bytes()
    (tmp_path / "crf.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"crf.safetensors' must have the SHA-256 .* it is damaged. Export"):
        load_chain(tmp_path)
    (tmp_path / "crf.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"crf.safetensors' must be a complete file: .* Export the model again"):
        load_chain(tmp_path)


def test_what_does_not_fit_is_refused(written, tmp_path):
    with pytest.raises(ValueError, match="must hold crf.safetensors, got"):
        load_chain(tmp_path)
    crf = load_chain(written[1])
    for call in (crf.decode, crf.marginals):
        with pytest.raises(ValueError, match=r"`emissions` must have the shape \(batch, seq, 9\), got \(1, 3, 4\)"):
            call(np.zeros((1, 3, 4)), np.ones((1, 3)))
        with pytest.raises(ValueError, match=r"`mask` must have the shape \(1, 3\)"):
            call(np.zeros((1, 3, 9)), np.ones((1, 4)))
    copy(written[1] / "config.json", tmp_path)
    save_file({"transitions": np.zeros((2, 2), np.float32)}, tmp_path / "crf.safetensors")
    with pytest.raises(ValueError, match="must hold scores of the shapes"):
        load_chain(tmp_path)
