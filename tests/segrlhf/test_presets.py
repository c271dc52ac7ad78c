"""The published systems: their settings to the letter, and what of them a flag replaces."""

import math
import re
from pathlib import Path

import pytest

from segrlhf import cli, presets
from segrlhf.errors import UserError

PUBLISHED = [name for name, system in presets.SYSTEMS.items() if system.policy]


def ppo(name, *argv):
    return cli.parse("ppo", ["--preset", name, "--output_dir", "policy", *argv])[2]


def reward(name, *argv):
    return cli.parse("reward", ["--preset", name, "--output_dir", "rm", "--bf16", "false", *argv])[
        2
    ]


@pytest.mark.parametrize("name", presets.SYSTEMS)
def test_every_preset_is_a_runnable_configuration(name):
    system = presets.SYSTEMS[name]
    model, _, rm = cli.parse("reward", ["--preset", name, "--output_dir", "rm", "--bf16", "false"])
    assert model.model_name_or_path == system.backbone.model
    assert rm.granularity == system.granularity
    assert rm.entropy_threshold == system.threshold
    segment = cli.parse("segment", ["--preset", name])[2]
    assert (segment.max_length, segment.max_prompt_length) == (rm.max_length, rm.max_prompt_length)
    policy = ppo(name, *(() if system.reward_model else ("--reward_model", "rm")))
    assert policy.reward_granularity == system.granularity
    assert policy.reward_threshold == system.threshold


def test_there_are_nine_published_systems():
    names = {
        f"{backbone}-{granularity}"
        for backbone in ("phi3-mini", "llama3-8b-sft", "llama3.1-8b")
        for granularity in ("segment", "token", "bandit")
    }
    assert set(PUBLISHED) == names
    for name in PUBLISHED:
        system = presets.SYSTEMS[name]
        hub = re.fullmatch(r"yyqoni/(.+)-(\w+)-rm-700k", system.reward_model)
        assert hub[2] == system.granularity
        backbone = hub[1].replace("Phi-3-mini-4k-instruct", "Phi-3-mini-4k")
        assert system.policy.name == f"yyqoni/{backbone}-{hub[2]}-ppo-60k"


@pytest.mark.parametrize(
    ("name", "at_end", "at_half"),
    [
        # b_m and b_s of the paper's table; those minus ln 2 times w_m and w_s.
        ("phi3-mini-segment", (0.4705, 2.8339), (-0.06100, 2.65583)),
        ("phi3-mini-token", (1.2917, 3.5006), (0.62434, 3.23748)),
        ("llama3-8b-sft-segment", (0.8572, 4.1667), (0.23566, 3.77299)),
        ("llama3-8b-sft-token", (1.3212, 5.4513), (0.11929, 4.76467)),
        ("llama3.1-8b-segment", (0.8798, 3.7358), (0.30137, 3.40448)),
        ("llama3.1-8b-token", (0.6419, 4.9217), (-0.48571, 4.48820)),
    ],
)
def test_lines_of_the_paper(name, at_end, at_half):
    w_m, b_m, w_s, b_s = ppo(name).normalizer_line
    assert (b_m, b_s) == at_end
    half = math.log(0.5)
    assert (w_m * half + b_m, w_s * half + b_s) == pytest.approx(at_half, abs=1e-5)


def test_scalars_of_the_paper():
    assert ppo("phi3-mini-bandit").normalizer_scalar == [-0.5195, 2.1563]
    assert ppo("llama3-8b-sft-bandit").normalizer_scalar == [-0.8164, 2.9531]
    assert ppo("llama3.1-8b-bandit").normalizer_scalar == [-0.8281, 2.9375]


