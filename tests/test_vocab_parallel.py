import pytest
import torch
import torch.distributed as dist
from backends import NATIVE, REFERENCE, TRITON
from ranks import on_ranks, vocab_parallel
from test_token_stats import draw, generator, hard_rows, run, storage
from tolerance import assert_close

import segkernels.vocab_parallel as api
from segkernels import (
    logprobs_and_entropy,
    merge_vocab_stats,
    vocab_parallel_logprobs_and_entropy,
    vocab_shard_stats,
)
from segkernels.vocab_parallel import _merge_stats, _shard_stats

BACKENDS = (REFERENCE, NATIVE)
SPLITS = [(1000,), (300, 700), (0, 1000), (999, 0, 1), (1, 64, 935), (250, 250, 0, 500)]
NAN, INF = float("nan"), float("inf")

backends = pytest.mark.parametrize("backend", BACKENDS)


def starts(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes))]


def upstream(entropy, seed=0):
    """What ``run`` takes."""
    up = torch.randn(2, *entropy.shape, generator=generator(seed), dtype=torch.float64)
    return tuple(up.to(entropy.dtype))


def run_shards(backend, logits, targets, sizes, temperature=1.0, mask=None):
    """(logprobs, entropy, dlogits) by the building blocks, every shard's results being the same."""
    shards = [x.detach().clone() for x in logits.split(sizes, -1)]
    shards = [x.requires_grad_() for x in backend.place(*shards)]
    targets, *rest = backend.place(targets, temperature, mask)
    states = torch.stack(
        [
            vocab_shard_stats(x, targets, start, *rest, backend=backend)
            for x, start in zip(shards, starts(sizes), strict=True)
        ]
    )
    outputs, grads = None, []
    for x, start in zip(shards, starts(sizes), strict=True):
        mine = merge_vocab_stats(states, x, targets, start, *rest, backend=backend)
        outputs = outputs or mine
        for a, b in zip(mine, outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        grads += torch.autograd.grad(mine, x, backend.place(*upstream(mine[1].cpu())))
    return *(x.detach().cpu() for x in outputs), torch.cat(grads, -1).cpu()


def assert_close_to_whole(got, logits, targets, temperature=1.0, mask=None, what=""):
    double = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    baseline = run(REFERENCE, logits, targets, temperature, mask)
    truth = run(REFERENCE, logits.double(), targets, double, mask)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[2].dtype == logits.dtype
    for name, k, b, t in zip(("logprobs", "entropy", "dlogits"), got, baseline, truth, strict=True):
        assert_close(k, b, t, f"{what} {name}")


def some_case(dtype, rows=12, vocab=1000):
    """Logits, targets, temperatures and mask; targets also at both ends, and ignored."""
    logits, targets = draw(rows, vocab, dtype)
    targets[:3] = torch.tensor([0, vocab - 1, -100])
    temperatures = torch.rand(rows, generator=generator(3)) + 0.5
    return logits, targets, temperatures, torch.arange(rows) % 4 < 3


@backends
@storage
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_shards_equal_the_whole(backend, dtype, sizes):
    logits, targets, temperatures, mask = some_case(dtype)
    for rest in ((), (0.7,), (temperatures, mask)):
        got = run_shards(backend, logits, targets, sizes, *rest)
        assert_close_to_whole(got, logits, targets, *rest)


@backends
@storage
@pytest.mark.parametrize("sizes", [(333, 667), (1, 0, 998, 1)], ids=str)
def test_hard_rows(backend, dtype, sizes):
    for name, row in hard_rows(dtype).items():
        targets = torch.tensor([int(row.double().argmax())])
        for temperature in (1.0, 0.5):
            got = run_shards(backend, row[None], targets, sizes, temperature)
            assert_close_to_whole(got, row[None], targets, temperature, what=name)


@storage
def test_one_shard_is_the_ordinary_op(dtype):
    logits, targets, temperatures, mask = some_case(dtype)
    shards = run_shards(NATIVE, logits, targets, (1000,), temperatures, mask)
    whole = run(NATIVE, logits, targets, temperatures, mask)
    assert all(map(torch.equal, shards, whole))
    single = vocab_parallel_logprobs_and_entropy(logits, targets, 0, temperatures, mask)
    assert all(map(torch.equal, single, whole[:2]))


@pytest.mark.parametrize("backend", TRITON)
@storage
def test_triton_kernels(backend, dtype):
    logits, targets = draw(9, 90, dtype)
    targets[2] = -100
    temperatures = torch.rand(9, generator=generator()) + 0.5
    mask = torch.arange(9) != 4
    for sizes in ((90,), (40, 0, 50)):
        for rest in ((), (temperatures, mask)):
            got = run_shards(backend, logits, targets, sizes, *rest)
            assert_close_to_whole(got, logits, targets, *rest)


@backends
def test_every_column_of_every_shard_can_be_the_target(backend):
    logits = torch.randn(9, generator=generator()).expand(9, 9)
    targets = torch.arange(9)
    sharded = run_shards(backend, logits, targets, (2, 0, 3, 4))[0]
    torch.testing.assert_close(sharded, logits[0].log_softmax(-1))


@backends
def test_banned_and_empty_shards_add_exactly_nothing(backend):
    logits, targets = draw(6, 50, torch.float32)
    banned = torch.full((6, 7), -INF)
    alone = run_shards(backend, logits, targets, (30, 20))
    for sizes, wide in (
        ((30, 20, 7), torch.cat([logits, banned], 1)),
        ((30, 20, 0), logits),
    ):
        got = run_shards(backend, wide, targets, sizes)
        assert torch.equal(got[0], alone[0])
        assert torch.equal(got[1], alone[1])
        assert torch.equal(got[2][:, :50], alone[2])
        assert (got[2][:, 50:] == 0).all()


@backends
@storage
@pytest.mark.parametrize("place", [0, 6, 18, 39])
def test_no_distribution_gives_nan_on_every_rank(backend, dtype, place):
    logits = torch.randn(4, 40, generator=generator()).to(dtype)
    logits[0, place] = NAN
    logits[1, place] = INF
    logits[2] = -INF
    logits[3, place] = -INF
    targets = torch.tensor([place, place, 5, 7])
    *outputs, dlogits = run_shards(backend, logits, targets, (6, 12, 22))
    for out in (*outputs, dlogits):
        assert out[:3].isnan().all()
        assert out[3].isfinite().all()


@backends
def test_masked_rows_are_transparent(backend):
    logits, targets, temperatures, mask = some_case(torch.float32)
    poisoned = logits.masked_fill(~mask[:, None], NAN)
    garbage = targets.masked_fill(~mask, 10**12)
    hot = temperatures.masked_fill(~mask, NAN)
    got = run_shards(backend, poisoned, garbage, (300, 700), hot, mask)
    clean = run_shards(backend, logits, targets, (300, 700), temperatures)
    for a, b in zip(got, clean, strict=True):
        assert (a[~mask] == 0).all()
        assert torch.equal(a[mask], b[mask])
    states = vocab_shard_stats(poisoned, garbage, 300, hot, mask, backend=backend)
    unread = torch.tensor([-INF, 0.0, 0.0, INF], dtype=torch.float64)
    assert (states[~mask] == unread).all()


@backends
def test_entropy_alone(backend):
    logits, targets = draw(5, 40, torch.float32)
    logits.requires_grad_()
    nothing, entropy = vocab_parallel_logprobs_and_entropy(logits, None, 0, backend=backend)
    whole = logprobs_and_entropy(logits, targets, backend=backend)[1]
    assert nothing is None
    grads = [torch.autograd.grad(h.sum(), logits)[0] for h in (entropy, whole)]
    torch.testing.assert_close(entropy, whole)
    torch.testing.assert_close(*grads)


@backends
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0), (2, 3, 4)], ids=str)
def test_leading_shapes(backend, shape):
    logits = torch.randn(*shape, 12, generator=generator())
    targets = torch.randint(0, 12, shape, generator=generator())
    got = run_shards(backend, logits, targets, (5, 0, 7))
    for a, b in zip(got, run(REFERENCE, logits, targets), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("own", [0, 1])
def test_gradcheck_of_the_reference(own):
    logits, targets = draw(4, 9, torch.float64)
    logits[0, 1] = -INF
    targets[:2] = torch.tensor([0, 8])
    targets[3] = -100
    mask = torch.tensor([True, True, False, True])
    temperatures = torch.tensor([0.5, 1.0, NAN, 2.0], dtype=torch.float64)
    shards = list(logits.split((4, 5), -1))
    finite = shards[own].isfinite()

    def stats(x):
        """Of one shard's logits; the states of the other do not change."""
        shards[own] = torch.full_like(shards[own].detach(), -INF).masked_scatter(finite, x)
        rest = temperatures, mask
        states = [
            vocab_shard_stats(s, targets, b, *rest) for s, b in zip(shards, (0, 4), strict=True)
        ]
        return merge_vocab_stats(torch.stack(states), shards[own], targets, (0, 4)[own], *rest)

    assert torch.autograd.gradcheck(stats, shards[own][finite].requires_grad_())


def parallel_cases():
    """Name -> (ranks of the group or None for all three, backend, sizes, logits, ...)."""
    cases = {}
    logits, targets, temperatures, mask = some_case(torch.float32)
    grid = logits.view(3, 4, -1), targets.view(3, 4), 0.7, mask.view(3, 4)
    for ranks, sizes in ((None, (64, 0, 936)), ((0, 2), (300, 700))):
        cases |= {
            f"{ranks} plain": (ranks, NATIVE, sizes, logits, targets, 1.0, None),
            f"{ranks} reference": (ranks, REFERENCE, sizes, logits, targets, temperatures, mask),
            f"{ranks} double": (ranks, REFERENCE, sizes, logits.double(), targets, 1.0, None),
            f"{ranks} no token": (ranks, NATIVE, sizes, logits[:0], targets[:0], 1.0, None),
        }
        for dtype in (torch.bfloat16, torch.float16):
            stored = logits.to(dtype), targets, temperatures, mask
            cases[f"{ranks} {dtype}"] = (ranks, NATIVE, sizes, *stored)
    cases["grid"] = (None, NATIVE, (333, 333, 334), *grid)
    cases["alone"] = ((1,), NATIVE, (1000,), *grid)
    return cases


def test_ranks(tmp_path):
    """Every rank has the same bits, those of the building blocks, and its shard's gradient; it has
    sent four numbers per token, once."""
    cases = parallel_cases()
    sent = []
    for ranks, backend, sizes, logits, targets, temperature, mask in cases.values():
        arguments = {"targets": targets, "temperature": temperature, "mask": mask}
        up = upstream(logits[..., 0].to(torch.promote_types(logits.dtype, torch.float32)))
        shards = [x.clone() for x in logits.split(sizes, -1)]
        sent.append((ranks, shards, {**arguments, "backend": backend}, up))
    results = on_ranks(vocab_parallel, 3, tmp_path, sent)
    for name, (ranks, backend, sizes, logits, targets, *rest) in cases.items():
        by_rank = [results[rank].pop(0) for rank in ranks or range(3)]
        for *outputs, _, gathered in by_rank:
            assert all(map(torch.equal, outputs, by_rank[0][:2])), name
            assert gathered == [(*targets.shape, 4)], name
        got = *by_rank[0][:2], torch.cat([dlogits for *_, dlogits, _ in by_rank], -1)
        blocks = run_shards(backend, logits, targets, sizes, *rest)
        assert all(map(torch.equal, got, blocks)), name
        if logits.dtype != torch.float64 and logits.numel():
            assert_close_to_whole(got, logits, targets, *rest, what=name)
    assert not any(results)


def test_states_carry_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    for backend in BACKENDS:
        assert not vocab_shard_stats(logits, None, 0, backend=backend).requires_grad


def test_a_target_in_no_shard_is_nan_where_values_are_not_checked(monkeypatch):
    monkeypatch.setattr(api, "values_may_be_checked", lambda _: False)
    logits, _ = draw(2, 10, torch.float32)
    targets = torch.tensor([10, 3])
    for backend in BACKENDS:
        logprobs, entropy, _ = run_shards(backend, logits, targets, (4, 6))
        assert logprobs.isnan().tolist() == [True, False]
        assert entropy.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    logits = torch.randn(3, 4, 17, generator=generator()).requires_grad_()
    targets = torch.randint(0, 30, (3, 4), generator=generator())
    mask = torch.rand(3, 4, generator=generator()) < 0.5 if masked else None
    temperatures = torch.full((3, 4), 0.7) if masked else None
    other = torch.randn(3, 4, 13, generator=generator())
    rest = 1.0, temperatures, mask, "native"
    mine = logits.detach(), targets, 13, *rest
    states = torch.stack(
        [_shard_stats(other, targets, 0, *rest), _shard_stats(*mine)],
    )
    torch.library.opcheck(_shard_stats, mine)
    torch.library.opcheck(_shard_stats, (logits.detach()[..., :0], None, 30, *rest))
    torch.library.opcheck(_merge_stats, (states, logits, targets, 13, *rest))
    torch.library.opcheck(_merge_stats, (states, logits, None, 13, *rest))


def assert_compiles(loss, logits):
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x), x)[0])
    assert torch.equal(*grads)


