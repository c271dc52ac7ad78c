"""Whether what an optimizer step left behind is finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..errors import NonFiniteError
from .checkpoints import last_checkpoint
from .distributed import any_rank


def check_weights(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: str,
    output_dir: str | Path,
) -> None:
    """NonFiniteError if a trained weight or a number of the optimizer's state is NaN or infinite.

    To be called by all processes after each optimizer step, before anything is saved: every
    checkpoint that is complete was then found finite. All tensors are read once, in one fused norm,
    and the device is waited for once. ``step`` names the step in the message.
    """
    norm = torch.nn.utils.get_total_norm([x for _, x in _trained(model, optimizer)])
    if not any_rank(accelerator, ~norm.isfinite()):
        return
    # Squares of finite numbers may overflow: only now is each number looked at.
    bad = [name for name, x in _trained(model, optimizer) if not x.isfinite().all()]
    names = sorted(set(gather_object(bad)))
    if not names:
        return
    last = last_checkpoint(output_dir)
    kept = (
        f"nothing was saved of it; the newest checkpoint, which is finite, is {last}: go on from "
        "there with --resume_from_checkpoint true"
        if last
        else "no checkpoint had been saved: start again"
    )
    raise NonFiniteError(
        f"weights: expected finite numbers after {step}, got NaN or infinity in "
        f"{', '.join(names[:5])}{f' ... ({len(names)} in all)' if len(names) > 5 else ''}; {kept}, "
        "with a lower learning rate or another optimizer setting"
    )


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, this process's shards, of trained weights and of their moments."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        named = [(name, parameter.detach())]
        for key, value in optimizer.state.get(parameter, {}).items():
            # Of what is no tensor of the parameter's size, the number of steps is all there is.
            if torch.is_tensor(value) and value.dim() and value.is_floating_point():
                named.append((f"{key} of {name}", value))
        for key, value in named:
            local = _local(value)
            if local.numel():
                yield key, local


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
