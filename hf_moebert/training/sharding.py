"""Models whose parameters lie in shards: those that are refused, and the rows that FSDP2 leaves to each process."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard


SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def refuse_sharded(model: nn.Module, rule: str) -> None:
    """Refuse FSDP, DeepSpeed, Megatron and tensor parallelism.

    Args:
        model: The model of the Trainer.
        rule: Start of the error message: who needs which tensors whole.

    Raises:
        ValueError: If the model, or the run, is sharded.
    """
    if who := _name_sharding(model):
        raise ValueError(
            f"{rule}, which {who} keeps in shards. Use plain data parallelism (torchrun without FSDP, DeepSpeed or "
            "tensor parallelism)."
        )


def refuse_sharded_but_fsdp2(model: nn.Module, rule: str) -> None:
    """Refuse what `refuse_sharded` does, but not FSDP2, which leaves whole rows to each process.

    Args:
        model: The model of the Trainer, which FSDP2 has sharded or will shard.
        rule: Start of the error message: who needs which tensors whole, or in rows.

    Raises:
        ValueError: If the model, or the run, is sharded in another way.
    """
    who = _name_sharding(model)
    if who not in (None, "FSDP2"):
        raise ValueError(
            f"{rule}, which {who} keeps in other shards. Use FSDP2 over all processes (`fsdp=True` and "
            '`fsdp_config={"version": 2}`), or plain data parallelism.'
        )


def _name_sharding(model: nn.Module) -> str | None:
    state = AcceleratorState() if is_initialized() else None
    kind = DistributedType.NO if state is None else state.distributed_type
    shards = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if kind is DistributedType.FSDP and getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 1) != 2:
        return "FSDP1"
    if kind is DistributedType.FSDP or isinstance(model, FSDPModule):
        return "FSDP2" if all(map(_is_of_rows, shards)) else "FSDP2 with replicas or tensor parallelism"
    if kind in SHARDED:
        return str(kind.value)
    return "tensor parallelism" if shards else None


def _is_of_rows(parameter: DTensor) -> bool:
    return parameter.placements == (Shard(0),) and parameter.device_mesh.size() == dist.get_world_size()


@contextmanager
def plain_classes(model: nn.Module) -> Iterator[None]:
    """Give the modules that FSDP2 has made its own the classes that they had, and their shards, for a look at them."""
    wrapped = {module: type(module) for module in model.modules() if isinstance(module, FSDPModule)}
    for module, cls in wrapped.items():
        module.reshard()  # after an evaluation the outermost is still whole
        module.__class__ = cls.__bases__[1]  # `FSDPBertModel` is made of `(FSDPModule, BertModel)`
    try:
        yield
    finally:
        for module, cls in wrapped.items():
            module.__class__ = cls


def local_values(tensor: Tensor) -> Tensor:
    """Return what this process holds of a parameter or gradient, without a copy: some of its rows, or all of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(parameter: Tensor) -> slice:
    """Return which of the elements of a parameter this process holds, counted in the order of memory."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.numel())
    rows = len(parameter)
    row = parameter.numel() // rows
    share = -(-rows // dist.get_world_size())  # as `torch.chunk` cuts, by which FSDP2 does
    first, last = (min(rank * share, rows) for rank in (dist.get_rank(), dist.get_rank() + 1))
    return slice(first * row, last * row)


def join_processes(values: Tensor) -> Tensor:
    """Join the values that each process has, in the order of ranks.

    Args:
        values: Some of this process; their number may differ. Shape `(n,)`.

    Returns:
        Those of all processes, in each of them. Shape `(total,)`.
    """
    processes = range(dist.get_world_size())
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.zeros_like(length) for _ in processes]
    dist.all_gather(lengths, length)
    longest = max(int(other) for other in lengths)
    padded = torch.cat([values, values.new_zeros(longest - len(values))])  # collectives want one shape
    parts = [torch.empty_like(padded) for _ in processes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(other)] for part, other in zip(parts, lengths, strict=True)])


@torch.no_grad()
def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Spread the weights of a model that is only asked over all processes by FSDP2, layer by layer, in place.

    All processes get those of the first one: `cpu_ram_efficient_loading` reads a checkpoint there alone. A model that
    is spread already stays as it is.

    Args:
        model: A model of transformers, frozen.
        device: Where this process computes.
    """
    if isinstance(model, FSDPModule):
        return
    for tensor in chain(model.parameters(), model.buffers()):
        values = tensor.to(device)
        dist.broadcast(values, src=0)
        tensor.copy_(values)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = set(getattr(model, "_no_split_modules", None) or [])
    for module in [*reversed(list(model.modules()))]:  # the model itself is the last
        if module is model or type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # the outermost would stay whole by default
