"""Boundaries, segment scores, token rewards and advantages, on three kinds of ragged batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import eager
import peers
import pytest
import shapes
import torch
from cases import Case, Contender, Forward, Missing, ours, textbook
from shapes import NORMALIZER, THRESHOLD, Stream
from torch import Tensor

import segkernels as sk

LONGEST_MATRIX = 4096  # tokens: a triangular matrix of this size is 64 MB


def _shape(layout: str, stream: Stream) -> dict[str, int | float | str]:
    return {"layout": layout, "rows": len(stream.lengths), "tokens": stream.count}


def _case(
    op: str,
    workload: str,
    stream: Stream,
    fields: tuple[str, ...],
    fused: Callable[..., dict[str, Tensor]],
    others: Sequence[Contender],
    *,
    rename: Mapping[str, str] | None = None,
    wrt: tuple[str, ...] = (),
    scalars: tuple[str, ...] = (),
) -> Case:
    """Ours and the definition on the packed stream, everybody else on right-padded grids.

    ``fields`` are the inputs, ``rename`` the names that the op has for some of them. Padding is
    done beforehand: nobody pays for the other's layout.
    """
    names = dict(rename or {})
    cu_seqlens = stream.cu_seqlens
    packed = {names.get(name, name): stream.tokens[name] for name in fields}
    grid = {names.get(name, name): x for name, x in stream.grid().items() if name in fields}
    for name in wrt:
        grid[name].requires_grad_()

    def restore(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: stream.flat(x) for name, x in outputs.items()}

    def on(backend: str | None) -> Forward:
        return lambda **inputs: fused(**inputs, cu_seqlens=cu_seqlens, backend=backend)

    dtype = stream.tokens["rewards"].dtype
    upstream = {name: torch.ones((), device=stream.device) for name in scalars} if wrt else {}
    return Case(
        op=op,
        shape=_shape(workload, stream),
        dtype=dtype,
        inputs=packed,
        definition=on("reference"),
        contenders=[
            ours(on(None)),
            Contender("reference", on("reference"), "definition"),
            *(replace(each, inputs=grid, restore=restore) for each in others),
        ],
        upstream=upstream,
        wrt=wrt,
        moved=_moved(packed, on(None), wrt),
    )


def _moved(packed: Mapping[str, Tensor], forward: Callable, wrt: tuple[str, ...]) -> int:
    """Bytes of the inputs once, of the outputs once, and of the gradients once."""
    with torch.no_grad():
        outputs = forward(**packed)
    gradients = [packed[name] for name in wrt]
    return sum(
        x.numel() * x.element_size() for x in (*packed.values(), *outputs.values(), *gradients)
    )


def segment_ends(workload: str, stream: Stream) -> Case:
    def fused(entropy, mask, **where):
        return {"ends": sk.segment_ends(entropy, mask, THRESHOLD, **where)}

    return _case(
        "segment_ends",
        workload,
        stream,
        ("entropy", "mask"),
        fused,
        textbook(eager.segment_ends),
    )


def segment_offsets(workload: str, stream: Stream) -> Case:
    """Tables for the host: the definition is all there is."""

    def fused(ends, mask, **where):
        offsets = sk.segment_offsets(ends, mask, **where)
        return dict(zip(("segments", "rows"), offsets, strict=True))

    return _case("segment_offsets", workload, stream, ("ends", "mask"), fused, [])


def segment_scores(workload: str, stream: Stream, *, backward: bool) -> Case:
    def fused(rewards, ends, **where):
        scores = sk.segment_scores(rewards, ends, **where)
        return {"scores": scores, "total": scores.sum()}

    def plain(rewards, ends):
        scores = eager.segment_scores(rewards, ends)["scores"]
        return {"scores": scores, "total": scores.sum()}

    return _case(
        "segment_scores",
        workload,
        stream,
        ("rewards", "ends"),
        fused,
        textbook(plain),
        wrt=("rewards",) if backward else (),
        scalars=("total",),
    )


def segment_bradley_terry(workload: str, stream: Stream, *, backward: bool) -> Case:
    def fused(rewards, ends, **where):
        out = sk.segment_bradley_terry(rewards, ends, **where)
        return {"loss": out.loss, "scores": out.scores}

    return _case(
        "segment_bradley_terry",
        workload,
        stream,
        ("rewards", "ends"),
        fused,
        textbook(eager.segment_bradley_terry),
        wrt=("rewards",) if backward else (),
        scalars=("loss",),
    )


def scatter_segment_rewards(workload: str, stream: Stream) -> Case:
    def fused(rewards, ends, mask, **where):
        return {
            "token_rewards": sk.scatter_segment_rewards(
                rewards, ends, mask, normalizer=NORMALIZER, **where
            )
        }

    return _case(
        "scatter_segment_rewards",
        workload,
        stream,
        ("rewards", "ends", "mask"),
        fused,
        textbook(eager.scatter_segment_rewards),
    )


def _matrix(stream: Stream, form: Forward) -> Forward | Missing:
    if max(stream.lengths) > LONGEST_MATRIX:
        return Missing(f"a {max(stream.lengths):,} x {max(stream.lengths):,} matrix")
    return form


def gae(workload: str, stream: Stream) -> Case:
    def fused(rewards, values, mask, **where):
        out = sk.gae(rewards, values, mask, **where)
        return dict(zip(("advantages", "returns"), out, strict=True))

    return _case(
        "gae",
        workload,
        stream,
        ("rewards", "values", "mask"),
        fused,
        [
            Contender("eager, loop over time", eager.gae_over_time, "textbook"),
            *textbook(_matrix(stream, eager.gae_matrix), ", matrix"),
            *peers.gae(),
        ],
    )


RESULTS = ("advantages", "returns", "token_rewards", "kl")


def segment_advantages(workload: str, stream: Stream) -> Case:
    def fused(rewards, ends, logprobs, ref_logprobs, values, mask, **where):
        out = sk.segment_advantages(
            *(rewards, ends, logprobs, ref_logprobs, values, mask), normalizer=NORMALIZER, **where
        )
        return dict(zip(RESULTS, out, strict=True))

    fields = ("rewards", "ends", "logprobs", "ref_logprobs", "values", "mask")
    return _case("segment_advantages", workload, stream, fields, fused, [])


def boundaries_to_advantages(workload: str, stream: Stream, *, by_token: bool = False) -> Case:
    """What happens between two models' outputs and PPO."""

    def fused(entropy, rewards, logprobs, ref_logprobs, values, mask, **where):
        out = sk.segment_ends_and_advantages(
            *(entropy, rewards, logprobs, ref_logprobs, values, mask, THRESHOLD),
            normalizer=NORMALIZER,
            **where,
        )
        return dict(zip(("ends", *RESULTS), out, strict=True))

    loop = eager.boundaries_to_advantages(eager.gae_over_time)
    matrix = eager.boundaries_to_advantages(eager.gae_matrix)
    others = [
        Contender("eager, GAE loops over time", loop, "textbook"),
        *textbook(_matrix(stream, matrix), ", GAE as a matrix"),
    ]
    if by_token:
        by_loops = eager.boundaries_to_advantages_by_token
        others.append(Contender("Python loops over tokens", by_loops, "textbook"))
    fields = ("entropy", "rewards", "logprobs", "ref_logprobs", "values", "mask")
    return _case("boundaries to advantages", workload, stream, fields, fused, others)