def test_settings_of_single_runs():
    overlong = {name for name in PUBLISHED if ppo(name).overlong_tokens is not None}
    assert overlong == {"llama3.1-8b-segment"}
    segment = ppo("llama3.1-8b-segment")
    assert (segment.overlong_tokens, segment.overlong_reward) == (800, -0.05)
    for name in PUBLISHED:
        policy = ppo(name)
        bandit, phi3 = name.endswith("bandit"), name.startswith("phi3")
        assert policy.cliprange_value == (0.2 if bandit else 0.25)
        assert policy.reward_spread == ("last" if bandit else "even")
        rows = policy.per_device_train_batch_size, policy.generation_batch_size
        assert rows == ((4, 16) if phi3 else (2, 4))
        assert policy.num_episodes == (2 if phi3 else 1)
        by_length = name == "llama3-8b-sft-token"
        assert policy.reward_reduction == ("token-mean" if by_length else "sum")


def test_learning_rates_fall_to_a_tenth():
    for train in (reward, ppo):
        config = train("phi3-mini-segment")
        assert config.lr_scheduler_type == "cosine_with_min_lr"
        assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
        assert config.warmup_steps == 0.03  # below 1: a share of all
        other = train("phi3-mini-segment", "--lr_scheduler_type", "linear")
        assert (other.lr_scheduler_kwargs, other.warmup_steps) == (None, 0.03)


@pytest.mark.parametrize("normalizer", ["none", "auto", "running"])
def test_a_normaliser_of_ones_own_drops_the_published_numbers(normalizer, capsys):
    own = ppo("phi3-mini-segment", "--normalizer", normalizer)
    assert (own.normalizer, own.normalizer_line) == (normalizer, None)
    assert (own.reward_threshold, own.reward_model) == (
        1.75,
        "yyqoni/Phi-3-mini-4k-instruct-segment-rm-700k",
    )
    assert capsys.readouterr().err == (
        "preset phi3-mini-segment: left out normalizer_line, chosen for normalizer line and not "
        f"for {normalizer}\n"
    )


def test_a_scalar_of_ones_own():
    own = ppo("phi3-mini-token", "--normalizer", "scalar", "--normalizer_scalar", "0.5", "2")
    assert (own.normalizer_line, own.normalizer_scalar) == (None, [0.5, 2.0])


def test_another_reward_model_brings_its_own_normaliser_and_threshold():
    own = ppo("phi3-mini-segment", "--reward_model", "mine")
    assert (own.normalizer, own.normalizer_line, own.reward_threshold) == ("auto", None, None)
    assert own.reward_granularity == "segment"  # what the preset is; held against the model's own
    bandit = ppo("phi3-mini-bandit", "--reward_model", "mine")
    assert (bandit.normalizer, bandit.normalizer_scalar) == ("auto", None)
    assert bandit.reward_spread == "last"
    same = ppo("phi3-mini-segment", "--reward_model", presets.SYSTEMS["phi3-mini-segment"].reward_model)  # fmt: skip # noqa: E501
    assert same.normalizer == "line"


def test_another_threshold_or_granularity_leaves_the_published_numbers():
    assert ppo("phi3-mini-segment", "--reward_threshold", "2").normalizer == "auto"
    with pytest.raises(UserError, match="reward_model: expected a value, got none"):
        ppo("phi3-mini-segment", "--reward_granularity", "token")
    assert reward("phi3-mini-segment", "--granularity", "token").entropy_threshold is None


