"""Tiny models, tiny data, and a Trainer that leaves no traces."""

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_moebert.methods.platon import PlatonConfig, PlatonPruningCallback
from hf_moebert.methods.platon.training_parameters import find_prunable


TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
RECIPE = {"keep_ratio": 0.3, "initial_warmup": 2, "final_warmup": 6, "window": 3}


def make_bert(**changes):
    """A fresh tiny classifier, always of the same weights; dropout off makes runs comparable."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**TINY | dropout | changes))
    model.accepts_loss_kwargs = False  # the stock head averages over a batch
    return model


def make_data():
    """Sequences of equal length whose label is whether they begin with a small id."""
    ids = torch.randint(20, (64, 6), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] < 10).long().tolist()})


def make_trainer(folder, model, pruning=None, *, trainer_class=Trainer, callbacks=(), extra=None, **arguments):
    """A stock Trainer with the callback; keywords are training arguments, `pruning` those of the recipe."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }
    callback = [] if pruning is False else [PlatonPruningCallback(PlatonConfig(**RECIPE | (pruning or {})))]
    data = make_data()
    return trainer_class(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*callback, *callbacks],
        **(extra or {}),
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


class SaveAt(TrainerCallback):
    """Saves a checkpoint after each of these steps, and no other."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


def callback_of(trainer):
    return next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, PlatonPruningCallback))


def pruner_of(trainer):
    return callback_of(trainer).pruner


def count_all_zeros(model, config=None):
    parameters = find_prunable(model, config or PlatonConfig()).values()
    return sum(int((p == 0).sum()) for p in parameters), sum(p.numel() for p in parameters)


def assert_same_weights(ours, theirs):
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def snapshot(pruner):
    tensors = {f"{kind} {n}": t.clone() for kind, named in pruner.statistics.tensors.items() for n, t in named.items()}
    tensors |= {f"keep {name}": keep.clone() for name, keep in pruner.keep.items()}
    tensors |= {f"weight {name}": parameter.detach().clone() for name, parameter in pruner.parameters.items()}
    return tensors, (pruner.clock, pruner.ratio, pruner.threshold, pruner.revived, pruner.dropped)


def same_snapshots(one, other):
    return one[1] == other[1] and all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


def gather_state(trainer):
    tensors, _ = snapshot(pruner_of(trainer))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("weight")} | {
        f"weight {name}": tensor for name, tensor in trainer.model.state_dict().items()
    }
