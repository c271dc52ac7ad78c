"""Everybody computes the same and takes turns, and documents say what was measured."""

import functools
import inspect
import math
import platform
import sys
import zipfile
from pathlib import Path

import bench_linear as linear
import bench_sequence as sequence
import bench_token_stats as token_stats
import bench_training as training
import documents
import goals
import gpu
import gpu_cases
import gpu_clock
import gpu_sweep
import machine
import memory
import pytest
import result_file
import shapes
import tables
import test_cuda
import timing
import torch
from cases import Case, Contender, Later, Missing, ours
from compare import ALLOWED, Wrong, compare

from segkernels import linear_policy, projection

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
    case.contenders = [
        each for each in case.contenders if each.role in ("ours", "definition", "textbook")
    ]
    comparison = compare(case)
    names = [each.name for each in case.contenders]
    assert list(comparison.alternation.timed)[: len(names)] == names
    for result in comparison.results.values():
        assert result.get("error", 0) <= ALLOWED[case.dtype]


def two(*contenders, **options):
    """A case that doubles numbers, run by these contenders."""
    return Case(
        op="double",
        shape={"rows": 1, "vocab": 3},
        dtype=FP32,
        inputs={"x": torch.tensor([1.0, 2.0, 3.0])},
        definition=lambda x: {"y": 2 * x},
        contenders=[
            ours(form) if name == "segkernels" else Contender(name, form)
            for name, form in contenders
        ],
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
        ("c", Later(lambda: Missing("not installed"))),
        ("d", lambda x: {"y": torch.full_like(x, torch.nan)}),
    )
    said = []
    comparison = compare(case, announce=said.append)
    assert said == ["segkernels", "a", "b", "c", "d", "the rounds"]
    assert list(comparison.alternation.timed) == ["segkernels"]
    comparison.alternation.run()
    line = comparison.finish()
    first, a, b, c, d = line.pop("contenders")
    assert line == case.facts()
    assert first["median"] > 0
    assert "median" not in a | b | c | d
    assert a["reason"].startswith("Wrong: error 5.0e-04")
    assert b["reason"] == "RuntimeError: no such device"
    assert c["reason"] == "not installed"
    assert d["reason"].startswith("Wrong: error inf")


@pytest.mark.parametrize(("function", "error"), [(wrong, Wrong), (broken, RuntimeError)])
def test_our_own_failure_is_no_result(function, error):
    with pytest.raises(error):
        compare(two(("segkernels", function)))


def test_wrong_gradients_are_wrong():
    def detached(x):
        return {"y": x + x.detach()}

    upstream = {"y": torch.ones(3)}
    case = two(("segkernels", right), ("a", detached), upstream=upstream, wrt=("x",))
    results = compare(case).results
    assert "reason" not in results["segkernels"]
    assert results["a"]["reason"].startswith("Wrong: error 5.0e-01")


def test_contenders_take_turns_and_slow_ones_sit_out_rounds(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)
    calls = []
    seconds = {"a": 0.01, "b": 3.0, "c": timing.SHORTEST / 4}

    def clock(run, repeats):
        calls.append((run, repeats))
        return seconds[run] * repeats

    timed = {name: timing.Timed(name, 2 if name == "a" else 1) for name in seconds}
    alternation = timing.Alternation(timed, clock, seconds=0.05)
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
    monkeypatch.setattr(timing, "PAUSE", 0)
    calls = []

    def clock(run, repeats):
        calls.append(run)
        return 0.1

    alternation = timing.Alternation({name: timing.Timed(name) for name in "abc"}, clock, 0.4)
    calls.clear()
    for _ in range(alternation.rounds):
        alternation.round()
    assert calls == [*"abc", *"bca", *"cab"]


def test_a_very_slow_call_is_timed_once(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)
    seconds = {"slow": timing.LONGEST, "quick": 1.0}
    timed = {name: timing.Timed(name) for name in seconds}
    alternation = timing.Alternation(timed, lambda run, repeats: seconds[run] * repeats, 0.5)
    for _ in range(alternation.rounds):
        alternation.round()
    assert alternation.samples == {"slow": [timing.LONGEST], "quick": [1.0] * timing.FEWEST}
    assert timing.spread([5.0]) == {"q1": 5.0, "median": 5.0, "q3": 5.0, "samples": 1}


