"""A new process loads compressed models and adapters, and shares them on the Hub by the usual calls."""

import mpo_adapters
import new_process
import pytest
from loopback_hub import loopback_hub  # noqa: F401
from peft import get_peft_model
from safetensors.torch import load, save_file
from tiny_mpo import IDS, logits, make

from hf_moebert import MPOConfig, compress_mpo


LOAD_AND_SHARE = """
import sys, torch
import hf_moebert
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

folder = sys.argv[1]
seen = load_file(f"{folder}/seen.safetensors")
with torch.no_grad():
    small = AutoModelForSeq2SeqLM.from_pretrained(f"{folder}/small").eval()
    adapted = AutoModelForSequenceClassification.from_pretrained(f"{folder}/adapter").eval()
    for name, model in (("small", small), ("adapted", adapted)):
        inputs = {key.partition("/")[2]: tensor for key, tensor in seen.items() if key.startswith(f"{name}/")}
        expected = inputs.pop("logits")
        assert torch.equal(model(**inputs).logits, expected), name

    small.push_to_hub("tester/small")
    again = AutoModelForSeq2SeqLM.from_pretrained("tester/small").eval()
    assert torch.equal(again.shared.weight, small.shared.weight)

    base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base")
    base.push_to_hub("tester/base")
    base = AutoModelForSequenceClassification.from_pretrained("tester/base")
    PeftModel.from_pretrained(base, f"{folder}/adapter").push_to_hub("tester/adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained("tester/adapter").eval()
    assert torch.equal(loaded(**inputs).logits, expected)
"""


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_new_process_loads_and_shares_them(loopback_hub, tmp_path):  # noqa: F811
    small, ids = compress_mpo(make("t5"), bond=8), mpo_adapters.ids()
    small.save_pretrained(tmp_path / "small")
    mpo_adapters.build("bert").save_pretrained(tmp_path / "base")
    base = mpo_adapters.MODELS["bert"][0].from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, MPOConfig(bond=2, task_type="SEQ_CLS"))
    mpo_adapters.train(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    seen = {"small/input_ids": IDS, "small/decoder_input_ids": IDS.clone(), "small/logits": logits("t5", small)}
    seen |= {"adapted/input_ids": ids, "adapted/logits": mpo_adapters.logits(adapted, ids)}
    save_file(seen, tmp_path / "seen.safetensors")
    new_process.run(LOAD_AND_SHARE, tmp_path)
    assert set(loopback_hub.files("tester/small")) >= {"config.json", "model.safetensors"}
    assert not any(name.endswith(".py") for name in loopback_hub.files("tester/small"))
    adapter = load(loopback_hub.files("tester/adapter")["adapter_model.safetensors"])
    largest = max(tensor.numel() for tensor in adapter.values())
    assert largest < 16 * 16  # neither a central tensor nor a matrix
