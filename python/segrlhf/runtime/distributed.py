"""The processes of a launch."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes of this launch; without an accelerator torchrun's work together on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def say(text: str) -> None:
    """Prints once, whatever the number of processes."""
    if processes().is_main_process:
        print(text, flush=True)