def test_the_spread_of_samples():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {
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

    peak = memory.peak_memory(run, torch.device("cpu"))
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


ROLES = {"segkernels": "ours", "torch.compile": "compiled", "eager": "textbook"}


def result(name, median=None, **other):
    timing = {} if median is None else {"median": median, "q1": median, "q3": median, "samples": 3}
    return {"name": name, "role": ROLES.get(name, "peer")} | timing | other


def line(*contenders, **other):
    facts = {
        "op": "entropy_from_logits",
        "pass": "forward",
        "shape": {"rows": 8, "vocab": 32_064},
        "dtype": "float32",
    }
    return facts | other | {"contenders": list(contenders)}


def measured(*lines, of=goals.CPU_GOALS[:3], **other):
    file = result_file.File(facts(**other), lines)
    return [goal.measured(file) for goal in of]


def test_goals_are_measured_on_their_worst_case():
    first = line(
        result("segkernels", 1.0), result("torch.compile", 6.0), result("eager", 30), moved=8 << 20
    )
    assert measured(first) == ["6.00x", "30.0x", "0%, missed"]
    shape = {"rows": 9, "vocab": 151_936}
    second = line(
        result("segkernels", 1e-3), result("torch.compile", 4e-3), moved=8 << 20, shape=shape
    )
    assert measured(second, first) == ["4.00x, missed", "30.0x", "0%, missed"]
    assert measured(second)[2] == "84%"
    reason = line(result("segkernels", 1.0), result("eager", reason="Wrong: error 1"), moved=9)
    assert measured(reason)[1] == "no number: Wrong: error 1"


def test_goals_speak_of_the_cases_whose_fields_they_name():
    ours = result("segkernels", 1.0)
    others = (
        {"shape": {"rows": 7, "vocab": 8}},
        {"shape": {"layout": "long-tailed", "active": 3, "rows": 8, "vocab": 32_064}},
        {"op": "logprobs_and_entropy"},
        {"pass": "backward"},
        {"dtype": "bfloat16"},
    )
    for other in others:
        assert measured(line(ours, moved=9, **other)) == [goals.UNMEASURED] * 3
    one_core = result("segkernels, 1 thread", 1.0, threads=1) | {"role": "ours"}
    assert measured(line(one_core, moved=9)) == [goals.UNMEASURED] * 3


def test_a_goal_says_what_its_bound_is():
    texts = [goal.text for goal in goals.CPU_GOALS[:3]]
    assert texts == [
        "at least 5x torch.compile",
        "at least 20x eager",
        "at least 50% of the read bandwidth",
    ]
    limits = [goal.text for goal in goals.GPU_GOALS if goal.about.startswith("Bradley-Terry")]
    assert limits == ["at most 1 without synchronisation", "at most 2 without synchronisation"]


def policy_loss(*contenders, gated=0.0):
    shape = {"tokens": 8192, "hidden": 4096, "vocab": 131_072, "gated": gated}
    facts = {"op": "linear_policy_loss", "pass": "forward + backward", "dtype": "bfloat16"}
    return line(*contenders, shape=shape, **facts)


def test_liger_is_met_in_the_same_run_or_as_reported_at_the_rate_of_the_products_here():
    [goal] = [goal for goal in goals.GPU_GOALS if goal.measure is goals.LIGER_SHARE]
    here = {"device": "NVIDIA H100", "copy_bandwidth": 3e12}
    ours, liger = result("segkernels", 40e-3), result(goals.LIGER, 50e-3)
    bare = result("four bare products", 4 * 12.3e-3) | {"role": "bare", "products": 4}
    assert measured(policy_loss(ours, liger, bare), of=[goal], **here) == ["0.800x"]
    absent = result(goals.LIGER, reason="not installed")
    for found in ([ours, absent, bare], [ours, bare]):
        [said] = measured(policy_loss(*found), of=[goal], **here)
        assert said == "0.797x, of 50.2 ms, the reported time at this product rate"
    slower = bare | {"median": 8 * 12.3e-3}
    [said] = measured(policy_loss(ours, absent, slower), of=[goal], **here)
    assert said == "0.398x, of 100.4 ms, the reported time at this product rate"
    assert measured(policy_loss(ours, absent), of=[goal], **here) == ["no number: not installed"]


def test_gated_rows_are_compared_with_none_gated():
    [half] = [goal for goal in goals.GPU_GOALS if goal.about.startswith("same, 50%")]
    lines = [
        policy_loss(result("segkernels", t), gated=gated)
        for t, gated in ((1.0, 0.0), (0.6, 0.5), (0.5, 0.9))
    ]
    assert measured(*lines, of=[half], device="NVIDIA H100") == ["60%"]
    assert measured(*lines[1:], of=[half], device="NVIDIA H100") == [goals.UNMEASURED]


def test_bandwidth_is_claimed_beyond_the_cache_alone():
    def said(moved, seconds, *others):
        case = result_file.Measured(line(result("segkernels", seconds), *others, moved=moved))
        return tables.share(result_file.File(facts(), ()), case.ours, case)

    assert said(1e9, 1.0) == "10% of the read bandwidth"
    assert said(1e6, 1e-3) == "1.00 GB/s, in cache"
    bare = result("one bare product", 2.0) | {"role": "bare", "products": 1}
    assert said(1e9, 3.0, bare) == "1.50x one bare product"


def test_result_files_are_one_per_machine_and_instruction_set(tmp_path, monkeypatch):
    monkeypatch.setattr(result_file, "RESULTS", tmp_path)
    path = tmp_path / result_file.file_name(facts())
    assert path.name == "cpu-a-processor-r-2-2-threads-avx2.jsonl"
    assert result_file.file_name(facts(device="NVIDIA H100")) == "gpu-nvidia-h100.jsonl"
    for median in (1.0, 2.0):
        result_file.write(path, facts(), [line(result("segkernels", median))])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    [file] = result_file.files("cpu")
    assert file == result_file.File(facts(), [line(result("segkernels", 2.0))])


def test_of_a_case_that_was_measured_again_the_last_time_counts():
    lines = [line(result("segkernels", 1.0)), {"step": "tests"}, line(result("segkernels", 2.0))]
    [case] = result_file.File(facts(), lines).cases
    assert case.ours["median"] == 2.0


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_what_the_result_files_say(path):
    text = path.read_text()
    assert "<!-- benchmarks: " in text
    assert documents.rewritten(text) == text


def test_what_no_gpu_has_measured_stands_in_one_document_alone():
    [readme, _, gpus] = [path.read_text() for path in documents.DOCUMENTS]
    assert goals.UNMEASURED not in readme
    if not result_file.files("gpu"):
        assert gpus.count(goals.UNMEASURED) == len(goals.GPU_GOALS)


def test_plots_show_what_the_result_files_say():
    made = {
        plot.name: plot.data for x in result_file.files("cpu")[:1] for plot in documents.plots(x)
    }
    kept = {
        path.name: documents.plotted(path.read_text())
        for path in documents.IMAGES.glob("benchmark-*.svg")
    }
    assert kept == made


def points():
    return [
        line(
            *(
                result(f"segkernels, {n} thread{'s' * (n > 1)}", 1e-3 * x / n, threads=n)
                for n in (1, 2)
            ),
            axis="tokens",
            x=x,
        )
        for x in (200, 100)
    ]


def test_a_file_becomes_plots():
    [plot] = documents.plots(result_file.File(facts(), points()))
    assert plot.name == "benchmark-entropy-from-logits-forward-tokens.svg"
    one, two = plot.lines["segkernels, 1 thread"], plot.lines["segkernels, 2 threads"]
    assert one == [(0.1, 100.0), (0.2, 200.0)]
    assert two == [(0.1, 50.0), (0.2, 100.0)]


def test_a_plot_is_drawn_with_its_data():
    pytest.importorskip("matplotlib", reason="draws the plots of docs/benchmarks.md")
    [plot] = documents.plots(result_file.File(facts(), points()))
    svg = plot.svg()
    assert svg == plot.svg()
    assert ">segkernels, 2 threads<" in svg
    assert documents.plotted(svg) == plot.data


def test_a_file_becomes_tables():
    text = tables.text(result_file.File(facts(), [line(result("segkernels", 2e-3, error=1e-7))]))
    assert "2.00 ms" in text
    assert "commit 0123456789" in text
    unknown = tables.machine(result_file.File(facts(commit=None, uncommitted=None), ()))
    assert "commit unknown" in unknown


# ---- reward training ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_pairs(tmp_path_factory):
    """What trainers read: the folder, and what ``prepare`` says of it."""
    folder = tmp_path_factory.mktemp("training")
    workload = training.Workload(
        count=3, max_length=64, max_prompt_length=40, hidden=16, layers=1, seed=3
    )
    return folder, training.prepare(workload, folder)


def test_trainers_do_the_same_work(small_pairs):
    folder, shape = small_pairs
    case = training.side_by_side(shape, folder, batch=2, repeats=1)
    assert case["shape"] == shape | {"batch": 2}
    by_name = {result["name"]: result for result in case["contenders"]}
    if by_name["TRL"].get("reason") == "not installed":
        del by_name["TRL"]
    assert {"segrlhf", "segrlhf, padded rows"} <= by_name.keys()
    for result in by_name.values():
        assert len(result["losses"]) == 2  # of a whole pass, after a batch that is left out
        assert result["samples"] == 1
        assert result["median"] > 0
    assert by_name["segrlhf"]["tokens"] < by_name["segrlhf, padded rows"]["tokens"]
    text = tables.text(result_file.File(facts(), [case]))
    assert "3 pairs (generated), 2 a batch" in text
    assert "gradient error" in text


@pytest.mark.parametrize("error", [2e-5, math.inf, math.nan])
def test_a_trainer_with_other_losses_has_no_time(error):
    training.check({"loss_error": 1e-5, "gradient_error": 1e-4})
    with pytest.raises(Wrong, match="loss error"):
        training.check({"loss_error": error, "gradient_error": 0.0})
    with pytest.raises(Wrong, match="gradient error"):
        training.check({"loss_error": 0.0, "gradient_error": 10 * error})


def test_errors_of_losses_and_gradients_are_shares(tmp_path):
    assert training.loss_error([1.0, 3.0], [1.0, 2.0]) == 0.5
    for name, numbers in {"a": [3.0, 4.0], "b": [3.0, 4.5], "c": [3.0]}.items():
        torch.tensor(numbers).numpy().tofile(tmp_path / name)
    a, b, c = (tmp_path / name for name in "abc")
    assert training.gradient_error(a, a) == 0
    assert training.gradient_error(b, a) == pytest.approx(0.1)
    assert training.gradient_error(c, a) == math.inf


class Said:
    """A trainer's process, as ``side_by_side`` sees it."""

    def __init__(self, name, folder, *_, dies=(), wrong=()):
        self.replies = [{"seconds": 9.0}, {"seconds": 2.0}]
        losses = [0.7, 0.8 if name in wrong else 0.6]
        self.replies.append({"losses": losses, "tokens": 5, "peak_bytes": 1})
        self.dies = name in dies
        torch.ones(3).numpy().tofile(training.gradients_file(folder, name))

    def go(self):
        if self.dies:
            raise BrokenPipeError("gone")

    def reply(self):
        return self.replies.pop(0)

    def close(self):
        pass


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"dies": ["TRL"]}, "BrokenPipeError: gone"),
        ({"wrong": ["TRL"]}, "Wrong: loss error 3.3e-01"),
    ],
)
def test_what_befalls_trl_is_its_reason(how, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(training, "Process", functools.partial(Said, **how))
    case = result_file.Measured(training.side_by_side({"pairs": 2}, tmp_path, 1, repeats=1))
    assert case.ours["median"] == 2.0
    trl = case.find(name="TRL")
    assert trl["reason"].startswith(reason)
    assert "median" not in trl


@pytest.mark.parametrize("how", [{"dies": ["segrlhf"]}, {"wrong": ["segrlhf"]}])
def test_what_befalls_our_trainer_is_an_error(how, tmp_path, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "Process", functools.partial(Said, **how))
    with pytest.raises((Wrong, BrokenPipeError)):
        training.side_by_side({"pairs": 2}, tmp_path, 1, repeats=1)


def trained(batch, **trl):
    shape = {"model": "llama", "parameters": 134_515_584, "data": "f", "pairs": 24}
    shape |= {"longest": 2048, "batch": batch}
    ours = result("segrlhf", 10.0, peak_bytes=1 << 30) | {"role": "ours"}
    return line(
        *(ours, result("TRL", **trl)),
        **{"op": "reward training", "pass": "forward + backward", "shape": shape},
    )


def test_goals_of_training_are_held_against_trl():
    first = trained(8, median=35.0, peak_bytes=3 << 30)
    second = trained(16, reason="not installed")
    assert measured(first, second, of=goals.TRAINING_GOALS) == [
        *("3.50x", "33%"),
        *["no number: not installed"] * 2,
    ]
    [goal] = {goal.about for goal in goals.TRAINING_GOALS if goal.bound == 4.2}
    assert goal == "reward training, SmolLM2-135M, 16 pairs a batch"


# ---- make gpu ----------------------------------------------------------------------------------


def test_every_goal_for_gpus_has_its_case():
    """Without a GPU: the small forms of the cases stand where the goals look, sizes apart."""
    every = gpu_cases.measurements(dry=True)
    assert len(every) > 20
    cases = [result_file.Measured(x.make(0).facts()) for x in every.values() if x.goal]
    assert len(cases) == 11

    def kind(op, passes, dtype, shape):
        return op, passes, dtype, shape.get("gated"), shape.get("layout"), *sorted(shape)

    wanted = {kind(goal.op, goal.passes, goal.dtype, goal.shapes) for goal in goals.GPU_GOALS}
    found = {kind(*(case.line[x] for x in ("op", "pass", "dtype", "shape"))) for case in cases}
    assert found == wanted


class Timeline:
    """A device that works a microsecond a cycle, and a host that queues work of two seconds in a
    tenth of one; if it is ``blocking``, it waits for the device first."""

    def __init__(self, blocking=False):
        self.host = self.device = 0.0
        self.blocking = blocking
        self.waits = []

    def _sleep(self, cycles):
        self.waits.append(cycles)
        self.device = max(self.host, self.device) + cycles * 1e-6

    def call(self):
        if self.blocking:
            self.host = max(self.host, self.device)
        self.host += 0.1
        self.device = max(self.host, self.device) + 2

    def Event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, timeline):
        self.timeline = timeline

    def record(self):
        self.at = max(self.timeline.host, self.timeline.device)

    def query(self):
        return self.timeline.host >= self.at

    def synchronize(self):
        self.timeline.host = max(self.timeline.host, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_the_time_on_a_gpu_holds_nothing_of_the_hosts():
    device = Timeline()
    clock = gpu_clock.EventClock(device)
    first = gpu_clock.SHORTEST_WAIT
    call = device.call
    assert clock(call, 1) == pytest.approx(2)
    assert device.waits == [first]
    assert clock(call, 20) == pytest.approx(40)  # two seconds of launches
    assert device.waits[1:] == [first, 8 * first]
    assert clock(call, 20) == pytest.approx(40)
    assert device.waits[3:] == [8 * first]  # it remembers


def test_work_that_the_host_waits_in_is_timed_as_it_is():
    device = Timeline(blocking=True)
    clock = gpu_clock.EventClock(device)
    call = device.call
    assert clock(call, 1) == pytest.approx(2.1)
    assert max(device.waits) == gpu_clock.LONGEST_WAIT
    before = len(device.waits)
    assert clock(call, 1) == pytest.approx(2.1)
    assert len(device.waits) == before


# A worker that needs no torch: what ``gpu.py`` may meet, by the names of its cases.
WORKER = """
import json, os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu_worker import announce, serve

def facts(request):
    if "COPY_CRASHES" in os.environ and request["copy"]:
        os.abort()
    facts = {{"device": "GPU", "copy_bandwidth": 2e12, "commit": None, "uncommitted": None,
              "date": "2026-01-02", "versions": {{}}, "cuda": "13", "driver": None}}
    return {{"facts": facts, "cases": dict.fromkeys({cases!r}, True)}}

def case(*contenders, at=None, fault=None):
    def job(request):
        results = []
        for name in contenders:
            result = {{"name": name, "role": "ours" if name == "segkernels" else "peer"}}
            if name in request["without"]:
                results.append({{**result, "reason": request["without"][name]}})
                continue
            announce(name)
            if name == at:
                fault()
            results.append({{**result, "median": 1e-3}})
        return {{"op": request["job"], "pass": "forward", "shape": {{"rows": 1, "vocab": 2}},
                 "dtype": "float32", "contenders": results}}
    return job

def broken():
    raise RuntimeError("an illegal memory access was encountered")

def segmentation():
    os.kill(os.getpid(), signal.SIGSEGV)

def tiles(request):
    def point(op, width, *times):
        seconds = dict(zip(("logits", "dX", "dW", "op"), times))
        return {{"op": op, "height": 8, "width": width, "seconds": seconds}}

    each = [("linear form", 16, 1.0, 2.0, 3.0, 7.5), ("linear form", 32, 2.0, 2.0, 1.5, 8.0),
            ("policy loss", 16, 1.0, 2.0, 3.0, 6.5), ("policy loss", 32, 2.0, 2.0, 1.5, 6.0)]
    return {{"sweep": "tiles", "points": [point(*one) for one in each]}}

def rows(request):
    warps, unroll, *_ = sizes = request["sizes"]
    if warps == 8:
        os.abort()
    return {{"sweep": "row kernels", "sizes": sizes,
             "seconds": {{"forward": 1.0 / unroll, "backward": 1.0 / warps}},
             "moved": {{"forward": 1e11, "backward": 1e11}}}}

serve({{
    "facts": facts,
    "sound": case("segkernels", "peer"),
    "peer crashes": case("segkernels", "one", "two", at="one", fault=os.abort),
    "peer hangs": case("segkernels", "one", at="one", fault=lambda: time.sleep(60)),
    "ours crashes": case("segkernels", at="segkernels", fault=segmentation),
    "ours raises": case("segkernels", at="segkernels", fault=broken),
    "silent": lambda request: os._exit(0),
    "last": case("segkernels"),
    "sweep tiles": tiles,
    "sweep row kernels": rows,
}})
"""


@pytest.fixture
def make_gpu(tmp_path, monkeypatch, capsys):
    """Runs ``make gpu`` over such workers in an empty folder; gives (exit status, result file, what
    it printed)."""
    script = tmp_path / "worker.py"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, str(script)))

    def run(*arguments, cases=("sound",)):
        benchmarks = str(Path(gpu.__file__).parent)
        script.write_text(WORKER.format(benchmarks=benchmarks, cases=list(cases)))
        out = tmp_path / "out"
        status = gpu.main(["--out", str(out), *arguments])
        [path] = out.glob("*.jsonl")
        printed = capsys.readouterr().out
        assert printed.rstrip().splitlines()[-1].startswith(goals.GPU_GOALS[-1].about)
        assert len(printed[printed.index("\nresults: ") :]) < 12_000
        return status, result_file.read(path), printed

    return run


