"""``segrlhf <command>``: flags over ``--config run.yaml`` over ``--preset``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import signal
import sys
from dataclasses import dataclass, fields
from typing import Any

from .configs import Flag, Missing
from .errors import DiskFullError, NonFiniteError, UserError
from .runtime.checkpoints import is_disk_full
from .runtime.interrupt import Interrupt


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

EXIT_USER, EXIT_NON_FINITE, EXIT_DISK = 2, 3, 4
EXIT_SIGNAL = 128  # and the signal's number, as shells count

# Of transformers.TrainingArguments' flags, the ones that --help shows; --help_all shows all.
COMMON_TRAINING_FLAGS = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs",
    "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "bf16", "seed",
    "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "report_to", "resume_from_checkpoint", "label_smoothing_factor",
}  # fmt: skip


_EXIT_STATUS = """exit status:
  0    done
  2    the input is wrong
  3    a number was NaN or infinite
  4    the disk is full
  129, 130, 143    stopped by SIGHUP, by SIGINT (Ctrl-C), by SIGTERM: 128 and the signal's number"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; its exit status, see ``_EXIT_STATUS``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("segkernels"))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail("", f"expected one of {', '.join(COMMANDS)}, got {name!r}{hint}", EXIT_USER)
    try:
        with Interrupt():
            configs = parse(name, rest)
            importlib.import_module(f".{COMMANDS[name].module}", __package__).run(*configs)
    except UserError as error:
        return _fail(name, error, EXIT_USER)
    except NonFiniteError as error:
        return _fail(name, error, EXIT_NON_FINITE)
    except KeyboardInterrupt as stop:
        text = f"interrupted; {stop}" if str(stop) else "interrupted"
        return _fail(name, text, EXIT_SIGNAL + getattr(stop, "signal", signal.SIGINT))
    except DiskFullError as error:
        return _fail(name, error, EXIT_DISK)
    except Exception as error:
        if not is_disk_full(error):
            raise
        text = f"disk full: {error}; what was there before is intact, free some space"
        return _fail(name, text, EXIT_DISK)
    return 0


def _fail(name: str, error: object, status: int) -> int:
    print(f"{f'segrlhf {name}'.strip()}: {error}", file=sys.stderr)
    return status


def _usage() -> str:
    lines = ["usage: segrlhf <command> [--config run.yaml] [--preset NAME] [flags]", ""]
    lines += [f"  {name:15} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "segrlhf <command> --help lists the flags of a command.", "", _EXIT_STATUS]
    return "\n".join(lines)


def parse(name: str, argv: list[str]) -> tuple[Any, ...]:
    """The dataclass instances of command ``name`` from its flags, config file and preset.

    Flags win over the config file, and that wins over the preset. A value that loses takes along
    what was chosen for it (``depends_on`` of ``configs.flag``), which is said on stderr.
    """
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    front.add_argument("--config", help="YAML file of flags; the command line wins over it.")
    front.add_argument("--preset", help="A published system; the config file wins over it.")
    chosen, words = front.parse_known_args(argv)

    parser = _parser(name, front, show_all="--help_all" in words)
    if "--help_all" in words:
        words = ["--help"]
    required = [action.dest for action in parser._actions if action.required]
    for action in parser._actions:
        action.required = False  # in any one source; all together must have it

    values = _given(parser, words)
    if chosen.config:
        lower = _listed(parser, _read_yaml(chosen.config), chosen.config)
        values = _over(parser, values, lower, chosen.config)
    if chosen.preset:
        from .presets import preset

        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        lower = _listed(parser, preset(chosen.preset, name, values, world_size), "preset")
        values = _over(parser, values, lower, f"preset {chosen.preset}")
    for flag in dict.fromkeys([*values, *required]):
        value = values.get(flag, Missing("a value", f"pass --{flag}"))
        if isinstance(value, Missing):
            raise UserError(f"{flag}: expected {value.expected}, got none; {value.remedy}")
    return tuple(parser.parse_dict(values))


_ABSENT = object()


def _given(parser: Any, words: list[str]) -> dict[str, Any]:
    """The values of the flags that stand among ``words``, and of no others."""
    # argparse gives a default only to what is not there yet.
    absent = argparse.Namespace(**{action.dest: _ABSENT for action in parser._actions})
    namespace, unknown = parser.parse_known_args(words, absent)
    if unknown:
        raise UserError(f"{unknown[0]}: {_no_flag(unknown[0].lstrip('-'), _names(parser))}")
    return {flag: value for flag, value in vars(namespace).items() if value is not _ABSENT}


def _listed(parser: Any, mapping: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of a mapping, read as command-line words, so that one parser checks everything."""
    known = _names(parser)
    words: list[str] = []
    missing: dict[str, Any] = {}
    for key, value in mapping.items():
        flag = str(key).replace("-", "_")
        if flag not in known:
            raise UserError(f"{source}: {_no_flag(flag, known)}")
        if isinstance(value, Missing):
            missing[flag] = value
        elif isinstance(value, dict):
            words += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words += [f"--{flag}", str(value)]
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


class _Help(argparse.HelpFormatter):
    """One spelling of each flag, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = next(iter(action.option_strings), "")
        if action.nargs == 0:
            return option
        return (
            f"{option} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        return {"int": "N", "float": "X", "string_to_bool": "BOOL"}.get(kind, "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split()).replace("%", "%%")
        if action.default is None or action.default is argparse.SUPPRESS or action.nargs == 0:
            return text
        return f"{text} (default: %(default)s)"


def _parser(name: str, front: argparse.ArgumentParser, show_all: bool) -> Any:
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
    parser = HfArgumentParser(
        classes,
        parents=[front],
        prog=f"segrlhf {name}",
        usage=f"segrlhf {name} [--config run.yaml] [--preset NAME] [flags]",
        description=COMMANDS[name].summary,
        allow_abbrev=False,
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


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as handle:
            values = yaml.safe_load(handle)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"config: expected a readable YAML file, got {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"config: expected a mapping of flags in {path}, got {type(values).__name__}; "
            "write one 'flag: value' a line"
        )
    return values


if __name__ == "__main__":
    sys.exit(main())
