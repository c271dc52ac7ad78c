"""The files of configs/ on gloo: reward training launched with them (ddp.yaml: test_reward.py)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segrlhf import cli
from segrlhf.reward.run import run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture
def flags(tiny_lm_dir, pairs_file, tmp_path):
    """Three batches of eight pairs, whose lengths make processes' numbers of micro-batches differ;
    a checkpoint after two."""

    def flags(output, **changes):
        values = {
            "model_name_or_path": tiny_lm_dir,
            "dataset_name": pairs_file,
            "output_dir": tmp_path / output,
            "granularity": "token",
            "max_length": 48,
            "max_prompt_length": 40,
            "max_tokens_per_batch": 80,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
            "report_to": "none",
            **changes,
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return flags


def launch(config, words, program, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         str(CONFIGS / config), "--num_processes", "2", "--mixed_precision", "no", *program,
         "reward", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SHARDED = {
    "fsdp2.yaml": ((str(Path(__file__).with_name("fsdp_on_cpus.py")),), {}, "optimizer.bin"),
    "zero3.yaml": (("-m", "segrlhf.cli"), {"DS_ACCELERATOR": "cpu"}, "latest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", SHARDED)
def test_launched_training_equals_one_process(config, flags, tmp_path):
    """Losses and weights, and again after a resume, which ends with the same bits."""
    if config == "zero3.yaml" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    program, environment, state = SHARDED[config]
    launch(config, flags("two"), program, **environment)
    assert (tmp_path / "two" / "checkpoint-2" / state).is_file()
    history = json.loads((tmp_path / "two/checkpoint-3/trainer_state.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(*cli.parse("reward", flags("one", per_device_train_batch_size=8)))
    finally:
        torch.set_num_threads(threads)
    losses = [[log["loss"] for log in logs if "loss" in log] for logs in (
        one["history"], history["log_history"],
    )]  # fmt: skip
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    for gone in ("checkpoint-3", "model.safetensors"):
        path = tmp_path / "resumed" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    launch(config, flags("resumed", resume_from_checkpoint="true"), program, **environment)
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    for name, weight in theirs.items():
        assert torch.equal(resumed[name], weight), name


def test_lora_in_bf16(flags, tmp_path):
    words = flags("lora", max_tokens_per_batch=200, max_steps=1)
    result = run(*cli.parse("reward", ["--config", str(CONFIGS / "lora.yaml"), *words]))
    assert result["history"]
    assert "score.weight" in load_file(tmp_path / "lora" / "model.safetensors")
    assert cli.parse("reward", ["--config", str(CONFIGS / "lora.yaml"), *words])[2].bf16