def steps(file):
    """What each step failed by; empty where it passed."""
    return {line["step"]: line.get("failed", "") for line in file.lines if "step" in line}


def measured_by(file):
    return [case.line["op"] for case in file.cases]


def python(*lines):
    return sys.executable, "-c", "\n".join(lines)


def test_a_case_that_crashes_or_hangs_costs_itself_alone(make_gpu, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "case", 5)
    names = ["sound", "peer crashes", "peer hangs", "ours crashes", "ours raises", "silent", "last"]
    status, file, printed = make_gpu("--steps", "goals", cases=names)
    assert status == 1
    done = {case.line["op"]: case for case in file.cases}
    assert list(done) == ["sound", "peer crashes", "peer hangs", "last"]
    assert all(case.ours["median"] == 1e-3 for case in done.values())
    crashed, hung = (done[f"peer {how}"].find(name="one") for how in ("crashes", "hangs"))
    assert crashed["reason"] == "ended the process: ended by SIGABRT"
    assert hung["reason"] == "ended the process: did not end within 5 s"
    assert done["peer crashes"].find(name="two")["median"] == 1e-3
    failed = {line["case"]: line["failed"] for line in file.lines if "case" in line}
    assert failed == {
        "ours crashes": "ended by SIGSEGV",
        "ours raises": "exit status 1: RuntimeError: an illegal memory access was encountered",
        "silent": "ended without a result",
    }
    for name in failed:
        assert f"FAILED: {name}: " in printed


