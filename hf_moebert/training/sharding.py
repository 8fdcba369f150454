"""Refuse sharded models where whole tensors and their gradients are needed."""

from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor


SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def refuse_sharded(model: nn.Module, rule: str) -> None:
    """Refuse FSDP, DeepSpeed, Megatron and tensor parallelism.

    Args:
        model: The model of the Trainer.
        rule: Start of the error message: who needs which tensors whole.

    Raises:
        ValueError: If the model, or the run, is sharded.
    """
    kind = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    if kind in SHARDED or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        who = kind.value if kind in SHARDED else "tensor parallelism"
        raise ValueError(
            f"{rule}, which {who} keeps in shards. Use plain data parallelism (torchrun without FSDP, DeepSpeed or "
            "tensor parallelism)."
        )
