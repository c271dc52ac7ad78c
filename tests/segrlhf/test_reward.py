import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launched import stop_under_torchrun
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, TrainerCallback, set_seed
from waits import Waits

from segkernels import segment_bradley_terry
from segrlhf import cli
from segrlhf.data.batch import pad_responses
from segrlhf.data.tokenize import tokenize_pairs
from segrlhf.entropy_cache import Pairs
from segrlhf.errors import NonFiniteError, UserError
from segrlhf.models.loading import load_tokenizer
from segrlhf.models.reward_model import SegmentRewardModel
from segrlhf.reward import run as reward_run
from segrlhf.reward import trainer
from segrlhf.reward.config import EVAL_METRICS, RewardConfig
from segrlhf.reward.run import run, trained_with
from segrlhf.reward.trainer import SegmentRewardTrainer
from segrlhf.runtime import interrupt
from segrlhf.runtime.checkpoints import COMPLETE, last_checkpoint, mark_complete


@pytest.fixture(autouse=True)
def one_thread():
    """So that runs in other processes can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def flags(tiny_lm_dir, pairs_file, tmp_path):
    """The command line of a small run, with changes; None drops a flag."""

    def flags(output="rm", **changes):
        values = {
            "model_name_or_path": tiny_lm_dir,
            "dataset_name": pairs_file,
            "output_dir": tmp_path / output,
            "granularity": "segment",
            "entropy_threshold": 3.0,
            "entropy_cache_dir": tmp_path / "cache",
            "max_length": 48,
            "max_prompt_length": 40,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "report_to": "none",
            **changes,
        }
        return [
            word
            for name, value in values.items()
            if value is not None
            for word in (f"--{name}", str(value))
        ]

    return flags


@pytest.fixture
def train(flags):
    """Runs the command in this process; its result."""

    def train(output="rm", **changes):
        return run(*cli.parse("reward", flags(output, **changes)))

    return train


@pytest.fixture
def make_trainer(tiny_lm_dir, tokenizer, pairs, tmp_path):
    """A trainer of a token model on the tiny LM."""

    def make(rows=pairs, eval_rows=None, callbacks=None, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "granularity": "token",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
        config = RewardConfig(**settings)
        set_seed(config.seed)
        model = SegmentRewardModel.from_causal_lm(
            tiny_lm_dir, config.granularity, config.entropy_threshold
        )
        return SegmentRewardTrainer(
            model,
            config,
            train_dataset=Pairs(rows),
            eval_dataset=Pairs(eval_rows) if eval_rows is not None else None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return make


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def logged(result, *names):
    return [[log[name] for name in names] for log in result["history"] if "loss" in log]


# What comes out


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_learns_and_leaves_a_whole_model(train, tmp_path, granularity):
    result = train(
        granularity=granularity,
        entropy_threshold=3.0 if granularity == "segment" else None,
        num_train_epochs=6,
        eval_size=0.25,
    )
    losses = [loss for (loss,) in logged(result, "loss")]
    assert losses[-1] < losses[0]
    assert result["metrics"]["eval_accuracy"] > 0.8
    model = SegmentRewardModel.from_pretrained(tmp_path / "rm")
    assert model.granularity == granularity
    assert model.entropy_threshold == (3.0 if granularity == "segment" else None)
    per_response = result["history"][0]["segments/per_response"]
    assert (per_response == 1) == (granularity == "bandit")
    assert load_tokenizer(tmp_path / "rm").eos_token == "</s>"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.num_labels == 1
    assert not list((tmp_path / "rm").glob(".*"))
    known = trained_with(tmp_path / "rm")
    assert (known["max_length"], known["truncation_side"]) == (48, "none")


def test_segments_come_from_the_entropy_model_named(train, tiny_lm_dir, tmp_path):
    same = train("same", max_steps=1)
    other = train("other", max_steps=1, entropy_model=tiny_lm_dir)
    assert logged(same, "loss") == logged(other, "loss")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["segment_reward"]["entropy_model"] == str(tiny_lm_dir)


def test_lora_is_merged_into_a_whole_model(train, tmp_path):
    result = train(use_peft=True, lora_r=4, num_train_epochs=6, eval_size=0.25)
    names = weights(tmp_path / "rm").keys()
    assert "score.weight" in names
    assert not any("lora" in name for name in names)
    model = SegmentRewardModel.from_pretrained(tmp_path / "rm")
    assert model.granularity == "segment"
    assert result["metrics"]["eval_accuracy"] > 0.8


def test_lora_resumes_with_the_same_bits(train, tmp_path):
    settings = {"use_peft": True, "lora_r": 4, "save_steps": 4, "max_steps": 8}
    train("whole", **settings)
    train(**settings)
    train(**settings, resume_from_checkpoint=tmp_path / "rm" / "checkpoint-4")
    assert_same_bits(tmp_path / "rm", tmp_path / "whole")


def test_lora_is_not_sharded(train, monkeypatch):
    monkeypatch.setattr(reward_run, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match=r"use_peft: expected whole weights on every process"):
        train(use_peft=True)


def test_tensorboard_gets_the_metrics(train, tmp_path):
    train(max_steps=2, report_to="tensorboard", logging_dir=None)
    assert list(tmp_path.rglob("events.out.tfevents*"))


# Loss and metrics


def test_loss_and_metrics_are_those_of_the_batch(make_trainer, pairs, tokenizer):
    rows = [{**pairs[i], "margin": 0.25 * i, "row": i} for i in range(5)]
    trainer = make_trainer(
        Dataset.from_list(rows).remove_columns("row"),
        per_device_train_batch_size=5,
        max_steps=1,
        learning_rate=0.0,
        label_smoothing_factor=0.1,
        center_rewards_coefficient=0.01,
        score_reduction="sum",
    )
    sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
    ids, attention, mask = pad_responses(
        [row["prompt_ids"] for row, _ in sides], [row[f"{side}_ids"] for row, side in sides]
    )
    with torch.no_grad():
        rewards = trainer.model(ids, attention)
    terminated = torch.tensor([row[f"{side}_terminated"] for row, side in sides])
    ends = trainer.model.segment_ends(None, mask, terminated)
    expected = segment_bradley_terry(
        rewards,
        ends,
        mask,
        reduction="sum",
        margin=torch.tensor([row["margin"] for row in rows]),
        label_smoothing=0.1,
        center_coef=0.01,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    chosen, rejected = expected.scores.view(2, -1)
    assert log["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert log["accuracy"] == pytest.approx(float(expected.accuracy))
    assert log["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-5)
    assert log["mean_reward"] == pytest.approx(float(expected.scores.mean()), rel=1e-4)
    assert log["min_reward"] == pytest.approx(float(expected.scores.min()), rel=1e-5)
    assert log["max_reward"] == pytest.approx(float(expected.scores.max()), rel=1e-5)
    responses = mask.sum(1).double()
    assert log["segments/per_response"] == pytest.approx(float((responses - 1).mean()))
    assert log["segments/tokens_per_segment"] == 1


def test_gradient_accumulation_weighs_pairs_equally(train, tmp_path, pairs_file, write_jsonl):
    """22 pairs in batches of 4 leave a last micro-batch of 2."""
    odd = write_jsonl(tmp_path / "odd.jsonl", read_jsonl(pairs_file)[:22])
    whole = train("whole", dataset_name=odd, per_device_train_batch_size=8, optim="sgd")
    parts = train("parts", dataset_name=odd, gradient_accumulation_steps=2, optim="sgd")
    assert_close_runs(whole, parts, tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens_per_batch": 96}, {"packing": "varlen", "max_tokens_per_batch": 150},
     {"packing": "none"}, {"max_tokens_per_batch": 64, "activation_checkpointing": "true"}],
    ids=str,
)  # fmt: skip
def test_how_pairs_are_read_changes_no_number(train, tmp_path, changes):
    """But for rounding: micro-batches of any size, padded or not."""
    common = {"optim": "sgd", "eval_size": 0.2, "eval_strategy": "epoch"}
    whole, parts = train("whole", **common), train("parts", **common, **changes)
    assert_close_runs(whole, parts, tmp_path / "whole", tmp_path / "parts")
    for name in ("eval_loss", "eval_accuracy", "eval_segments/per_response"):
        assert parts["metrics"][name] == pytest.approx(whole["metrics"][name], rel=1e-4)


def test_a_budget_below_the_longest_pair(train, tmp_path):
    with pytest.raises(UserError, match=r"max_tokens_per_batch: expected at least \d+, .* got 30"):
        train(max_tokens_per_batch=30)


def test_one_pair_is_enough(train, tmp_path, pairs_file, write_jsonl):
    one = write_jsonl(tmp_path / "one.jsonl", read_jsonl(pairs_file)[:1])
    result = train(dataset_name=one, num_train_epochs=1)
    assert len(logged(result, "loss")) == 1


def test_evaluation_is_exact_and_stands_beside_longer_wins(make_trainer, pairs, capsys):
    """7 pairs in batches of 4: every pair counts once."""
    rows = pairs.select(range(7))
    trainer = make_trainer(eval_rows=rows)
    found = trainer.evaluate()
    [part] = trainer._read(trainer.model, [Pairs(rows)[i] for i in range(7)])
    with torch.no_grad():
        result, ends = trainer._forward(trainer.model, part.batch)
    lengths = part.batch.batch.cu_seqlens.diff().view(2, -1)
    longer = (lengths[0] > lengths[1]).float() + 0.5 * (lengths[0] == lengths[1])
    assert found["eval_loss"] == pytest.approx(float(result.loss), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(float(result.accuracy))
    assert found["eval_longer_wins"] == pytest.approx(float(longer.mean()))
    assert found["eval_segments/per_response"] == pytest.approx(float(ends.sum() / 14))
    assert "'the longer response wins' is right for" in capsys.readouterr().out


# Several processes


@pytest.mark.slow
def test_two_processes_equal_one(flags, train, tmp_path, pairs_file, write_jsonl):
    """21 pairs: the last global batch of an epoch is partial, and on one process empty."""
    odd = write_jsonl(tmp_path / "odd.jsonl", read_jsonl(pairs_file)[:21])
    common = {
        "dataset_name": odd,
        "optim": "sgd",
        "gradient_accumulation_steps": 2,
        "eval_size": 0.2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    one = train("one", **common)
    words = flags(
        "two",
        **{**common, "entropy_cache_dir": tmp_path / "cache_two"},
        per_device_train_batch_size=2,
    )
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         str(Path(__file__).parents[2] / "configs" / "ddp.yaml"), "--num_processes", "2",
         "--mixed_precision", "no", "-m", "segrlhf.cli", "reward", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    last = last_checkpoint(tmp_path / "two")
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert_close_runs(one, {"history": history}, tmp_path / "one", tmp_path / "two")
    ours = [log for log in one["history"] if "eval_loss" in log]
    theirs = [log for log in history if "eval_loss" in log]
    assert len(theirs) == 2
    for a, b in zip(ours, theirs, strict=False):  # ours also holds the final evaluation
        for name in ("loss", "accuracy", "longer_wins", "margin", "segments/per_response"):
            assert a[f"eval_{name}"] == pytest.approx(b[f"eval_{name}"], rel=1e-4), name


# Interrupted runs


@pytest.mark.slow
def test_kill_then_resume_ends_with_the_same_bits(flags, train, tmp_path):
    settings = {"num_train_epochs": 10, "save_steps": 5, "save_total_limit": 2}
    process = subprocess.Popen(
        [sys.executable, "-m", "segrlhf.cli", "reward", *flags("killed", **settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    marker = tmp_path / "killed" / "checkpoint-10" / COMPLETE
    deadline = time.time() + 240
    while not marker.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train("killed", resume_from_checkpoint="true", **settings)
    train("whole", **settings)
    assert_same_bits(tmp_path / "killed", tmp_path / "whole")


def interrupt_at(monkeypatch, step, kind=signal.SIGINT):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            for _ in range(3):  # launchers repeat it
                signal.raise_signal(kind)

    monkeypatch.setattr(trainer._Guard, "on_step_begin", on_step_begin, raising=False)


def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(
    flags, train, tmp_path, monkeypatch, capsys
):
    handler = signal.getsignal(signal.SIGTERM)
    train("whole", save_strategy="no")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM)
        status = cli.main(["reward", *flags(save_strategy="no")])
    assert status == 143
    said = capsys.readouterr().err
    assert "stopped after step 5" in said
    assert "go on with --resume_from_checkpoint true" in said
    assert last_checkpoint(tmp_path / "rm").name == "checkpoint-5"
    assert not (tmp_path / "rm" / "model.safetensors").exists()
    train(save_strategy="no", resume_from_checkpoint="true")
    assert_same_bits(tmp_path / "rm", tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_after_five_seconds_stops_at_once(flags, monkeypatch, capsys):
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 0.0)  # so that the next one is later
    interrupt_at(monkeypatch, 4)
    assert cli.main(["reward", *flags(save_steps=2)]) == 130
    said = capsys.readouterr().err
    assert "stopped at once, without a new checkpoint; newest complete one: " in said
    assert "checkpoint-4" in said


@pytest.mark.slow
def test_a_signal_to_launcher_and_workers_stops_both_after_a_step(flags, tmp_path):
    settings = {"num_train_epochs": 10_000, "save_steps": 20, "save_total_limit": 1}
    words = ["-m", "segrlhf.cli", "reward", *flags(**settings)]
    ready = tmp_path / "rm" / "checkpoint-20" / COMPLETE
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = stop_under_torchrun(words, env, tmp_path, ready, signal.SIGINT)
    last = last_checkpoint(tmp_path / "rm")
    assert f"stopped after step {last.name.rpartition('-')[2]}; saved {last}" in said
    assert {p.name for p in (tmp_path / "rm").iterdir()} == {last.name}


def test_a_signal_after_the_last_step_waits_for_the_model(flags, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 11, signal.SIGHUP)  # of 12
    assert cli.main(["reward", *flags(save_strategy="no")]) == 129
    assert "it was finished, and all was saved" in capsys.readouterr().err
    assert SegmentRewardModel.from_pretrained(tmp_path / "rm").granularity == "segment"


def test_resume_may_name_a_checkpoint(train, tmp_path):
    train(save_steps=4, max_steps=8)
    before = {name: w.clone() for name, w in weights(tmp_path / "rm").items()}
    train(save_steps=4, max_steps=8, resume_from_checkpoint=tmp_path / "rm" / "checkpoint-4")
    for name, weight in weights(tmp_path / "rm").items():
        assert torch.equal(weight, before[name])
    with pytest.raises(UserError, match=r"expected a complete checkpoint directory, got .*-5"):
        train(resume_from_checkpoint=tmp_path / "rm" / "checkpoint-5")


# Checkpoints of other runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Where the first of the tests below leaves its run, for the others to copy."""
    return tmp_path_factory.mktemp("finished") / "rm"