def test_nothing_is_lost_when_the_copy_crashes(make_gpu, monkeypatch):
    monkeypatch.setenv("COPY_CRASHES", "1")
    status, file, _ = make_gpu("--steps", "goals")
    assert status == 1
    assert file.facts["device"] == "GPU"
    assert measured_by(file) == ["sound"]


def test_where_torch_cannot_be_imported_the_other_steps_are_taken(make_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "WORKER", python("import no_such_torch"))
    monkeypatch.setattr(gpu, "BUILD", python(""))
    status, file, printed = make_gpu("--steps", "build", "smoke", "goals", "tests")
    assert status == 1
    assert file.facts["device"] == "unknown"
    assert steps(file)["machine"] == "neither torch nor the GPU can be asked what they are"
    assert steps(file)["build"] == ""
    assert "No module named 'no_such_torch'" in steps(file)["smoke"]
    assert "No module named 'no_such_torch'" in printed


def builder(log, *refused):
    """Notes its options, and fails where one of them is refused."""
    return python(
        "import os",
        "options = os.environ['CMAKE_ARGS']",
        f"open({str(log)!r}, 'a').write(options + '\\n')",
        f"raise SystemExit(any(each in options for each in {refused!r}))",
    )


def test_a_build_that_fails_is_tried_in_lesser_forms(make_gpu, monkeypatch, tmp_path):
    old = tmp_path / "segkernels" / "_cuda.cpython-312.so"
    old.parent.mkdir()
    tried = tmp_path / "tried"
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    forms = [
        "-DSEGK_CUDA=ON -DSEGK_STRICT=ON",
        "-DSEGK_CUDA=ON -DSEGK_STRICT=OFF",
        "-DSEGK_CUDA=OFF",
    ]
    for refused, count in ((), 1), (["STRICT=ON"], 2), (["CUDA=ON"], 3), (["CUDA"], 3):
        old.touch()
        monkeypatch.setattr(gpu, "BUILD", builder(tried, *refused))
        status, file, printed = make_gpu("--steps", "build", "goals")
        assert tried.read_text().splitlines() == forms[:count]
        assert status == (1 if refused else 0)
        assert ("build: FAILED: with warnings as errors: exit status 1" in printed) == bool(refused)
        assert bool(steps(file)["build"]) == (refused == ["CUDA"])
        assert old.exists() == (count < 3)  # it is of other sources than the rest
        assert measured_by(file) == ["sound"]
        tried.unlink()


