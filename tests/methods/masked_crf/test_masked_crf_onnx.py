"""An exported tagger: emissions of ONNX Runtime and tags of numpy are those of torch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from shutil import copy

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_crf import labels_of, make, make_dense

from hf_moebert.methods.masked_crf.modeling_decoder import load_decoder
from hf_moebert.methods.masked_crf.modeling_export import export_crf


pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]  # warnings of the exporter
KINDS = {"bert": {}, "distilbert": {"mask_transitions": "off"}}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A model and the folder of its export."""
    folder = tmp_path_factory.mktemp("exported")
    model = make(request.param, labels_of("IOBES"), **KINDS[request.param]).train()
    export_crf(model, folder)
    assert model.training
    return model.eval(), folder


@torch.no_grad()
def test_fifty_batches_are_tagged_as_in_torch(exported):
    model, folder = exported
    session, decode = onnxruntime.InferenceSession(folder / "model.onnx"), load_decoder(folder)
    generator = torch.Generator().manual_seed(0)
    for number in range(50):
        rows, length = 1 + number % 4, int(torch.randint(1, 60, (), generator=generator))
        ids = torch.randint(5, 60, (rows, length), generator=generator)
        mask = torch.rand(rows, length, generator=generator) < 0.8
        mask[-1] &= number % 3 > 0  # a row of padding alone
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        (emissions,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        wanted = model(**inputs, word_mask=mask)
        np.testing.assert_allclose(emissions, wanted.logits, atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(decode(emissions, mask.numpy()), wanted.predictions)


def test_the_decoder_is_the_layer_on_any_emissions(exported):
    model, folder = exported
    decode, tags = load_decoder(folder), len(model.crf.labels)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1e3, 1e30):
        emissions = scale * torch.randn(4, 11, tags, generator=generator)
        emissions[0, 3, 1], emissions[1, 2, 0], emissions[2, 5] = torch.inf, -torch.inf, torch.nan
        mask = torch.rand(4, 11, generator=generator) < 0.7
        np.testing.assert_array_equal(decode(emissions.numpy(), mask.numpy()), model.crf.decode(emissions, mask))
    for shape in ((0, 5), (2, 0), (2, 5)):
        assert (decode(np.zeros((*shape, tags), np.float32), np.zeros(shape, bool)) == -100).all()
        assert decode(np.zeros((*shape, tags), np.float32), np.zeros(shape, bool)).shape == shape


def test_the_folder_explains_itself(exported):
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == model.crf.labels
    scores = load_file(folder / "crf.safetensors")
    masked = model.config.mask_transitions != "off"
    assert np.isneginf(scores["transitions"]).any() == masked
    assert np.isneginf(scores["start"]).any() == masked
    legal = model.crf.legal.numpy() if masked else np.ones_like(model.crf.legal.numpy())
    np.testing.assert_array_equal(scores["transitions"][legal], model.crf.transitions.detach().numpy()[legal])


SERVE = """
import sys
import numpy as np
from served.modeling_decoder import load_decoder
tags = load_decoder(sys.argv[1])(np.ones((1, 3, 9), np.float32), np.ones((1, 3), bool))
print(tags.shape, "torch" in sys.modules)
"""


def test_two_files_serve_without_torch(exported, tmp_path):
    source = Path(importlib.util.find_spec("hf_moebert.methods.masked_crf").origin).parent
    (tmp_path / "served").mkdir()
    for name in ("functional_numpy.py", "modeling_decoder.py"):
        copy(source / name, tmp_path / "served")
    command = [sys.executable, "-c", SERVE, str(exported[1])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(1, 3) False"


def test_damaged_scores_are_refused(exported, tmp_path):
    for name in ("config.json", "crf.safetensors"):
        copy(exported[1] / name, tmp_path)
    content = (tmp_path / "crf.safetensors").read_bytes()
    (tmp_path / "crf.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"crf.safetensors' must have the SHA-256 .* it is damaged. Export"):
        load_decoder(tmp_path)
    (tmp_path / "crf.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"crf.safetensors' must be a complete file: .* Export the model again"):
        load_decoder(tmp_path)


def test_what_does_not_fit_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="must hold crf.safetensors, got"):
        load_decoder(tmp_path)
    with pytest.raises(ValueError, match="`model` must be a tagger with a CRF, got BertForTokenClassification"):
        export_crf(make_dense(), tmp_path)
    decode = load_decoder(exported[1])
    with pytest.raises(ValueError, match=r"`emissions` must have the shape \(batch, seq, 9\), got \(1, 3, 4\)"):
        decode(np.zeros((1, 3, 4)), np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"`mask` must have the shape \(1, 3\)"):
        decode(np.zeros((1, 3, 9)), np.ones((1, 4)))
    copy(exported[1] / "config.json", tmp_path)
    save_file({"transitions": np.zeros((2, 2), np.float32)}, tmp_path / "crf.safetensors")
    with pytest.raises(ValueError, match="must hold scores of the shapes"):
        load_decoder(tmp_path)
