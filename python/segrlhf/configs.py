"""How flags are declared and checked, and those that several commands share; each command's own
stand in its module."""

from __future__ import annotations

import argparse
import functools
import json
import math
import numbers
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError, first_line
from .outputs import check_writable


@dataclass(frozen=True)
class Missing:
    """Stands in a preset for a value that whoever runs it has to give."""

    expected: str
    remedy: str


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes.

    Whole numbers are at most ``LARGEST_WHOLE`` unless ``max`` says otherwise; others are finite in
    fp32, in which kernels compute, unless ``infinite`` says that infinity has a meaning. Neither is
    told to who keeps within it.
    """

    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None
    infinite: bool = False
    unit: str = ""

    def refuses(self, value: Any, whole: bool) -> str | None:
        """What was expected, where ``value`` is not in the range."""
        number = numbers.Integral if whole else numbers.Real
        largest = self.max
        if largest is None:
            largest = LARGEST_WHOLE if whole else math.inf if self.infinite else LARGEST
        if (
            isinstance(value, number)
            and not isinstance(value, bool)
            and not math.isnan(value)  # type: ignore[arg-type]
            and (self.min is None or value >= self.min)  # type: ignore[operator]
            and (self.above is None or value > self.above)  # type: ignore[operator]
            and (self.below is None or value < self.below)  # type: ignore[operator]
            and value <= largest  # type: ignore[operator]
            and (self.infinite or whole or value >= -LARGEST)  # type: ignore[operator]
        ):
            return None
        bounds = {
            "at least": self.min, "above": self.above, "below": self.below, "at most": self.max,
        }  # fmt: skip
        texts = [f"{word} {_short(bound)}" for word, bound in bounds.items() if bound is not None]
        # What a type holds is no limit that a person has to know, before it is met.
        too_long = (
            self.max is None and isinstance(value, number) and math.inf > abs(value) > largest  # type: ignore[arg-type,operator]
        )
        if whole:
            kind = "a whole number of 32 bits" if too_long else "a whole number"
        elif self.infinite:
            kind = "a number"
        else:
            kind = "a number that is finite in float32" if too_long else "a finite number"
        kind += f" of {self.unit}" if self.unit else ""
        return ", ".join([kind, " and ".join(texts)]) if texts else kind


def _short(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


LARGEST_WHOLE = 2**31 - 1
LARGEST = 2.0**128 - 2.0**104  # of fp32
# Beyond it weights overflow in a step or two, by exceptions of torch where a scalar does.
LEARNING_RATE = WEIGHT_DECAY = Range(min=0, max=1000)
THRESHOLD = Range(min=0, unit="nats")
SEED = Range(min=0, max=2**32 - 1)  # what NumPy takes


class Flag(argparse.Action):
    """Stores a value, and knows the flags that it was chosen for. What else ``flag`` declares is
    read by ``check_flags``."""

    def __init__(
        self,
        *args: Any,
        depends_on: Any = (),
        limits: Any = None,
        writes: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.depends_on = depends_on

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)

    def needs(self, value: Any) -> tuple[str, ...]:
        """The flags on which ``value`` depends."""
        if isinstance(self.depends_on, Mapping):
            return self.depends_on.get(value, ())
        return self.depends_on


def flag(
    default: Any,
    help: str,
    *,
    depends_on: tuple[str, ...] | Mapping[Any, tuple[str, ...]] = (),
    limits: Range | None = None,
    writes: str | None = None,
    **options: Any,
) -> Any:
    """A dataclass field that is a flag; ``...`` as ``default`` makes it required.

    ``limits`` are the numbers that it takes, each of them where it takes several; every flag of
    numbers has some. ``writes`` says that it names a "file" or a "directory" that the command
    writes. Words that a flag may take are said by its type (``Literal``). All of that is checked by
    ``check_flags``, which the ``__post_init__`` of a class of flags calls.

    ``depends_on`` names the flags that a value was chosen for: where a preset or a config file sets
    both, and one of those is replaced by something that wins over the file, this value does not
    apply any more and the default is back. A mapping says it by value. ``options`` are further ones
    of argparse.
    """
    metadata: dict[str, Any] = {"help": help, **options}
    declared = {"depends_on": depends_on, "limits": limits, "writes": writes}
    if any(declared.values()):
        metadata |= {"action": Flag, **declared}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_flags(config: Any, limits: Mapping[str, Range] = types.MappingProxyType({})) -> None:
    """UserError for a value of ``config`` that its flag does not take.

    ``limits`` are those of fields that were not declared by ``flag``. Options that are json text
    become what they say.
    """
    hints = _hints(type(config))  # type: ignore[arg-type]  # classes are hashable
    for each in fields(config):
        value = getattr(config, each.name)
        if value is None:
            continue
        kinds = _kinds(hints[each.name])
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and value not in words:
            raise UserError(f"{each.name}: expected one of {', '.join(words)}, got {value!r}")
        within = each.metadata.get("limits") or limits.get(each.name)
        if within is not None:
            _check_range(each, kinds, value, within)
        if each.metadata.get("writes"):
            check_writable(each.name, value, each.metadata["writes"])
        if each.name.endswith("_kwargs") and isinstance(value, str):
            setattr(config, each.name, _json_object(each.name, value))


def _check_range(each: Any, kinds: tuple[Any, ...], value: Any, within: Range) -> None:
    whole = int in kinds or list[int] in kinds
    for one in value if isinstance(value, list) else [value]:
        expected = within.refuses(one, whole)
        if expected:
            usual = isinstance(each.default, int | float)
            remedy = f"the default is {each.default}" if usual else "see --help"
            raise UserError(f"{each.name}: expected {expected}, got {one!r}; {remedy}")


def _json_object(name: str, text: str) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of json")

    try:
        found = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        why = f", which cannot be read: {first_line(error)}"
    else:
        if isinstance(found, dict):
            return found
        why = ""
    raise UserError(
        f'{name}: expected a json object like {{"min_lr_rate": 0.1}}, got {text}{why}; quote it '
        "for the shell"
    )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@dataclass
class ModelConfig:
    """The causal language model that a run starts from."""

    _argument_group_name = "model"

    model_name_or_path: str = flag(..., "Causal LM: a directory or a hub name.")
    tokenizer_name_or_path: str | None = flag(None, "Tokenizer, when it is not the model's own.")
    model_revision: str = flag("main", "Hub revision of the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Storage of the weights."
    )
    attn_implementation: str | None = flag(None, "Attention kernel of transformers, e.g. sdpa.")
    chat_template_path: str | None = flag(
        None, "A jinja file, for a tokenizer without chat template."
    )
    trust_remote_code: bool = flag(False, "Run code that comes with the model. Off by default.")

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass
class AdaptedModelConfig(ModelConfig):
    """A model of which all weights are trained, or LoRA adapters only."""

    use_peft: bool = flag(False, "Train LoRA adapters (needs peft).")
    lora_r: int = flag(16, "LoRA rank.", limits=Range(min=1))
    lora_alpha: int = flag(32, "LoRA alpha.", limits=Range(min=1))
    lora_dropout: float = flag(0.0, "LoRA dropout.", limits=Range(min=0, below=1))
    lora_target_modules: list[str] | None = flag(
        None, "Modules that get adapters; default: all linear ones."
    )


@dataclass
class DataConfig:
    """The rows of a run, in TRL's preference or prompt format."""

    _argument_group_name = "data"

    dataset_name: str = flag(
        ...,
        "json, jsonl (also .gz), parquet or csv file, a directory of those, a dataset saved with "
        "save_to_disk, or a hub name.",
    )
    dataset_config: str | None = flag(None, "Hub configuration.")
    dataset_train_split: str = flag("train", "Split to train on.")
    dataset_test_split: str = flag("test", "Split to evaluate on, where the dataset has it.")
    eval_size: float = flag(
        0.0,
        "Without a test split: share of the prompts held out for evaluation (all pairs of a prompt "
        "stay on one side).",
        limits=Range(min=0, below=1),
    )
    max_samples: int | None = flag(None, "Use only the first rows.", limits=Range(min=1))

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass
class PairConfig:
    """How preference rows become token ids; the arguments of ``data.tokenize.tokenize_pairs``."""

    max_length: int = flag(2048, "Tokens of prompt and response.", limits=Range(min=1))
    max_prompt_length: int = flag(
        1728,
        "Rows with a longer prompt are dropped and counted; see --truncation_side.",
        limits=Range(min=1),
    )
    truncation_side: Literal["none", "left"] = flag(
        "none",
        "left: no row is dropped for its prompt; where prompt and the longer response take more "
        "than max_length tokens, the prompt keeps its last max_prompt_length ones.",
    )
    force_eos: bool = flag(
        False, "A response that is cut gets the end token as its last, as if it ended there."
    )
    strip_system_header: bool = flag(
        False,
        "Of conversations: leave out what the chat template writes before the first message, that "
        "is BOS and a system message of its own.",
    )

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def tokenization(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(PairConfig)}
