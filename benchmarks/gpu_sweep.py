"""What the tunable sizes of the GPU kernels are worth: the last step of ``make gpu``.

Slice widths and chunk heights of the linear forms by the time of the whole op, beside that of their
products on one tile, scaled to the whole shape; the configurations of the row kernels by the
bandwidth that they reach. Measured in workers; ``gpu.py``, which imports no torch, writes the
recommendation.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Clock = Callable[[Callable[[], Any], int], float]  # seconds of so many calls

SHAPE = (8192, 4096, 131_072)  # tokens, hidden size, vocabulary
# The linear form takes all rows and a slice of the columns at a time, the policy loss some rows and
# all columns. Multiples of 8,448 columns fill 132 multiprocessors with blocks of 256.
WIDTHS = (8448, 12_032, 16_896, 21_888, 25_344)
HEIGHTS = (512, 768, 1024, 1280, 1408)
PRODUCTS = {"linear form": ("logits", "logits", "dX", "dW"), "policy loss": ("logits", "dX", "dW")}

# (warps, vectors in flight forward, backward, bytes of a span); the first is the default.
ROW_KERNELS = (
    (4, 4, 2, 64 << 10),
    (8, 4, 2, 64 << 10),
    (4, 8, 4, 64 << 10),
    (2, 8, 4, 64 << 10),
    (8, 2, 1, 64 << 10),
    (4, 2, 1, 64 << 10),
    (2, 4, 2, 64 << 10),
    (4, 4, 2, 128 << 10),
    (4, 4, 2, 32 << 10),
)


def _median(clock: Clock, run: Callable[[], Any]) -> float:
    run()
    return statistics.median(clock(run, 1) for _ in range(5))


@contextlib.contextmanager
def tiled(op: str, height: int, width: int) -> Iterator[None]:
    """The op cuts bf16 logits into such tiles, where its workspace has room for neither larger ones
    nor all."""
    from segkernels.projection import TILINGS, WORKSPACE, Tiling

    default = TILINGS["triton"]
    share = (height * width * 2 + 1) / WORKSPACE["triton"]  # of the tile, and half an element
    linear = op == "linear form"
    TILINGS["triton"] = (
        Tiling(share, columns=width) if linear else Tiling(default.tile, rows=height)
    )
    try:
        yield
    finally:
        TILINGS["triton"] = default


def tiles(device: str, clock: Clock, dry: bool) -> dict[str, Any]:
    """Seconds of the whole op, forward and backward, in tiles of each height and width, and of its
    products, as if those of one tile were repeated."""
    import shapes
    import torch

    import segkernels as sk
    from segkernels.projection import add_product

    tokens, size, vocab = (16, 8, 96) if dry else SHAPE
    sizes = [(tokens, width, "linear form") for width in ((32, 48) if dry else WIDTHS)]
    sizes += [(height, vocab, "policy loss") for height in ((4, 8) if dry else HEIGHTS)]
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device).to(torch.bfloat16)

    hidden, weight = random(tokens, size), random(vocab, size)
    tile = random(max(height * width for height, width, _ in sizes))
    dhidden = torch.empty(tokens, size, device=device)
    dweight = torch.empty_like(weight)
    targets = shapes.targets(tokens, vocab, device)
    upstream = random(tokens).float()

    def linear_form(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = sk.linear_logprobs_and_entropy(x, w, targets, backend="triton")
        return torch.dot(logprobs, upstream) + entropy.sum()

    def policy_loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(targets, dtype=torch.bool)[None]
        streams = targets[None], torch.zeros_like(upstream)[None], upstream[None], mask
        # Nothing is clipped: every row has a gradient.
        return sk.linear_policy_loss(x[None], w, *streams, clip=math.inf, backend="triton").loss

    losses = {"linear form": linear_form, "policy loss": policy_loss}

    def whole(op: str, height: int, width: int) -> float:
        x, w = (t.detach().requires_grad_() for t in (hidden, weight))
        with tiled(op, height, width):
            return _median(clock, lambda: torch.autograd.grad(losses[op](x, w), (x, w)))

    def point(height: int, width: int, op: str) -> dict[str, Any]:
        x, panel = hidden[:height], weight[:width]
        part = tile[: height * width].view(height, width)
        runs = {
            "logits": lambda: torch.mm(x, panel.t(), out=part),
            "dX": lambda: add_product(dhidden[:height], part, panel, start=True),
            "dW": lambda: add_product(dweight[:width], part.t(), x, start=True),
        }
        count = (tokens / height) * (vocab / width)
        seconds = {name: _median(clock, run) * count for name, run in runs.items()}
        seconds["op"] = whole(op, height, width)
        return {"op": op, "height": height, "width": width, "seconds": seconds}

    return {"sweep": "tiles", "points": [point(*each) for each in sizes]}


def row_kernels(device: str, clock: Clock, dry: bool, sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds of the row kernels over 8,192 x 151,936 bf16 logits in a configuration."""
    import shapes
    import torch

    from segkernels.triton import vocab as kernels
    from segkernels.vocab import Rows

    config = kernels.Config(*sizes)
    count, vocab = (2, 5000) if dry else (8192, 151_936)
    logits = shapes.logits(count, vocab, torch.bfloat16, device)
    dlogits = torch.empty_like(logits)
    rows = Rows(logits, shapes.targets(count, vocab, device), 1.0)
    logprobs, entropy = torch.empty(2, count, device=device)
    stats = torch.empty(count, 3, device=device)
    dlogprobs, dentropy = torch.randn(2, count, device=device)

    def forward() -> None:
        kernels.forward(rows, None, logprobs, entropy, stats, config)

    def backward() -> None:
        kernels.backward(rows, stats, dlogprobs, dentropy, dlogits, config)

    return {
        "sweep": "row kernels",
        "sizes": list(sizes),
        "seconds": {"forward": _median(clock, forward), "backward": _median(clock, backward)},
        "moved": {"forward": logits.nbytes, "backward": 2 * logits.nbytes},
    }


