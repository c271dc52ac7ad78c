"""PPO: exact over processes, micro-batches and restarts; learns; stops with messages that help."""

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
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from launched import stop_under_torchrun
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_scheduler
from transformers import PreTrainedTokenizerFast as FastTokenizer
from waits import Waits

from segkernels import LocationNormalizer, ScalarNormalizer, scatter_segment_rewards, segment_scores
from segrlhf import cli
from segrlhf.configs import DataConfig, ModelConfig
from segrlhf.errors import Interrupted, NonFiniteError, UserError
from segrlhf.models import lm_head
from segrlhf.models.lm_head import token_stats
from segrlhf.models.reward_model import SegmentRewardModel
from segrlhf.ppo import checkpoint
from segrlhf.ppo import trainer as trainer_module
from segrlhf.ppo.config import PPOConfig
from segrlhf.ppo.experience import apply_reward_rules, build_normalizer, make_experience
from segrlhf.ppo.models import PolicyAndValue, state_values
from segrlhf.ppo.optimization import make_optimizer, make_schedule
from segrlhf.ppo.rollout import Rollout, prompt_of
from segrlhf.ppo.run import run
from segrlhf.ppo.trainer import PPOTrainer
from segrlhf.runtime.checkpoints import last_checkpoint, mark_complete
from segrlhf.runtime.interrupt import SIGNALS

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstu"]
PROMPTS = ["a b c", "d", "e f", "g h i j", "k l", "m"]
MODEL = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
)


