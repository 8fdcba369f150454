"""The stack of the page runs as it stands: pruned, cut into experts, taught by the dense model, in int8 and ONNX."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_classifiers import WORDS
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

from hf_moebert import compress, export_onnx, load_onnx


BLOCK = re.findall(r"```python\n(.*?)```", (Path(compress.__path__[0]) / "README.md").read_text(), re.DOTALL)[-1]
TEXTS = ["good film", "a bad film", "very good film", "not bad"]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """The folder of the stack, the optimised model, and the dense one."""
    folder = tmp_path_factory.mktemp("stack")
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=16)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = BertConfig(vocab_size=len(vocab), max_position_embeddings=16, initializer_range=0.3, **sizes)
    teacher = BertForSequenceClassification(config).eval()
    rows = Dataset.from_list([{**tokenizer(text), "labels": index % 2} for index, text in enumerate(TEXTS * 2)])
    options = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(folder / "run", max_steps=3, per_device_train_batch_size=4, logging_steps=1, **options)
    scope = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(BLOCK, scope)
        data = {"train_dataset": rows, "data_collator": DataCollatorWithPadding(tokenizer)}
        optimized = scope["stack"](teacher, tokenizer, TEXTS * 8, args, **data)
    return folder / "stack", optimized, teacher


@torch.no_grad()
def test_the_stack_is_narrow_of_experts_and_in_int8(stacked):
    folder, optimized, teacher = stacked
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(loaded).__name__ == "MoEBertForSequenceClassification"
    assert loaded.config.is_heterogeneous
    assert loaded.num_parameters() < teacher.num_parameters()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    wanted = loaded(**inputs).logits
    torch.testing.assert_close(optimized(**inputs).logits, wanted, atol=0.1 * float(wanted.abs().max()), rtol=0)
    assert all(not parameter.requires_grad for parameter in teacher.parameters())  # it taught


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")  # of the exporter
@torch.no_grad()
def test_the_stack_runs_in_onnx_runtime(stacked, tmp_path):
    folder, _, _ = stacked
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export_onnx(model, tmp_path / "graphs", precisions=["float32", "int8"], tokenizer=tokenizer, texts=TEXTS)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    wanted = model(**inputs).logits
    for precision, tolerance in (("float32", 1e-4), ("int8", 0.1)):
        found = load_onnx(tmp_path / "graphs", precision=precision)(**inputs).logits
        torch.testing.assert_close(found, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)