def recommendation(lines: Sequence[Mapping[str, Any]], bandwidth: float | None) -> str:
    """What the sweep found, and the best of it."""
    out: list[str] = []
    points = [point for line in lines if line["sweep"] == "tiles" for point in line["points"]]
    for op, needed in PRODUCTS.items():
        found = [point for point in points if point["op"] == op]
        if not found:
            continue
        out.append(f"{op}, rows x columns    logits      dX      dW products      op, ms")
        total = {}
        for point in found:
            name, seconds = f"{point['height']} x {point['width']}", point["seconds"]
            total[name] = seconds["op"]
            times = [seconds[product] for product in dict.fromkeys(needed)]
            times += [sum(seconds[product] for product in needed), seconds["op"]]
            out.append(f"{name:>{len(op) + 16}}  " + "".join(f"{x * 1e3:8.2f}" for x in times))
        best = min(total, key=lambda name: total[name])
        out.append(f"best: {best}")
    settings = [line for line in lines if line["sweep"] == "row kernels"]
    rates: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    if settings:
        out.append("row kernels: warps, unroll forward and backward, KiB a span; TB/s")
    for line in settings:
        *sizes, span = line["sizes"]
        name = ", ".join(map(str, (*sizes, span >> 10)))
        for way, found in rates.items():
            found[name] = line["moved"][way] / line["seconds"][way] / 1e12
        out.append(f"{name:>14}" + "".join(f"{found[name]:9.2f}" for found in rates.values()))
    for way, found in rates.items():
        if found:
            best = max(found, key=lambda name: found[name])
            share = "" if bandwidth is None else f", {found[best] * 1e12 / bandwidth:.0%} of a copy"
            out.append(f"best {way}: {best}{share}")
    return "\n".join(out)