def test_a_config_file_replaces_as_flags_do(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("reward_model: mine\nreward_threshold: 2.5\n")
    own = ppo("llama3.1-8b-segment", "--config", str(path))
    assert (own.reward_model, own.reward_threshold, own.normalizer) == ("mine", 2.5, "auto")
    assert own.overlong_tokens == 800


def test_a_threshold_without_a_published_reward_model():
    with pytest.raises(
        UserError,
        match=r"reward_model: expected a reward model trained at threshold 2\.0 \(none was "
        r"published\), got none; train one with 'segrlhf reward --preset phi3-mini-segment-2\.0'",
    ):
        ppo("phi3-mini-segment-2.0")
    own = ppo("phi3-mini-segment-2.0", "--reward_model", "mine")
    assert (own.reward_threshold, own.normalizer) == (2.0, "auto")
    assert reward("phi3-mini-segment-2.0").entropy_threshold == 2.0


@pytest.mark.parametrize("world_size", [1, 8, 64])
@pytest.mark.parametrize("given", [{}, {"per_device_train_batch_size": 2}])
def test_the_published_batch_is_kept(world_size, given):
    flags = presets.preset("phi3-mini-token", "reward", given, world_size) | given
    steps = flags["gradient_accumulation_steps"]
    assert flags["per_device_train_batch_size"] * steps * world_size == 128


def test_a_batch_of_ones_own():
    assert reward("phi3-mini-token", "--per_device_train_batch_size", "2").train_batch_size == 2
    own = reward("phi3-mini-token", "--gradient_accumulation_steps", "3")
    assert own.gradient_accumulation_steps == 3
    with pytest.raises(UserError, match="times 3 processes, divides the published batch of 128"):
        presets.preset("phi3-mini-token", "reward", {}, 3)
    with pytest.raises(UserError, match="got 5; run another number of processes, or choose"):
        reward("phi3-mini-token", "--per_device_train_batch_size", "5")


@pytest.mark.parametrize("name", PUBLISHED)
def test_inputs_of_the_published_models(name):
    system = presets.SYSTEMS[name]
    rows = reward(name).tokenization
    assert rows == cli.parse("segment", ["--preset", name])[2].tokenization
    assert rows == {
        "max_length": 2048,
        "max_prompt_length": 1728,
        "truncation_side": "left",
        "force_eos": True,
        "strip_system_header": name.startswith("llama3.1"),
    }
    data, scores = cli.parse("score", ["--preset", name, "--dataset_name", "rows.jsonl"])
    assert data.dataset_name == "rows.jsonl"
    fit = cli.parse("fit-normalizer", ["--preset", name, "--reward_model", "downloaded"])[1]
    assert (scores.reward_model, fit.reward_model) == (system.reward_model, "downloaded")
    for config in (scores, fit):
        assert (config.granularity, config.entropy_threshold) == (
            system.granularity,
            system.threshold,
        )
        segments = system.granularity == "segment"
        assert config.entropy_model == (system.backbone.model if segments else None)
        assert {key: getattr(config, key) for key in rows} == rows
    assert fit.max_pairs == 60_000
    policy = ppo(name)
    assert (policy.max_prompt_length, policy.truncation_side) == (1024, "left")


def test_scores_of_another_reward_model_are_read_as_in_its_own_training():
    argv = ["--preset", "phi3-mini-segment", "--dataset_name", "rows.jsonl"]
    own = cli.parse("score", [*argv, "--reward_model", "mine"])[1]
    assert own.granularity == "segment"
    assert own.entropy_threshold is own.entropy_model is own.force_eos is own.max_length is None


def test_a_normaliser_is_written_into_a_directory():
    with pytest.raises(UserError, match=r"got none; bring one there with 'hf download yyqoni/Phi"):
        cli.parse("fit-normalizer", ["--preset", "phi3-mini-token"])


def test_presets_that_cannot_be():
    with pytest.raises(UserError, match=r"preset: expected one of phi3-mini-segment.*got 'phi4'"):
        presets.preset("phi4", "reward", {})
    with pytest.raises(UserError, match="expected a command that presets configure, got 'demo'"):
        presets.preset("phi3-mini-token", "demo", {})


def test_the_page_lists_what_the_presets_hold():
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip(" `") for cell in line.strip("|").split("|"))
        for line in page.splitlines()
        if line.startswith("| `") and line.split("`")[1] in presets.SYSTEMS
    ]
    expected = []
    for name, system in presets.SYSTEMS.items():
        policy, numbers = system.policy, list(system.normalizer.to_dict().values())[1:5]
        hub = (system.reward_model, policy and policy.name)
        expected += [
            (name, system.backbone.model, *(str(cell or "-") for cell in (system.threshold, *hub))),
            (name, *(f"{number:.4f}" for number in numbers)),
        ]
        if policy:
            results = f"{policy.alpaca_eval:.2f} {policy.arena_hard:.1f} {policy.mt_bench:.2f}"
            expected.append((name, *results.split()))
    assert sorted(rows) == sorted(expected)
