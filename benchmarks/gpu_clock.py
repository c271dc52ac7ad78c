"""How calls on a GPU are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import Timed

# Cycles of a GPU's clock: at 2 GHz half a millisecond, and 34.
SHORTEST_WAIT, LONGEST_WAIT = 1 << 20, 1 << 26


class EventClock:
    """Seconds between two events on the device, without the host's share.

    A busy wait is queued before the first event, and everything else while it lasts, so that the
    device finds its work ready when the first event passes. A wait that was over too early is
    made longer and the sample taken again. Work during which the host waits for the device cannot
    be queued ahead: it is timed with what the host takes.
    """

    def __init__(self, cuda: Any = torch.cuda):
        self.cuda = cuda
        # Cycles that were enough for so many calls; 0 where none are.
        self.waits: dict[tuple[Callable[[], Any], int], int] = {}

    def __call__(self, run: Callable[[], Any], repeats: int) -> float:
        key = run, repeats
        wait = self.waits.setdefault(key, SHORTEST_WAIT)
        seconds, ready = self._sample(run, repeats, wait)
        while wait and not ready:
            wait = self.waits[key] = wait * 8 if wait < LONGEST_WAIT else 0
            seconds, ready = self._sample(run, repeats, wait)
        return seconds

    def _sample(self, run: Callable[[], Any], repeats: int, wait: int) -> tuple[float, bool]:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        if wait:
            self.cuda._sleep(wait)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        ready = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1000, ready


def one_by_one(runs: list[Callable[[], Any]]) -> tuple[Timed, str]:
    def run():
        for each in runs:
            each()

    return Timed(run, len(runs)), "calls"


def graph(clock: EventClock) -> Callable[[list[Callable[[], Any]]], tuple[Timed, str]]:
    """All calls as one CUDA graph; what synchronises, or takes longer than launches do, is timed
    call by call."""

    def batch(runs: list[Callable[[], Any]]) -> tuple[Timed, str]:
        runs[0]()
        if clock(runs[0], 1) > 20e-3:
            return Timed(runs[0]), "calls"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs * 2:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                for run in runs:
                    run()
        except RuntimeError:
            torch.cuda.synchronize()
            return one_by_one(runs)[0], "calls; no CUDA graph can be captured"
        return Timed(captured.replay, len(runs)), "CUDA graph"

    return batch


def launches(run: Callable[[], Any]) -> dict[str, Any]:
    """How many kernels a call launches, and whether the host waits for one."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        waits = False
    except RuntimeError:
        waits = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    count = sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in recorded.events()
    )
    return {"launches": count, "synchronises": waits}
