"""Reward models with one reward per token; the token statistics and the loss of a policy."""

from __future__ import annotations

import functools
import inspect
import json
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

import segkernels
from segkernels import ScalarNormalizer, normalizer_from_dict, objective
from segkernels.layout import values_may_be_checked

from .configs import AdaptedModelConfig, ModelConfig
from .data import check_eos
from .errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from segkernels.ppo_loss import Aggregation

GRANULARITIES = ("segment", "token", "bandit")

# Keyword arguments of from_pretrained that say where the files are.
_WHERE = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")


def check_threshold(threshold: float | None, name: str = "entropy_threshold") -> float:
    """A finite number of nats >= 0, or UserError."""
    if threshold is None or not (math.isfinite(threshold) and threshold >= 0):
        raise UserError(
            f"{name}: expected a finite number of nats >= 0, got {threshold}; published runs use "
            "1.75 and 2.0, 'segrlhf segment' shows what each threshold cuts on your data"
        )
    return threshold


def check_granularity(granularity: str) -> str:
    if granularity not in GRANULARITIES:
        raise UserError(
            f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}"
        )
    return granularity


class SegmentRewardModel(PreTrainedModel):
    """A decoder with a bias-free scalar head, read at every token: one reward per token.

    An instance is also one of transformers' own ``<Family>ForSequenceClassification`` with one
    label, so that what ``save_pretrained`` writes is loaded by plain
    ``AutoModelForSequenceClassification``, whose logit of a row is the reward at its last token.
    (Families for which transformers has no such class are put together the same way; their
    checkpoints load here only.) ``config.json`` keeps under ``segment_reward`` the granularity, the
    entropy threshold in nats, the name of the entropy model and the normaliser.

    Built by ``from_pretrained`` (a reward model) or ``from_causal_lm`` (a language model).
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if type(self) is SegmentRewardModel:
            raise TypeError(
                "SegmentRewardModel: expected from_pretrained or from_causal_lm, got a direct call"
            )
        super().__init__(config, *args, **kwargs)
        if not isinstance(getattr(self, "score", None), nn.Linear):
            raise UserError(
                f"model: expected a decoder whose {type(self).__name__} has a linear head 'score', "
                "got one without; its hidden state at a token may read later tokens"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | Path,
        granularity: str | None = None,
        entropy_threshold: float | None = None,
        **kwargs: Any,
    ) -> SegmentRewardModel:
        """A trained reward model, from a directory or the hub; remote code is not needed.

        Reads what ``save_pretrained`` wrote, sequence-classification checkpoints with one label,
        and those whose config says ``RewardModel`` and gives no label count. ``granularity`` and
        ``entropy_threshold`` are for checkpoints that do not say. A published bandit model, or one
        with ``normalize_reward``, gets the scalar normaliser of its ``mean`` and ``std``, unless
        they are 0 and 1, which say that none was fitted. Other keyword arguments (dtype,
        attn_implementation, revision, ...) are those of transformers.

        Raises UserError for weights that are not safetensors, for a head of more than one label,
        without a head, for weights that are missing, and for a granularity or threshold that is
        not the checkpoint's own.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        config = kwargs.pop("config", None) or _load_config(name_or_path, where)
        labels = _n_labels(name_or_path, where)
        if labels != 1:
            raise UserError(
                f"reward model: expected one label, got {labels} in {name_or_path}; a classifier "
                "is not a reward model, train one with 'segrlhf reward'"
            )
        model, info = _load(_reward_class(config), name_or_path, config, kwargs)
        if info["missing_keys"]:
            raise UserError(
                f"reward model: expected all weights of {type(model).__name__}, got {name_or_path} "
                f"without {', '.join(sorted(info['missing_keys'])[:5])}"
            )
        model._settle(granularity, entropy_threshold)
        return model

    @classmethod
    def from_causal_lm(
        cls,
        name_or_path: str | Path,
        granularity: str,
        entropy_threshold: float | None = None,
        entropy_model: str | None = None,
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> SegmentRewardModel:
        """An untrained reward model on the backbone of a language model.

        The head is drawn N(0, variance 1 / (hidden size + 1)) with ``seed``; the backbone is
        copied exactly. ``entropy_threshold`` (nats) is required for segments. With ``tokenizer``
        its size is checked and its pad token is written into the config, where plain
        sequence-classification code looks for it; a pad token that is also EOS is left out there,
        because that code would take the EOS of a response for padding. Raises UserError as
        ``from_pretrained`` does.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        config = _load_config(name_or_path, where, kwargs.get("trust_remote_code", False))
        _weight_files(name_or_path, where)
        check_granularity(granularity)
        if granularity == "segment":
            check_threshold(entropy_threshold)
        text = config.get_text_config()
        if tokenizer is not None:
            check_vocabulary(text.vocab_size, tokenizer)
            text.pad_token_id = tokenizer.pad_token_id
        ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        if text.pad_token_id in ends:
            text.pad_token_id = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, info = _load(_reward_class(config), name_or_path, config, kwargs)
        strange = set(info["missing_keys"]) - {"score.weight"}
        if strange:
            raise UserError(
                f"model: expected the weights of a causal LM, got {name_or_path} without "
                f"{', '.join(sorted(strange)[:5])}"
            )
        model._keep(
            granularity=granularity,
            entropy_threshold=entropy_threshold,
            entropy_model=entropy_model,
            normalizer=None,
        )
        return model

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "score", None):
            hidden = module.weight.shape[1]
            initialization.normal_(module.weight, std=1.0 / math.sqrt(hidden + 1))
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Rewards ``[B, T]``, fp32: entry t is the model's output after reading token t.

        ``attention_mask`` ``[B, T]`` is 1 on tokens, 0 on padding, which may be on either side:
        positions are counted over tokens unless ``position_ids`` gives them. What stands at padding
        has no meaning. Keyword arguments go to the backbone; None is the same as absent.
        """
        given = {key: value for key, value in kwargs.items() if value is not None}
        given["use_cache"] = False
        backbone = self.base_model
        if position_ids is None:
            position_ids = positions(backbone, attention_mask)
        if position_ids is not None:
            given["position_ids"] = position_ids
        hidden = backbone(input_ids, attention_mask=attention_mask, **given)[0]  # [B, T, D]
        # Rewards near each other must not be rounded to one bf16 number where the head is fp32.
        with torch.autocast(hidden.device.type, enabled=False):
            head_dtype = next(self.score.parameters()).dtype
            return self.score(hidden.to(head_dtype)).squeeze(-1).float()

    @property
    def granularity(self) -> str:
        """``segment``, ``token`` or ``bandit``; UserError where the checkpoint does not say."""
        found = self._kept("granularity")
        if found is None:
            raise UserError(
                f"reward model: expected a known granularity, got {self.name_or_path} whose config "
                "does not say; pass granularity= (--granularity segment, token or bandit)"
            )
        return found

    @granularity.setter
    def granularity(self, value: str) -> None:
        self._keep(granularity=check_granularity(value))

    @property
    def entropy_threshold(self) -> float | None:
        """Nats; None where no threshold divides the text (token, bandit) or none is known."""
        return self._kept("entropy_threshold")

    @entropy_threshold.setter
    def entropy_threshold(self, value: float) -> None:
        self._keep(entropy_threshold=check_threshold(value))

    @property
    def entropy_model(self) -> str | None:
        """Name or path of the LM whose entropies divided the training responses."""
        return self._kept("entropy_model")

    @entropy_model.setter
    def entropy_model(self, value: str | None) -> None:
        self._keep(entropy_model=value)

    @property
    def normalizer(self) -> Any:
        """A normaliser of segkernels, or None where none was fitted."""
        found = self._kept("normalizer")
        return None if found is None else normalizer_from_dict(found)

    @normalizer.setter
    def normalizer(self, value: Any) -> None:
        self._keep(normalizer=None if value is None else value.to_dict())

    def segment_ends(
        self, entropy: Tensor | None, mask: Tensor, terminated: Tensor | None = None
    ) -> Tensor:
        """Ends of the segments whose rewards this model gives, bool ``[B, T]``.

        ``entropy`` ``[B, T]`` (nats, of the distribution which produced each token) is read for
        segments only. ``mask`` bool ``[B, T]`` marks the response. The last token of a row is EOS
        and lies in no segment where ``terminated`` (bool ``[B]``, None: everywhere) says so; a
        bandit's one segment ends there in any case. Raises UserError for an unknown granularity or
        threshold, and for segments without ``entropy``.
        """
        ends = functools.partial(segkernels.segment_ends, mask=mask, entropy_of="current")
        nowhere = torch.zeros(mask.shape, device=mask.device)
        if self.granularity == "bandit":
            return ends(nowhere, threshold=math.inf, exclude_last=False)
        exclude_last = True if terminated is None else terminated
        if self.granularity == "token":
            return ends(nowhere, threshold=-math.inf, exclude_last=exclude_last)
        threshold = check_threshold(self.entropy_threshold)
        if entropy is None:
            raise UserError(
                "entropy: expected the response tokens' entropies, which divide a text into "
                "segments, got None; pass those of the entropy model"
            )
        return ends(entropy, threshold=threshold, exclude_last=exclude_last)

    def _kept(self, key: str) -> Any:
        return (getattr(self.config, "segment_reward", None) or {}).get(key)

    def _keep(self, **values: Any) -> None:
        kept = getattr(self.config, "segment_reward", None) or {}
        self.config.segment_reward = {**kept, **values}

    def _settle(self, granularity: str | None, entropy_threshold: float | None) -> None:
        """Joins what the caller says with what the checkpoint says."""
        for key, value in (
            ("granularity", granularity and check_granularity(granularity)),
            ("entropy_threshold", entropy_threshold),
        ):
            known = self._kept(key)
            if value is None or value == known:
                continue
            if known is not None:
                raise UserError(
                    f"{key}: expected {known}, with which {self.name_or_path} was trained, got "
                    f"{value}; its rewards have no meaning at other tokens, train another model "
                    f"with --{key} {value}"
                )
            setattr(self, key, value)
        if self._kept("granularity") == "segment":
            check_threshold(self.entropy_threshold)
        config = self.config
        mean, std = getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
        applies = granularity == "bandit" or getattr(config, "normalize_reward", False)
        fresh = "normalizer" not in (getattr(config, "segment_reward", None) or {})
        if fresh and applies and (mean, std) != (0.0, 1.0):
            self.normalizer = ScalarNormalizer(mean, std)


def _load_config(
    name_or_path: str | Path, where: dict[str, Any], trust_remote_code: bool = False
) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **where
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: expected a directory with config.json or a hub name, got {name_or_path}, "
            f"which cannot be read: {(str(error).strip().splitlines() or [''])[0]}"
        ) from error
    # What is saved again must not point at code that did not come with it.
    config.__dict__.pop("auto_map", None)
    return config


