"""Arguments that several commands share; each command's own stand in its module."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """The causal language model that a run starts from."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Causal LM: a directory or a hub name."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, when it is not the model's own."}
    )
    model_revision: str = field(default="main", metadata={"help": "Hub revision of the model."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Storage of the weights: auto, float32, bfloat16 or float16."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of transformers, e.g. sdpa."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A jinja file, for a tokenizer without chat template."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model. Off by default."}
    )


@dataclass
class AdaptedModelConfig(ModelConfig):
    """A model of which all weights are trained, or LoRA adapters only."""

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters (needs peft)."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get adapters; default: all linear ones."}
    )


@dataclass
class DataConfig:
    """The rows of a run, in TRL's preference or prompt format."""

    _argument_group_name = "data"

    dataset_name: str = field(
        metadata={
            "help": "json, jsonl (also .gz), parquet or csv file, a directory of those, a dataset "
            "saved with save_to_disk, or a hub name."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Hub configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where the dataset has it."}
    )
    eval_size: float = field(
        default=0.0,
        metadata={
            "help": "Without a test split: share of the prompts held out for evaluation "
            "(all pairs of a prompt stay on one side)."
        },
    )
    max_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
