"""``entropy_from_logits`` and ``logprobs_and_entropy``."""

from __future__ import annotations

import eager
import peers
import pytest
import shapes
import torch
from cases import Case, Contender, Yardstick, ours, textbook
from torch import Tensor

import segkernels as sk

# Of logits and their gradient together: more than the last-level cache of a large server.
BYTES = 320 << 20


def rows_of(vocab: int, dtype: torch.dtype, backward: bool = False) -> int:
    return -(-BYTES // (vocab * dtype.itemsize * (1 + backward)) // 32) * 32


def _checked(rows: int) -> slice:
    """Some 64 rows over the whole range: fp64 gradients of all would take minutes."""
    return slice(None, None, max(1, rows // 64))


def _new_gradient(logits: Tensor) -> Yardstick | None:
    """The floor of a backward pass on CPUs: memory from the system, written once."""
    if logits.is_cuda:
        return None
    return Yardstick("a new gradient of zeros, alone", lambda: torch.empty_like(logits).zero_())


def entropy(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    backward: bool = False,
) -> Case:
    logits = shapes.logits(rows, vocab, dtype, device)
    upstream = torch.randn(rows, generator=shapes.generator(device, 5), device=device)
    size = logits.numel() * logits.element_size()

    def fused(logits, backend=None):
        return {"entropy": sk.entropy_from_logits(logits, backend=backend)}

    return Case(
        op="entropy_from_logits",
        shape={"rows": rows, "vocab": vocab},
        dtype=dtype,
        inputs={"logits": logits},
        definition=lambda logits: fused(logits, "reference"),
        contenders=[ours(fused), *textbook(eager.entropy), *peers.entropy()],
        upstream={"entropy": upstream} if backward else {},
        wrt=("logits",) if backward else (),
        rows=_checked(rows),
        moved=3 * size if backward else size,
        yardstick=_new_gradient(logits) if backward else None,
    )


def logprobs_and_entropy(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    backward: bool = False,
    forward: bool = True,
) -> Case:
    logits = shapes.logits(rows, vocab, dtype, device)
    g = shapes.generator(device, 5)
    upstream = {
        name: torch.randn(rows, generator=g, device=device) for name in ("logprobs", "entropy")
    }
    size = logits.numel() * logits.element_size()

    def fused(logits, targets, backend=None):
        logprobs, entropy = sk.logprobs_and_entropy(logits, targets, backend=backend)
        return {"logprobs": logprobs, "entropy": entropy}

    return Case(
        op="logprobs_and_entropy",
        shape={"rows": rows, "vocab": vocab},
        dtype=dtype,
        inputs={"logits": logits, "targets": shapes.targets(rows, vocab, device)},
        definition=lambda logits, targets: fused(logits, targets, "reference"),
        contenders=[
            ours(fused),
            *textbook(eager.logprobs_and_entropy),
            *peers.logprobs_and_entropy(),
        ],
        upstream=upstream if backward else {},
        wrt=("logits",) if backward else (),
        rows=_checked(rows),
        backward_alone=not forward,
        moved=(forward + 2 * backward) * size,
        yardstick=_new_gradient(logits) if backward else None,
    )


def masked_entropy(
    rows: int, tokens: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Case:
    """A padded batch of long-tailed responses: rows outside the mask need not be read."""
    lengths = shapes.row_lengths("long-tailed", rows, tokens)
    mask = torch.arange(tokens, device=device) < torch.tensor(lengths, device=device)[:, None]
    mask = mask.flatten()
    logits = shapes.logits(rows * tokens, vocab, dtype, device)

    def fused(logits, mask, backend=None):
        return {"entropy": sk.entropy_from_logits(logits, mask=mask, backend=backend)}

    def plain(logits, mask):
        return {"entropy": eager.entropy(logits)["entropy"] * mask}

    def selected(logits, mask):
        entropy = eager.entropy(logits[mask])["entropy"]
        return {
            "entropy": torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, entropy)
        }

    return Case(
        op="entropy_from_logits",
        shape={
            "layout": "long-tailed",
            "active": sum(lengths),
            "rows": rows * tokens,
            "vocab": vocab,
        },
        dtype=dtype,
        inputs={"logits": logits, "mask": mask},
        definition=lambda logits, mask: fused(logits, mask, "reference"),
        contenders=[
            ours(fused),
            *textbook(plain),
            Contender("eager, action tokens alone", selected, "textbook"),
        ],
        rows=_checked(rows * tokens),
        moved=int(mask.sum()) * vocab * logits.element_size(),
    )


VOCABS = (32_064, 151_936)
storage = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
vocabs = pytest.mark.parametrize("vocab", VOCABS)
passes = pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])


@storage
@vocabs
def test_entropy(side_by_side, vocab, dtype):
    side_by_side(entropy(rows_of(vocab, dtype), vocab, dtype))


@storage
def test_entropy_backward(side_by_side, dtype):
    vocab = max(VOCABS)
    side_by_side(entropy(rows_of(vocab, dtype, True), vocab, dtype, backward=True))


@storage
@vocabs
@passes
def test_logprobs_and_entropy(side_by_side, vocab, dtype, backward):
    rows = rows_of(vocab, dtype, backward)
    side_by_side(logprobs_and_entropy(rows, vocab, dtype, backward=backward))


def test_masked_entropy(side_by_side):
    side_by_side(masked_entropy(8, 512, 32_064, torch.float32))
