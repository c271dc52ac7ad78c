"""The command line: flags over ``--config run.yaml`` over ``--preset``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .configs import Flag, Missing
from .errors import EXIT_STATUS, UserError


@dataclass(frozen=True)
class Command:
    module: str
    configs: tuple[str, ...]  # "module:Class", in the order that run() takes them
    summary: str


_MODEL, _DATA = "configs:ModelConfig", "configs:DataConfig"
COMMANDS = {
    "segment": Command(
        "segment",
        (_MODEL, _DATA, "segment:SegmentConfig"),
        "entropies of a frozen LM over pairs, once; segments per response for several thresholds",
    ),
    "reward": Command(
        "reward.run",
        ("configs:AdaptedModelConfig", _DATA, "reward.config:RewardConfig"),
        "train a bandit, token or segment reward model from preference pairs",
    ),
    "fit-normalizer": Command(
        "fit_normalizer",
        (_DATA, "fit_normalizer:FitConfig"),
        "fit mean and std of a reward model's rewards over position",
    ),
    "ppo": Command(
        "ppo.run",
        (_MODEL, _DATA, "ppo.config:PPOConfig"),
        "train a policy with the reward model by PPO",
    ),
    "score": Command(
        "score",
        (_DATA, "score:ScoreConfig"),
        "score responses, segment by segment, to jsonl or a coloured html page",
    ),
}

# Of transformers.TrainingArguments' flags, the ones that --help shows; --help_all shows all.
COMMON_TRAINING_FLAGS = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs",
    "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "bf16", "seed",
    "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "report_to", "resume_from_checkpoint", "label_smoothing_factor",
}  # fmt: skip


def parse(name: str, argv: list[str]) -> tuple[Any, ...]:
    """The dataclass instances of command ``name`` from its flags, config file and preset.

    Flags win over the config file, and that wins over the preset. A value that loses takes along
    what was chosen for it (``depends_on`` of ``configs.flag``), which is said on stderr.
    """
    with _naming_the_flag():
        chosen, words = _front().parse_known_args(argv)

    parser = command_parser(name, show_all="--help_all" in words)
    if "--help_all" in words:
        words = ["--help"]
    required = [action.dest for action in parser._actions if action.required]
    for action in parser._actions:
        action.required = False  # in any one source; all together must have it

    values = _given(parser, words)
    if chosen.config is not None:
        from .config_file import read_flags

        lower = read_flags(chosen.config)
        if "config" in lower:
            raise UserError(
                f"{chosen.config}: expected flags, got config {lower['config']!r}; a config file "
                "names no other, name it on the command line"
            )
        inner = lower.pop("preset", None)
        if isinstance(inner, str) and chosen.preset is None:
            chosen.preset = inner
        elif inner is not None and not isinstance(inner, str):
            raise UserError(f"{chosen.config}: expected the name of a preset, got {inner!r}")
        values = _over(parser, values, _listed(parser, lower, chosen.config), chosen.config)
    if chosen.preset is not None:
        from .presets import preset

        world_size = int(os.environ.get("WORLD_SIZE") or "1")
        lower = _listed(parser, preset(chosen.preset, name, values, world_size), "preset")
        values = _over(parser, values, lower, f"preset {chosen.preset}")
    for flag in dict.fromkeys([*values, *required]):
        value = values.get(flag, Missing("a value", f"pass --{flag}"))
        if isinstance(value, Missing):
            raise UserError(f"{flag}: expected {value.expected}, got none; {value.remedy}")
    try:
        return tuple(parser.parse_dict(values))
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # of TrainingArguments
        raise UserError(
            f"flags: expected settings that go together, got this refusal of transformers: "
            f"{' '.join(str(error).split())}; change or drop one of them"
        ) from error


_ABSENT = object()


def _given(parser: Any, words: list[str]) -> dict[str, Any]:
    """The values of the flags that stand among ``words``, and of no others."""
    # argparse gives a default only to what is not there yet.
    absent = argparse.Namespace(**{action.dest: _ABSENT for action in parser._actions})
    with _naming_the_flag():
        namespace, unknown = parser.parse_known_args(words, absent)
    if unknown and unknown[0].startswith("-"):
        raise UserError(f"{unknown[0]}: {_no_flag(unknown[0].lstrip('-'), _names(parser))}")
    if unknown:
        raise UserError(
            f"{unknown[0]}: expected a flag, got this word after a flag that takes no more; quote "
            "a value that has spaces"
        )
    return {flag: value for flag, value in vars(namespace).items() if value is not _ABSENT}


def _listed(parser: Any, mapping: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of a mapping, read as command-line words, so that one parser checks everything."""
    known = _names(parser)
    several = {option[2:] for a in parser._actions if a.nargs == "+" for option in a.option_strings}
    words: list[str] = []
    missing: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in mapping.items():
        flag = str(key).replace("-", "_")
        if flag not in known:
            raise UserError(f"{source}: {_no_flag(flag, known)}")
        if flag in seen:
            raise UserError(f"{source}: {flag}: expected one line, got two of them; drop one")
        seen.add(flag)
        if isinstance(value, list) and flag not in several:
            raise UserError(
                f"{source}: {flag}: expected one value, got {len(value)}; write 'flag: value'"
            )
        if isinstance(value, Missing):
            missing[flag] = value
        elif isinstance(value, dict):
            try:
                words.append(f"--{flag}={json.dumps(value)}")
            except TypeError as error:  # YAML has dates and bytes
                raise UserError(
                    f"{source}: {flag}: expected words, numbers, true, false and null, got "
                    f"{value}: {error}; put it in quotes"
                ) from error
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words.append(f"--{flag}={value}")
    return _given(parser, words) | missing


