"""Language models, tokenizers and LoRA adapters, read and checked."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

from ..configs import AdaptedModelConfig, ModelConfig
from ..data.render import check_eos
from ..errors import UserError, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AGAIN = "copy or save the model again, or name another"


def load_config(
    name_or_path: str | Path, where: dict[str, Any], trust_remote_code: bool = False
) -> PreTrainedConfig:
    with reading("model", "a directory with config.json or a hub name", name_or_path, AGAIN):
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **where
        )
    # What is saved again must not point at code that did not come with it.
    config.__dict__.pop("auto_map", None)
    return config


def weight_files(name_or_path: str | Path, where: dict[str, Any]) -> dict[str, str]:
    """File of each weight; "" stands for the only file. UserError where none is safetensors."""
    found = functools.partial(
        cached_file,
        str(name_or_path),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        **where,
    )
    if single := found(SAFE_WEIGHTS_NAME):
        return {"": single}
    index = found(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise UserError(
            f"model: expected {SAFE_WEIGHTS_NAME} in {name_or_path}, got none; other weight "
            "formats can run code when they are read, convert them once with save_pretrained"
        )
    with reading("model", "an index of safetensors files", index, AGAIN):
        weights = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weights.items()}


def load_whole(
    load: Callable[..., Any],
    name_or_path: str | Path,
    what: str,
    *,
    new: frozenset[str] = frozenset(),
    backbone_only: bool = False,
    **kwargs: Any,
) -> Any:
    """``load(name_or_path, **kwargs)``, a ``from_pretrained``, whose every weight is in the files.

    transformers draws at random what the files lack and leaves out what the model has no place for;
    here both are UserErrors that begin with ``what``. ``new`` names the weights that are drawn on
    purpose, and must not be in the files. ``backbone_only``: another head in the files is left out.
    """
    with _quiet():  # the same is said below, as an error
        model, info = load(
            name_or_path,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    missing, unexpected = set(info["missing_keys"]), _foreign(model, info["unexpected_keys"])
    if backbone_only:
        children = {name for name, _ in model.base_model.named_children()}
        unexpected = [
            name
            for name in unexpected
            if name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in children
        ]
    for found, how in (
        (
            [f"{n} {list(a)} for {list(b)}" for n, a, b in info["mismatched_keys"]],
            "with the shapes",
        ),
        (missing - new, "without"),
        (new - missing, "which is no language model, it has"),
        (unexpected, "which also has"),
    ):
        if found:
            raise UserError(
                f"{what}: expected exactly the weights of {type(model).__name__}, got "
                f"{name_or_path} {how} {_some(found)}; give the directory that save_pretrained "
                "wrote, with the config.json of the same model"
            )
    return model


def _foreign(model: PreTrainedModel, unexpected: set[str]) -> list[str]:
    """Weights for which the model has no place. Masks and positions that older versions of
    transformers saved, and newer ones compute, are none."""
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()} | {"masked_bias"}
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def legacy(name: str) -> bool:
        place, _, leaf = name.rpartition(".")
        return leaf in computed and (place in modules or prefix + place in modules)

    return [
        name for name in unexpected if not legacy(name) and not name.endswith("rotary_emb.inv_freq")
    ]


def _some(names: Iterable[str]) -> str:
    """The first few, layers in order."""
    ordered = sorted(names, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)], name))
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_causal_lm(config: ModelConfig, **kwargs: Any) -> PreTrainedModel:
    """The causal LM that ``config`` names; keyword arguments go to transformers.

    Raises UserError for a name that cannot be read, for weights that are not safetensors, and for
    weights that are not exactly this model's: missing ones, those of more layers, another head.
    """
    where: dict[str, Any] = {"revision": config.model_revision}
    load_config(config.model_name_or_path, where, config.trust_remote_code)
    weight_files(config.model_name_or_path, where)
    with reading("model", "the whole weights of a causal LM", config.model_name_or_path, AGAIN):
        return load_whole(
            AutoModelForCausalLM.from_pretrained,
            config.model_name_or_path,
            "model",
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            **where,
            **kwargs,
        )


def load_tokenizer(source: ModelConfig | str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: of a config, or of a directory or hub name.

    A tokenizer without pad token stays as it is: ``data.render.pad_token_id`` pads with EOS, and
    the attention mask tells padding. Raises UserError for one that cannot be read, one without
    EOS, and a chat template file that is not there.
    """
    remedy = "pass --tokenizer_name_or_path"
    if not isinstance(source, ModelConfig):
        source, remedy = ModelConfig(str(source)), "put the files of its tokenizer there"
    name = source.tokenizer_name_or_path or source.model_name_or_path
    revision = "main" if source.tokenizer_name_or_path else source.model_revision
    with reading("tokenizer", "a directory or hub name with tokenizer files", name, remedy):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=source.trust_remote_code
        )
    check_eos(tokenizer)
    if source.chat_template_path is not None:
        path = Path(source.chat_template_path)
        if not path.is_file():
            raise UserError(f"chat_template_path: expected a jinja file, got {path}")
        with reading("chat_template_path", "a jinja file in UTF-8", path, "check the file"):
            tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where the tokenizer has ids that a model of this config has not."""
    vocab_size = config.get_text_config().vocab_size
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    highest = max([*tokenizer.get_vocab().values(), *ends], default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"tokenizer: expected token ids below {vocab_size}, the vocab_size of "
            f"{config.name_or_path or 'the model'}, got {highest}; pass the tokenizer that the "
            "model was trained with"
        )


def check_positions(model: nn.Module, tokens: int, what: str) -> None:
    """UserError where ``what`` takes more ``tokens`` than a model that learnt its positions by
    number has a table for. Rotary positions have no table."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int) or tokens <= most:
        return
    words = model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(most <= table.num_embeddings < most + 8 for table in tables):
        raise UserError(
            f"model: expected rows of at most {most} tokens, for which it learnt positions, got "
            f"{what} of {tokens}; lower --max_length (ppo: --max_prompt_length and "
            "--response_length)"
        )