def test_a_build_that_takes_too_long_leaves_time_for_the_last_form(make_gpu, monkeypatch):
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    # What is left for the last form is many times what Python takes to start on a busy machine.
    monkeypatch.setitem(gpu.LIMITS, "build", 22)
    monkeypatch.setattr(gpu, "LAST_BUILD", 20)
    slow = ["import os, time", "time.sleep(60 * ('CUDA=ON' in os.environ['CMAKE_ARGS']))"]
    monkeypatch.setattr(gpu, "BUILD", python(*slow))
    status, file, printed = make_gpu("--steps", "build", "goals")
    assert status == 1
    assert "with warnings as errors: did not end within 2 s" in printed
    assert steps(file) == {"machine": "", "build": "", "goals": ""}
    assert measured_by(file) == ["sound"]


def test_a_missing_program_costs_its_step(make_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "BUILD", ("no-such-program",))
    monkeypatch.setenv("PATH", "")
    status, file, _ = make_gpu("--steps", "build", "memcheck", "goals")
    assert status == 1
    assert steps(file)["build"].count("no-such-program: No such file or directory") == 3
    assert steps(file)["memcheck"] == "compute-sanitizer: No such file or directory"
    assert measured_by(file) == ["sound"]
    assert machine.header("none")["commit"] is None  # no git