@pytest.fixture
def resume(train, finished, tmp_path):
    """Goes on, with changes, from a copy of a run that has done four steps of eight."""
    settings = {"save_steps": 4, "max_steps": 4}
    if not finished.exists():
        train("rm", **settings)
        shutil.copytree(tmp_path / "rm", finished)
        shutil.rmtree(tmp_path / "rm")
    shutil.copytree(finished, tmp_path / "rm")

    def resume(**changes):
        return train(**{**settings, "max_steps": 8, "resume_from_checkpoint": "true", **changes})

    return resume


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"seed 42 \(now 1\)"),
        ({"entropy_threshold": 2.0}, r"entropy_threshold 3.0 \(now 2.0\)"),
        ({"granularity": "token", "entropy_threshold": None}, "entropy model .*granularity"),
        ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size 4 \(now 2\)"),
        ({"learning_rate": 1e-3}, r"learning_rate 0.01 \(now 0.001\)"),
        ({"neftune_noise_alpha": 0.1}, r"neftune_noise_alpha None \(now 0.1\)"),
        ({"max_length": 24}, "pairs"),
        ({"eval_size": 0.25}, "pairs"),
    ],
)
def test_checkpoint_of_another_run(resume, changes, named):
    with pytest.raises(UserError, match=rf"got another one: {named}.*may be changed: eval_steps"):
        resume(**changes)


