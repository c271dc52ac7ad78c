"""One case: everybody is checked against the definition first, then timed in alternation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, Missing
from memory import peak_memory
from timing import Alternation, Clock, Timed, spread, wall_clock
from torch import Tensor

# A contender may be wrong by this share of the largest true value, in the storage dtype of the
# inputs: four roundings in half precision, where peers compute in it, and four digits in float32.
# Coarser than tests/tolerance.py on purpose: that one is for our kernels, this one lets everybody
# run who computes the right thing. The error stands beside every time.
ALLOWED = {
    torch.float32: 1e-4,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}


class Wrong(ArithmeticError):
    """A contender's results are not the definition's: it gets no time."""


@dataclass
class Comparison:
    """A case on its way to results: contenders that were checked, in alternation."""

    case: dict[str, Any]
    results: dict[str, dict[str, Any]]  # by contender
    alternation: Alternation

    def finish(self) -> dict[str, Any]:
        """The case and, under "contenders", everybody's numbers: a line of a result file."""
        for name, samples in self.alternation.samples.items():
            self.results[name] |= spread(samples)
        return self.case | {"contenders": list(self.results.values())}


Batch = Callable[[list[Callable[[], Any]]], tuple[Timed, str]]


def compare(
    case: Case,
    seconds: float = 0.5,
    clock: Clock = wall_clock,
    copies: Iterable[Case] = (),
    batch: Batch | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Runs every contender once, checks it, and sets those that are right against each other.

    ``seconds`` is the time for each. ``batch`` makes one thing to time, and a word for how, of the
    calls on the case and its ``copies``. ``announce`` is told who runs next. An error of ours is an
    error; one of another contender's is its reason for having no time, unless it leaves the device
    unusable.
    """
    torch.compiler.reset()
    every = [case, *copies]
    for each in every:
        for name in each.wrt:
            each.inputs[name].requires_grad_()
    device = next(x.device for x in case.inputs.values() if isinstance(x, Tensor))
    results: dict[str, dict[str, Any]] = {}
    timed: dict[str, Timed] = {}
    for contender in case.contenders:
        name = contender.name
        result = results[name] = contender.facts()
        announce(name)
        contender = contender.loaded()
        if isinstance(contender.forward, Missing):
            result["reason"] = contender.forward.reason
            continue
        try:
            runs = [each.call(each.named(name).loaded()) for each in every]
            outputs = runs[0]()
            result["error"] = case.error(contender.restore(outputs))
            result["output_bytes"] = sum(x.numel() * x.element_size() for x in outputs.values())
            del outputs
            if not result["error"] <= ALLOWED[case.dtype]:
                raise Wrong(f"error {result['error']:.1e}, allowed {ALLOWED[case.dtype]:.1e}")
            result["peak_bytes"] = peak_memory(runs[0], device)
            if batch is None:
                timed[name] = Timed(runs[0])
            else:
                timed[name], result["timed"] = batch(runs)
        except Exception as error:
            if contender.role == "ours":
                raise
            lines = str(error).strip().splitlines() or [""]
            result["reason"] = f"{type(error).__name__}: {lines[0][:160]}"
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where nothing can run any more
    announce("the rounds")
    if case.yardstick is not None:
        results[case.yardstick.name] = case.yardstick.facts()
        timed[case.yardstick.name] = Timed(case.yardstick.run)
    return Comparison(case.facts(), results, Alternation(timed, clock, seconds))