def check_same_tokenizer(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> None:
    """UserError, naming the first difference, unless both map the same tokens to the same ids.

    The reward model reads the policy's token ids, so that each reward lands on a policy token.
    """
    ours, theirs = policy.get_vocab(), reward.get_vocab()
    if ours == theirs and policy.eos_token_id == reward.eos_token_id:
        return
    if len(ours) != len(theirs):
        what = f"{len(theirs)} tokens instead of {len(ours)}"
    elif ours != theirs:
        token = min(ours.keys() | theirs.keys(), key=lambda t: (ours.get(t) == theirs.get(t), t))
        what = f"{token!r} as id {theirs.get(token)} instead of {ours.get(token)}"
    else:
        what = f"EOS {reward.eos_token!r} instead of {policy.eos_token!r}"
    raise UserError(
        f"reward model: expected the policy's tokenizer ({policy.name_or_path}), got "
        f"{reward.name_or_path} with {what}; train the reward model from a model of the policy's "
        "family, since rewards are read at the policy's own tokens"
    )


def recompute_activations(model: Any) -> None:
    """Saves memory in training: activations are computed again in the backward pass."""
    # transformers 5.23 renamed it and warns of the older name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def apply_lora(model: PreTrainedModel, config: AdaptedModelConfig, task_type: str) -> nn.Module:
    """``model`` with LoRA adapters: ``task_type`` CAUSAL_LM, or SEQ_CLS, where ``score`` is trained
    whole. ``merge_and_unload()`` of the result gives the plain model back for saving."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            "use_peft: expected the package peft, got none; pip install peft"
        ) from error
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        exclude_modules=["score"] if task_type == "SEQ_CLS" else None,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
    )
    return get_peft_model(model, lora)


def is_peft(model: Any) -> bool:
    return hasattr(model, "merge_and_unload")
