"""What bounds the ops on a processor: ``python benchmarks/bench_limits.py``, a minute.

Each part takes an op apart, or runs it where one resource is not needed, with the alternatives in
turn. The quickest call of many counts: what a machine can do, not what it does beside others.
"""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import eager
import shapes
import torch
from timing import Alternation, Timed, on_threads

import segkernels as sk
from segkernels import native
from segkernels.native.rewards import curve_address

KEPT = {name: str(1 << 30) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}


def quickest(functions: dict[Any, Callable[[], object]], seconds: float = 1.0) -> dict[Any, float]:
    """Seconds of each, in turn."""
    alternation = Alternation({name: Timed(f) for name, f in functions.items()}, seconds=seconds)
    return {name: min(samples) for name, samples in alternation.run().items()}


def entropy() -> None:
    """From the second-level cache and from memory, in two widths: is it memory or arithmetic?"""
    print("entropy_from_logits, the kernel on one thread: G elements/s")
    calls, elements = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        for place, bytes_ in (("1 MiB, in cache", 1 << 20), ("256 MiB", 1 << 28)):
            count = bytes_ // dtype.itemsize // 32_768
            logits = shapes.logits(count, 32_768, dtype, "cpu")
            rows = native.extension.VocabRows(
                *(native.floats(logits), count, 32_768, 1, 32_768, 0, 0, 0, 0, 1.0)
            )
            h, stats = torch.empty(count), torch.empty(count, 3)
            name = f"{str(dtype)[6:]:9} {place}"
            elements[name] = logits.numel()
            # The default argument keeps the logits.
            calls[name] = lambda rows=rows, h=h, stats=stats, logits=logits: (
                native.extension.vocab_forward(rows, 0, 0, native.ptr(h), native.ptr(stats), 1)
            )
    for name, seconds in quickest(calls).items():
        print(f"  {name:26} {elements[name] / seconds / 1e9:6.2f}")


def backward() -> None:
    """Into memory that the system has yet to hand out, and over the logits."""
    print("logprobs_and_entropy, forward + backward, 1,024 x 32,064 float32: ms")
    logits = shapes.logits(1024, 32_064, torch.float32, "cpu").requires_grad_()
    targets = shapes.targets(1024, 32_064, "cpu")

    def both(inplace: bool) -> None:
        # Not a leaf: its memory may become the gradient's.
        x = logits.detach().requires_grad_().view_as(logits)
        logprobs, h = sk.logprobs_and_entropy(x, targets, inplace_backward=inplace)
        torch.autograd.grad((logprobs + h).sum(), x)

    table(
        {
            "to new memory": lambda: both(False),
            "over the logits": lambda: both(True),
            "new memory, zeros alone": lambda: torch.zeros(logits.shape),
        }
    )


def linear() -> None:
    """Beside the product that it cannot do without."""
    print("linear_logprobs_and_entropy, forward, 256 x 1,024 x 32,000 float32: ms")
    g = shapes.generator("cpu")
    hidden, weight = (torch.randn(n, 1024, generator=g) for n in (256, 32_000))
    targets, out = shapes.targets(256, 32_000, "cpu"), torch.empty(256, 32_000)
    table(
        {
            "one bare product": lambda: torch.mm(hidden, weight.t(), out=out),
            "the op": lambda: sk.linear_logprobs_and_entropy(hidden, weight, targets),
        }
    )


def table(calls: dict[str, Callable[[], object]]) -> None:
    """Of one thread and of two, milliseconds."""
    runs = {
        (name, count): on_threads(count, call) for name, call in calls.items() for count in (1, 2)
    }
    seconds = quickest(runs)
    for name in calls:
        one, two = (seconds[name, count] * 1e3 for count in (1, 2))
        print(f"  {name:26} {one:8.2f} {two:8.2f} on two threads, {one / two:.2f}x")


def advantages() -> None:
    """Its kernel and what stands around it."""
    print("boundaries to advantages, 64 x 1,024, one thread: microseconds")
    torch.set_num_threads(1)
    fields = ("entropy", "rewards", "logprobs", "ref_logprobs", "values")
    loop = eager.boundaries_to_advantages(eager.gae_over_time)

    def stream(rows: int, tokens: int) -> dict[str, torch.Tensor]:
        x = shapes.stream([tokens] * rows, "cpu").grid()
        return {name: x[name] for name in (*fields, "mask")}

    def op(entropy, rewards, logprobs, ref_logprobs, values, mask):
        return sk.segment_ends_and_advantages(
            *(entropy, rewards, logprobs, ref_logprobs, values, mask, shapes.THRESHOLD),
            normalizer=shapes.NORMALIZER,
        )

    def kernel(entropy, rewards, logprobs, ref_logprobs, values, mask):
        rows, ends = native.rows(rewards, None), torch.empty_like(mask)
        curve = shapes.NORMALIZER.curve.packed
        outputs = [torch.empty_like(rewards) for _ in range(4)]

        def run() -> None:
            native.extension.segment_ends_and_advantages_fwd(
                native.floats(entropy),
                (shapes.THRESHOLD, False, 0, True),
                native.floats(rewards),
                native.floats(logprobs),
                native.floats(ref_logprobs),
                native.floats(values),
                native.ptr(mask),
                rows,
                (curve_address(curve), 0, False, 10.0),
                0.01,
                (1.0, 0.95),
                native.ptr(ends),
                tuple(map(native.ptr, outputs)),
                1,
            )

        return run

    large, small = stream(64, 1024), stream(1, 8)
    seconds = quickest(
        {
            "the op": lambda: op(**large),
            "its kernel alone": kernel(**large),
            "the op on 8 tokens": lambda: op(**small),
            "eager, GAE loops over time": lambda: loop(**large),
        }
    )
    for name, t in seconds.items():
        print(f"  {name:26} {t * 1e6:10.1f}")


def outputs() -> None:
    x = shapes.stream([1024] * 1024, "cpu").grid()
    args = [x[n] for n in ("rewards", "ends", "logprobs", "ref_logprobs", "values", "mask")]
    run = functools.partial(sk.segment_advantages, *args, normalizer=shapes.NORMALIZER)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    table({f"{pages:,} new pages": run})


def main() -> None:
    if sys.argv[1:] == ["outputs"]:
        outputs()
        return
    print(native.extension.build_info())
    entropy()
    backward()
    linear()
    advantages()
    print("segment_advantages, 1,024 x 1,024, as malloc is and made to keep memory: ms", flush=True)
    for environment in ({}, KEPT):
        here = [sys.executable, __file__, "outputs"]
        subprocess.run(here, env={**os.environ, **environment}, check=True)


if __name__ == "__main__":
    main()