def test_checkpoint_of_another_model(resume, tiny_lm_dir, tmp_path):
    shutil.copytree(tiny_lm_dir, tmp_path / "moved")
    resume(model_name_or_path=tmp_path / "moved")  # the same weights, elsewhere
    other = load_file(tiny_lm_dir / "model.safetensors")
    other["model.norm.weight"] += 1e-3
    save_file(other, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"got another one: entropy model .*, model "):
        resume(model_name_or_path=tmp_path / "moved", max_steps=12)


def test_what_may_be_changed_is_used(resume, capsys):
    result = resume(max_steps=6, logging_steps=2)
    assert [log["step"] for log in result["history"] if "loss" in log] == [1, 2, 3, 4, 6]
    assert "logging_steps 1.0 (now 2), max_steps 4 (now 6)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["identity.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_checkpoint_without_one_of_its_files(resume, tmp_path, name):
    (tmp_path / "rm" / "checkpoint-4" / name).unlink()
    with pytest.raises(UserError, match=rf"expected {name} in .*checkpoint-4, got none"):
        resume()


def test_checkpoint_without_one_of_its_weights(resume, tmp_path):
    path = tmp_path / "rm" / "checkpoint-4" / "model.safetensors"
    kept = load_file(path)
    del kept["model.norm.weight"]
    save_file(kept, path, metadata={"format": "pt"})
    mark_complete(tmp_path / "rm" / "checkpoint-4", 4)
    with pytest.raises(UserError, match=r"checkpoint: expected exactly the weights .*model\.norm"):
        resume()