def whiten(workload: str, stream: Stream) -> Case:
    def fused(x, mask, cu_seqlens=None, backend=None):
        return {"white": sk.whiten(x, mask, backend=backend)}

    return _case(
        "whiten",
        workload,
        stream,
        ("advantages", "mask"),
        fused,
        [*textbook(eager.whiten), *peers.whiten()],
        rename={"advantages": "x"},
    )


def running_normalizer(workload: str, stream: Stream) -> Case:
    """One batch into the running statistics; no peer has them."""
    bins = 1000
    latest: list[sk.RunningLocationNormalizer] = []

    def fused(rewards, ends, mask):
        latest[:] = [sk.RunningLocationNormalizer(bins)]
        latest[0].update(rewards, ends, mask, cu_seqlens=stream.cu_seqlens)
        latest[0].all_reduce()
        return {}

    def read(_: dict[str, Tensor]) -> dict[str, Tensor]:
        past = latest[0].state_dict()["past"]
        dense = torch.zeros(3, bins, dtype=torch.float64)
        columns = [past[name] for name in ("count", "mean", "m2")]
        dense[:, past["bin"]] = torch.tensor(columns, dtype=torch.float64)
        return dict(zip(("count", "mean", "m2"), dense, strict=True))

    def plain(rewards, ends, mask):
        return eager.moments_by_position(rewards, ends, bins)

    fields = ("rewards", "ends", "mask")
    grid = {name: x for name, x in stream.grid().items() if name in fields}
    packed = {name: stream.tokens[name] for name in fields}
    return Case(
        op="RunningLocationNormalizer.update",
        shape=_shape(workload, stream),
        dtype=torch.float32,
        inputs=packed,
        definition=lambda **_: plain(**grid | {"rewards": grid["rewards"].double()}),
        contenders=[
            replace(ours(fused), restore=read),
            Contender("eager", plain, "textbook", inputs=grid),
        ],
    )


