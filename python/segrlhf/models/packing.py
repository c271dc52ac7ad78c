"""How a model reads examples: the packings that its attention can do, tried on the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..configs import Range, flag
from ..data.batch import (
    Batch,
    Example,
    Packing,
    Sizes,
    make_batch,
    plan_batches,
    token_budget,
)
from ..errors import UserError, first_line
from ..runtime.distributed import say

# Largest relative difference, in the Euclidean norm, of what two packings of an example give; by
# whether the model computes in float32. Rounding alone gives some 1e-6 and 1e-2.
TOLERANCE = {True: 1e-4, False: 5e-2}

_CHOICES: dict[str, tuple[Packing, ...]] = {  # by attention, best first
    "flex_attention": ("flex", "none"),
    "flash_attention_2": ("varlen", "none"),
    "flash_attention_3": ("varlen", "none"),
}
_SUITS = {"flex": ("flex_attention",), "mask": ("sdpa", "eager")}


@dataclass(kw_only=True)
class PackingConfig:
    """Flags on how examples are read."""

    max_tokens_per_batch: int | None = flag(
        None,
        "Tokens, padding included, in one pass through a model; default 4096, or the largest "
        "example. Lower it to save memory: results stay the same to rounding.",
        limits=Range(min=1),
    )
    packing: Literal["auto", "flex", "mask", "varlen", "none"] = flag(
        "auto",
        "How rows are read. mask: a prompt once for all its responses, by a 4-D mask "
        "(--attn_implementation sdpa or eager). flex: the same over one packed stream "
        "(flex_attention). varlen: one stream, a prompt for each response (flash_attention_2). "
        "none: padded rows. auto: what the attention offers, if rewards are the same.",
    )


def attention_of(model: nn.Module) -> str:
    """The attention implementation of a model, wrapped or not."""
    from accelerate.utils import extract_model_from_parallel

    config: Any = extract_model_from_parallel(model).config
    return config.get_text_config()._attn_implementation or "eager"


def model_inputs(model: nn.Module, batch: Batch, packing: Packing) -> dict[str, Any]:
    """What ``model``, wrapped or not, takes to read ``batch``."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if packing == "none":
        return {**inputs, "attention_mask": batch.attention_mask}
    inputs["position_ids"] = batch.position_ids
    if packing == "mask":
        attends = batch.attends()
        if attention_of(model) != "sdpa":  # others add the mask to the scores
            dtype = _dtype(model)
            scores = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
            attends = scores.masked_fill_(~attends, torch.finfo(dtype).min)
        inputs["attention_mask"] = attends
    elif packing == "flex":
        inputs["attention_mask"] = _block_mask(batch)
    return inputs


def _block_mask(batch: Batch) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    example, branch = batch.example[0], batch.branch[0]

    def attends(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        shared = (branch[k] == 0) | (branch[k] == branch[q])
        return (k <= q) & (example[k] == example[q]) & shared

    # Compiled, it never forms the dense mask.
    create = torch.compile(create_block_mask) if example.is_cuda else create_block_mask
    return create(attends, None, None, len(example), len(example), str(example.device))


@dataclass(frozen=True)
class Reader:
    """How examples become batches for one model."""

    packing: Packing
    max_tokens: int
    pad_token_id: int = 0

    def plan(self, sizes: Sizes) -> list[np.ndarray]:
        """``plan_batches`` for this packing and budget."""
        return plan_batches(sizes, self.packing, self.max_tokens)

    def batch(self, examples: Sequence[Example], device: torch.device | str) -> Batch:
        """The examples on that device."""
        # A compiled kernel sees four lengths of streams, not as many as there are batches.
        multiple = -(-self.max_tokens // (4 * 128)) * 128 if self.packing == "flex" else 1
        return make_batch(
            examples, self.packing, pad_token_id=self.pad_token_id, pad_to_multiple_of=multiple
        ).to(device)


# What a model says at response tokens: (model, batch, packing) -> [N, ...] floats.
Read = Callable[[nn.Module, Batch, Packing], Tensor]


def make_reader(
    model: nn.Module,
    options: PackingConfig,
    read: Read,
    sizes: Sizes,
    example: Callable[[int], Example],
    *,
    pad_token_id: int = 0,
    mixed_precision: bool = False,
) -> Reader:
    """The reader of examples of these ``sizes``, tried on the largest of them; says its choice.

    ``example`` gives an example by number; ``mixed_precision`` says that ``model`` runs in
    autocast. All processes must call it. UserError where ``options.max_tokens_per_batch`` is too
    small, and where the packing asked for does not work.
    """
    largest = int(sizes.tokens("mask").argmax())
    packing, line = choose_packing(
        model,
        options.packing,
        read,
        example(largest),
        pad_token_id=pad_token_id,
        mixed_precision=mixed_precision,
    )
    max_tokens = token_budget(options.max_tokens_per_batch, sizes, packing)
    say(f"{line}; up to {max_tokens:,} tokens a batch")
    return Reader(packing, max_tokens, pad_token_id)


@torch.no_grad()
def choose_packing(
    model: nn.Module,
    asked: str,
    read: Read,
    example: Example,
    *,
    pad_token_id: int = 0,
    mixed_precision: bool = False,
) -> tuple[Packing, str]:
    """The best packing for this model, and a line that says which and why.

    ``asked`` is a flag's value. Every packing but "none" is tried on ``example``: what ``read``
    gives must be what it gives for padded rows, to rounding (``TOLERANCE``). Where it is not, the
    next one is taken, or UserError raised if ``asked`` names one. All processes must call it.
    """
    attention = attention_of(model)
    choices = _CHOICES.get(attention, ("mask", "none")) if asked == "auto" else (asked,)
    if asked in _SUITS and attention not in _SUITS[asked]:
        raise UserError(
            f"packing: expected one that suits --attn_implementation {attention}, got {asked}, "
            f"which is for {' or '.join(_SUITS[asked])}; pass --packing auto"
        )
    if choices == ("none",):
        return "none", "packing: none, one padded row a response"
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # dropout would differ
    try:

        def tried(packing: Any) -> Tensor:
            batch = make_batch([example], packing, pad_token_id=pad_token_id).to(device)
            return read(model, batch, packing).double()

        expected = tried("none")
        refused: list[str] = []
        exact = _dtype(model) == torch.float32 and not mixed_precision
        for packing in choices:
            if packing == "none":
                return "none", f"packing: none, one padded row a response ({'; '.join(refused)})"
            try:
                found = tried(packing)
                error = float((found - expected).norm() / expected.norm())
                reason = "" if error <= TOLERANCE[exact] else f"differ by {error:.1e} of their norm"
            except Exception as failure:  # whatever a model does with inputs that it cannot read
                error, reason = float("nan"), f"fail: {type(failure).__name__}: "
                reason += first_line(failure)[:200]
            if not any(gather_object([bool(reason)])):
                return packing, (  # type: ignore[return-value]
                    f"packing: {packing} ({attention}), which gives the numbers of padded rows: "
                    f"relative difference {error:.1e} over {len(expected):,} response tokens"
                )
            refused.append(f"with {packing}, numbers {reason or 'differ on another process'}")
    finally:
        model.train(was_training)
    raise UserError(
        f"packing: expected a way of reading that gives the numbers of padded rows, got {asked}: "
        f"{'; '.join(refused)}; pass --packing auto"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    """In which it computes."""
    weight = next(model.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