def _weight_files(name_or_path: str | Path, where: dict[str, Any]) -> dict[str, str]:
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
    return json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]


def _n_labels(name_or_path: str | Path, where: dict[str, Any]) -> int:
    """Rows of the head, read from the header of the weights: older configs do not give them."""
    from safetensors import safe_open

    name = "score.weight"
    files = _weight_files(name_or_path, where)
    if path := files.get("") or files.get(name):
        if not files.get(""):
            path = cached_file(str(name_or_path), path, **where)
        with safe_open(path, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118 (a file handle, no dict)
                return weights.get_slice(name).get_shape()[0]
    raise UserError(
        f"reward model: expected a head 'score.weight', got {name_or_path} without; for a language "
        "model, train a reward model on it with 'segrlhf reward'"
    )


def _reward_class(config: PreTrainedConfig) -> type[SegmentRewardModel]:
    config.num_labels = 1
    return _class_for(type(config))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _class_for(config_class: type[PreTrainedConfig]) -> type[SegmentRewardModel]:
    """SegmentRewardModel mixed into the family's sequence classifier, under the latter's name,
    which is what save_pretrained writes as architecture."""
    bases: tuple[type, ...]
    if config_class in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        bases = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config_class],)
        name, body = bases[0].__name__, {}
    elif config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        causal = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        family = next(c for c in causal.__mro__ if PreTrainedModel in c.__bases__)
        bases = (GenericForSequenceClassification, family)
        name = causal.__name__.replace("ForCausalLM", "ForSequenceClassification")
        body = {"base_model_prefix": family.base_model_prefix}
    else:
        raise UserError(
            f"model: expected a causal LM that transformers has a class for, got "
            f"{config_class.__name__}"
        )
    return type(name, (SegmentRewardModel, *bases), {"__module__": __name__, **body})


