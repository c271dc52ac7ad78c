"""Contenders in alternation: whatever slows the machine slows all of them.

Rounds go through all contenders in turn, each round starting with another one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[Callable[[], Any], int], float]  # seconds of so many calls

SHORTEST = 4e-3  # seconds of a sample: quicker calls are repeated within it
PAUSE = 5e-3  # seconds before a sample: the last contender's threads spin a while before they sleep
FEWEST, MOST = 3, 50  # samples of a contender
LONGEST = 5.0  # seconds: a call that takes longer is timed once


def wall_clock(run: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


def on_threads(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with as many threads as ``count``, torch's and ours."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.set_num_threads(count)
        return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Timed:
    """What the clock runs, and how many calls of the op that is."""

    run: Callable[[], Any]
    calls: int = 1


class Alternation:
    """Rounds over several contenders; ``round()`` times each of them once, in turn.

    The first, here, finds how often a call has to be repeated, and counts where that is once.
    Each contender then gets ``seconds``, but some samples at least and not too many; those of the
    slow ones are spread over the rounds, and the very slow are left alone after the first.
    """

    def __init__(self, timed: Mapping[str, Timed], clock: Clock = wall_clock, seconds: float = 0.5):
        self.timed = dict(timed)
        self.clock = clock
        self.samples: dict[str, list[float]] = {name: [] for name in timed}
        self.repeats = dict.fromkeys(timed, 1)
        once = {name: self._time(name) for name in timed}
        self.repeats = {name: math.ceil(SHORTEST / max(t, 1e-7)) for name, t in once.items()}
        self.wanted: dict[str, int] = {}
        for name, t in once.items():
            counts = self.repeats[name] == 1
            if counts:
                self.samples[name].append(t / self.timed[name].calls)
            fit = int(seconds / (t * self.repeats[name]))
            fewest = FEWEST if t < LONGEST else 1
            self.wanted[name] = min(max(fit, fewest), MOST) - counts
        self.rounds = max(1, *self.wanted.values())
        self.done = 0

    def _time(self, name: str) -> float:
        time.sleep(PAUSE)
        run, repeats = self.timed[name].run, self.repeats[name]
        if repeats > 1:  # quick calls would time what the sleep and the others left behind
            self.clock(run, repeats)
        return self.clock(run, repeats) / repeats

    def round(self) -> None:
        names = list(self.timed)
        first = self.done % len(names)
        for name in names[first:] + names[:first]:
            before, now = ((self.done + step) * self.wanted[name] // self.rounds for step in (0, 1))
            if now > before:
                self.samples[name].append(self._time(name) / self.timed[name].calls)
        self.done += 1

    def run(self) -> dict[str, list[float]]:
        """All rounds; seconds of each contender's samples."""
        for _ in range(self.rounds):
            self.round()
        return self.samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles, seconds."""
    several = samples if len(samples) > 1 else samples * 2
    quartiles = statistics.quantiles(several, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), quartiles, strict=True)) | {"samples": len(samples)}
