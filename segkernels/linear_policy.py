"""PPO's policy loss straight from hidden states and the output projection."""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, vocab
from .backend import choose, row_kernels
from .layout import (
    check_bools,
    check_coefficient,
    check_floats,
    check_like,
    each,
    layout_of,
    values_may_be_checked,
)
from .linear import linear_bwd, linear_fwd, linear_logprobs_and_entropy
from .objective import Objective
from .ppo_loss import Aggregation, PolicyLoss, check_aggregation, check_clip, check_kl_coef
from .projection import (
    HiddenRows,
    Projection,
    Space,
    add_product,
    check_projection,
    check_workspace,
    even_part,
    may_synchronise,
    parts_of,
    room_for_logits,
)
from .token_stats import IGNORED, check_row_inputs, check_row_values, empty_stats

# A gradient of half-precision weights that is added to chunk by chunk is rounded as many times. At
# 16 the roundings together stay near two units in the last place.
MOST_ROUNDINGS = 16
# Products of fewer rows spend more time on moving the weight than a fourth product takes.
FEWEST_ROWS = 32


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip: float = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
    workspace: int | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped surrogate of PPO without ever holding the logits of all tokens.

    With logprob and H those of softmax((hidden weight^T + bias) / temperature),
    rho = exp(logprob - old_logprob) and q = logprob - ref_logprob, the term of an action token is::

        -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl_coef (exp(-q) - 1 + q) - entropy_coef H

    and the loss their aggregate, as in :func:`segkernels.policy_loss`. Row i of ``hidden`` predicts
    ``targets[i]``: the caller shifts, and everything per token is aligned with ``targets``.

    The loss of a token and its gradient in logprob and H are known as soon as the token's logits
    are. So the gradients in ``hidden``, ``weight`` and ``bias`` are formed in the forward pass,
    chunk by chunk of tokens whose logits fit ``workspace``: three products, of which rows outside
    the mask take no part in any, and rows without gradient (clipped, or of advantage 0, and neither
    KL nor entropy term) only in the first. The backward pass multiplies them by the gradient of the
    loss where they are, so that there is one: a second backward pass, and ``create_graph``, raise
    RuntimeError. Where no gradient is wanted (``torch.no_grad``) there is one product.

    The gradient of bfloat16 weights is rounded after every chunk. Where that would be more than 16
    times, where a chunk would have less than 32 rows, and always in float16, whose range needs the
    scale of the loss before anything is rounded, the gradients are formed as those of
    :func:`segkernels.linear_logprobs_and_entropy` are, with a fourth product. A larger
    ``workspace`` makes larger chunks.

    Source: arXiv 1707.06347, equation 7; arXiv 2501.02790 for the surrounding method. The KL term
    is the k3 estimator of http://joschu.net/blog/kl-approx.html.

    Args:
        hidden: last hidden states ``[N, T, D]``, or ``[T, D]`` with ``cu_seqlens``.
        weight: output projection ``[V, D]``.
        targets: token ids ``[N, T]`` or ``[T]``, in [0, V) at action tokens.
        old_logprobs: nats, float like ``targets``; under the policy that sampled it. A constant.
        advantages: float like ``targets``. A constant.
        mask: bool like ``targets``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        bias: ``[V]`` or None.
        temperature: positive; one float, or a tensor like ``targets``.
        clip: positive; ``math.inf`` clips nothing.
        ref_logprobs: nats, float like ``targets``; needed where ``kl_coef`` is not 0. A constant.
        kl_coef: weight of the KL term.
        entropy_coef: weight of the entropy bonus.
        aggregation: see :func:`segkernels.policy_loss`.
        workspace: bytes of extra memory, the gradients apart; None for 64 MiB on CPUs, 512 MiB on
            GPUs.
        backend: see ``segkernels.backend``; dtypes and waits of the host are those of
            :func:`segkernels.linear_logprobs_and_entropy`, with one more wait for each chunk.

    Returns:
        ``PolicyLoss``; ``loss`` is differentiable in ``hidden``, ``weight`` and ``bias``, the other
        fields are detached. Without an action token everything is 0.

    Raises:
        ValueError: shapes that disagree; a target out of range or -100 at an action token; an
            unknown aggregation; a clip that is not positive; ``kl_coef`` without ``ref_logprobs``.
        TypeError: dtypes that do not fit.
    """
    layout = layout_of("targets", targets, cu_seqlens)
    check_projection(hidden, weight, bias)
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden: expected shape {[*targets.shape, 'D']} to fit targets, got "
            f"{list(hidden.shape)}; pass the hidden state that predicts each target"
        )
    per_token = [("old_logprobs", old_logprobs), ("advantages", advantages)]
    if ref_logprobs is not None:
        per_token.append(("ref_logprobs", ref_logprobs))
    for name, tensor in per_token:
        check_floats(name, tensor)
        check_like(name, tensor, "targets", targets)
    check_bools("mask", mask, "targets", targets)
    check_clip(clip)
    check_aggregation(aggregation)
    check_workspace(workspace)
    check_kl_coef(kl_coef, ref_logprobs)
    check_coefficient("entropy_coef", entropy_coef)
    name = choose(
        "linear_policy_loss", hidden, weight, bias, old_logprobs, advantages, backend=backend
    )
    old_logprobs, advantages, ref_logprobs = each(
        Tensor.detach, old_logprobs, advantages, ref_logprobs
    )
    constants = (old_logprobs, advantages, ref_logprobs, mask)
    coefficients = (clip, kl_coef, entropy_coef, aggregation)
    if name == "reference" or _holds_float16(hidden, weight, bias):
        _check_targets(targets, mask)
        logprobs, entropy = linear_logprobs_and_entropy(
            hidden, weight, targets, bias, temperature, mask, workspace=workspace, backend=name
        )
        assert logprobs is not None
        if name == "reference":
            from .reference import ppo_loss as reference

            totals = reference.policy_loss(
                logprobs,
                old_logprobs,
                advantages,
                ref_logprobs,
                entropy,
                mask,
                layout,
                clip=clip,
                kl_coef=kl_coef,
                entropy_coef=entropy_coef,
                aggregation=aggregation,
            )
        else:
            objective = Objective.of(*constants, layout, *coefficients)
            totals = objective.totals(logprobs, entropy)
        loss, clip_fraction, approx_kl = totals
        return PolicyLoss(loss, logprobs.detach(), entropy.detach(), clip_fraction, approx_kl)
    token_ids, scalar, temperatures = check_row_inputs(
        "hidden[..., 0]", hidden.select(-1, 0), targets, temperature, mask
    )
    assert token_ids is not None
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    results = _Results(
        *_policy_fwd(
            hidden,
            weight,
            bias,
            needs,
            targets=token_ids,
            old_logprobs=old_logprobs,
            advantages=advantages,
            ref_logprobs=ref_logprobs,
            mask=mask,
            cu_seqlens=layout.cu_seqlens,
            temperature=scalar,
            temperatures=None if temperatures is None else temperatures.float(),
            clip=clip,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            aggregation=aggregation,
            workspace=workspace,
            backend=name,
        )
    )
    return PolicyLoss(
        results.loss,
        results.logprobs,
        results.entropy,
        results.clip_fraction,
        results.approx_kl,
    )


def _holds_float16(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.dtype == torch.float16 for t in tensors)


def _check_targets(targets: Tensor, mask: Tensor) -> None:
    if values_may_be_checked(targets):
        missing = (mask & (targets == IGNORED)).nonzero()
        if len(missing):
            raise ValueError(
                f"targets: expected token ids at action tokens, got {IGNORED} at "
                f"{missing[0].tolist()}; set the mask to False there"
            )


class _Results(NamedTuple):
    """What the operator returns: a ``PolicyLoss`` and the gradients of the loss.

    Gradients that are not needed have no element.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


