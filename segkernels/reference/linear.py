"""Log-probabilities and entropy from hidden states in plain PyTorch: through the logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from ._actions import accumulation_dtype
from .token_stats import put_rows, row_stats, take_per_row, take_rows


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    dtype = accumulation_dtype(hidden, weight, bias)
    shape = hidden.shape[:-1]
    rows = take_rows(hidden, shape, mask)  # [A, D]
    # Contiguous: libraries sum the products of other strides in another order.
    rows, weight = rows.to(dtype).contiguous(), weight.to(dtype).contiguous()
    logits = linear(rows, weight, None if bias is None else bias.to(dtype))
    stats = row_stats(logits, *take_per_row(targets, temperature, shape, mask))
    return put_rows(stats, shape, mask)