def test_when_the_time_is_over_results_and_goals_are_there(make_gpu, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "tests", 1)
    monkeypatch.setattr(gpu, "PYTEST", python("import time", "time.sleep(60)"))
    status, file, _ = make_gpu("--steps", "goals", "tests", "everybody")
    assert status == 1
    assert steps(file)["tests"] == "did not end within 1 s: KeyboardInterrupt"
    assert measured_by(file) == ["sound"]
    status, file, _ = make_gpu("--steps", "goals", "tests", "--minutes", "0")
    assert status == 1
    over = "no time was left"
    assert steps(file) == {"machine": "", "goals": over, "tests": over}


def test_the_sweep_recommends_among_those_that_ran(make_gpu):
    status, file, printed = make_gpu("--steps", "sweep")
    assert status == 1
    crashed = sum(warps == 8 for warps, *_ in gpu_sweep.ROW_KERNELS)
    assert steps(file)["sweep"].count("ended by SIGABRT") == crashed > 0
    kept = [line for line in file.lines if "sweep" in line]
    assert len(kept) == 1 + len(gpu_sweep.ROW_KERNELS) - crashed
    linear, policy = (line for line in printed.splitlines() if line.startswith("best: "))
    assert (linear, policy) == ("best: 8 x 16", "best: 8 x 32")
    # Two logits, dX and dW of the linear form; the policy loss computes the logits once.
    rows = [line.split() for line in printed.splitlines()]
    assert ["8", "x", "16", "1000.00", "2000.00", "3000.00", "7000.00", "7500.00"] in rows
    assert ["8", "x", "32", "2000.00", "2000.00", "1500.00", "5500.00", "6000.00"] in rows


