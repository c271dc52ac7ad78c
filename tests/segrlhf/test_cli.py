"""Flags over config file over preset, and what a person sees when one is wrong."""

import subprocess
import sys

import pytest

from segrlhf import cli, presets
from segrlhf.errors import NonFiniteError, UserError


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def reward_config(*argv):
    return cli.parse("reward", [*argv])[2]


BASE = ("--model_name_or_path", "lm", "--dataset_name", "pairs.jsonl", "--output_dir", "rm")


def test_flags_win_over_config_wins_over_preset(config):
    path = config("learning_rate: 1e-4\nmax_length: 512\nlogging_steps: 7\n")
    got = reward_config("--preset", "phi3-mini-segment", "--config", path, *BASE[2:],
                        "--max_length", "256")  # fmt: skip
    assert got.max_length == 256
    assert got.learning_rate == 1e-4
    assert got.entropy_threshold == 1.75
    assert got.logging_steps == 7


def test_config_holds_required_flags_lists_and_booleans(config):
    path = config(
        "model_name_or_path: lm\ndataset_name: pairs.jsonl\noutput_dir: rm\ngranularity: token\n"
        "use_peft: true\nlora_target_modules: [q_proj, v_proj]\nmax_samples: null\n"
    )
    model, data, _ = cli.parse("reward", ["--config", path])
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert model.use_peft is True
    assert data.max_samples is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "got 'learning_rat'; did you mean learning_rate?"),
        ("- a\n", "expected a mapping of flags"),
        ("a: [\n", "expected a readable YAML file"),
    ],
)
def test_a_config_that_is_wrong(config, text, message):
    with pytest.raises(UserError, match=r"run\.yaml|config") as caught:
        cli.parse("reward", ["--config", config(text), *BASE])
    assert message in str(caught.value)


def test_an_unknown_flag_suggests_and_lora_belongs_to_reward():
    with pytest.raises(UserError, match="got 'learning_rat'; did you mean learning_rate"):
        cli.parse("reward", [*BASE, "--granularity", "token", "--learning_rat", "1"])
    with pytest.raises(UserError, match="--use_peft: expected a flag of this command"):
        cli.parse("ppo", [*BASE, "--reward_model", "rm", "--use_peft", "true"])


def test_a_config_that_is_not_there():
    with pytest.raises(UserError, match=r"expected a readable YAML file, got nowhere\.yaml"):
        cli.parse("reward", ["--config", "nowhere.yaml", *BASE])


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("world_size", [1, 8])
def test_every_preset_is_a_runnable_configuration(name, world_size, monkeypatch):
    monkeypatch.setattr(
        presets, "preset", lambda n, c, w, real=presets.preset: real(n, c, world_size)
    )
    _, _, reward = cli.parse("reward", ["--preset", name, "--output_dir", "rm", "--bf16", "false"])
    batch = reward.per_device_train_batch_size * reward.gradient_accumulation_steps * world_size
    assert batch == 128
    model, _, ppo = cli.parse("ppo", ["--preset", name, "--output_dir", "policy"])
    assert ppo.rollout_batch_size == 1024
    granularity = reward.granularity
    assert granularity in name
    assert f"-{granularity}-rm-" in ppo.reward_model
    assert (ppo.cliprange_value == 0.2) == (granularity == "bandit")
    assert (
        model.model_name_or_path
        == cli.parse("reward", ["--preset", name, *BASE[4:]])[0].model_name_or_path
    )


def test_presets_hold_the_published_lines():
    ppo = presets.preset("phi3-mini-segment", "ppo")
    assert ppo["normalizer_line"] == [0.7668, 0.4705, 0.2569, 2.8339]  # w_m b_m w_s b_s
    assert presets.preset("phi3-mini-segment-2.0", "ppo")["normalizer_line"][0] == 0.7209
    assert presets.preset("llama3-8b-sft-bandit", "ppo")["normalizer_scalar"] == [-0.8164, 2.9531]
    llama31 = presets.preset("llama3.1-8b-token", "ppo")
    assert (llama31["overlong_tokens"], llama31["overlong_reward"]) == (800, -0.05)


def test_presets_that_cannot_be():
    with pytest.raises(UserError, match=r"preset: expected one of phi3-mini-segment.*got 'phi4'"):
        presets.preset("phi4", "reward")
    with pytest.raises(UserError, match="divides the published batch of 128, got 3"):
        presets.preset("phi3-mini-token", "reward", world_size=3)
    with pytest.raises(UserError, match="expected a command that presets configure, got 'score'"):
        presets.preset("phi3-mini-token", "score")


def test_unknown_command_suggests(capsys):
    assert cli.main(["rewrd"]) == cli.EXIT_USER
    assert "did you mean reward?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("dataset: wrong"), 2, "segrlhf score: dataset: wrong"),
        (NonFiniteError("loss is NaN at step 3"), 3, "loss is NaN at step 3"),
        (OSError(28, "No space left on device"), 4, "what was there before is intact"),
        (KeyboardInterrupt("resume with x"), 130, "interrupted; resume with x"),
    ],
)
def test_errors_become_one_line_and_a_status(monkeypatch, capsys, error, status, message):
    from segrlhf import score

    def fail(_data, _config):
        raise error

    monkeypatch.setattr(score, "run", fail)
    assert cli.main(["score", "--dataset_name", "rows.jsonl", "--reward_model", "rm"]) == status
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_readable(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--output_dir" in text or "--output" in text or name in ("segment", "fit-normalizer")
    assert "--neftune_noise_alpha" not in text  # a rare flag of transformers
    assert "--config" in text


def test_top_level_help_needs_no_heavy_import():
    code = (
        "import sys; from segrlhf.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "fit-normalizer" in done.stdout