def test_compiles_in_one_graph_with_its_collective():
    logits, targets, temperatures, mask = some_case(torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def loss(x):
            stats = vocab_parallel_logprobs_and_entropy(x, targets, 0, temperatures, mask)
            return (stats[0] * 2 + stats[1]).sum()

        assert_compiles(loss, logits)
    finally:
        dist.destroy_process_group()


def test_building_blocks_compile_in_one_graph():
    logits, targets, temperatures, mask = some_case(torch.float32)
    rest = temperatures, mask
    other = logits[:, :300].detach()

    def loss(x):
        states = [
            vocab_shard_stats(s, targets, b, *rest, backend="native")
            for s, b in ((other, 0), (x, 300))
        ]
        stats = merge_vocab_stats(torch.stack(states), x, targets, 300, *rest, backend="native")
        return (stats[0] * 2 + stats[1]).sum()

    assert_compiles(loss, logits[:, 300:])


LOGITS = torch.zeros(2, 3, 5)
TARGETS = torch.zeros(2, 3, dtype=torch.long)
STATES = vocab_shard_stats(LOGITS, TARGETS, 0)[None]


@backends
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": LOGITS.long()},
            TypeError,
            "logits: expected float32, bfloat16, float16 or float64, got torch.int64; ",
        ),
        (
            {"logits": torch.tensor(1.0)},
            ValueError,
            r"logits: expected shape \[..., columns of this shard\], got \[\]; ",
        ),
        (
            {"vocab_start": -5},
            ValueError,
            "vocab_start: expected the id of this shard's first token, got -5; "
            "pass the number of columns in the shards before it",
        ),
        (
            {"targets": TARGETS[:, 1:]},
            ValueError,
            r"targets: expected shape \[2, 3\] like logits\[..., 0\], got \[2, 2\]; ",
        ),
        (
            {"targets": TARGETS + torch.tensor([0, 0, 5])},
            ValueError,
            "targets: expected -100 or the id of a token in exactly one shard, got 5 at "
            r"\[0, 2\], which 0 of 1 hold; pass ids of the whole vocabulary, and as vocab_start "
            "the first one of this shard",
        ),
        ({"targets": TARGETS - 1}, ValueError, r"targets: .*got -1 at \[0, 0\], which 0 of 1 "),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive .* got 0.0; "),
        (
            {"temperature": torch.tensor([[1.0, 1.0, -2.0]] * 2)},
            ValueError,
            r"temperature: expected a positive finite number, got -2.0 at \[0, 2\]; ",
        ),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected bool, got torch.float32; "),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS, "vocab_start": 0}
    with pytest.raises(error, match=message):
        vocab_parallel_logprobs_and_entropy(**{**arguments, **change}, backend=backend)


@backends
@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (STATES.float(), TypeError, "states: expected float64, got torch.float32; "),
        (
            STATES[0],
            ValueError,
            r"states: expected shape \['shards', 2, 3, 4\] to fit logits, got \[2, 3, 4\]; "
            "stack what vocab_shard_stats gave for every shard",
        ),
        (STATES[:0], ValueError, r"states: expected .*, got \[0, 2, 3, 4\]; "),
        (
            STATES.to("meta"),
            ValueError,
            r"states: expected device cpu like logits, got meta; move it with .to\(logits.device\)",
        ),
        (
            torch.cat([STATES, STATES]),
            ValueError,
            r"targets: expected .* in exactly one shard, got 0 at \[0, 0\], which 2 of 2 hold; ",
        ),
    ],
)
def test_errors_of_the_merge(backend, states, error, message):
    with pytest.raises(error, match=message):
        merge_vocab_stats(states, LOGITS, TARGETS, 0, backend=backend)
