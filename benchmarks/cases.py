"""What is compared: one op on one workload, and everybody who computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "segkernels"

Outputs = dict[str, Tensor]
Forward = Callable[..., Outputs]

# ours; the reference that defines the op; what people write in plain torch, and the same compiled;
# another package's function; the work that nobody can do without (a product, memory to be filled).
Role = Literal["ours", "definition", "textbook", "compiled", "peer", "bare"]


@dataclass(frozen=True)
class Missing:
    """Why a contender does not run here."""

    reason: str


@dataclass(frozen=True)
class Later:
    """A function that is imported when its turn comes: packages are slow to import, and may fail
    in ways of their own."""

    load: Callable[[], Forward | Missing]


@dataclass(frozen=True)
class Contender:
    """A function of the case's inputs by name, or of inputs of its own."""

    name: str
    forward: Forward | Missing | Later
    role: Role = "peer"
    partial: bool = False  # computes only a part of what the op does
    threads: int | None = None  # None: as many as the process has
    inputs: Mapping[str, Any] | None = None
    restore: Callable[[Outputs], Outputs] = dict  # its outputs in the shape of the definition's

    def loaded(self) -> Contender:
        return (
            replace(self, forward=self.forward.load()) if isinstance(self.forward, Later) else self
        )

    def facts(self) -> dict[str, Any]:
        """What a result says of it, beside its numbers."""
        facts: dict[str, Any] = {"name": self.name, "role": self.role}
        if self.partial:
            facts["partial"] = True
        if self.threads is not None:
            facts["threads"] = self.threads
        return facts


def ours(forward: Forward) -> Contender:
    return Contender(OURS, forward, "ours")


def textbook(form: Forward | Missing, which: str = "") -> list[Contender]:
    """A form in plain torch, as it is and compiled."""
    alone = Contender(f"eager{which}", form, "textbook")
    if not isinstance(form, Missing):
        form = torch.compile(form, dynamic=False, fullgraph=True)
    return [alone, Contender(f"torch.compile{which}", form, "compiled")]


@dataclass(frozen=True)
class Yardstick:
    """The bare work of an op, timed in the same rounds and not checked."""

    name: str
    run: Callable[[], Any]
    products: int | None = None  # matrix products of the case's shape

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": self.name, "role": "bare"}
        return facts if self.products is None else facts | {"products": self.products}


@dataclass
class Case:
    op: str
    shape: Mapping[str, int | float | str]  # see ``describe``
    dtype: torch.dtype
    inputs: Mapping[str, Any]
    definition: Forward  # the reference; called with floats in fp64
    contenders: Sequence[Contender]
    upstream: Mapping[str, Tensor] = field(default_factory=dict)  # by output; none: forward only
    wrt: tuple[str, ...] = ()  # inputs that get a gradient
    backward_alone: bool = False  # the forward pass is done beforehand
    rows: slice | None = None  # tokens whose outputs are checked where all would take too long
    moved: int = 0  # bytes read and written at least
    flops: int = 0
    yardstick: Yardstick | None = None
    axis: str | None = None  # of the plot that this case is a point of
    x: int | None = None  # where on it

    @property
    def passes(self) -> str:
        if self.backward_alone:
            return "backward"
        return "forward + backward" if self.upstream else "forward"

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        optional = {name: getattr(self, name) for name in ("moved", "flops", "axis", "x")}
        return {
            "op": self.op,
            "pass": self.passes,
            "shape": dict(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        } | {name: value for name, value in optional.items() if value}

    def named(self, name: str) -> Contender:
        return next(each for each in self.contenders if each.name == name)

    def call(self, contender: Contender) -> Callable[[], Outputs]:
        forward = contender.forward
        assert callable(forward)
        inputs = dict(self.inputs if contender.inputs is None else contender.inputs)
        if not self.upstream:
            return lambda: _without_gradients(forward, inputs)
        if self.backward_alone:
            outputs = forward(**inputs)
            return lambda: _gradients(outputs, inputs, self.upstream, self.wrt, keep=True)
        return lambda: _gradients(forward(**inputs), inputs, self.upstream, self.wrt)

    def error(self, outputs: Outputs) -> float:
        """Largest error of any output, as a share of the largest true value of that output."""
        names = tuple(name for name in outputs if not name.startswith("d_"))
        truth = self._truth(names)
        worst = 0.0
        for name, value in outputs.items():
            if self.rows is not None:
                value = value[self.rows]
            true = truth[name]
            if value.shape != true.shape:
                raise ValueError(f"{name}: {list(value.shape)} instead of {list(true.shape)}")
            scale = true.abs().max().item() or 1.0
            error = (value.double() - true).abs().max().item() / scale
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst

    def _truth(self, names: tuple[str, ...]) -> Outputs:
        """The definition of these outputs and of the gradients that flow from them alone."""
        if not hasattr(self, "_truths"):
            self._truths: dict[tuple[str, ...], Outputs] = {}
        if names not in self._truths:
            pick = (lambda x: x) if self.rows is None else (lambda x: x[self.rows])

            def wide(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return pick(x.detach()).double() if x.is_floating_point() else pick(x)

            inputs = {name: wide(value) for name, value in self.inputs.items()}
            upstream = {name: wide(value) for name, value in self.upstream.items()}
            for name in self.wrt:
                inputs[name].requires_grad_()

            outputs = self.definition(**inputs)
            outputs = {name: outputs[name] for name in names}
            if upstream:
                outputs = _gradients(outputs, inputs, upstream, self.wrt)
            self._truths[names] = {name: value.double() for name, value in outputs.items()}
        return self._truths[names]


def _without_gradients(forward: Forward, inputs: Mapping[str, Any]) -> Outputs:
    with torch.no_grad():
        return forward(**inputs)


def _gradients(
    outputs: Outputs,
    inputs: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    wrt: tuple[str, ...],
    *,
    keep: bool = False,
) -> Outputs:
    """The outputs and, as ``d_`` and its name, the gradient of each input in ``wrt``."""
    names = [name for name in outputs if name in upstream]
    grads = torch.autograd.grad(
        [outputs[name] for name in names],
        [inputs[name] for name in wrt],
        [upstream[name].to(outputs[name].dtype) for name in names],
        retain_graph=keep,
    )
    detached = {name: value.detach() for name, value in outputs.items()}
    return detached | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}