# Numbers that are not finite


def poison(model, row_text, tokenizer, value=math.nan):
    """Rewards of rows that hold this text become ``value``."""
    token = tokenizer.encode(row_text, add_special_tokens=False)[0]

    def hook(module, args, kwargs, rewards):
        bad = (kwargs["input_ids"] == token).any(1)
        return torch.where(bad[:, None], value, rewards)

    model.register_forward_hook(hook, with_kwargs=True)


@pytest.fixture
def with_a_star(pair_rows, tokenizer):
    rows = [dict(row) for row in pair_rows]
    rows[9]["rejected"] += "*"
    return tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=48, max_prompt_length=40)[
        0
    ]


def test_non_finite_loss_stops_with_step_rows_and_checkpoint(
    make_trainer, with_a_star, tokenizer, tmp_path
):
    weights_after = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            weights_after[state.global_step] = model.score.weight.detach().clone()

    trainer = make_trainer(
        with_a_star,
        train_sampling_strategy="sequential",
        save_strategy="no",
        callbacks=[Watch()],
    )
    poison(trainer.model, "*", tokenizer)
    with pytest.raises(NonFiniteError, match=r"loss: .* at step 3, rows 9 of .*checkpoint-2") as e:
        trainer.train()
    assert str(tmp_path / "out" / "checkpoint-2") in str(e.value)
    assert "Tell me about snow:" in str(e.value)
    saved = weights(last_checkpoint(tmp_path / "out"))
    assert torch.equal(saved["score.weight"], weights_after[2])
    assert all(weight.isfinite().all() for weight in saved.values())
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_non_finite_loss_in_the_first_step_saves_nothing(
    make_trainer, with_a_star, tokenizer, tmp_path
):
    trainer = make_trainer(with_a_star, per_device_train_batch_size=24)
    poison(trainer.model, "*", tokenizer)
    with pytest.raises(NonFiniteError, match=r"step 1, rows 9 .*nothing to save"):
        trainer.train()
    assert last_checkpoint(tmp_path / "out") is None


