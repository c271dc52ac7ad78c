"""What the tunable sizes of the GPU kernels are worth: the last step of ``make gpu``.

Slice widths and chunk heights of the linear forms by the time of their three products on one tile,
scaled to the whole shape; UNROLL and WARPS of the row kernels by the bandwidth that they reach.
Measured in workers; ``gpu.py``, which imports no torch, writes the recommendation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

Clock = Callable[[Callable[[], Any], int], float]  # seconds of so many calls

SHAPE = (8192, 4096, 131_072)  # tokens, hidden size, vocabulary
HEIGHTS = (512, 1024, 1408, 2048)
# Whole waves of products with tiles of 128 x 256 on 132 multiprocessors.
WIDTHS = (8448, 16_896, 25_344)


def _median(clock: Clock, run) -> float:
    run()
    return statistics.median(clock(run, 1) for _ in range(5))


def tiles(device: str, clock: Clock, dry: bool) -> dict[str, Any]:
    """Seconds of the whole shape's products, were it cut into tiles of each height and width."""
    import torch

    from segkernels import projection

    tokens, size, vocab = (16, 8, 96) if dry else SHAPE
    heights, widths = ((4, 8), (32, 48)) if dry else (HEIGHTS, WIDTHS)
    dtype = torch.bfloat16
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    hidden, weight = random(tokens, size), random(vocab, size)
    space = projection.Space.of("triton", None, hidden)
    rows = projection.HiddenRows(hidden, None, dtype)
    height = space.height(rows)
    now = height, space.columns(height, weight, sums=True)
    tile = random(max(*heights, height) * max(*widths, now[1]))
    dhidden = torch.zeros(tokens, size, device=device)
    dweight = torch.zeros(max(*widths, now[1]), size, device=device)

    def products(height: int, width: int) -> dict[str, Any]:
        x, panel = hidden[:height], weight[:width]
        part = tile[: height * width].view(height, width)
        runs = {
            "logits": lambda: torch.mm(x, panel.t(), out=part),
            "dX": lambda: projection.add_product(dhidden[:height], part, panel, False),
            "dW": lambda: projection.add_product(dweight[:width], part.t(), x, False),
        }
        count = (tokens / height) * (vocab / width)
        seconds = {name: _median(clock, run) * count for name, run in runs.items()}
        return {"height": height, "width": width, "seconds": seconds}

    sizes = dict.fromkeys([now, *((h, w) for h in heights for w in widths)])
    points = [products(*each) for each in sizes]
    return {"sweep": "tiles", "points": points}


# (warps, vectors in flight forward, backward); the first is what is used.
ROW_KERNELS = ((4, 4, 2), (4, 8, 4), (4, 2, 1), (8, 4, 2), (8, 2, 1), (2, 8, 4))


def row_kernels(clock: Clock, warps: int, forward: int, backward: int) -> dict[str, Any]:
    """Seconds of the row kernels over 8,192 x 151,936 bf16 logits, built with these sizes.

    In a process of its own: Triton compiles a kernel for the constants that it finds first.
    """
    import shapes
    import torch
    import triton.language as tl

    import segkernels as sk
    from segkernels.triton import vocab as kernels

    kernels.LANES = tl.constexpr(32 * warps)
    kernels.UNROLL = tl.constexpr(forward)
    kernels.UNROLL_BACKWARD = tl.constexpr(backward)
    kernels.OPTIONS["num_warps"] = warps
    rows, vocab = 8192, 151_936
    logits = shapes.logits(rows, vocab, torch.bfloat16, "cuda").requires_grad_()
    targets = shapes.targets(rows, vocab, "cuda")
    upstream = [torch.randn(rows, device="cuda") for _ in range(2)]
    with torch.no_grad():
        read = _median(clock, lambda: sk.logprobs_and_entropy(logits, targets))
    out = sk.logprobs_and_entropy(logits, targets)
    written = _median(clock, lambda: torch.autograd.grad(out, logits, upstream, retain_graph=True))
    return {
        "sweep": "row kernels",
        "warps": warps,
        "unroll": [forward, backward],
        "seconds": {"forward": read, "backward": written},
        "moved": {"forward": logits.nbytes, "backward": 2 * logits.nbytes},
    }


def recommendation(lines: list[Mapping[str, Any]], bandwidth: float | None) -> str:
    """What the sweep found, beside what is used: a table, and the best of each."""
    out: list[str] = []
    for line in lines:
        if line["sweep"] != "tiles":
            continue
        points = line["points"]
        out.append("height x width    logits      dX      dW     all, ms")
        for point in points:
            each = [point["seconds"][name] * 1e3 for name in ("logits", "dX", "dW")]
            cells = "".join(f"{x:8.2f}" for x in (*each, sum(each)))
            used = "   (now)" if point is points[0] else ""
            out.append(f"{point['height']:6} x {point['width']:6}  {cells}{used}")
        best = min(points, key=lambda point: sum(point["seconds"].values()))
        gain = sum(best["seconds"].values()) / sum(points[0]["seconds"].values())
        out.append(f"best: {best['height']} x {best['width']}, {gain:.1%} of the time now")
    settings = [line for line in lines if line["sweep"] == "row kernels"]
    if settings:
        out.append("warps  unroll   forward  backward, TB/s")
    for line in settings:
        rates = [line["moved"][name] / line["seconds"][name] / 1e12 for name in line["seconds"]]
        unroll = "{}, {}".format(*line["unroll"])
        out.append(f"{line['warps']:5}  {unroll:>6}  {rates[0]:8.2f}  {rates[1]:8.2f}")
    for name in ("forward", "backward") if settings else ():
        best = min(settings, key=lambda line: line["seconds"][name])
        rate = best["moved"][name] / best["seconds"][name]
        share = "" if bandwidth is None else f", {rate / bandwidth:.0%} of the copy bandwidth"
        unroll = best["unroll"][name == "backward"]
        out.append(f"best {name}: {best['warps']} warps, unroll {unroll}{share}")
    return "\n".join(out)
