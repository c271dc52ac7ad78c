"""What the tunable sizes of the GPU kernels are worth: the last step of ``make gpu``.

Slice widths and chunk heights of the linear forms by the time of their products on one tile, scaled
to the whole shape; the configurations of the row kernels by the bandwidth that they reach. Measured
in workers; ``gpu.py``, which imports no torch, writes the recommendation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
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


def tiles(device: str, clock: Clock, dry: bool) -> dict[str, Any]:
    """Seconds of the whole shape's products, were it cut into tiles of each height and width."""
    import torch

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

    def products(height: int, width: int, op: str) -> dict[str, Any]:
        x, panel = hidden[:height], weight[:width]
        part = tile[: height * width].view(height, width)
        runs = {
            "logits": lambda: torch.mm(x, panel.t(), out=part),
            "dX": lambda: add_product(dhidden[:height], part, panel, start=True),
            "dW": lambda: add_product(dweight[:width], part.t(), x, start=True),
        }
        count = (tokens / height) * (vocab / width)
        seconds = {name: _median(clock, run) * count for name, run in runs.items()}
        return {"op": op, "height": height, "width": width, "seconds": seconds}

    return {"sweep": "tiles", "points": [products(*each) for each in sizes]}


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
        out.append(f"{op}, rows x columns    logits      dX      dW     all, ms")
        total = {}
        for point in found:
            name = f"{point['height']} x {point['width']}"
            total[name] = sum(point["seconds"][product] for product in needed)
            times = [*point["seconds"].values(), total[name]]
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