def test_infinite_scores_stop_even_where_the_loss_is_finite(make_trainer, with_a_star, tokenizer):
    trainer = make_trainer(with_a_star, per_device_train_batch_size=24)
    poison(trainer.model, "*", tokenizer, -math.inf)  # the rejected one: loss 0
    with pytest.raises(NonFiniteError, match=r"step 1, rows 9 of"):
        trainer.train()


def test_non_finite_gradient_never_reaches_the_weights(make_trainer, pairs, tmp_path):
    trainer = make_trainer(pairs, train_sampling_strategy="sequential", save_strategy="no")
    calls = []

    def spoil(grad):
        calls.append(1)
        return grad * torch.inf if len(calls) == 3 else grad

    trainer.model.score.weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"gradient norm: .* step 3, rows 8, 9, 10, 11 of"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"


def test_weights_that_are_not_finite_are_never_saved(flags, tmp_path, capsys):
    """And a corrected command finds the directory as the first one did."""
    zero_in_fp32 = {"adam_epsilon": 1e-50}
    assert cli.main(["reward", *flags(save_steps=1, **zero_in_fp32)]) == cli.EXIT_NON_FINITE
    said = capsys.readouterr().err
    assert "weights: expected finite numbers after step 1, got NaN or infinity in" in said
    assert "no checkpoint had been saved: start again" in said
    assert not (tmp_path / "rm").exists()


