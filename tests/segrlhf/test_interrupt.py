"""Signals are requests; repeated ones are the same request; later ones stop at once."""

import multiprocessing
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from segrlhf import cli, score
from segrlhf.errors import Interrupted
from segrlhf.runtime import interrupt
from segrlhf.runtime.checkpoints import mark_complete
from segrlhf.runtime.interrupt import SIGNALS, Interrupt


@pytest.fixture(autouse=True)
def handlers():
    """As a program finds them that was not started in the background."""
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in SIGNALS}
    yield
    assert all(signal.getsignal(kind) is signal.default_int_handler for kind in SIGNALS)
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(interrupt, "time", clock)
    return clock


@pytest.fixture(scope="module")
def alone():
    return Accelerator(cpu=True)


def stop(train):
    """The interruption that ``train`` ends with."""
    with pytest.raises(Interrupted) as stopped:
        train()
    return stopped.value


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_and_its_repetitions_are_one_request(kind, clock, alone, capfd, tmp_path):
    def train():
        with Interrupt(tmp_path) as asked:
            assert not asked.requested(alone)
            for other in (kind, *SIGNALS):
                signal.raise_signal(other)
                clock.now += 4.9 / 4
            assert asked.requested(alone)
            raise asked.stopped("saved")

    stopped = stop(train)
    assert (str(stopped), stopped.signal) == ("saved", kind)
    assert capfd.readouterr().err.count("finishing this step and saving a checkpoint") == 1


def test_a_signal_after_five_seconds_stops_at_once(clock, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    mark_complete(tmp_path / "checkpoint-4", 4)

    def train():
        with Interrupt(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            clock.now += 5.0
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")

    stopped = stop(train)
    assert stopped.signal == signal.SIGINT
    assert "at once, without a new checkpoint; newest complete one: " in str(stopped)
    assert str(stopped).endswith("checkpoint-4")


def test_a_request_that_no_step_meets_ends_the_outermost_block(tmp_path):
    saved = []

    def train():
        with Interrupt(tmp_path):
            with Interrupt(tmp_path):
                signal.raise_signal(signal.SIGHUP)
            saved.append("final")

    assert "it was finished, and all was saved" in str(stop(train))
    assert saved == ["final"]


def test_ignored_signals_stay_ignored(alone, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt(tmp_path) as asked:
        signal.raise_signal(signal.SIGHUP)
        assert not asked.requested(alone)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.default_int_handler)


def test_another_process_was_asked(capfd, tmp_path):
    class Two:
        num_processes, device = 2, "cpu"

        def gather(self, mine):
            return torch.cat([mine, torch.tensor([int(signal.SIGTERM)])])

    def train():
        with Interrupt(tmp_path) as asked:
            assert asked.requested(Two())
            signal.raise_signal(signal.SIGINT)  # the launcher's repetition comes late
            raise asked.stopped("saved")

    assert stop(train).signal == signal.SIGTERM
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", SIGNALS)
def test_every_command_ends_with_the_signals_status(kind, monkeypatch, capsys, tmp_path):
    """Outside of training too, where repetitions find it cleaning up."""

    def run(_data, _config):
        try:
            signal.raise_signal(kind)
        finally:
            for other in SIGNALS:
                signal.raise_signal(other)
            (tmp_path / "cleaned").touch()

    monkeypatch.setattr(score, "run", run)
    words = ["score", "--dataset_name", "rows.jsonl", "--reward_model", "rm"]
    assert cli.main(words) == 128 + kind
    assert "segrlhf score: interrupted; stopped at once" in capsys.readouterr().err
    assert (tmp_path / "cleaned").exists()


def _worker(pipe):
    pipe.send("started")
    pipe.recv()  # after the SIGINT
    pipe.send("lived")
    pipe.recv()


def test_a_forked_worker_outlives_ctrl_c_and_dies_of_its_parents_signal(tmp_path):
    mine, theirs = multiprocessing.Pipe()
    with Interrupt(tmp_path):
        worker = multiprocessing.get_context("fork").Process(
            target=_worker, args=(theirs,), daemon=True
        )
        worker.start()
        assert mine.recv() == "started"
        os.kill(worker.pid, signal.SIGINT)
        mine.send("go on")
        assert mine.poll(20)
        assert mine.recv() == "lived"
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == -signal.SIGTERM
