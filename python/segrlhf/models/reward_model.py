"""Reward models with one reward per token."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import cached_file

import segkernels
from segkernels import ScalarNormalizer, normalizer_from_dict

from ..data.batch import Batch, Packing
from ..errors import UserError, reading
from .lm_head import positions
from .loading import AGAIN, check_vocabulary, load_config, load_whole, weight_files
from .packing import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        without a head, for weights that are missing or of more layers, and for a granularity or
        threshold that is not the checkpoint's own.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        config = kwargs.pop("config", None) or load_config(name_or_path, where)
        labels = _n_labels(name_or_path, where)
        if labels != 1:
            raise UserError(
                f"reward model: expected one label, got {labels} in {name_or_path}; a classifier "
                "is not a reward model, train one with 'segrlhf reward'"
            )
        model = _load("reward model", name_or_path, config, kwargs)
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

        The head is drawn normal with standard deviation 1 / (hidden size + 1) and ``seed``, as in
        the paper's published code; the backbone is copied exactly. ``entropy_threshold`` (nats) is
        required for segments. With ``tokenizer`` its size is checked and its pad token is written
        into the config, where plain sequence-classification code looks for it; a pad token that is
        also EOS is left out there, because that code would take the EOS of a response for padding.
        Raises UserError as ``from_pretrained`` does, and for what has a head of rewards already.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        config = load_config(name_or_path, where, kwargs.get("trust_remote_code", False))
        weight_files(name_or_path, where)
        check_granularity(granularity)
        if granularity == "segment":
            check_threshold(entropy_threshold)
        text = config.get_text_config()
        if tokenizer is not None:
            check_vocabulary(config, tokenizer)
            text.pad_token_id = tokenizer.pad_token_id
        ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        if text.pad_token_id in ends:
            text.pad_token_id = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _load("model", name_or_path, config, kwargs, frozenset({"score.weight"}))
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
            initialization.normal_(module.weight, std=1.0 / (hidden + 1))
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
        self,
        entropy: Tensor | None,
        mask: Tensor,
        terminated: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Ends of the segments whose rewards this model gives, bool ``[B, T]``; ``[N]`` of a flat
        stream of responses with ``cu_seqlens`` int32 ``[B + 1]``.

        ``entropy`` (nats, of the distribution which produced each token) is read for segments only.
        ``mask`` bool marks the response. The last token of a row is EOS
        and lies in no segment where ``terminated`` (bool ``[B]``, None: everywhere) says so; a
        bandit's one segment ends there in any case. Raises UserError for an unknown granularity or
        threshold, and for segments without ``entropy``.
        """
        ends = functools.partial(
            segkernels.segment_ends, mask=mask, cu_seqlens=cu_seqlens, entropy_of="current"
        )
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


def response_rewards(model: nn.Module, batch: Batch, packing: Packing) -> Tensor:
    """Rewards after each response token of a packed batch, fp32 ``[N]`` in the order of
    ``batch.tokens``; ``model``, a ``SegmentRewardModel``, may be wrapped by peft or for distributed
    training."""
    rewards = model(**model_inputs(model, batch, packing))
    return rewards.flatten().index_select(0, batch.tokens)


def _n_labels(name_or_path: str | Path, where: dict[str, Any]) -> int:
    """Rows of the head, read from the header of the weights: older configs do not give them."""
    from safetensors import safe_open

    name = "score.weight"
    files = weight_files(name_or_path, where)
    if path := files.get("") or files.get(name):
        if not files.get(""):
            path = cached_file(str(name_or_path), path, **where)
        with (
            reading("reward model", "whole safetensors weights", path, "copy the file again"),
            safe_open(path, framework="pt") as weights,
        ):
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
    what: str,
    name_or_path: str | Path,
    config: PreTrainedConfig,
    kwargs: dict[str, Any],
    new: frozenset[str] = frozenset(),
) -> SegmentRewardModel:
    if config.is_encoder_decoder:
        raise UserError(
            f"model: expected a decoder-only model, got the encoder-decoder {name_or_path}"
        )
    load = super(SegmentRewardModel, _reward_class(config)).from_pretrained  # type: ignore[misc]
    with reading("model", "the whole weights of a decoder", name_or_path, AGAIN):
        return load_whole(
            load, name_or_path, what, new=new, backbone_only=True, config=config, **kwargs
        )
