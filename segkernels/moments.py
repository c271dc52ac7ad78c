"""Count, mean and summed squared deviation (M2), merged exactly.

Moments are a tensor ``[3, ...]`` of (count, mean, M2). Chan, Golub, LeVeque, "Updating formulae and
a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def grouped(x: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Moments ``[3, n_groups]`` in fp64 of ``x [S]``, value i belonging to ``group[i]``."""
    x = x.double()
    count = torch.bincount(group, minlength=n_groups).double()
    size = count.clamp(min=1)
    mean = torch.bincount(group, x, minlength=n_groups) / size
    m2 = torch.bincount(group, (x - mean[group]).square(), minlength=n_groups)
    return torch.stack([count, mean, m2])


def merge(left: Tensor, right: Tensor) -> Tensor:
    """Moments of both sets together."""
    count = left[0] + right[0]
    share = torch.where(count > 0, right[0] / count, right[0])  # a number would wait for the GPU
    delta = right[1] - left[1]
    mean = left[1] + delta * share
    m2 = left[2] + right[2] + delta.square() * left[0] * share
    return torch.stack([count, mean, m2])


def all_reduce(moments: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Moments over all ranks, bitwise equal on each; a collective when there are several.

    Every rank puts its moments into a slot of its own, so that one all-reduce (x + 0 is exact)
    hands all of them to everybody, who merge them in the order of the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return moments
    world = dist.get_world_size(group)
    if world == 1:
        return moments
    slots = moments.new_zeros((world, *moments.shape))
    slots[dist.get_rank(group)] = moments
    if moments.device.type == "cpu" and dist.get_backend(group) in ("nccl", "xccl"):
        slots = slots.to(torch.accelerator.current_accelerator())
    dist.all_reduce(slots, group=group)
    merged = slots[0]
    for rank in range(1, world):
        merged = merge(merged, slots[rank])
    return merged.to(moments.device)
