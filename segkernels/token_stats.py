"""Entropy and log-probabilities of next-token distributions, from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import native, vocab
from .backend import choose, row_kernels
from .layout import (
    check_bools,
    check_floats,
    check_like,
    check_tensor,
    each,
    number,
    values_may_be_checked,
)

IGNORED = -100


def entropy_from_logits(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Entropy of every row's distribution, in nats.

    With z = logits / temperature, p = softmax(z) and d = z - max z::

        H = logsumexp(z) - sum_v p_v z_v = log(sum_v exp d_v) - sum_v p_v d_v
        dH/dz_v = -p_v (log p_v + H)

    A logit of -inf (a banned token) adds exactly 0 to H and to every gradient; so does one whose
    probability is below 2e-38 of the largest, in the native implementation, whose exp is within
    1.1 ulp (1.4 without a fused multiply-add). A row that holds NaN or +inf, or nothing but -inf,
    gives NaN.

    Args:
        logits: ``[..., V]``, any leading shape, which may be a view such as ``logits[:, :-1]``.
            float32, bfloat16 or float16, read as float32; float64 runs the reference.
        temperature: positive; one float, or a tensor of one per row. No gradient flows to it.
        mask: bool of the leading shape; rows with False are not read, give 0 and get no gradient.
        inplace_backward: the backward pass writes the gradient over the logits instead of
            allocating another ``[..., V]``. It destroys them: nothing may read the logits (or a
            tensor that shares their memory) after it. Autograd raises where something that it
            saved was lost, a second backward pass included. The logits must be contiguous and
            computed by another op. ``torch.compile`` may copy them first.
        backend: see ``segkernels.backend``.

    Returns:
        float32 (float64 for float64 logits) of the leading shape, differentiable in ``logits``.

    Raises:
        ValueError: shapes that disagree, a temperature that is not positive and finite,
            ``inplace_backward`` on logits that are a leaf or not contiguous, or on the reference.
        TypeError: dtypes that do not fit.

    Source: the entropy that cuts segments, arXiv 2501.02790, section 2.2.
    """
    return _token_stats(
        "entropy_from_logits", logits, None, temperature, mask, inplace_backward, backend
    )[1]


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every row's target, and the row's entropy, from one read of the logits.

    ::

        logprob = z_y - logsumexp(z)        d logprob / dz_v = 1[v = y] - p_v

    with z, p and the entropy as in :func:`entropy_from_logits`. Row i predicts ``targets[i]``: the
    caller shifts, and ``mask`` is aligned with ``targets``.

    Args:
        logits: as in :func:`entropy_from_logits`.
        targets: integers of the leading shape, in [0, V); -100 gives log-probability 0 and no
            gradient from it (the entropy is still computed).
        temperature: as in :func:`entropy_from_logits`.
        mask: as there; targets of rows with False may be anything.
        inplace_backward: as there; it destroys the logits.
        backend: see ``segkernels.backend``.

    Returns:
        (logprobs, entropy) in nats, of the leading shape and differentiable in ``logits``.

    Raises:
        ValueError: as there, and a target out of range (CPU tensors, or SEGKERNELS_DEBUG=1).
        TypeError: dtypes that do not fit.
    """
    logprobs, entropy = _token_stats(
        "logprobs_and_entropy", logits, targets, temperature, mask, inplace_backward, backend
    )
    assert logprobs is not None
    return logprobs, entropy


def _token_stats(
    op: str,
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
    inplace_backward: bool,
    backend: str | None,
) -> tuple[Tensor | None, Tensor]:
    check_floats("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: expected shape [..., vocabulary], got {list(logits.shape)}; "
            "pass one row of at least one logit per token"
        )
    row = logits.select(-1, 0)
    targets, scalar, temperatures = check_row_inputs(
        "logits[..., 0]", row, targets, temperature, mask
    )
    chosen = choose(op, logits, backend=backend)
    if inplace_backward:
        _check_inplace_backward(logits, chosen)
    if chosen == "reference":
        from .reference import token_stats as reference

        if values_may_be_checked(logits):
            check_row_values(logits.shape[-1], targets, temperatures, mask)
        return reference.token_stats(logits, targets, per_row(scalar, temperatures), mask)
    logprobs, entropy, _ = _token_stats_fwd(
        logits, targets, scalar, *each(Tensor.float, temperatures), mask, inplace_backward, chosen
    )
    return (None if targets is None else logprobs), entropy


def _check_inplace_backward(logits: Tensor, backend: str) -> None:
    if backend == "reference":
        raise ValueError(
            "inplace_backward: expected False for the reference, whose backward pass is autograd's "
            "own, got True; drop it, or choose another backend"
        )
    if not logits.is_contiguous():
        raise ValueError(
            "inplace_backward: expected contiguous logits, got a view with strides "
            f"{list(logits.stride())}; pass the logits of all positions with a mask, or drop it"
        )
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward: expected logits that another op computed, got a leaf, whose values "
            "would be lost; drop it, or pass logits.clone()"
        )


def check_row_inputs(
    like_name: str,
    like: Tensor,
    targets: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> tuple[Tensor | None, float, Tensor | None]:
    """(targets as int64, temperature of all rows, temperatures of the single rows or None)."""
    if mask is not None:
        check_bools("mask", mask, like_name, like)
    if targets is not None:
        check_tensor("targets", targets)
        kind = targets.dtype
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise TypeError(f"targets: expected integer token ids, got {kind}; pass targets.long()")
        check_like("targets", targets, like_name, like)
        targets = targets.long()
    if isinstance(temperature, Tensor):
        check_floats("temperature", temperature)
        check_like("temperature", temperature, like_name, like)
        return targets, 1.0, temperature.detach()
    if not 0 < number("temperature", temperature) < math.inf:
        raise _bad_temperature(temperature)
    return targets, float(temperature), None


def per_row(scalar: float, temperatures: Tensor | None) -> float | Tensor:
    return scalar if temperatures is None else temperatures


def check_row_values(
    vocab: int, targets: Tensor | None, temperatures: Tensor | None, mask: Tensor | None
) -> None:
    """Targets in [0, V) or IGNORED and positive temperatures, wherever the mask is True."""
    if targets is not None:
        bad = ((targets < 0) & (targets != IGNORED)) | (targets >= vocab)
        bad = (bad if mask is None else bad & mask).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            raise ValueError(
                f"targets: expected token ids in [0, {vocab}) or {IGNORED}, got "
                f"{int(targets[at])} at {list(at)}; logits and targets must share one tokenizer"
            )
    if temperatures is not None:
        bad = ~((temperatures > 0) & temperatures.isfinite())
        bad = (bad if mask is None else bad & mask).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            raise _bad_temperature(float(temperatures[at]), f" at {list(at)}")


def _bad_temperature(value: float, where: str = "") -> ValueError:
    return ValueError(
        f"temperature: expected a positive finite number, got {value}{where}; "
        "1.0 leaves the logits as they are"
    )


@torch.library.custom_op("segkernels::token_stats_fwd", mutates_args=())
def _token_stats_fwd(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if values_may_be_checked(logits):
        check_row_values(logits.shape[-1], targets, temperatures, mask)
    targets, temperatures, mask = each(Tensor.contiguous, targets, temperatures, mask)
    logprobs, entropy, stats = empty_stats(logits.shape[:-1], targets, logits)
    row_kernels(backend).forward(
        vocab.Rows(vocab.addressable(logits), targets, temperature, temperatures),
        mask,
        None if targets is None else logprobs,
        entropy,
        stats,
    )
    return logprobs, entropy, stats


def empty_stats(
    shape: torch.Size, targets: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs (no element without targets), entropy, and what the backward pass keeps of a row."""
    entropy = torch.empty(shape, dtype=torch.float32, device=like.device)
    logprobs = torch.empty_like(entropy) if targets is not None else entropy.new_empty(0)
    return logprobs, entropy, entropy.new_empty((*shape, 3))