@torch.library.custom_op("segkernels::linear_policy_loss_fwd", mutates_args=())
def _policy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    clip: float,
    kl_coef: float,
    entropy_coef: float,
    aggregation: str,
    workspace: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``_Results``; ``needs`` says which of hidden, weight and bias need their gradient."""
    _check_targets(targets, mask)
    if values_may_be_checked(hidden):
        check_row_values(weight.shape[0], targets, temperatures, mask)
    objective = Objective.of(
        old_logprobs,
        advantages,
        ref_logprobs,
        mask,
        layout_of("targets", targets, cu_seqlens),
        clip,
        kl_coef,
        entropy_coef,
        aggregation,
    )
    rows = (hidden, weight, targets, bias, temperature, temperatures)
    where = (workspace, backend)
    if not any(needs):
        logprobs, entropy, *_ = linear_fwd(*rows, mask, False, *where)
        gradients = _empty_gradients((hidden, weight, bias), needs)
    elif (chunks := _Chunks(hidden, weight, mask, *where)).worthwhile:
        logprobs, entropy, gradients = _three_products(*rows, objective, chunks, needs, backend)
    else:
        keep_logits = room_for_logits(hidden, weight, *where)
        logprobs, entropy, stats, kept = linear_fwd(*rows, mask, keep_logits, *where)
        dlogprobs, dentropy = objective.grads(logprobs)
        gradients = linear_bwd(*rows, stats, kept, dlogprobs, dentropy, needs, *where)
    loss, clip_fraction, approx_kl = objective.totals(logprobs, entropy)
    return _Results(loss, logprobs, entropy, clip_fraction, approx_kl, *gradients)


class _Chunks:
    """The rows in the mask, in chunks whose logits fit the workspace."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, mask: Tensor, workspace: int | None, backend: str
    ):
        space = Space.of(backend, workspace, hidden)
        self.rows = HiddenRows(hidden, mask, space.dtype)
        vocabulary, hidden_size = weight.shape
        self.row_stride = space.row_stride(vocabulary)
        size = space.dtype.itemsize
        row_bytes = size * self.row_stride
        copies = Projection.copies(weight, space.dtype)
        # Float32 sums of a slice of dweight, which is rounded after each product.
        self.sums_apart = weight.dtype not in (space.dtype, torch.float32)
        self.columns = vocabulary
        if copies or self.sums_apart:
            self.columns = even_part(vocabulary, space.total // 16 // (4 * hidden_size), 128)
        panels = self.columns * hidden_size * (size * copies + 4 * self.sums_apart)
        self.moved = max(1, space.total // 32 // row_bytes)
        # Twice the hidden states (those in the mask, those with a gradient), theirs before the
        # conversion, and their gradient before and after one.
        states = hidden_size * (2 * size + 4 + 2 * hidden.dtype.itemsize)
        # An eighth is left to the few numbers per token, and to the buffers of the products.
        free = space.total - space.total // 8 - panels - self.moved * row_bytes
        most = free // (row_bytes + states)
        half = weight.dtype.itemsize < 4  # dweight is rounded after every chunk
        least = -(-self.rows.count // MOST_ROUNDINGS) if half else 0
        self.height = space.chunk(self.rows.count, least, most, hidden_size)
        self.worthwhile = self.height >= least and most >= min(FEWEST_ROWS, self.rows.count)


class _Gradients:
    """Gradients of the loss in hidden, weight and bias, from dlogits that come tile by tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: list[bool],
        chunks: _Chunks,
        projection: Projection,
    ):
        self.needs = needs
        self.rows, self.projection = chunks.rows, projection
        self.dhidden, self.dweight, dbias = _empty_gradients((hidden, weight, bias), needs)
        self.dhidden.zero_()
        self.dbias = native.empty(dbias, *dbias.shape).zero_()
        self.bias_dtype = dbias.dtype
        need_hidden, need_weight, _ = needs
        self.dx = native.empty(hidden, chunks.height if need_hidden else 0, hidden.shape[-1])
        self.sums: Tensor | None = None
        if need_weight and chunks.sums_apart:
            self.sums = projection.scratch(torch.float32)
        self.started = False

    def add(self, dlogits: Tensor, x: Tensor, positions: Tensor) -> None:
        """dlogits [B, V] of hidden states [B, D], which stand at ``positions`` [B]."""
        need_hidden, need_weight, need_bias = self.needs
        for part, panel in self.projection.slices():
            if need_hidden:
                add_product(self.dx[: len(x)], dlogits[:, part], panel, start=part.start == 0)
            if need_weight:
                self._add_to_dweight(part, dlogits[:, part], x)
        if need_hidden:
            dx = self.dx[: len(x)].to(self.dhidden.dtype)
            self.dhidden.view(-1, self.dhidden.shape[-1]).index_copy_(0, positions, dx)
        if need_bias:
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        self.started = True

    def _add_to_dweight(self, part: slice, dlogits: Tensor, x: Tensor) -> None:
        dw = self.dweight[part]
        if self.sums is not None:
            dw = self.sums[: len(dw)]
            if self.started:
                dw.copy_(self.dweight[part])
        add_product(dw, dlogits.t(), x, start=not self.started)
        if self.sums is not None:
            self.dweight[part] = dw

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self.started:
            self.dweight.zero_()
        return self.dhidden, self.dweight, self.dbias.to(self.bias_dtype)


def _three_products(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    objective: Objective,
    chunks: _Chunks,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """logprobs, entropy, (dhidden, dweight, dbias).

    The tile keeps, at its front, the dlogits of rows that have a gradient; the logits of the next
    rows are computed behind them. dX and dW are computed when it is full.
    """
    kernels = row_kernels(backend)
    rows, vocabulary = chunks.rows, weight.shape[0]
    projection = Projection(weight, bias, rows.dtype, chunks.columns)
    tile = native.empty(hidden, chunks.height, chunks.row_stride, dtype=rows.dtype)[:, :vocabulary]
    targets, temperatures = each(rows.take, targets, temperatures)
    objective = objective.map(rows.take)
    logprobs, entropy, stats = empty_stats(torch.Size([rows.count]), targets, hidden)
    gradients = _Gradients(hidden, weight, bias, needs, chunks, projection)

    waiting: list[Tensor] = []  # positions of the rows at the front of the tile
    filled = begin = 0
    while begin < rows.count:
        block = slice(begin, min(begin + chunks.height - filled, rows.count))
        begin = block.stop
        x = rows.read(block)
        logits = tile[filled : filled + len(x)]
        for part, panel in projection.slices():
            projection.logits(x, part, panel, logits[:, part])
        at_rows = each(itemgetter(block), targets, temperatures)
        kernels.forward(
            vocab.Rows(logits, at_rows[0], temperature, at_rows[1]),
            *each(itemgetter(block), rows.mask),
            logprobs[block],
            entropy[block],
            stats[block],
        )
        dlogprobs, dentropy = objective.map(itemgetter(block)).grads(logprobs[block])
        positions = rows.positions(block)
        at_rows += [stats[block], dlogprobs, dentropy]
        if may_synchronise(hidden):
            active = ((dlogprobs != 0) | (dentropy != 0)).nonzero().squeeze(1)
            if len(active) < len(x):
                logits = _moved_forward(logits, active, chunks.moved)
                positions, *at_rows = each(itemgetter(active), positions, *at_rows)
        targets_b, temperatures_b, *upstream = at_rows
        if len(logits):
            tile_rows = vocab.Rows(logits, targets_b, temperature, temperatures_b)
            kernels.backward(tile_rows, *upstream, logits)
        whole = filled == 0 and len(logits) == len(x)  # hidden states that are at hand
        waiting.append(positions)
        filled += len(logits)
        # Forward products of fewer rows spend more time on moving the weight than one of dW does.
        full = chunks.height - filled <= chunks.height // 4
        if filled and (full or begin == rows.count):
            positions = torch.cat(waiting)
            x = x if whole else rows.gather(positions)
            gradients.add(tile[:filled], x, positions)
            waiting, filled = [], 0
    return rows.put(logprobs), rows.put(entropy), gradients.results()


def _moved_forward(logits: Tensor, active: Tensor, size: int) -> Tensor:
    """The active rows, in place: each comes from where it is or further back, so going from the
    first to the last overwrites none that has yet to move."""
    for block in parts_of(len(active), size):
        logits[block] = logits[active[block]]
    return logits[: len(active)]


@torch.library.custom_op(
    "segkernels::linear_policy_loss_bwd_", mutates_args=("dhidden", "dweight", "dbias")
)
def _policy_bwd_(dloss: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """Each gradient times dloss: the product in fp32, rounded once."""
    for gradient in (dhidden, dweight, dbias):
        # On CPUs in pieces, because torch first converts whole operands.
        size = gradient.numel() if gradient.is_cuda else 1 << 18
        for part in parts_of(gradient.numel(), size):
            piece = gradient.view(-1)[part]
            torch.mul(piece, dloss.view(1), out=piece)


def _empty_gradients(
    tensors: tuple[Tensor, Tensor, Tensor | None], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = tensors
    like = (hidden, weight, hidden.new_empty(0) if bias is None else bias)
    dhidden, dweight, dbias = (
        x.new_empty(x.shape if need else 0) for x, need in zip(like, needs, strict=True)
    )
    return dhidden, dweight, dbias


@_policy_fwd.register_fake
def _(hidden, weight, bias, needs, targets, *_):
    loss, clip_fraction, approx_kl = (native.empty(hidden) for _ in range(3))
    logprobs, entropy = (native.empty(hidden, *targets.shape) for _ in range(2))
    gradients = _empty_gradients((hidden, weight, bias), needs)
    return _Results(loss, logprobs, entropy, clip_fraction, approx_kl, *gradients)


@_policy_bwd_.register_fake
def _(dloss, *_):
    return None


def _setup_context(ctx, inputs, output):
    loss, *others = output
    results = _Results(loss, *others)
    ctx.save_for_backward(results.dhidden, results.dweight, results.dbias)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.spent = False


def _backward(ctx, dloss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_policy_loss: expected create_graph=False, got True; it has no second "
            "derivative. policy_loss of linear_logprobs_and_entropy has one"
        )
    if ctx.spent:
        raise RuntimeError(
            "linear_policy_loss: expected one backward pass, got a second one, after the first has "
            "scaled the gradients in place; compute the loss again"
        )
    ctx.spent = True
    gradients = ctx.saved_tensors
    _policy_bwd_(dloss, *gradients)
    needs, constants = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    needed = (g.detach() if need else None for g, need in zip(gradients, needs, strict=True))
    return (*needed, *(None for _ in constants))


_policy_fwd.register_autograd(_backward, setup_context=_setup_context)
