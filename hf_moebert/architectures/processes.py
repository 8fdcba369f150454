"""The processes that a launcher of torch or accelerate started to work together."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def find_processes(**options: Any) -> PartialState:
    """Meet the other processes of a launcher, or find that there is none.

    It looks as an `Accelerator` would, or the processes of `accelerate launch --cpu` never meet.

    Args:
        **options: Such as `timeout`, for `torch.distributed.init_process_group`, if it was not called yet.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, **options)
