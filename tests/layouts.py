"""Named ragged cases, the same for every op: row lengths and action masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = (0, 1, 2, 31, 32, 33, 1023, 1025)
GIANT = 20_000


@dataclass
class Case:
    """One token stream in its flat form; ``grid`` gives the padded form of the same rows."""

    lengths: list[int]
    mask: Tensor  # [T] bool

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    def grid(self, flat: Tensor, fill: float | bool) -> Tensor:
        """[N, longest] form of a flat tensor; padding holds ``fill`` (poison it with NaN)."""
        width = max(self.lengths, default=0) + 1  # one column of padding even for the longest
        out = torch.full((len(self.lengths), width), fill, dtype=flat.dtype)
        for row, part in enumerate(flat.split(self.lengths)):
            out[row, : len(part)] = part
        return out

    def flat(self, grid: Tensor) -> Tensor:
        return torch.cat([grid[row, :n] for row, n in enumerate(self.lengths)])


def _case(lengths: list[int], keep: str, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    for part in mask.split(lengths):
        if keep == "holes":
            part[torch.rand(len(part), generator=g) < 0.3] = False
        elif keep == "response":  # a prompt in front
            part[: len(part) // 3] = False
        elif keep == "none":
            part[:] = False
        elif keep == "one" and len(part):
            part[:] = False
            part[len(part) // 2] = True
    return Case(lengths, mask)


CASES: dict[str, Case] = {
    "full": _case([5, 7, 3, 9], "all"),
    "response": _case([8, 12, 31, 33], "response"),
    "holes": _case([17, 64, 1, 40, 2, 33], "holes", 1),
    "empty rows": _case([0, 5, 0, 0, 3, 0], "all"),
    "no action token": _case([4, 9], "none"),
    "one action token": _case([1, 6, 31, 2], "one"),
    "lengths": _case(list(LENGTHS), "holes", 2),
    "giant": _case([3, GIANT, 0, 40], "holes", 3),
    "two tokens": _case([2, 2], "all"),
}


@st.composite
def cases(draw, even: bool = False) -> Case:
    """Random layouts; ``even`` gives an even number of rows (pairs)."""
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=8))
    if even and len(lengths) % 2:
        lengths.append(draw(st.sampled_from(LENGTHS)))
    keep = draw(st.sampled_from(["all", "holes", "response", "none", "one"]))
    return _case(lengths, keep, draw(st.integers(0, 2**31 - 1)))