@_token_stats_fwd.register_fake
def _(logits, targets, temperature, temperatures, mask, inplace_backward, backend):
    return empty_stats(logits.shape[:-1], targets, logits)


@torch.library.custom_op("segkernels::token_stats_bwd", mutates_args=())
def _token_stats_bwd(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    stats: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    backend: str,
    first: int = 0,
) -> Tensor:
    """The gradient of whole rows, or of a slice of their columns that begins with ``first``."""
    dlogits = native.empty(logits, *logits.shape, dtype=logits.dtype)
    upstream = stats, dlogprobs, dentropy
    _fill_gradient(dlogits, logits, targets, temperature, temperatures, *upstream, backend, first)
    return dlogits


@_token_stats_bwd.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("segkernels::token_stats_bwd_", mutates_args=("logits",))
def _token_stats_bwd_(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    stats: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    backend: str,
) -> None:
    upstream = stats, dlogprobs, dentropy
    _fill_gradient(logits, logits, targets, temperature, temperatures, *upstream, backend)


@_token_stats_bwd_.register_fake
def _(logits, *_):
    return None


def _fill_gradient(
    dlogits: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    stats: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    backend: str,
    first: int = 0,
) -> None:
    """Into dlogits, which may be the logits themselves."""
    if not dlogits.numel():
        return
    targets, temperatures, dlogprobs, dentropy = each(
        Tensor.contiguous, targets, temperatures, dlogprobs, dentropy
    )
    rows = vocab.Rows(vocab.addressable(logits), targets, temperature, temperatures, first)
    row_kernels(backend).backward(rows, stats, dlogprobs, dentropy, dlogits)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.temperature, temperatures, _, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, temperatures, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogprobs, dentropy, _):
    logits, targets, temperatures, stats = ctx.saved_tensors
    dlogprobs = None if targets is None else dlogprobs
    op = "entropy_from_logits" if targets is None else "logprobs_and_entropy"
    rows = (logits, targets, ctx.temperature, temperatures, stats, dlogprobs, dentropy, ctx.backend)
    if not ctx.inplace:
        return native.gradient(op, _token_stats_bwd, *rows), *[None] * 6
    if torch.is_grad_enabled():
        raise native.no_second_derivative(f"{op} with inplace_backward=True")
    _token_stats_bwd_(*rows)
    return logits.detach(), *[None] * 6


_token_stats_fwd.register_autograd(_backward, setup_context=_setup_context)
