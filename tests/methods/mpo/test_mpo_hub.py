"""Compressed models and adapters go to the Hub with the host's own calls, and come back."""

import subprocess
import sys

from loopback_hub import loopback_hub  # noqa: F401
from safetensors.torch import load
from tiny_mpo import make


SHARE = """
import sys, torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForSequenceClassification
from hf_moebert import MPOConfig, compress_mpo

ids = torch.arange(3, 9).unsqueeze(0)
dense = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
dense.push_to_hub("tester/dense")
compressed = compress_mpo(dense, keep_ratio=0.5).eval()
compressed.push_to_hub("tester/small")
base = AutoModelForSequenceClassification.from_pretrained("tester/dense")
adapted = get_peft_model(base, MPOConfig(target_modules=["query"], modules_to_save=["classifier"])).eval()
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "mpo_auxiliary" in name:
            parameter.mul_(1.1)
    adapted.push_to_hub("tester/adapter")
    small = AutoModelForSequenceClassification.from_pretrained("tester/small").eval()
    assert torch.equal(small(ids).logits, compressed(ids).logits)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained("tester/adapter").eval()
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
"""


def test_shared_and_loaded_they_give_the_same_bytes(loopback_hub, tmp_path):  # noqa: F811
    make("bert").save_pretrained(tmp_path / "bert")
    done = subprocess.run(
        [sys.executable, "-c", SHARE, tmp_path / "bert"],
        env=loopback_hub.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(loopback_hub.files("tester/small")) >= {"config.json", "model.safetensors"}
    assert not any(name.endswith(".py") for name in loopback_hub.files("tester/small"))
    adapter = load(loopback_hub.files("tester/adapter")["adapter_model.safetensors"])
    largest = max(tensor.numel() for tensor in adapter.values())
    assert largest < 24 * 24  # neither a central tensor nor a matrix