def test_the_last_checkpoint_is_finite_and_goes_on(make_trainer, tmp_path):
    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 3:
                optimizer.param_groups[0]["eps"] = math.nan

    with pytest.raises(NonFiniteError, match=r"after step 4, .*which is finite, is .*checkpoint-2"):
        make_trainer(save_steps=2, callbacks=[Break()]).train()
    last = last_checkpoint(tmp_path / "out")
    assert all(weight.isfinite().all() for weight in weights(last).values())
    trainer = make_trainer(save_steps=2)
    trainer.train(str(last))
    assert trainer.state.global_step == trainer.state.max_steps


def test_micro_batches_do_not_wait_for_the_device(make_trainer):
    trainer = make_trainer(
        gradient_accumulation_steps=3, save_strategy="no", max_tokens_per_batch=80
    )
    trainer.reader(trainer.model)  # once at the start, the packing is tried
    waits = {"training_step": [], "check_step": []}

    def count(name, method):
        def counted(*args, **kwargs):
            with Waits() as mode:
                result = method(*args, **kwargs)
            waits[name].append(mode.count)
            return result

        return counted

    for name in waits:
        setattr(trainer, name, count(name, getattr(trainer, name)))
    trainer.train()
    assert len(waits["training_step"]) == 3 * len(waits["check_step"])
    assert set(waits["training_step"]) == {0}
    assert set(waits["check_step"]) == {1}


def test_non_finite_evaluation_names_the_rows(make_trainer, with_a_star, tokenizer):
    trainer = make_trainer(eval_rows=with_a_star)
    poison(trainer.model, "*", tokenizer)
    with pytest.raises(NonFiniteError, match=r"finite scores, .* rows 9 of the evaluation pairs"):
        trainer.evaluate()


# Saving


def test_disk_full_in_a_checkpoint_keeps_the_earlier_one(
    flags, train, tmp_path, monkeypatch, capsys
):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        status = cli.main(["reward", *flags(save_steps=2)])
    assert status == cli.EXIT_DISK
    said = capsys.readouterr().err
    assert "disk full while saving checkpoint-4" in said
    assert "checkpoint-2" in said
    assert "--resume_from_checkpoint true" in said
    assert not (tmp_path / "rm" / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path / "rm").name == "checkpoint-2"
    train(save_steps=2, resume_from_checkpoint="true")
    train("whole", save_steps=2)
    assert_same_bits(tmp_path / "rm", tmp_path / "whole")


def test_disk_full_keeps_a_checkpoint_of_the_same_step(train, tmp_path, monkeypatch):
    train(save_steps=4, max_steps=8)
    before = (tmp_path / "rm" / "checkpoint-8" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full while saving checkpoint-8"):
        train(save_steps=4, max_steps=8, resume_from_checkpoint=tmp_path / "rm" / "checkpoint-4")
    assert (tmp_path / "rm" / "checkpoint-8" / "model.safetensors").read_bytes() == before
    assert last_checkpoint(tmp_path / "rm").name == "checkpoint-8"


def test_disk_full_in_the_final_save_keeps_what_was_there(train, tmp_path, monkeypatch):
    train(save_steps=4, max_steps=4)
    before = (tmp_path / "rm" / "model.safetensors").read_bytes()
    real = SegmentRewardModel.save_pretrained

    def full(self, directory, *args, **kwargs):
        if "checkpoint" in str(directory):
            return real(self, directory, *args, **kwargs)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(SegmentRewardModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"disk full while saving the final model in .*checkpoint-8"):
        train(save_steps=4, max_steps=8, resume_from_checkpoint="true")
    assert (tmp_path / "rm" / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "rm").glob(".*"))


