"""Tiny models with masks, tiny data, and a Trainer that leaves no traces."""

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig, from_dense


VOCAB, PAD = 29, 0
KINDS = ("llama", "t5", "bert")


def make_dense(kind="llama", dropout=0.0):
    """A random dense model, always of the same weights; dropout off makes runs comparable."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "llama":
        config = LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD, initializer_range=0.1, **sizes)
        config.attention_dropout = dropout
        return LlamaForCausalLM(config).eval()
    if kind == "t5":
        config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        config.dropout_rate, config.decoder_start_token_id = dropout, PAD
        return T5ForConditionalGeneration(config).eval()
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=16, initializer_range=0.1, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return BertForSequenceClassification(config).eval()


def make(kind="llama", *, dropout=0.0, **options):
    """The same with masks to learn."""
    return from_dense(make_dense(kind, dropout), **{"num_experts": 2} | options)


def make_data(kind="llama", *, count=32, padded=False):
    """Random ids; what to say of them is whether they begin with a large one, or all of them again."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (count, 8), generator=generator)
    lengths = torch.randint(3, 9, (count, 1), generator=generator) if padded else 8
    mask = (torch.arange(8) < lengths).long().expand(count, 8)
    labels = (ids[:, 0] > VOCAB // 2).long() if kind == "bert" else ids.masked_fill(mask == 0, -100)
    rows = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in rows.items()})


def make_args(folder, **options):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(str(folder), **defaults | options)


def make_trainer(folder, model, recipe=None, *, data=None, callbacks=(), trainer=Trainer, extra=None, **options):
    """A Trainer with the callback and its optimizer, to learn masks to the end; `options` are training arguments."""
    args = make_args(folder, **options)
    callback = MaskSparsityCallback(MaskSparsityConfig(**{"ramp_share": 0.5, "learn_share": 1.0} | (recipe or {})))
    data = make_data(model.config.model_type.removeprefix("mom_")) if data is None else data
    return trainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, *callbacks],
        optimizers=(callback.make_optimizer(model, args), None),
        **extra or {},
    )


def callback_of(trainer):
    return next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, MaskSparsityCallback))


def gather_state(trainer):
    """All tensors that a run leaves behind: of the model, and of the optimizer."""
    found = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for number, moments in optimizer.state_dict()["state"].items():
        found |= {f"moment/{number}/{name}": tensor.clone() for name, tensor in moments.items()}
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    pairs = {name: (ours[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in theirs.items()}
    different = [name for name, pair in pairs.items() if not torch.equal(*pair)]
    assert different == []


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]


def scores_of(model):
    return torch.stack([network.masks.learned.detach() for network in model.masked_networks().values()])


def without_opinion(model):
    """A language model whose loss is always the same, whatever its masks."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


class Spy(TrainerCallback):
    """Calls a function with the state and the callback's arguments at one event."""

    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, **kwargs: function(state, **kwargs))
