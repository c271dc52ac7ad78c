"""Every file of a checkpoint, damaged in every way: a resumed run is the same run, or none."""

import io
import os
import random
import re
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from segrlhf import cli
from segrlhf.models.reward_model import SegmentRewardModel
from segrlhf.ppo import checkpoint as ppo_checkpoint
from segrlhf.ppo.config import PPOConfig
from segrlhf.reward import run as reward_run
from segrlhf.reward.config import RewardConfig
from segrlhf.runtime import checkpoints
from segrlhf.runtime.checkpoints import COMPLETE


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def random_bytes(path):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def json_list(path):
    path.write_text("[]")


def json_object(path):
    path.write_text("{}")


def json_text(path):
    path.write_text('"x"')


def missing(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def unreadable(path):
    path.chmod(0)


DAMAGES = [
    truncate, empty, random_bytes, flip_a_bit, json_list, json_object, json_text, missing,
    directory, pipe, unreadable,
]  # fmt: skip
COMMANDS = ["reward", "ppo"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tiny_lm_dir, tokenizer, pairs_file, prompts_file, tmp_path_factory):
    """A finished run of each command with checkpoints 1 and 2, and its command line."""
    root = tmp_path_factory.mktemp("runs")
    SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token").save_pretrained(root / "rm")
    tokenizer.save_pretrained(root / "rm")
    flags = {
        "reward": {
            "dataset_name": pairs_file,
            "granularity": "token",
            "max_length": 48,
            "max_prompt_length": 40,
            "max_steps": 2,
            "report_to": "none",
        },
        "ppo": {
            "dataset_name": prompts_file,
            "reward_model": root / "rm",
            "normalizer": "none",
            "total_episodes": 4,
            "rollout_batch_size": 2,
            "mini_batch_size": 2,
            "response_length": 3,
        },
    }
    made = {}
    for command, values in flags.items():
        common = {"model_name_or_path": tiny_lm_dir, "save_steps": 1}
        words = [f"--{name}={value}" for name, value in {**common, **values}.items()]
        assert cli.main([command, *words, f"--output_dir={root / command}"]) == 0
        made[command] = SimpleNamespace(path=root / command, words=[command, *words])
    return made


@pytest.fixture
def resume(runs, tmp_path, capfd):
    def resume(command, **flags):
        flags = {"output_dir": tmp_path / "run", "resume_from_checkpoint": "true", **flags}
        words = [f"--{name}={value}" for name, value in flags.items()]
        status = cli.main([*runs[command].words, *words])
        said = capfd.readouterr()
        return status, said.out, said.err

    return resume


def copied(runs, command, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(runs[command].path, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-2"


def files(directory):
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def refuse_unreadable(path, mode="r", **options):
    """``open``, for which root has no more rights than others."""
    if not os.stat(path).st_mode & 0o400:
        raise PermissionError(13, "Permission denied", str(path))
    return io.open(path, mode, **options)  # noqa: UP020


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(command, damage, runs, resume, tmp_path, monkeypatch):
    if damage is unreadable:
        monkeypatch.setattr(checkpoints, "open", refuse_unreadable, raising=False)
    for name in files(runs[command].path / "checkpoint-2"):
        if damage is unreadable and name.name == COMPLETE:
            continue  # read by Path.read_text, whatever root's rights
        checkpoint = copied(runs, command, tmp_path)
        damage(checkpoint / name)
        left = files(tmp_path / "run")
        status, out, err = resume(command)
        what = f"{damage.__name__} of {name}: status {status}, {out}, {err}"
        assert "Traceback" not in err, what
        if name.name == COMPLETE and damage in (missing, directory, pipe):
            assert status == 0, what
            assert "checkpoint-1 (without checkpoint-2, cut off before" in out, what
            continue
        assert status == cli.EXIT_USER, what
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"segrlhf {command}: resume_from_checkpoint: expected"), what
        assert str(checkpoint) in last, what
        assert "move that checkpoint away, and --resume_from_checkpoint true goes on" in last, what
        assert files(tmp_path / "run") == left, what


@pytest.mark.parametrize("command", COMMANDS)
def test_the_remedy_for_a_damaged_checkpoint(command, runs, resume, tmp_path):
    checkpoint = copied(runs, command, tmp_path)
    flip_a_bit(next(checkpoint.rglob("model.safetensors")))
    checkpoint.rename(tmp_path / "moved")
    status, out, _ = resume(command)
    assert status == 0
    assert f"resuming from {checkpoint.parent / 'checkpoint-1'}\n" in out
    for name in ("model.safetensors", "config.json"):
        whole = (runs[command].path / name).read_bytes()
        assert (checkpoint.parent / name).read_bytes() == whole


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_checkpoint_is_written_again(command, runs, resume, tmp_path):
    checkpoint = copied(runs, command, tmp_path)
    damaged = next(checkpoint.rglob("model.safetensors"))
    flip_a_bit(damaged)
    status, _, err = resume(command, resume_from_checkpoint=checkpoint.parent / "checkpoint-1")
    assert status == 0, err
    whole = runs[command].path / damaged.relative_to(checkpoint.parent)
    assert damaged.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_newer_checkpoints_are_not_taken_for_those_of_other_settings(
    command, runs, resume, tmp_path
):
    checkpoint = copied(runs, command, tmp_path)
    flags = {"resume_from_checkpoint": checkpoint.parent / "checkpoint-1", "max_grad_norm": 0.5}
    status, _, err = resume(command, **flags)
    assert status == cli.EXIT_USER
    assert "expected the newest checkpoint of" in err
    assert "checkpoint-1, and checkpoint-2 beside it" in err
    shutil.rmtree(checkpoint)
    assert resume(command, **flags)[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_run_stays_as_it_is(command, runs, resume, tmp_path):
    """Two steps of the reward model's run are no whole epoch."""
    copied(runs, command, tmp_path)
    assert resume(command)[0] == 0
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (runs[command].path / name).read_bytes()


@pytest.mark.parametrize("shorter", [("reward", {"max_steps": 1}), ("ppo", {"total_episodes": 2})])
def test_a_run_does_not_end_before_its_checkpoint(shorter, runs, resume, tmp_path):
    command, flags = shorter
    shutil.rmtree(copied(runs, command, tmp_path))
    assert resume(command, **flags)[0] == 0
    copied(runs, command, tmp_path)
    status, _, err = resume(command, **flags)
    assert status == cli.EXIT_USER
    assert "1, where this run ends, got one of" in err


# Flags of transformers without influence on the weights that a run ends with, and places.
OTHERS = """
    output_dir resume_from_checkpoint entropy_cache_dir entropy_batch_size use_cpu use_cache
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_empty_cache_steps fsdp_config debug skip_memory_metrics
    logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    per_device_eval_batch_size eval_delay eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    prediction_loss_only bf16_full_eval fp16_full_eval
    save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout do_train do_eval do_predict local_rank
"""


def test_every_flag_of_a_reward_model_is_kept_or_free_or_without_influence():
    """A new flag of transformers belongs into one of these lists, and into docs/errors.md."""
    lists = [reward_run.KEPT, reward_run.FREE, reward_run.HASHED, OTHERS.split()]
    assert len({name for each in lists for name in each}) == sum(map(len, lists))
    assert {each.name for each in fields(RewardConfig)} <= {name for each in lists for name in each}


def test_the_table_of_what_may_be_changed_is_that_of_the_code():
    page = Path(__file__).parents[2] / "docs" / "errors.md"
    rows = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first.partition(",")[0]] = [re.findall(r"`(\w+)`", cell) for cell in cells]
    flags = [each.name for each in fields(PPOConfig)]
    free, places = ppo_checkpoint.FREE, ppo_checkpoint.PLACES
    assert rows["may be changed"] == [list(reward_run.FREE), list(free)]
    kept = [name for name in flags if name not in (*free, *places)]
    assert rows["refused"] == [list(reward_run.KEPT), kept]
    hashed, by_name = rows["refused where what it names"]
    assert hashed == ["dtype", *reward_run.HASHED]
    assert {*by_name, *rows["does not matter"][1]} == {"dtype", *places}