def _over(parser: Any, upper: dict[str, Any], lower: dict[str, Any], source: str) -> dict[str, Any]:
    """``upper`` over ``lower``, without what ``lower`` chose for a value that lost."""
    needs = {a.dest: a.needs for a in parser._actions if isinstance(a, Flag)}
    kept = {flag: value for flag, value in lower.items() if flag not in upper}
    for lost in upper:
        old = lower.get(lost, upper[lost])
        if isinstance(old, Missing) or old == upper[lost]:
            continue
        gone = [lost]
        for flag in gone:  # grows: what depends on something gone is gone too
            gone += [f for f, value in kept.items() if f in needs and flag in needs[f](value)]
            kept = {f: value for f, value in kept.items() if f not in gone}
        if gone[1:] and os.environ.get("RANK", "0") == "0":
            print(
                f"{source}: left out {', '.join(gone[1:])}, chosen for {lost} {old} and "
                f"not for {upper[lost]}",
                file=sys.stderr,
            )
    return {**kept, **upper}


def _names(parser: Any) -> list[str]:
    """The flags that take a value, by every name."""
    options = [option for a in parser._actions if a.nargs != 0 for option in a.option_strings]
    return [option[2:] for option in options if option.startswith("--") and "-" not in option[2:]]


def _no_flag(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"expected a flag of this command, got {name!r}; {hint}"


@contextmanager
def _naming_the_flag() -> Iterator[None]:
    """argparse's complaints about a flag without value, as UserError."""
    try:
        yield
    except argparse.ArgumentError as error:
        names = [name.lstrip("-") for name in (error.argument_name or "flags").split("/")]
        raise UserError(
            f"{names[0]}: {error.message}, got none or another flag; write --{names[0]}=VALUE for "
            "a value that begins with a dash"
        ) from error


class _Words(argparse.ArgumentParser):
    """Reads words, and says in one line which flag got a wrong one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse's own takes -1e-3, -inf and -nan for flags.
        number = r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-(inf(inity)?|nan)"
        self._negative_number_matcher = re.compile(rf"^({number})$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"flags: {message}; see --help")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        if not text.strip() or "\0" in text:
            raise UserError(f"{action.dest}: expected a value, got {text!r}; drop the flag")
        try:
            return super()._get_value(action, text)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            kind = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
            expected = kind.get(getattr(action.type, "__name__", ""), "another value")
            raise UserError(
                f"{action.dest}: expected {expected}, got {text!r}; see --help"
            ) from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            words = ", ".join(map(str, action.choices))
            near = difflib.get_close_matches(str(value), map(str, action.choices), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{action.dest}: expected one of {words}, got {value!r}{hint}")


class _Help(argparse.HelpFormatter):
    """One spelling of each flag, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = next(iter(action.option_strings), "")
        if action.nargs == 0:
            return option
        return (
            f"{option} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # the table of exit statuses keeps its lines

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        return {"int": "N", "float": "X", "string_to_bool": "BOOL"}.get(kind, "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split()).replace("%", "%%")
        if action.default is None or action.default is argparse.SUPPRESS or action.nargs == 0:
            return text
        return f"{text} (default: %(default)s)"


class _Once(argparse.Action):
    """A second one would take the place of the first, with all flags in it."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) not in (None, _ABSENT):
            raise UserError(f"{self.dest}: expected one, got two; drop one of them")
        setattr(namespace, self.dest, values)


def _front() -> argparse.ArgumentParser:
    """Reads what says where further flags are."""
    front = _Words(add_help=False, allow_abbrev=False, exit_on_error=False)
    front.add_argument(
        "--config", action=_Once, help="YAML file of flags; the command line wins over it."
    )
    front.add_argument(
        "--preset", action=_Once, help="A published system; the config file wins over it."
    )
    return front


def command_parser(name: str, show_all: bool = True) -> Any:
    """The parser of a command's flags; its --help has the rare ones too if ``show_all``."""
    try:
        from transformers import HfArgumentParser, TrainingArguments
    except ImportError as error:
        raise UserError(
            f"segrlhf: expected the training stack, got {error}; pip install 'segkernels[train]'"
        ) from error

    classes = []
    for config in COMMANDS[name].configs:
        module, _, cls = config.partition(":")
        classes.append(getattr(importlib.import_module(f".{module}", __package__), cls))

    class Parser(_Words, HfArgumentParser):
        pass

    parser = Parser(
        classes,
        parents=[_front()],
        prog=f"segrlhf {name}",
        usage=f"segrlhf {name} [--config run.yaml] [--preset NAME] [flags]",
        description=COMMANDS[name].summary,
        epilog=EXIT_STATUS,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=_Help,
    )
    training = next((c for c in classes if issubclass(c, TrainingArguments)), None)
    if training is not None:
        parser.add_argument("--help_all", action="store_true", help="Also list rare flags.")
        own = {f.name for f in fields(training)} - {f.name for f in fields(TrainingArguments)}
        rare = {f.name for f in fields(TrainingArguments)} - COMMON_TRAINING_FLAGS - own
        for action in parser._actions:
            if action.dest in rare and not show_all:
                action.help = argparse.SUPPRESS
    return parser