def test_old_checkpoints_go_when_the_new_one_is_complete(train, tmp_path):
    train(save_steps=2, max_steps=8, save_total_limit=2)
    left = sorted(path.name for path in (tmp_path / "rm").glob("checkpoint-*"))
    assert left == ["checkpoint-6", "checkpoint-8"]
    assert all((tmp_path / "rm" / name / COMPLETE).is_file() for name in left)


# Bad input


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf, None])
def test_bad_thresholds(tmp_path, bad):
    with pytest.raises(UserError, match=r"entropy_threshold: expected a finite number of nats"):
        RewardConfig(output_dir=str(tmp_path), entropy_threshold=bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"granularity": "token", "entropy_threshold": 1.0},
            "expected none with granularity token",
        ),
        (
            {"granularity": "word"},
            "granularity: expected one of segment, token, bandit, got 'word'",
        ),
        ({"granularity": "token", "score_reduction": "max"}, "score_reduction: expected one of"),
        (
            {"granularity": "token", "remove_unused_columns": True},
            "remove_unused_columns: expected",
        ),
        (
            {"granularity": "token", "enable_jit_checkpoint": True},
            "enable_jit_checkpoint: expected false",
        ),
        (
            {"granularity": "token", "dataloader_num_workers": 2},
            "dataloader_num_workers: expected 0, got 2; the pairs are tokens already",
        ),
        ({"granularity": "token", "max_steps": 0}, "max_steps: expected at least 1, or -1"),
        (
            {"granularity": "token", "metric_for_best_model": "bleu"},
            "metric_for_best_model: expected one of loss, accuracy, .*, got bleu",
        ),
        (
            {"granularity": "token", "eval_do_concat_batches": False},
            "eval_do_concat_batches: expected true",
        ),
        (
            {"granularity": "token", "train_sampling_strategy": "group_by_length"},
            "expected random or sequential, got group_by_length",
        ),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(output_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_args": "junk"}, "optim: expected settings that transformers takes, got .*junk"),
        ({"lr_scheduler_kwargs": '{"a": 1}'}, "lr_scheduler_kwargs: expected .*'a': 1"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 100},
            "expected at least one step, got 24 pairs for batches of 100",
        ),
    ],
)
def test_settings_that_only_the_trainer_knows(train, changes, message):
    with pytest.raises(UserError, match=message):
        train(max_steps=1, **changes)


def test_the_metrics_of_the_best_model_are_those_of_an_evaluation(train):
    metrics = train(max_steps=1, eval_size=0.25)["metrics"]
    assert {f"eval_{name}" for name in EVAL_METRICS} <= metrics.keys()


def test_prompts_are_no_pairs(train, prompts_file):
    with pytest.raises(UserError, match=r"expected the columns chosen and rejected .*segrlhf ppo"):
        train(dataset_name=prompts_file)


def test_evaluation_needs_rows(train):
    with pytest.raises(UserError, match=r"eval_strategy: expected rows .*pass --eval_size 0.05"):
        train(eval_strategy="epoch")


def test_an_output_directory_that_is_not_empty_is_left_alone(flags, train, tmp_path, capsys):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "mine.txt").write_text("precious")
    assert cli.main(["reward", *flags()]) == cli.EXIT_USER
    assert "expected a new or empty directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "rm").iterdir()] == ["mine.txt"]


def test_segments_need_entropies(make_trainer):
    trainer = make_trainer(granularity="segment", entropy_threshold=2.0)
    with pytest.raises(UserError, match=r"entropy: expected the response tokens' entropies"):
        trainer.train()


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_close_runs(a, b, a_dir, b_dir):
    names = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward",
             "segments/per_response", "segments/tokens_per_segment")  # fmt: skip
    ours, theirs = logged(a, *names), logged(b, *names)
    assert len(ours) == len(theirs) > 1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    ours, theirs = weights(a_dir), weights(b_dir)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
