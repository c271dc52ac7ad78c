"""Everybody computes the same and takes turns, and documents say what was measured."""

import dataclasses
import platform
import time

import bench_linear as linear
import bench_sequence as sequence
import bench_token_stats as token_stats
import harness
import pytest
import shapes
import tables
import torch

FP32, BF16 = torch.float32, torch.bfloat16


def stream(workload, seed=0):
    lengths = shapes.row_lengths(workload, 5, 70)
    return shapes.stream(lengths + [1] * (len(lengths) % 2), "cpu", seed=seed)


SMALL = {
    **{
        f"entropy {d}": lambda d=d: token_stats.entropy(9, 301, d, backward=True)
        for d in (FP32, BF16)
    },
    "log-probs": lambda: token_stats.logprobs_and_entropy(70, 301, FP32, backward=True),
    "log-probs, backward": lambda: token_stats.logprobs_and_entropy(
        7, 301, FP32, backward=True, forward=False
    ),
    "masked": lambda: token_stats.masked_entropy(3, 40, 301, FP32),
    "linear": lambda: linear.linear(7, 16, 301, FP32),
    "linear, both": lambda: linear.linear(700, 16, 301, BF16, backward=True),
    "policy": lambda: linear.linear_policy_loss(2, 5, 16, 301, FP32, gated=0.5),
    **{
        f"{op.__name__} {workload}": lambda op=op, workload=workload: op(workload, stream(workload))
        for workload in sequence.WORKLOADS
        for op in (
            sequence.segment_ends,
            sequence.segment_offsets,
            sequence.scatter_segment_rewards,
            sequence.gae,
            sequence.segment_advantages,
            sequence.whiten,
            sequence.running_normalizer,
        )
    },
    **{
        f"{op.__name__} {workload}": lambda op=op, workload=workload: op(
            workload, stream(workload), backward=True
        )
        for workload in sequence.WORKLOADS
        for op in (
            sequence.segment_scores,
            sequence.segment_bradley_terry,
            sequence.policy_loss,
            sequence.value_loss,
        )
    },
    **{
        f"path {workload}": lambda workload=workload: sequence.boundaries_to_advantages(
            workload, stream(workload), by_token=True
        )
        for workload in sequence.WORKLOADS
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_the_contenders_of_every_case_compute_its_definition(name):
    case = SMALL[name]()
    case.contenders = {
        name: each
        for name, each in case.contenders.items()
        if name.startswith((harness.OURS, "reference", "eager", "Python"))
    }
    comparison = harness.compare(case)
    assert list(comparison.alternation.timed)[: len(case.contenders)] == list(case.contenders)
    for result in comparison.results.values():
        assert result.get("error", 0) <= harness.ALLOWED[case.dtype]


def two(*contenders, **options):
    """A case that doubles numbers, run by these contenders."""
    return harness.Case(
        op="double",
        workload="3",
        dtype=FP32,
        inputs={"x": torch.tensor([1.0, 2.0, 3.0])},
        definition=lambda x: {"y": 2 * x},
        contenders=dict(contenders),
        **options,
    )


def right(x):
    return {"y": x + x}


def wrong(x):
    return {"y": x + x * 1.001}


def broken(x):
    raise RuntimeError("no such device\nand more")


def test_who_is_wrong_or_broken_has_no_time():
    case = two(
        ("segkernels", right),
        ("a", wrong),
        ("b", broken),
        ("c", harness.Missing("not installed")),
        ("d", lambda x: {"y": torch.full_like(x, torch.nan)}),
    )
    comparison = harness.compare(case)
    assert list(comparison.alternation.timed) == ["segkernels"]
    for _ in range(3):
        comparison.alternation.round()
    ours, a, b, c, d = comparison.finish()
    assert ours["median"] > 0
    assert "median" not in a | b | c | d
    assert a["reason"].startswith("Wrong: error 5.0e-04")
    assert b["reason"] == "RuntimeError: no such device"
    assert c["reason"] == "not installed"
    assert d["reason"].startswith("Wrong: error inf")


@pytest.mark.parametrize(("function", "error"), [(wrong, harness.Wrong), (broken, RuntimeError)])
def test_our_own_failure_is_no_result(function, error):
    with pytest.raises(error):
        harness.compare(two(("segkernels", function)))


def test_wrong_gradients_are_wrong():
    def detached(x):
        return {"y": x + x.detach()}

    upstream = {"y": torch.ones(3)}
    case = two(("segkernels", right), ("a", detached), upstream=upstream, wrt=("x",))
    results = harness.compare(case).results
    assert "reason" not in results["segkernels"]
    assert results["a"]["reason"].startswith("Wrong: error 5.0e-01")


def test_contenders_take_turns_and_slow_ones_sit_out_rounds(monkeypatch):
    monkeypatch.setattr(harness, "PAUSE", 0)
    calls = []
    seconds = {"a": 0.01, "b": 3.0, "c": harness.SHORTEST / 4}

    def clock(run, repeats):
        calls.append((run, repeats))
        return seconds[run] * repeats

    timed = {name: harness.Timed(name, 2 if name == "a" else 1) for name in seconds}
    alternation = harness.Alternation(timed, clock, seconds=0.05)
    assert calls == [("a", 1), ("b", 1), ("c", 1)]
    assert alternation.rounds == 12  # 0.05 s of samples of 4 ms each
    calls.clear()
    for _ in range(12):
        alternation.round()
    # The quick one runs as often again before each sample, untimed.
    assert [calls.count(call) for call in (("a", 1), ("b", 1), ("c", 4))] == [4, 2, 24]
    assert len(calls) == 30
    assert calls[:7] == [("c", 4)] * 6 + [("a", 1)]  # each round begins with the next
    first_b, second_b = (i for i, call in enumerate(calls) if call[0] == "b")
    assert second_b - first_b > 10
    assert alternation.samples["a"] == [0.005] * 5  # two calls of the op a run
    assert alternation.samples["b"] == [3.0] * 3
    assert alternation.samples["c"] == [pytest.approx(seconds["c"])] * 12


def test_rounds_start_with_one_after_the_other(monkeypatch):
    monkeypatch.setattr(harness, "PAUSE", 0)
    calls = []

    def clock(run, repeats):
        calls.append(run)
        return 0.1

    alternation = harness.Alternation({name: harness.Timed(name) for name in "abc"}, clock, 0.4)
    calls.clear()
    for _ in range(alternation.rounds):
        alternation.round()
    assert calls == [*"abc", *"bca", *"cab"]


def test_a_very_slow_call_is_timed_once(monkeypatch):
    monkeypatch.setattr(harness, "PAUSE", 0)
    seconds = {"slow": harness.LONGEST, "quick": 1.0}
    timed = {name: harness.Timed(name) for name in seconds}
    alternation = harness.Alternation(timed, lambda run, repeats: seconds[run] * repeats, 0.5)
    for _ in range(alternation.rounds):
        alternation.round()
    assert alternation.samples == {"slow": [harness.LONGEST], "quick": [1.0] * harness.FEWEST}
    assert harness.spread([5.0]) == {"q1": 5.0, "median": 5.0, "q3": 5.0, "samples": 1}


def test_the_spread_of_samples():
    assert harness.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {
        "q1": 2.0,
        "median": 3.0,
        "q3": 4.0,
        "samples": 5,
    }


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_peak_memory_sees_what_was_freed_again():
    def run():
        torch.ones(16 << 20)  # 64 MiB, dropped at once
        return {"y": torch.ones(1 << 20)}

    peak = harness.peak_memory(run, torch.device("cpu"))
    assert 62 << 20 <= peak <= 80 << 20


def facts(**other):
    return {
        "commit": "0123456789abcdef",
        "uncommitted": False,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "processor": "A Processor (R) @ 2",
        "threads": 2,
        "isa": "avx2",
        "torch_isa": "AVX2",
        "last_level_cache": 1 << 20,
        "read_bandwidth": 10e9,
        **other,
    }


def result(contender, median=None, **other):
    timing = {} if median is None else {"median": median, "q1": median, "q3": median}
    common = {"op": "entropy_from_logits", "pass": "forward", "dtype": "float32"}
    return common | {"contender": contender, "workload": "8 x 32,064"} | timing | other


def goals(*results):
    file = tables.File(facts(), results)
    return [goal.measured(file) for goal in tables.CPU_GOALS[:3]]


def test_goals_are_measured_on_their_worst_case():
    moved = {"moved": 8 << 20}
    first = [result("segkernels", 1.0, **moved), result("torch.compile", 6.0), result("eager", 30)]
    assert goals(*first) == ["6.00x", "30.0x", "0%, missed"]
    other = {"workload": "9 x 151,936"}
    second = [result("segkernels", 1e-3, **moved, **other), result("torch.compile", 4e-3, **other)]
    assert goals(*second, *first) == ["4.00x, missed", "30.0x", "0%, missed"]
    assert goals(*second)[2] == "84%"
    assert goals(result("segkernels", 1.0, workload="7 x 8", **moved)) == ["not yet measured"] * 3
    reason = [result("segkernels", 1.0, **moved), result("eager", reason="Wrong: error 1.0e-02")]
    assert goals(*reason)[1] == "no time: Wrong: error 1.0e-02"


def test_bandwidth_is_claimed_beyond_the_cache_alone():
    file = tables.File(facts(), ())
    assert tables.share(file, {"moved": 1e9, "median": 1.0}, {}) == "10% of the read bandwidth"
    assert tables.share(file, {"moved": 1e6, "median": 1e-3}, {}) == "1.00 GB/s, in cache"
    bare = {"one bare product": {"median": 2.0}}
    assert tables.share(file, {"median": 3.0}, bare) == "1.50x one bare product"


def test_result_files_are_one_per_machine_and_instruction_set(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.result_file(facts())
    assert path.name == "cpu-a-processor-r-2-2-threads-avx2.jsonl"
    assert harness.result_file(facts(device="NVIDIA H100")).name == "gpu-nvidia-h100.jsonl"
    for median in (1.0, 2.0):
        harness.write_results(path, facts(), [result("segkernels", median)])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    [(read, results)] = harness.result_files("cpu")
    assert read == facts()
    assert results == [result("segkernels", 2.0)]


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_what_the_result_files_say(path):
    text = path.read_text()
    assert "<!-- benchmarks: goals cpu -->" in text
    assert tables.rewritten(text) == text


def test_plots_are_what_the_result_files_say():
    made = {plot.name: plot.svg for file in tables.files("cpu")[:1] for plot in tables.plots(file)}
    kept = {path.name: path.read_text() for path in tables.IMAGES.glob("benchmark-*.svg")}
    assert kept == made


def test_a_file_becomes_tables_and_plots():
    points = [
        result(f"segkernels, {n} thread{'s' * (n > 1)}", 1e-3 * x / n, axis="tokens", x=x)
        for n in (1, 2)
        for x in (100, 200)
    ]
    file = tables.File(facts(), points)
    [plot] = tables.plots(file)
    assert plot.name == "benchmark-entropy-from-logits-forward-tokens.svg"
    assert plot.svg.startswith("<svg")
    assert "segkernels, 2 threads" in plot.svg
    text = tables.text(tables.File(facts(), [result("segkernels", 2e-3, error=1e-7, moved=10)]))
    assert "2.00 ms" in text
    assert "commit 0123456789" in text


def test_everything_is_in_reach_of_make_gpu(monkeypatch):
    """Without a GPU: the names and small forms of all its cases."""
    import gpu

    run = gpu.Run(dry=True, results=None, begin=time.monotonic())
    names = [name for name, _ in gpu.cases(run)]
    assert len(names) == len(set(names)) > 15
    assert dataclasses.replace(run, begin=run.begin - 60).left < gpu.MINUTES * 60 - 59
