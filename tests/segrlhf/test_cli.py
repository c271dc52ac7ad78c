"""Flags over config file over preset, and what a person sees when one is wrong."""

import subprocess
import sys

import pytest

from segrlhf import cli, flags
from segrlhf.errors import NonFiniteError, UserError
from segrlhf.reward.config import RewardConfig


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
        ("seed: 1\nseed: 2\n", "seed stands there twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "a stands there twice"),
        ("output_dir: &a x\nentropy_model: *a\n", "line 2 has an alias"),
        ("seed: [1, 2]\n", "seed: expected one value, got 2"),
        ("report_to: [[a]]\n", "expected a word at line 1"),
        ("lr_scheduler_kwargs: !!python/object:os.system {}\n", "could not determine a constr"),
        ("lr_scheduler_kwargs: {a: 2020-01-01}\n", "of type date is not JSON serializable"),
        ("save-steps: 1\nsave_steps: 2\n", "save_steps: expected one line, got two of them"),
        ("[" * 5000, "recursion"),
    ],
)
def test_a_config_that_is_wrong(config, text, message):
    with pytest.raises(UserError, match=r"run\.yaml|config") as caught:
        cli.parse("reward", ["--config", config(text), *BASE])
    assert message in str(caught.value)


@pytest.mark.parametrize("flag", ["config", "preset"])
def test_a_second_config_or_preset_would_hide_the_first(flag):
    with pytest.raises(UserError, match=f"{flag}: expected one, got two"):
        cli.parse("reward", [f"--{flag}=a", f"--{flag}=b", *BASE])


def test_a_config_names_a_preset_but_no_config(config):
    own = cli.parse("reward", ["--config", config("preset: phi3-mini-token\noutput_dir: rm\n")])
    assert own[2].granularity == "token"
    path = config("preset: phi3-mini-token\noutput_dir: rm\n")
    flags = ["--config", path, "--preset", "phi3-mini-bandit"]
    assert cli.parse("reward", flags)[2].granularity == "bandit"
    with pytest.raises(UserError, match=r"run\.yaml: expected flags, got config 'other\.yaml'"):
        cli.parse("reward", ["--config", config("config: other.yaml\n"), *BASE])


def test_a_config_is_read_letter_by_letter(config):
    path = config(
        "mixed_precision: no\nreward_model: 010\noverlong_reward: -1e-3\nlearning_rate: 1e-3\n"
        "lr_scheduler_kwargs: {min_lr_rate: 1e-1}\n"
    )
    got = cli.parse("ppo", ["--config", path, *BASE])[2]
    assert (got.mixed_precision, got.reward_model) == ("no", "010")
    assert (got.overlong_reward, got.learning_rate) == (-1e-3, 1e-3)
    assert got.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_negative_numbers_with_exponents_are_no_flags():
    words = ["--reward_model", "rm", "--overlong_reward", "-1e-3"]
    assert cli.parse("ppo", [*BASE, *words])[2].overlong_reward == -1e-3
    line = ["--normalizer", "line", "--normalizer_line", "-1e-3", "-.5E1", "-2", "1e1"]
    assert cli.parse("ppo", [*BASE, *words, *line])[2].normalizer_line == [-1e-3, -5, -2, 10]


def test_an_unknown_flag_suggests_and_lora_belongs_to_reward():
    with pytest.raises(UserError, match="got 'learning_rat'; did you mean learning_rate"):
        cli.parse("reward", [*BASE, "--granularity", "token", "--learning_rat", "1"])
    with pytest.raises(UserError, match="--use_peft: expected a flag of this command"):
        cli.parse("ppo", [*BASE, "--reward_model", "rm", "--use_peft", "true"])


def test_a_config_that_is_not_there():
    with pytest.raises(UserError, match=r"expected a readable YAML file, got nowhere\.yaml"):
        cli.parse("reward", ["--config", "nowhere.yaml", *BASE])


def test_what_is_required_may_come_from_any_source(config):
    path = config("model_name_or_path: lm\noutput_dir: rm\n")
    assert cli.parse("reward", ["--config", path, *BASE[2:4], "--granularity", "token"])
    with pytest.raises(UserError, match=r"dataset_name: expected a value, got none; pass --data"):
        cli.parse("reward", ["--config", path, "--granularity", "token"])


def test_a_flag_drops_what_the_config_chose_for_its_old_value(config, capsys):
    path = config(
        "reward_model: rm\nreward_threshold: 2.0\nnormalizer: line\nlam: 0.9\n"
        "normalizer_line: [1, 2, 3, 4]\n"
    )

    def ppo(*argv):
        return cli.parse("ppo", ["--config", path, *BASE, *argv])[2]

    assert ppo("--reward_threshold", "2").normalizer_line == [1, 2, 3, 4]
    assert ppo("--normalizer_line", "5", "6", "7", "8").normalizer_line == [5, 6, 7, 8]
    assert capsys.readouterr().err == ""
    other = ppo("--reward_model", "other")
    assert (other.normalizer, other.normalizer_line) == ("auto", None)
    assert (other.reward_threshold, other.lam) == (None, 0.9)
    said = capsys.readouterr().err
    assert "left out reward_threshold, normalizer, normalizer_line, chosen for reward_model" in said
    running = ppo("--normalizer", "running")
    assert (running.normalizer_line, running.reward_threshold) == (None, 2.0)


def test_a_normaliser_without_numbers_belongs_to_every_reward_model(config):
    path = config("reward_model: rm\nnormalizer: none\n")
    argv = ["--config", path, *BASE, "--reward_model", "other"]
    assert cli.parse("ppo", argv)[2].normalizer == "none"


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


@pytest.mark.parametrize("name", flags.COMMANDS)
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


@pytest.mark.filterwarnings("error:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_has_two_names(name, config):
    def on(got):
        # Either is what some supported version of transformers reads.
        assert got.activation_checkpointing == got.gradient_checkpointing
        assert got.activation_checkpointing_kwargs == got.gradient_checkpointing_kwargs
        return got.gradient_checkpointing

    token = [*BASE, "--granularity", "token"]
    assert not on(reward_config(*token))
    assert on(reward_config(*token, f"--{name}"))
    assert on(reward_config(*token, "--config", config(f"{name}: true\n")))
    assert on(RewardConfig(output_dir="rm", granularity="token", **{name: True}))
    options = reward_config(*token, f"--{name}_kwargs", '{"use_reentrant": false}')
    assert options.gradient_checkpointing_kwargs == {"use_reentrant": False}
    preset = ("--preset", "phi3-mini-token", "--output_dir", "rm", "--bf16", "false")
    assert on(reward_config(*preset))
    assert not on(reward_config(*preset, f"--{name}", "false"))
    ppo = ["--preset", "phi3-mini-token", "--output_dir", "policy", f"--{name}", "false"]
    assert cli.parse("ppo", ppo)[2].gradient_checkpointing is False
