"""What every method does to a model that another one has compressed: the stages, and what must be true of two of them.

`python tests/stack_table.py` runs all pairs and writes what it saw into the README of `hf_moebert/compress`.
"""

import copy
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
)

from hf_moebert import (
    MultiTaskModel,
    PlatonConfig,
    compress_mpo,
    measure_importance,
    optimize_for_inference,
    revert_optimizations,
    save_packed,
    shrink,
)
from hf_moebert.architectures.stacks import find_forms
from hf_moebert.methods import masked_crf, mixture_of_masks, moebert
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.methods.trimming import drop_layers


TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 50, (4, 7), generator=GENERATOR)
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
LABELS = torch.randint(0, 2, (4, 7), generator=GENERATOR).masked_fill(MASK == 0, -100)
DATA = Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": MASK.tolist(), "labels": LABELS.tolist()})
TASKS = ("names", "places")
LORA = LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)


def make_dense(**fields):
    """A token classifier whose weights and biases are all of a size that shows differences."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 16}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 32, "frozen_layers": 1}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    labels = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}
    model = BertForTokenClassification(BertConfig(**sizes | no_dropout | labels | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


@torch.no_grad()
def run(model):
    """Return the logits of a batch with padding, of all tasks where there are many; padding is zero."""
    given = {"input_ids": IDS, "attention_mask": MASK}
    if any("CRF" in type(module).__name__ for module in model.modules()):
        given["word_mask"] = MASK
    outputs = model.eval()(**given)
    many = isinstance(model, MultiTaskModel)
    logits = torch.cat([outputs[name].logits for name in TASKS]) if many else outputs.logits
    return logits.float() * MASK.repeat(len(logits) // len(MASK), 1)[..., None]  # (rows, seq, tags)


def prune(model, granularity):
    """Prune in three steps, as `PlatonPruningCallback` does in a Trainer."""
    recipe = PlatonConfig(keep_ratio=0.5, granularity=granularity, initial_warmup=1, final_warmup=1, window=1)
    pruned = copy.deepcopy(model).train()
    pruner = Pruner(pruned, recipe, total_steps=3)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    for _ in range(3):
        pruned(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        with torch.no_grad():
            pruner.observe()
            optimizer.step()
            optimizer.zero_grad()
            pruner.advance()
    return pruned.eval()


def assert_same(ours, theirs):
    """Compare the results of two models, to the rounding of their precision; int8 counts as what is behind it."""
    found, wanted = (run(revert_optimizations(copy.deepcopy(model))) for model in (ours, theirs))
    if ours.dtype == torch.bfloat16:
        assert distance(found, wanted) < 0.1
    else:
        assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def distance(ours, theirs):
    """Return the difference of two results, relative to the second."""
    return float((ours - theirs).norm() / theirs.norm())


# The stages: each makes a new model of a model, and checks what it must keep or reach


def remove_units(model):
    pruned = prune(model, "structured")
    small = shrink(pruned, multiple_of=8)
    assert_same(small, pruned)
    assert small.num_parameters() < model.num_parameters()
    return small


def prune_weights(model):
    return prune(model, "unstructured")


def prune_two_of_four(model):
    return prune(model, "2:4")


def leave_out_a_layer(model):
    return drop_layers(model, [model.config.num_hidden_layers - 1])


def cut_experts(model):
    importance = measure_importance(model, DATA)
    assert_same(moebert.from_dense(model, importance, num_experts=1), model)
    return moebert.from_dense(model, importance, num_experts=2)


def compact_masks(model):
    masked = mixture_of_masks.from_dense(model, num_experts=2, group_size=8)
    assert_same(masked, model)
    fixed = masked.fix_masks(keep_ratio=0.5)
    compact = shrink(fixed)
    assert_same(compact, fixed)
    return compact


def make_chains(model):
    assert_same(compress_mpo(model, num_cores=3), model)
    return compress_mpo(model, num_cores=2, keep_ratio=0.8)


def pack(model):
    with tempfile.TemporaryDirectory() as folder:
        save_packed(model, folder)
        packed = reload(model, folder)
    assert_same(packed, model)
    return packed


def adapt(model):
    """Train an adapter and merge it. PEFT leaves all weights frozen then."""
    inside = r"branches.*\.(query|value)" if isinstance(model, MultiTaskModel) else ["query", "value"]
    config = LoraConfig(target_modules=inside, r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    train_a_step(adapted.base_model.model)
    wanted = copy.deepcopy(adapted.base_model.model)
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert_same(merged, wanted)
    assert distance(run(merged), run(model)) > 0.01
    if isinstance(model, MultiTaskModel):
        merged.trunk.requires_grad_(False)
    return merged


def add_crf(model):
    tagger = masked_crf.from_dense(model, tag_scheme="IOB2")
    assert_same(tagger, model)
    return tagger


def merge_tasks(model):
    tasks = [copy.deepcopy(model) for _ in TASKS]
    for task in tasks:
        task.config.frozen_layers = task.config.num_hidden_layers - 1
    merged = MultiTaskModel.from_tasks(dict(zip(TASKS, tasks, strict=True)))
    for name in TASKS:
        assert_same(merged.extract_task(name), model)
    assert_close(run(merged), run(revert_optimizations(copy.deepcopy(model))).repeat(2, 1, 1))
    return merged


def optimize(model):
    optimized = optimize_for_inference(copy.deepcopy(model), precision="int8")
    assert distance(run(optimized), run(model)) < 0.2
    return optimized


def cast(model):
    small = copy.deepcopy(model).to(torch.bfloat16)
    assert distance(run(small), run(model)) < 0.2
    return small


STAGES = {
    "units": remove_units,
    "weights": prune_weights,
    "2:4": prune_two_of_four,
    "layers": leave_out_a_layer,
    "experts": cut_experts,
    "masks": compact_masks,
    "MPO": make_chains,
    "packed": pack,
    "LoRA": adapt,
    "CRF": add_crf,
    "tasks": merge_tasks,
    "int8": optimize,
    "bfloat16": cast,
}


# What must be true of two stages


def check_pair(model, first, second):
    """Run a second stage on what a first one made, and return whether it undid the first one.

    Raises:
        ValueError: If the second stage refuses the model, before any work.
    """
    before = copy.deepcopy(model.state_dict())
    after = STAGES[second](model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert run(after).isfinite().all()
    assert is_made_by(second, after)
    if second not in {"int8", "packed", "bfloat16"}:
        train_a_step(copy.deepcopy(after))
    with tempfile.TemporaryDirectory() as folder:
        check_reload(after, folder)
    return not is_made_by(first, after) or (first == "packed" != second)


def train_a_step(model):
    """Take one step by hand, which must change the loss."""
    many = isinstance(model, MultiTaskModel)
    labels = dict.fromkeys(TASKS, LABELS) if many else LABELS
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        outputs = model.train()(input_ids=IDS, attention_mask=MASK, labels=labels)
        loss = sum(outputs[name].loss for name in TASKS) if many else outputs.loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[0] != losses[1]
    assert losses[1] == losses[1]  # no NaN


def check_reload(model, folder):
    """Save a model, and load it again: the same class and the same outputs."""
    model.save_pretrained(folder)
    loaded = reload(model, folder)
    assert isinstance(model, type(loaded))
    if "optimised" in find_forms(model):
        assert_same(loaded, model)
    else:
        assert_close(run(loaded), run(model))


def reload(model, folder):
    auto = AutoModel if isinstance(model, MultiTaskModel) else AutoModelForTokenClassification
    return auto.from_pretrained(folder)


def is_made_by(stage, model):
    """Check whether a model is what a stage makes, whatever else it is."""
    forms = find_forms(model)
    classes = {type(module).__name__ for module in model.modules()}
    if stage in {"weights", "2:4"}:
        return has_zeros(model, stage)
    return {
        "units": lambda: is_narrow(model),
        "layers": lambda: not any("layer.1." in name for name in model.state_dict()),
        "experts": lambda: "MoEBertExperts" in classes or "OptimizedMoEBertExperts" in classes,
        "masks": lambda: any(name.startswith("Compact") for name in classes),
        "MPO": lambda: "chains" in forms,
        "packed": lambda: True,
        "LoRA": lambda: "adapters" not in forms,
        "CRF": lambda: "MaskedCRF" in classes,
        "tasks": lambda: isinstance(model, MultiTaskModel),
        "int8": lambda: "optimised" in forms,
        "bfloat16": lambda: model.dtype == torch.bfloat16,
    }[stage]()


def has_zeros(model, stage):
    """Check whether half of the weights of the layers are zero, or two of each four."""
    matrices = [
        m.weight for name, m in model.named_modules() if type(m).__name__.endswith("Linear") and "layer." in name
    ]
    matrices += [parameter for parameter in model.parameters() if parameter.dim() == 3]
    kept = [(matrix != 0).flatten() for matrix in matrices if matrix.dim() > 1]
    if stage == "2:4":
        return all(int(x.unflatten(0, (-1, 4)).sum(dim=1).max()) <= 2 for x in kept)
    return sum(int(x.sum()) for x in kept) <= 0.6 * sum(len(x) for x in kept)


def is_narrow(model):
    """Check whether heads or neurons were removed somewhere."""
    sizes = {m.out_features for name, m in model.named_modules() if name.endswith(("query", "intermediate.dense"))}
    return bool(sizes - {16, 32})
