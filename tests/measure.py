"""What a call costs besides time."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes of tensors that were alive at once, beyond those alive before; the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(n for _, n in changes)), result


def multiplications(function: Callable[[], Any]) -> tuple[int, Any]:
    """Scalar multiplications in matrix products; the result."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        result = function()
    count = 0
    for event in profiled.events():
        if event.name in ("aten::mm", "aten::addmm"):
            first = 0 if event.name == "aten::mm" else 1
            (rows, depth), (_, columns) = event.input_shapes[first : first + 2]
            count += rows * depth * columns
    return count, result