def _load(
    reward_class: type[SegmentRewardModel],
    name_or_path: str | Path,
    config: PreTrainedConfig,
    kwargs: dict[str, Any],
) -> tuple[SegmentRewardModel, dict[str, Any]]:
    """(model, transformers' account of missing and unexpected weights)."""
    if config.is_encoder_decoder:
        raise UserError(
            f"model: expected a decoder-only model, got the encoder-decoder {name_or_path}"
        )
    with _quiet():  # the callers judge missing weights themselves
        return super(SegmentRewardModel, reward_class).from_pretrained(  # type: ignore[misc]
            name_or_path, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )


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

    Raises UserError for a name that cannot be read and for weights that are not safetensors.
    """
    where = {"revision": config.model_revision}
    _load_config(config.model_name_or_path, where, config.trust_remote_code)
    _weight_files(config.model_name_or_path, where)
    return AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        **where,
        **kwargs,
    )


def load_tokenizer(
    source: ModelConfig | str | Path, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: of a config, or of a directory or hub name.

    A tokenizer without pad token stays as it is: ``data.pad_token_id`` pads with EOS, and the
    attention mask tells padding. Raises UserError for one that cannot be read, one without EOS,
    and a chat template file that is not there.
    """
    if not isinstance(source, ModelConfig):
        source = ModelConfig(str(source), chat_template_path=chat_template_path)
    name = source.tokenizer_name_or_path or source.model_name_or_path
    revision = "main" if source.tokenizer_name_or_path else source.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer: expected a directory or hub name with tokenizer files, got {name}, which "
            f"cannot be read: {(str(error).strip().splitlines() or [''])[0]}; pass "
            "--tokenizer_name_or_path"
        ) from error
    check_eos(tokenizer)
    if source.chat_template_path is not None:
        path = Path(source.chat_template_path)
        if not path.is_file():
            raise UserError(f"chat_template_path: expected a jinja file, got {path}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where the tokenizer has ids that a model of ``vocab_size`` tokens has not."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"tokenizer: expected token ids below {vocab_size}, the model's vocab_size, got "
            f"{highest}; pass the tokenizer that the model was trained with"
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


def positions(module: nn.Module, attention_mask: Tensor | None) -> Tensor | None:
    """Position ids ``[B, T]`` counted over tokens, or None where ``module`` takes none."""
    if attention_mask is None or not _takes(module, "position_ids"):
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _takes(module: nn.Module, argument: str) -> bool:
    # Of the class: accelerate puts a wrapper without signature in front of an instance's forward.
    return argument in inspect.signature(type(module).forward).parameters


def token_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each action token under a causal LM.

    logprobs[t] = log p(input_ids[t] | tokens before t), entropy[t] that of the same distribution,
    p = softmax(logits / temperature); both fp32 ``[B, T]``, in nats, 0 where ``action_mask`` (bool
    ``[B, T]``) is False, differentiable. Padding may be on either side. ``model`` may be wrapped by
    peft or for distributed training. Where its logits are exactly lm_head(hidden), which is tried
    out once per model, they are never formed; else (soft caps, logit scales, sharded heads) the
    same numbers come from the logits. Under autocast the head multiplies in autocast's dtype.

    Raises ValueError for an action token with no token before it: nothing predicts it (CPU tensors,
    or SEGKERNELS_DEBUG=1).
    """
    at = token_stats_at(model, input_ids, attention_mask, action_mask, [temperature])
    return at[temperature]


def token_stats_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    temperatures: Iterable[float],
) -> dict[float, tuple[Tensor, Tensor]]:
    """``token_stats`` by temperature, all from one pass through the model."""
    states, head = _before_tokens(model, input_ids, attention_mask, action_mask)
    targets, mask = input_ids[:, 1:], action_mask[:, 1:]

    def stats(temperature: float) -> tuple[Any, Tensor]:
        if head is None:
            return segkernels.logprobs_and_entropy(states, targets, temperature, mask)
        return segkernels.linear_logprobs_and_entropy(
            states, head.weight, targets, head.bias, temperature, mask
        )

    at = {}
    for temperature in temperatures:
        logprobs, entropy = (_first_is_zero(each) for each in stats(temperature))
        at[temperature] = logprobs, entropy
    return at


def policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    temperature: float = 1.0,
    clip: float = 0.2,
    aggregation: Aggregation = "token-mean",
) -> segkernels.PolicyLoss:
    """``segkernels.linear_policy_loss`` of a causal LM's action tokens.

    ``old_logprobs`` (nats) and ``advantages`` are constants ``[B, T]``; their values outside
    ``action_mask`` are not read. Everything per token is aligned with ``input_ids``; the model, its
    padding, autocast and errors as in ``token_stats``, with the same choice of head or logits.
    """
    states, head = _before_tokens(model, input_ids, attention_mask, action_mask)
    targets, mask, old, advantages = (
        x[:, 1:] for x in (input_ids, action_mask, old_logprobs, advantages)
    )
    if head is None:
        logprobs, entropy = segkernels.logprobs_and_entropy(states, targets, temperature, mask)
        loss = segkernels.policy_loss(
            logprobs, old, advantages, mask, clip=clip, aggregation=aggregation
        )
        logprobs, entropy = logprobs.detach(), entropy.detach()
        out = segkernels.PolicyLoss(
            loss, logprobs, entropy, *_policy_diagnostics(logprobs, old, advantages, mask, clip)
        )
    else:
        out = segkernels.linear_policy_loss(
            states,
            head.weight,
            targets,
            old,
            advantages,
            mask,
            bias=head.bias,
            temperature=temperature,
            clip=clip,
            aggregation=aggregation,
        )
    return out._replace(logprobs=_first_is_zero(out.logprobs), entropy=_first_is_zero(out.entropy))


def _policy_diagnostics(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """(clip_fraction, approx_kl): means over the mask, without waiting for a GPU."""
    n = mask.sum().clamp(min=1)
    held = objective.clipped(logprobs, old_logprobs, advantages, clip) & mask
    half_squares = objective.squared_log_ratio(logprobs, old_logprobs)
    return held.sum() / n, half_squares.where(mask, 0.0).sum() / n


def _first_is_zero(stats: Tensor) -> Tensor:
    """``[B, T]`` of ``[B, T - 1]``: no distribution stands before the first token."""
    return nn.functional.pad(stats, (1, 0))


class _Head(NamedTuple):
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def _before_tokens(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, action_mask: Tensor
) -> tuple[Tensor, _Head | None]:
    """What predicts tokens 1 to T - 1: (hidden states ``[B, T - 1, D]``, the head that reads them),
    or (logits ``[B, T - 1, V]``, None)."""
    if values_may_be_checked(action_mask):
        first = attention_mask.long().cumsum(-1) == 1
        alone = (action_mask & first).nonzero()
        if alone.numel():
            raise ValueError(
                f"action_mask: expected a token before every action token, got none before token "
                f"{int(alone[0, 1])} of row {int(alone[0, 0])}; put a prompt or a BOS token in "
                "front"
            )
    causal = _unwrapped(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if (position_ids := positions(causal, attention_mask)) is not None:
        inputs["position_ids"] = position_ids
    if not _is_plain(model, causal):
        return model(**inputs).logits[:, :-1], None
    with _last_hidden(causal) as hidden:
        model(**inputs, logits_to_keep=1)
    head = causal.get_output_embeddings()
    device = head.weight.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden[0][:, :-1].to(dtype), _Head(head.weight.to(dtype), bias)


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def _last_hidden(causal: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the backbone returns while the block runs."""
    out: list[Tensor] = []
    hook = causal.base_model.register_forward_hook(lambda *call: out.append(call[-1][0]))
    try:
        yield out
    finally:
        hook.remove()


_PLAIN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_plain(model: nn.Module, causal: PreTrainedModel) -> bool:
    """Whether logits are exactly lm_head(hidden), and hidden and weight can be had from outside."""
    from accelerate.utils import is_compiled_module
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    head = causal.get_output_embeddings()
    within_reach = (
        type(head) is nn.Linear
        and not isinstance(model, FullyShardedDataParallel)
        and not isinstance(head.weight, DTensor)
        and not hasattr(head.weight, "ds_id")  # DeepSpeed's mark of a partitioned weight
        and not is_compiled_module(model)  # a compiled module does not see new hooks
        and _takes(causal, "logits_to_keep")
    )
    if within_reach and causal not in _PLAIN:
        _PLAIN[causal] = _head_is_plain(causal)
    return within_reach and _PLAIN[causal]


@torch.no_grad()
def _head_is_plain(causal: PreTrainedModel) -> bool:
    """Runs two tokens and looks at both sides of the head: it must get the backbone's output
    unchanged, and known numbers put in place of its own must come out as the logits."""
    head = causal.get_output_embeddings()
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        known = torch.linspace(-300, 300, output.shape[-1], device=output.device)
        known = known.to(output.dtype).expand_as(output).contiguous()
        seen.append((inputs[0], known))
        return known

    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    hook = head.register_forward_hook(replace)
    devices = [head.weight.device] if head.weight.device.type == "cuda" else []
    try:
        # Dropout must not draw from the stream that a resumed run would find elsewhere.
        with torch.random.fork_rng(devices), _last_hidden(causal) as hidden:
            logits = causal(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1 or len(hidden) != 1:
        return False
    read, known = seen[0]
    return torch.equal(read, hidden[0]) and torch.equal(logits.float(), known.float())