def test_an_interrupted_run_reports_what_it_has(make_gpu, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.STEPS, "tests", interrupted)
    status, file, printed = make_gpu("--steps", "goals", "tests", "everybody")
    assert status == 1
    assert steps(file) == {"machine": "", "goals": ""}
    assert measured_by(file) == ["sound"]
    assert "FAILED: interrupted" in printed


def test_time_is_kept_for_the_sweep(make_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "PYTEST", python(""))
    monkeypatch.setitem(gpu.LIMITS, "sweep", 14)
    minutes = str((5 + gpu.REPORT + gpu.LIMITS["sweep"]) / 60)
    _, file, _ = make_gpu("--minutes", minutes, "--steps", "goals", "everybody", "sweep")
    assert steps(file)["everybody"] == "no time was left for sound"
    assert measured_by(file) == ["sound"]
    assert any("sweep" in line for line in file.lines)


def wheel_of(folder, name, **files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        info = f"{name}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for path, text in files.items():
            wheel.writestr(path, text)


def test_the_workers_of_make_gpu_measure(tmp_path, monkeypatch, capsys):
    """The real ones, on small inputs, with peers from a folder of wheels."""
    found = gpu.machine

    def one_case(run):
        said = found(run)
        run.cases = {"Bradley-Terry, forward": True}
        return said

    monkeypatch.setitem(gpu.STEPS, "machine", one_case)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    # A line that is run where the folder is looked at for packages.
    wheel_of(tmp_path, "peer", **{"peer.pth": "import sys; print('a peer is found')"})
    arguments = ["--dry-run", "--out", str(tmp_path), "--wheels", str(tmp_path)]
    assert gpu.main([*arguments, "--steps", "peers", "goals"]) == 1
    file = result_file.read(tmp_path / "gpu-none.jsonl")
    broken = steps(file)["peers"]
    assert broken.startswith("broken-1.0-py3-none-any.whl: exit status")
    assert steps(file) == {"machine": "", "peers": broken, "goals": ""}
    assert measured_by(file) == ["segment_bradley_terry"]
    assert file.cases[0].ours["median"] > 0
    assert file.cases[0].ours["timed"] == "calls"
    assert "a peer is found" in (tmp_path / "gpu.log").read_text()
    assert capsys.readouterr().out.count("FAILED") == 2  # when it happened, and at the end


def test_the_smoke_test_runs_every_kind_of_kernel():
    found = gpu_cases.smoke(dry=True)
    assert len(found["errors"]) == 4
    assert all(error <= ALLOWED[BF16] for error in found["errors"].values())


@pytest.mark.triton
@pytest.mark.interpreter
def test_the_sweep_times_the_products_of_a_tile_and_the_op():
    default = projection.TILINGS["triton"]
    points = gpu_sweep.tiles("cpu", lambda run, repeats: 2.0, dry=True)["points"]
    assert projection.TILINGS["triton"] is default
    sizes = {op: set() for op in gpu_sweep.PRODUCTS}
    for point in points:  # a tile's time, as often as there are tiles
        sizes[point["op"]].add((point["height"], point["width"]))
        tiles = (16 / point["height"]) * (96 / point["width"])
        products = dict.fromkeys(("logits", "dX", "dW"), 2.0 * tiles)
        assert point["seconds"] == {**products, "op": 2.0}
    assert sizes == {"linear form": {(16, 32), (16, 48)}, "policy loss": {(4, 96), (8, 96)}}


@pytest.mark.parametrize("op", gpu_sweep.PRODUCTS)
def test_a_swept_tile_is_what_the_op_uses(op):
    tokens, size, vocab = gpu_sweep.SHAPE
    hidden, weight = (
        torch.empty(n, size, dtype=torch.bfloat16, device="meta") for n in (tokens, vocab)
    )

    def tile():
        if op == "policy loss":
            chunks = linear_policy._Chunks(hidden, weight, None, None, "triton")
            return chunks.height, chunks.columns
        space = projection.Space.of("triton", None, hidden)
        rows = projection.HiddenRows(hidden, None, space.dtype)
        height = space.height(rows)
        return height, space.columns(height, rows, weight)

    linear = [(tokens, width) for width in gpu_sweep.WIDTHS]
    policy = [(height, vocab) for height in gpu_sweep.HEIGHTS]
    swept = {"linear form": linear, "policy loss": policy}[op]
    default = tile()
    for each in swept:
        with gpu_sweep.tiled(op, *each):
            assert tile() == each
    assert tile() == default


@pytest.mark.triton
@pytest.mark.interpreter
def test_the_sweep_runs_the_row_kernels_as_configured():
    for sizes in (gpu_sweep.ROW_KERNELS[0], (2, 2, 1, 4 << 10)):
        line = gpu_sweep.row_kernels("cpu", timing.wall_clock, True, sizes)
        assert line["sizes"] == list(sizes)
        assert all(seconds > 0 for seconds in line["seconds"].values())
        assert line["moved"] == {"forward": 2 * 5000 * 2, "backward": 2 * 2 * 5000 * 2}


def test_the_sanitizers_run_about_ten_tests():
    [_, _, chosen] = gpu.SANITIZED
    count = 0
    for name in chosen.split(" or "):
        [test] = [test for each, test in vars(test_cuda).items() if name in each]
        assert "device" in inspect.signature(test).parameters
        count += math.prod(len(mark.args[1]) for mark in test.pytestmark)
    assert 8 <= count <= 16