def policy_loss(workload: str, stream: Stream, *, backward: bool) -> Case:
    def fused(logprobs, old_logprobs, advantages, mask, **where):
        out = sk.policy_loss(logprobs, old_logprobs, advantages, mask, **where)
        return {"loss": out.loss}

    return _case(
        "policy_loss",
        workload,
        stream,
        ("logprobs", "old_logprobs", "advantages", "mask"),
        fused,
        [*textbook(eager.policy_loss), *peers.policy_loss()],
        wrt=("logprobs",) if backward else (),
        scalars=("loss",),
    )


def value_loss(workload: str, stream: Stream, *, backward: bool) -> Case:
    def fused(values, old_values, returns, mask, **where):
        return {"loss": sk.value_loss(values, old_values, returns, mask, **where)}

    return _case(
        "value_loss",
        workload,
        stream,
        ("values", "old_values", "returns", "mask"),
        fused,
        [*textbook(eager.value_loss), *peers.value_loss()],
        wrt=("values",) if backward else (),
        scalars=("loss",),
    )


# Each name: (rows, longest). All are smaller than caches: a batch of them is a few megabytes.
WORKLOADS = {"uniform": (64, 1024), "long-tailed": (128, 2048), "giant": (512, 16384)}


def batch(workload: str, device: torch.device | str = "cpu") -> Stream:
    lengths = shapes.row_lengths(workload, *WORKLOADS[workload])
    if len(lengths) % 2:
        lengths.append(32)  # Bradley-Terry pairs rows
    return shapes.stream(lengths, device)


ragged = pytest.mark.parametrize("workload", WORKLOADS)


@ragged
def test_boundaries_to_advantages(side_by_side, workload):
    case = boundaries_to_advantages(workload, batch(workload), by_token=workload == "uniform")
    side_by_side(case)


@ragged
def test_gae(side_by_side, workload):
    side_by_side(gae(workload, batch(workload)))


@ragged
def test_bradley_terry(side_by_side, workload):
    side_by_side(segment_bradley_terry(workload, batch(workload), backward=True))


@pytest.mark.parametrize(
    "op",
    [
        segment_ends,
        segment_offsets,
        scatter_segment_rewards,
        segment_advantages,
        whiten,
        running_normalizer,
    ],
    ids=lambda op: op.__name__,
)
def test_forward(side_by_side, op):
    side_by_side(op("uniform", batch("uniform")))


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize(
    "op",
    [segment_scores, policy_loss, value_loss],
    ids=lambda op: op.__name__,
)
def test_both_passes(side_by_side, op, backward):
    side_by_side(op("uniform", batch("uniform"), backward=backward))


def test_bradley_terry_forward(side_by_side):
    side_by_side(segment_bradley_terry("uniform", batch("uniform"), backward=False))
