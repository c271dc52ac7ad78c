"""How flags are declared, and those that several commands share; each command's own stand in its
module."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Missing:
    """Stands in a preset for a value that whoever runs it has to give."""

    expected: str
    remedy: str


class Flag(argparse.Action):
    """Stores a value, and knows the flags that it was chosen for."""

    def __init__(self, *args: Any, depends_on: Any = (), **kwargs: Any) -> None:
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
    **options: Any,
) -> Any:
    """A dataclass field that is a flag; ``...`` as ``default`` makes it required.

    ``depends_on`` names the flags that a value was chosen for: where a preset or a config file sets
    both, and one of those is replaced by something that wins over the file, this value does not
    apply any more and the default is back. A mapping says it by value. Values that a flag may take
    are said by its type (``Literal``). ``options`` are further ones of argparse.
    """
    metadata: dict[str, Any] = {"help": help, **options}
    if depends_on:
        metadata |= {"action": Flag, "depends_on": depends_on}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The causal language model that a run starts from."""

    _argument_group_name = "model"

    model_name_or_path: str = flag(..., "Causal LM: a directory or a hub name.")
    tokenizer_name_or_path: str | None = flag(None, "Tokenizer, when it is not the model's own.")
    model_revision: str = flag("main", "Hub revision of the model.")
    dtype: str = flag("auto", "Storage of the weights: auto, float32, bfloat16 or float16.")
    attn_implementation: str | None = flag(None, "Attention kernel of transformers, e.g. sdpa.")
    chat_template_path: str | None = flag(
        None, "A jinja file, for a tokenizer without chat template."
    )
    trust_remote_code: bool = flag(False, "Run code that comes with the model. Off by default.")


@dataclass
class AdaptedModelConfig(ModelConfig):
    """A model of which all weights are trained, or LoRA adapters only."""

    use_peft: bool = flag(False, "Train LoRA adapters (needs peft).")
    lora_r: int = flag(16, "LoRA rank.")
    lora_alpha: int = flag(32, "LoRA alpha.")
    lora_dropout: float = flag(0.0, "LoRA dropout.")
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
    )
    max_samples: int | None = flag(None, "Use only the first rows.")


@dataclass
class PairConfig:
    """How preference rows become token ids; the arguments of ``data.tokenize.tokenize_pairs``."""

    max_length: int = flag(2048, "Tokens of prompt and response.")
    max_prompt_length: int = flag(
        1728, "Rows with a longer prompt are dropped and counted; see --truncation_side."
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

    @property
    def tokenization(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(PairConfig)}
