"""Inputs of the benchmarks: rows of logits, and ragged token streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import segkernels as sk

THRESHOLD = 1.75
NORMALIZER = sk.LocationNormalizer(0.7668, 0.4705, 0.2569, 2.8339)  # of the Phi-3-mini preset


def generator(device: torch.device | str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def logits(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Tensor:
    """Normal with deviation 3: some five nats of entropy, as an untrained model's."""
    out = torch.empty(rows, vocab, dtype=dtype, device=device)
    block = max(1, (1 << 24) // vocab)  # the fp32 numbers take less memory than the result
    g = generator(device, seed)
    for part in out.split(block):
        part.copy_(torch.randn(part.shape, generator=g, device=device) * 3)
    return out


def targets(rows: int, vocab: int, device: torch.device | str, seed: int = 1) -> Tensor:
    return torch.randint(vocab, (rows,), generator=generator(device, seed), device=device)


def row_lengths(workload: str, rows: int, tokens: int) -> list[int]:
    """uniform: ``rows`` of ``tokens`` each. long-tailed: log-normal up to ``tokens``. giant: one of
    ``tokens`` among ``rows`` of 32."""
    if workload == "uniform":
        return [tokens] * rows
    if workload == "long-tailed":
        draws = torch.randn(rows, generator=generator("cpu", 2)).exp() * (tokens / 8)
        return draws.clamp(1, tokens).long().tolist()
    assert workload == "giant"
    return [32] * (rows // 2) + [tokens] + [32] * (rows - rows // 2)


@dataclass
class Stream:
    """Responses of several lengths with everything per token, packed; and the padded form of it."""

    lengths: list[int]
    tokens: dict[str, Tensor]  # [T] each

    @property
    def count(self) -> int:
        return sum(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.tokens["mask"].device

    @property
    def cu_seqlens(self) -> Tensor:
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return ends.to(torch.int32).to(self.device)

    @property
    def filled(self) -> Tensor:
        """[N, longest] bool, False at padding."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(max(self.lengths), device=self.device) < lengths[:, None]

    def grid(self) -> dict[str, Tensor]:
        """[N, longest] of each, with zeros behind the rows."""
        filled = self.filled
        return {
            name: torch.zeros(filled.shape, dtype=x.dtype, device=x.device).masked_scatter(
                filled, x
            )
            for name, x in self.tokens.items()
        }

    def flat(self, grid: Tensor) -> Tensor:
        return grid[self.filled] if grid.shape == self.filled.shape else grid


FIELDS = ("rewards", "logprobs", "ref_logprobs", "values", "advantages", "returns", "old_values")


def stream(
    lengths: list[int],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Stream:
    """Random numbers where their spread matters little; about one token in eight ends a segment."""
    count, g = sum(lengths), generator(device, seed)
    tokens = {name: torch.randn(count, generator=g, device=device).to(dtype) for name in FIELDS}
    tokens["entropy"] = (torch.randn(count, generator=g, device=device) + 0.6).abs().to(dtype)
    tokens["old_logprobs"] = tokens["logprobs"] + tokens["values"] / 8
    tokens["mask"] = torch.ones(count, dtype=torch.bool, device=device)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    tokens["ends"] = sk.segment_ends(
        tokens["entropy"], tokens["mask"], THRESHOLD, cu_seqlens=cu, backend="reference"
    )
    return Stream(lengths, tokens)