def make_tokenizer(words=WORDS):
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return FastTokenizer(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    LlamaForCausalLM(MODEL).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def rm(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    model = SegmentRewardModel.from_causal_lm(lm, "segment", 2.0, lm, seed=3)
    model.normalizer = LocationNormalizer(0.1, 0.2, 0.3, 1.5)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return str(path)


FLAGS = {
    "total_episodes": 32,
    "rollout_batch_size": 8,
    "mini_batch_size": 4,
    "per_device_train_batch_size": 2,
    "generation_batch_size": 3,
    "response_length": 10,
    "learning_rate": 1e-2,
    "value_learning_rate": 2e-2,
    "num_ppo_epochs": 2,
    "save_steps": 0,
}


def make_config(out, rm="rm", **changes):
    return PPOConfig(output_dir=str(out), reward_model=rm, **{**FLAGS, **changes})


def rows(texts=PROMPTS):
    tokenizer = make_tokenizer()
    return [{"prompt": text, "prompt_ids": tokenizer(text).input_ids} for text in texts]


def make_trainer(lm, rm, out, reward_model=None, eval_prompts=None, eval_fn=None, **changes):
    return PPOTrainer(
        AutoModelForCausalLM.from_pretrained(lm),
        SegmentRewardModel.from_pretrained(rm) if reward_model is None else reward_model,
        make_tokenizer(),
        rows(),
        make_config(out, rm, **changes),
        eval_prompts=eval_prompts,
        eval_fn=eval_fn,
    )


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same_weights(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


TIMING = ("seconds", "eps")


def numbers(history):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in history]


def assert_same_numbers(one, two, rel=2e-3):
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-4)


def test_train_writes_policy_and_metrics(lm, rm, tmp_path):
    trainer = make_trainer(lm, rm, tmp_path, save_steps=2, save_total_limit=1)
    history = trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [line["update"] for line in history] == [1, 2, 3, 4]
    assert history[-1]["episode"] == 32
    first = history[0]
    expected = {
        "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg",
        "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/num_eos_tokens", "lr", "episode",
        "segments/per_response", "segments/tokens_per_segment", "rewards/clipped_share",
        "normalizer/mean_drift", "normalizer/std_drift",
    }  # fmt: skip
    assert expected <= first.keys()
    assert all(math.isfinite(value) for line in history for value in line.values())
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["objective/kl"] > 0.01
    assert first["segments/per_response"] > 1.5
    assert not same_weights(weights(tmp_path), weights(lm))
    assert same_weights(weights(tmp_path), trainer.module.policy.state_dict())
    assert make_tokenizer().get_vocab() == FastTokenizer.from_pretrained(tmp_path).get_vocab()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_nothing_is_logged_before_there_is_a_number(lm, rm, tmp_path):
    trainer = make_trainer(lm, rm, tmp_path / "new")
    trainer.log.start([])
    assert not (tmp_path / "new").exists()
    trainer.log.write({"update": 1, "lr": 0.5})
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == '{"update": 1, "lr": 0.5}\n'
    trainer.log.start([])  # of a run that is resumed before its first checkpoint
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""


def test_the_first_minibatch_has_ratio_one(lm, rm, tmp_path):
    trainer = make_trainer(lm, rm, tmp_path, num_ppo_epochs=1, mini_batch_size=8, total_episodes=8)
    (line,) = trainer.train()
    assert line["val/ratio"] == 1.0
    assert line["policy/approxkl_avg"] == 0.0
    assert line["policy/clipfrac_avg"] == 0.0


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_micro_batches_do_not_matter(lm, rm, tmp_path, aggregation):
    flags = {"loss_aggregation": aggregation, "total_episodes": 16}
    whole = make_trainer(lm, rm, tmp_path / "4", per_device_train_batch_size=4, **flags)
    parts = make_trainer(lm, rm, tmp_path / "3", per_device_train_batch_size=3, **flags)
    assert_same_numbers(whole.train(), parts.train())
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_micro_batches_do_not_wait_for_the_device(lm, rm, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_head, "values_may_be_checked", lambda _: False)  # as on a GPU
    waits = {}
    for rows_each in (1, 4):
        trainer = make_trainer(
            lm, rm, tmp_path / str(rows_each), per_device_train_batch_size=rows_each
        )
        step = trainer.train_minibatch

        def counted(*args, step=step, rows_each=rows_each):
            with Waits() as mode:
                step(*args)
            waits.setdefault(rows_each, []).append(mode.count)

        trainer.train_minibatch = counted
        trainer.update()
    assert waits[1][1:] == waits[4][1:]  # the first step also asks for the rows' lengths
    assert min(waits[1]) > 0  # a step asks whether its numbers are finite


def test_the_reference_policy_reads_a_text_once(lm, rm, tmp_path):
    """At another temperature too, though segments are cut by the entropy at temperature 1."""
    trainer = make_trainer(lm, rm, tmp_path, temperature=0.7)
    rollout = one_rollout()
    tokens = rollout.input_ids, rollout.attention_mask, rollout.action_mask
    passes = []
    ref_policy = trainer.worker.ref_policy
    ref_policy.base_model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        token_stats(ref_policy, *tokens)  # which has tried the head out
        passes.clear()
        read = trainer.worker.read(rollout)
        assert len(passes) == 1
        sampled, whole = (token_stats(ref_policy, *tokens, t) for t in (0.7, 1.0))
    assert torch.equal(read.ref_logprobs, sampled[0])
    assert torch.equal(read.entropy, whole[1])
    assert not torch.equal(whole[1], sampled[1])


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_changes_nothing(lm, rm, tmp_path):
    plain = make_trainer(lm, rm, tmp_path / "plain", total_episodes=16)
    saving = make_trainer(
        lm, rm, tmp_path / "saving", total_episodes=16, gradient_checkpointing=True
    )
    assert_same_numbers(plain.train(), saving.train())


def test_bf16_keeps_trained_weights_in_fp32(lm, rm, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        trainer = make_trainer(lm, rm, tmp_path, total_episodes=16, mixed_precision="bf16")
        history = trainer.train()
    finally:
        AcceleratorState._reset_state()
    assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert all(math.isfinite(value) for line in history for value in line.values())
    assert {p.dtype for p in trainer.module.parameters()} == {torch.float32}


def test_trackers(lm, rm, tmp_path):
    make_trainer(lm, rm, tmp_path, total_episodes=8, report_to=["tensorboard"]).train()
    assert list(tmp_path.glob("segrlhf-ppo/events*"))
    with pytest.raises(UserError, match=r"report_to: expected none or trackers .* got abacus; pip"):
        make_trainer(lm, rm, tmp_path / "other", report_to=["abacus"])


def command(lm, rm, prompts, out, *more, **changes):
    flags = {
        "model_name_or_path": lm, "reward_model": rm, "dataset_name": prompts, "output_dir": out,
        **FLAGS, **changes,
    }  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    return ["-m", "segrlhf.cli", "ppo", *words, *more]


def environment():
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "python"), str(root), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_two_processes_train_to_the_same_losses(lm, rm, prompts, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = command(lm, rm, prompts, tmp_path / "two", normalizer="running")
    launch += ["--nproc_per_node", "2", *words]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two = [json.loads(x) for x in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    trainer = make_trainer(lm, rm, tmp_path / "one", normalizer="running")
    assert_same_numbers(trainer.train(), two)
    one, other = trainer.module.policy.state_dict(), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)


def test_resume_after_kill_gives_the_same_weights(lm, rm, prompts, tmp_path):
    flags = {"total_episodes": 160, "save_steps": 2, "normalizer": "running", "kl_target": 0.5}
    words = command(lm, rm, prompts, tmp_path / "cut", **flags)
    with subprocess.Popen(
        [sys.executable, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 90
        while not (tmp_path / "cut" / "checkpoint-4" / "complete.json").is_file():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    killed_at = int(last_checkpoint(tmp_path / "cut").name.rpartition("-")[2])
    assert 4 <= killed_at < 20
    resumed = make_trainer(lm, rm, tmp_path / "cut", resume_from_checkpoint="true", **flags)
    history = resumed.train()
    whole = make_trainer(lm, rm, tmp_path / "whole", **flags)
    assert numbers(whole.train()) == numbers(history)
    assert same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 21))


@pytest.mark.parametrize("kind", SIGNALS)
def test_interruption_saves_and_says_how_to_go_on(lm, rm, tmp_path, kind):
    handler = signal.getsignal(kind)
    trainer = make_trainer(lm, rm, tmp_path / "cut")
    step = trainer.train_minibatch

    def interrupted_step(*args):
        trainer.train_minibatch = step
        for _ in range(3):  # launchers repeat it
            signal.raise_signal(kind)
        step(*args)

    trainer.train_minibatch = interrupted_step
    with pytest.raises(
        Interrupted,
        match=r"after update 1 of 4, saved as .*checkpoint-1; go on with --resume",
    ) as stopped:
        trainer.train()
    assert stopped.value.signal == kind
    assert signal.getsignal(kind) is handler
    resumed = make_trainer(lm, rm, tmp_path / "cut", resume_from_checkpoint="true")
    assert len(resumed.train()) == 4
    make_trainer(lm, rm, tmp_path / "whole").train()
    assert same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_signal_to_launcher_and_workers_stops_both_after_a_step(lm, rm, prompts, tmp_path):
    words = command(lm, rm, prompts, tmp_path / "out", total_episodes=80_000)
    said = stop_under_torchrun(
        words, environment(), tmp_path, tmp_path / "out" / "metrics.jsonl", signal.SIGHUP
    )
    last = last_checkpoint(tmp_path / "out")
    assert f"stopped after update {last.name.rpartition('-')[2]} of 10000, saved as {last}" in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {last.name, "metrics.jsonl"}


def test_weights_that_are_not_finite_are_never_saved(lm, rm, tmp_path):
    """And the checkpoint that the message names goes on with better settings."""
    flags = {"save_steps": 1, "resume_from_checkpoint": "true"}
    make_trainer(lm, rm, tmp_path, **flags, total_episodes=16).train()
    (tmp_path / "config.json").unlink()  # the policy of that run
    for group in (0, 1):  # of the policy, of the value model
        trainer = make_trainer(lm, rm, tmp_path, **flags)
        trainer.optimizer.param_groups[group]["eps"] = math.nan
        message = r"after an optimizer step of update 3, got NaN .*which is finite, is .*-2: go on"
        with pytest.raises(NonFiniteError, match=message):
            trainer.train()
        assert last_checkpoint(tmp_path).name == "checkpoint-2"
        assert not (tmp_path / "config.json").exists()
    resumed = make_trainer(lm, rm, tmp_path, **flags)
    assert len(resumed.train()) == 4


def test_non_finite_weights_in_the_first_step_leave_nothing(lm, rm, prompts, tmp_path, capsys):
    words = command(lm, rm, prompts, tmp_path / "out", adam_epsilon=1e-50)[2:]  # 0 in float32
    assert cli.main(words) == cli.EXIT_NON_FINITE
    assert "no checkpoint had been saved: start again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_largest_learning_rates_are_no_fault_of_the_program(lm, rm, prompts, tmp_path):
    """torch raises where a scalar of its optimizer has no float32."""
    largest = {"learning_rate": 1000, "value_learning_rate": 1000, "weight_decay": 1000}
    words = command(lm, rm, prompts, tmp_path / "out", **largest)[2:]
    assert cli.main(words) in (0, cli.EXIT_NON_FINITE)


def test_non_finite_reward_names_update_prompts_and_checkpoint(lm, rm, tmp_path):
    trainer = make_trainer(lm, rm, tmp_path)
    forward = trainer.worker.reward_model.forward

    def broken(ids, **kwargs):
        rewards = forward(ids, **kwargs)
        if trainer.state.global_step == 2:
            rewards[ids[:, 0] == rows()[3]["prompt_ids"][0]] = torch.nan
        return rewards

    trainer.worker.reward_model.forward = broken
    with pytest.raises(
        NonFiniteError,
        match=r"update 3: .* in rewards for prompts \[3\] .* in .*checkpoint-2; look",
    ):
        trainer.train()
    saved = last_checkpoint(tmp_path)
    assert saved.name == "checkpoint-2"
    assert same_weights(weights(saved / "policy"), trainer.module.policy.state_dict())


def test_non_finite_loss_leaves_the_weights_alone(lm, rm, tmp_path, monkeypatch):
    trainer = make_trainer(lm, rm, tmp_path)

    def broken(*args):
        experience = make_experience(*args)
        experience.advantages[4:] = torch.inf
        return experience

    monkeypatch.setattr(trainer_module, "make_experience", broken)
    with pytest.raises(NonFiniteError, match=r"update 1: .* in gradient of the loss for prompts"):
        trainer.train()
    saved = weights(last_checkpoint(tmp_path) / "policy")
    assert all(w.isfinite().all() for w in saved.values())
    assert not same_weights(saved, weights(lm))  # the first minibatch was sound


class CountsA(torch.nn.Module):
    """Pays 1 for every "a"; anything else of a reward model that PPO needs, token by token."""

    granularity, normalizer, config = "token", None, MODEL

    def forward(self, ids, attention_mask):
        return (ids == WORDS.index("a")).float()

    def segment_ends(self, entropy, mask, terminated):
        return mask


@pytest.mark.parametrize("credit", ["segments", "final"])
def test_it_learns(lm, rm, tmp_path, credit):
    trainer = make_trainer(
        lm, rm, tmp_path, reward_model=CountsA(), normalizer="none", reward_credit=credit,
        total_episodes=640, rollout_batch_size=64, mini_batch_size=32,
        per_device_train_batch_size=32, generation_batch_size=64, kl_coef=0.0,
        learning_rate=3e-3, value_learning_rate=3e-3,
    )  # fmt: skip
    history = trainer.train()
    assert history[-1]["objective/scores"] > 3 * history[0]["objective/scores"]


@pytest.mark.parametrize("source", ["policy", "reward", "PATH"])
def test_value_model_starts_from(lm, rm, tmp_path, source):
    trainer = make_trainer(lm, rm, tmp_path, value_model=rm if source == "PATH" else source)
    value, reward = trainer.module.value, trainer.worker.reward_model
    ids = torch.tensor([[1, 5, 6, 7]])
    values = state_values(value, ids, torch.ones_like(ids)).detach()
    if source == "policy":
        assert values.count_nonzero() == 0
        hidden, theirs = value.base_model(ids)[0], trainer.module.policy.base_model(ids)[0]
        torch.testing.assert_close(hidden, theirs)
    else:
        torch.testing.assert_close(values[:, 1:], reward(ids)[:, :-1])
        assert value is not reward


def test_prompts_are_seen_once_an_epoch_in_a_seeded_order():
    n = len(PROMPTS)
    seen = [prompt_of(row, n, 0) for row in range(3 * n)]
    epochs = [seen[i : i + n] for i in range(0, len(seen), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert prompt_of(13, n, 0) == seen[13]
    assert [prompt_of(row, n, 1) for row in range(3 * n)] != seen


def test_rows_have_the_same_prompts_and_numbers_in_every_minibatch(lm, rm, tmp_path):
    trainer = make_trainer(lm, rm, tmp_path, rollout_batch_size=4, mini_batch_size=2)
    prompts, _ = trainer.worker.sample(3, rows())
    assert prompts == [prompt_of(row, len(PROMPTS), 0) for row in range(12, 16)]


def one_rollout():
    """Three responses of 4, 3 and 2 tokens after a prompt of one; the first was cut."""
    lengths = torch.tensor([5, 4, 3])
    attention = torch.arange(6) < lengths[:, None]
    action = attention.clone()
    action[:, 0] = False
    return Rollout(
        torch.where(attention, 3, 0), attention.long(), action, torch.tensor([False, True, True])
    )


SEGMENT_ENDS = torch.tensor(
    [[0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool
)


def test_final_credit_pays_the_mean_of_the_segments_at_the_last_token(tmp_path):
    rollout, ends = one_rollout(), SEGMENT_ENDS
    rewards = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    config = make_config(tmp_path, reward_credit="final", normalizer="none")
    paid, paid_ends, _ = apply_reward_rules(config, rewards, ends, rollout, None)
    assert torch.equal(paid_ends, rollout.action_mask)
    mean = segment_scores(rewards, ends, rollout.action_mask, reduction="mean")
    last = torch.tensor([4, 3, 2])
    torch.testing.assert_close(paid[torch.arange(3), last], mean)
    assert paid.count_nonzero() == 3


def test_token_mean_divides_by_the_length_of_the_response(tmp_path):
    rollout, mask = one_rollout(), one_rollout().action_mask
    rewards = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    normalizer = LocationNormalizer(0.1, 0.2, 0.3, 1.5)
    flags = {"reward_reduction": "token-mean", "normalizer": "none"}
    config = make_config(tmp_path, reward_clip=1e3, **flags)
    for ends in (SEGMENT_ENDS, mask):
        paid, paid_ends, credit = apply_reward_rules(config, rewards, ends, rollout, normalizer)
        assert torch.equal(paid_ends, mask)
        summed = scatter_segment_rewards(
            rewards, ends, mask, normalizer=normalizer, reduction="sum", clip=1e3
        )
        torch.testing.assert_close(paid, summed / torch.tensor([[4.0], [3.0], [2.0]]))
        as_paid = scatter_segment_rewards(paid, paid_ends, mask, **credit)
        torch.testing.assert_close(as_paid, paid)
    clipped = make_config(tmp_path, reward_clip=0.1, **flags)
    found, _, _ = apply_reward_rules(clipped, rewards, mask, rollout, normalizer)
    torch.testing.assert_close(found, paid.clamp(-0.1, 0.1))


def test_rules_for_overlong_and_unfinished_responses(tmp_path):
    rollout = one_rollout()
    rewards, ends = torch.ones(3, 6), rollout.action_mask
    flags = {"normalizer": "none", "reward_reduction": "sum"}
    config = make_config(tmp_path, overlong_tokens=2, **flags)
    paid, _, _ = apply_reward_rules(config, rewards, ends, rollout, None)
    expected = torch.zeros(3, 6)
    expected[0, 1:5] = expected[1, 1:4] = -0.05
    expected[2, 1:3] = 1
    torch.testing.assert_close(paid, expected)
    config = make_config(tmp_path, missing_eos_penalty=3.0, **flags)
    paid, _, _ = apply_reward_rules(config, rewards, ends, rollout, None)
    expected = rollout.action_mask.float()
    expected[0, 4] = 1 - 3
    torch.testing.assert_close(paid, expected)


def test_evaluation(lm, rm, tmp_path):
    calls = []

    def gold(responses, prompts):
        calls.append((responses, prompts))
        return [float(text.count("a")) for text in responses]

    trainer = make_trainer(
        lm, rm, tmp_path, eval_prompts=rows(PROMPTS[:3]), eval_fn=gold, eval_steps=3
    )
    history = trainer.train()
    assert [line["update"] for line in history if "eval/gold" in line] == [0, 3, 4]
    assert history[0]["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["eval/kl"] > 0.01
    expected = {"scores", "kl", "gold", "segments_per_response", "distinct_bigrams"}
    assert {f"eval/{name}" for name in (*expected, "response_length")} <= history[-1].keys()
    responses, prompts = calls[0]
    assert prompts == PROMPTS[:3]
    assert "</s>" not in "".join(responses)
    assert history[0]["eval/gold"] == sum(text.count("a") for text in responses) / 3


def test_adaptive_kl_moves_beta_towards_the_target(lm, rm, tmp_path):
    flags = {"kl_target": 1e-3, "kl_horizon": 80, "kl_coef": 0.05}
    history = make_trainer(lm, rm, tmp_path, **flags).train()
    betas = [line["objective/kl_coef"] for line in history]
    assert betas[0] == 0.05
    assert betas[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 80))  # no KL yet: below the target
    assert betas[3] > betas[2]


def test_normalizer_choices(rm, lm, tmp_path):
    model = SegmentRewardModel.from_pretrained(rm)
    assert build_normalizer(make_config(tmp_path), model) == model.normalizer
    assert build_normalizer(make_config(tmp_path, normalizer="none"), model) is None
    line = make_config(tmp_path, normalizer="line", normalizer_line=[0.1, 0.2, 0.3, 1.5])
    assert build_normalizer(line, model) == model.normalizer
    scalar = make_config(tmp_path, normalizer="scalar", normalizer_scalar=[1.0, 2.0])
    assert build_normalizer(scalar, model).std(torch.tensor([0.5])) == 2.0
    model.normalizer = None
    with pytest.raises(UserError, match="got none; run segrlhf fit-normalizer --reward_model rm"):
        build_normalizer(make_config(tmp_path), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": "best"}, "normalizer: expected one of auto, none, running, line, scalar"),
        ({"reward_credit": "all"}, "reward_credit: expected one of segments, final, got 'all'"),
        (
            {"temperature": 0.0},
            "temperature: expected a finite number, at least 1e-06 and at most 1e.06, got 0.0",
        ),
        ({"total_episodes": 0}, "total_episodes: expected a whole number, at least 1, got 0"),
        ({"mini_batch_size": 3}, "mini_batch_size: expected a divisor of rollout_batch_size 8"),
        ({"normalizer": "line"}, "normalizer_line: expected 4 numbers with --normalizer line"),
        ({"normalizer_scalar": [0.0, 1.0]}, "normalizer_scalar: expected 2 numbers with"),
        ({"lr_scheduler_type": "sine"}, "lr_scheduler_type: expected one of .*, got 'sine'"),
        (
            {"lr_scheduler_kwargs": "[1]"},
            r"lr_scheduler_kwargs: expected a json object .*, got \[1\]",
        ),
        ({"lr_scheduler_kwargs": "{"}, "lr_scheduler_kwargs: expected a json object .*, got {"),
        (
            {"lr_scheduler_kwargs": {"min_lr": 1e-7}},
            "lr_scheduler_kwargs: expected min_lr_rate, .*, got min_lr 1e-07; give min_lr_rate",
        ),
        ({"warmup_steps": -1}, "warmup_steps: expected a finite number, at least 0, got -1"),
    ],
)
def test_bad_flags(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_config(tmp_path, **changes)


def test_evaluation_without_prompts(lm, rm, tmp_path):
    with pytest.raises(UserError, match="eval_steps: expected prompts to evaluate on, got none"):
        make_trainer(lm, rm, tmp_path, eval_steps=1)


def test_output_dir_that_is_not_empty_is_left_alone(lm, rm, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match="output_dir: expected a new or empty directory"):
        make_trainer(lm, rm, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


@pytest.fixture(scope="module")
def finished(lm, rm, tmp_path_factory):
    """The directory of a run of two updates; no test may write there."""
    path = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(lm, rm, path, save_steps=2, total_episodes=16).train()
    return path


def resumed(finished, tmp_path, lm, rm, **changes):
    shutil.copytree(finished, tmp_path / "run")
    flags = {"save_steps": 2, "total_episodes": 24, "resume_from_checkpoint": "true", **changes}
    return make_trainer(lm, rm, tmp_path / "run", **flags)


def other_weights(model):
    with torch.no_grad():
        model.score.weight[0, 0] += 1e-3


def other_normalizer(model):
    model.normalizer = ScalarNormalizer(1.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "alter", "named"),
    [
        ({"seed": 1}, None, r"seed 0 \(now 1\)"),
        ({"mini_batch_size": 8, "gamma": 0.5}, None, r"gamma 1.0 \(now 0.5\), mini_batch_size 4"),
        ({"normalizer": "none"}, None, r"normalizer auto \(now none\)"),
        ({}, other_weights, r"reward model [0-9a-f]+ \(now [0-9a-f]+\)"),
        ({}, other_normalizer, "reward model's segments and normalizer"),
    ],
)
def test_checkpoint_of_another_run(finished, lm, rm, tmp_path, changes, alter, named):
    model = SegmentRewardModel.from_pretrained(rm)
    if alter is not None:
        alter(model)
    other = resumed(finished, tmp_path, lm, rm, reward_model=model, **changes)
    with pytest.raises(UserError, match=rf"got another one: {named}.*may be changed: .*kl_coef"):
        other.train()


def test_prompts_of_another_run(finished, lm, rm, tmp_path):
    other = resumed(finished, tmp_path, lm, rm)
    other.train_prompts = rows(PROMPTS[::-1])
    with pytest.raises(UserError, match="got another one: prompts"):
        other.train()


def test_what_may_be_changed_is_used(finished, lm, rm, tmp_path, capsys):
    flags = {"kl_coef": 0.5, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    history = resumed(finished, tmp_path, lm, rm, **flags).train()
    assert history[1]["objective/kl_coef"] == 0.05
    assert (history[2]["objective/kl_coef"], history[2]["lr"]) == (0.5, 3e-2)
    said = capsys.readouterr()
    assert "kl_coef 0.05 (now 0.5)" in said.out + said.err


FILES = ["identity.json", "state.json", "optimizer.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_without_one_of_its_files(finished, lm, rm, tmp_path, name):
    other = resumed(finished, tmp_path, lm, rm)
    (tmp_path / "run" / "checkpoint-2" / name).unlink()
    with pytest.raises(UserError, match=rf"expected {name} in .*checkpoint-2, got none"):
        other.train()


@pytest.mark.parametrize("name", ["policy", "value"])
def test_checkpoint_without_one_of_its_weights(finished, lm, rm, tmp_path, name):
    other = resumed(finished, tmp_path, lm, rm)
    path = tmp_path / "run" / "checkpoint-2" / name / "model.safetensors"
    kept = load_file(path)
    del kept["model.norm.weight"]
    save_file(kept, path, metadata={"format": "pt"})
    mark_complete(tmp_path / "run" / "checkpoint-2", 2)
    with pytest.raises(UserError, match=r"expected exactly the weights .* without model\.norm"):
        other.train()


def test_disk_full_keeps_earlier_checkpoints(lm, rm, tmp_path, monkeypatch):
    trainer = make_trainer(lm, rm, tmp_path, save_steps=1)
    save = checkpoint.save_file

    def full(*args):
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        OSError, match=r"disk full while saving checkpoint-2 .*checkpoint-1; free"
    ) as e:
        trainer.train()
    assert e.value.errno == errno.ENOSPC
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "metrics.jsonl"}
    monkeypatch.undo()
    resumed = make_trainer(lm, rm, tmp_path, save_steps=1, resume_from_checkpoint="true")
    assert len(resumed.train()) == 4


def test_disk_full_in_the_final_save_keeps_the_checkpoint(lm, rm, prompts, tmp_path, capsys):
    """Words of the tokenizer's library, which raises a bare Exception."""
    words = command(lm, rm, prompts, tmp_path, total_episodes=16, save_steps=2)[2:]
    real = FastTokenizer.save_pretrained

    def full(self, directory, *args, **kwargs):
        if "checkpoint" not in str(directory):
            raise Exception("No space left on device (os error 28)")
        return real(self, directory, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastTokenizer, "save_pretrained", full)
        assert cli.main(words) == cli.EXIT_DISK
    said = capsys.readouterr().err
    assert "disk full while saving the policy" in said
    assert "checkpoint-2; free space and go on with --resume_from_checkpoint true" in said
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "metrics.jsonl"}
    assert cli.main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert same_weights(weights(tmp_path), weights(tmp_path / "checkpoint-2" / "policy"))


def test_a_disk_without_room_is_refused_before_anything_is_written(
    lm, rm, prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    words = command(lm, rm, prompts, tmp_path / "out")[2:]
    assert cli.main(words) == cli.EXIT_DISK
    assert "expected room for the final model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
}


@pytest.mark.parametrize("name", get_args(get_type_hints(PPOConfig)["lr_scheduler_type"]))
def test_both_learning_rates_follow_transformers_schedule(tmp_path, name):
    """Whatever update is asked for first: a resumed run continues it."""
    config = make_config(
        tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name], warmup_steps=0.15
    )
    models = PolicyAndValue(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    rates = make_schedule(config, make_optimizer(config, models), 20)
    optimizer = make_optimizer(config, models)
    theirs = get_scheduler(name, optimizer, 3, 20, SCHEDULES[name])
    expected = []
    for _ in range(20):
        expected.append(theirs.get_last_lr())
        optimizer.step()
        theirs.step()
    for update in (7, *range(20)):
        assert rates(update) == expected[update]


def test_published_schedule_of_the_command_line(tmp_path, lm, rm, prompts):
    flags = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
        "warmup_steps": 0.03,
    }
    words = command(lm, rm, prompts, tmp_path / "out", **flags)
    _, _, config = cli.parse("ppo", words[words.index("ppo") + 1 :])
    models = PolicyAndValue(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    rates = make_schedule(config, make_optimizer(config, models), 100)
    assert [rates(update)[0] for update in (0, 3)] == [0.0, config.learning_rate]
    assert rates(100) == pytest.approx(
        [0.1 * config.learning_rate, 0.1 * config.value_learning_rate]
    )
    config.lr_scheduler_kwargs = {"power": 2}
    with pytest.raises(UserError, match=r"lr_scheduler_kwargs: expected what .*min_lr takes, got"):
        make_schedule(config, make_optimizer(config, models), 100)


def arguments(lm, rm, prompts, out, **changes):
    return ModelConfig(lm), DataConfig(prompts), make_config(out, rm, **changes)


def test_run_names_the_entropy_model(lm, rm, prompts, tmp_path, capsys):
    flags = {"total_episodes": 8}
    run(*arguments(lm, rm, prompts, tmp_path / "same", **flags))
    assert f"by the entropy of {lm}, the reference policy" in capsys.readouterr().out
    other = tmp_path / "other"
    torch.manual_seed(5)
    LlamaForCausalLM(MODEL).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    flags["entropy_model"] = str(other)
    last = run(*arguments(lm, rm, prompts, tmp_path / "another", **flags))
    assert f"by the entropy of {other}, which is not the ref" in capsys.readouterr().out
    assert last["update"] == 1


def test_run_refuses_a_reward_model_of_another_tokenizer(lm, prompts, tmp_path):
    other = tmp_path / "rm"
    SegmentRewardModel.from_causal_lm(lm, "token").save_pretrained(other)
    make_tokenizer([*WORDS[:-1], "zebra"]).save_pretrained(other)
    with pytest.raises(UserError, match="reward model: expected the policy's tokenizer"):
        run(*arguments(lm, str(other), prompts, tmp_path / "out"))
