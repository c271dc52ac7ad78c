"""The processes of a launch."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor


def processes() -> PartialState:
    """The processes of this launch; without an accelerator torchrun's work together on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def say(text: str) -> None:
    """Prints once, whatever the number of processes."""
    if processes().is_main_process:
        print(text, flush=True)


def any_rank(accelerator: Accelerator, flag: bool | Tensor) -> bool:
    """Whether ``flag`` is true on any process; all must call it, and all get the same answer."""
    if accelerator.num_processes == 1:
        return bool(flag)
    count = torch.as_tensor(flag, dtype=torch.float32, device=accelerator.device)
    return bool(accelerator.reduce(count, "sum") > 0)
