"""Scores responses with a reward model, segment by segment: ``segrlhf score``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from segkernels import segment_positions, segment_scores

from .configs import THRESHOLD, DataConfig, ModelConfig, PairConfig, Range, check_flags, flag
from .data.batch import SIDES, Example, Ids, Sizes, responses_of
from .data.load import load_rows
from .data.render import Renderer, checked_row, split_pair
from .data.tokenize import cut_to_length
from .entropy_cache import entropies, load_entropy_model
from .errors import NonFiniteError, UserError
from .models.loading import check_positions, check_vocabulary, load_tokenizer
from .models.packing import PackingConfig, make_reader
from .models.reward_model import SegmentRewardModel, response_rewards
from .page import responses_html
from .reward.run import trained_with
from .runtime import files
from .runtime.distributed import processes, say

_TRAINED = ("reward_model",)  # what was so in its training


@dataclass
class RewardModelConfig(PackingConfig):
    """What ``fit-normalizer`` and ``score`` say about the reward model and its entropies."""

    reward_model: str = flag(
        ..., "Reward model: a directory, or a hub name.", depends_on=("granularity",)
    )
    granularity: Literal["segment", "token", "bandit"] | None = flag(
        None, "Only for a checkpoint that does not say."
    )
    entropy_threshold: float | None = flag(
        None,
        "Nats; only for a checkpoint that does not say.",
        depends_on=("reward_model", "granularity"),
        limits=THRESHOLD,
    )
    entropy_model: str | None = flag(
        None, "Frozen LM; default: the one of the reward model's config.", depends_on=_TRAINED
    )
    tokenizer_name_or_path: str | None = flag(
        None, "Tokenizer, when none is beside the reward model.", depends_on=_TRAINED
    )
    chat_template_path: str | None = flag(
        None, "A jinja file, for a tokenizer without chat template.", depends_on=_TRAINED
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Weights of the reward model."
    )
    max_length: int | None = flag(
        None,
        "Tokens of prompt and response; default: as in training.",
        depends_on=_TRAINED,
        limits=Range(min=1),
    )
    max_prompt_length: int | None = flag(
        None,
        "Tokens of the prompt; default: as in training.",
        depends_on=_TRAINED,
        limits=Range(min=1),
    )
    truncation_side: Literal["none", "left"] | None = flag(
        None,
        "none: rows with a longer prompt are left out. left: see 'segrlhf reward --help'. Default: "
        "as in training.",
        depends_on=_TRAINED,
    )
    force_eos: bool | None = flag(
        None,
        "A response that is cut gets the end token as its last; default: as in training.",
        depends_on=_TRAINED,
        nargs="?",
        const=True,
    )
    strip_system_header: bool | None = flag(
        None,
        "Of conversations: leave out what the chat template writes before the first message; "
        "default: as in training.",
        depends_on=_TRAINED,
        nargs="?",
        const=True,
    )

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass
class ScoreConfig(RewardModelConfig):
    """Arguments of ``segrlhf score``."""

    output: str = flag(
        "scores.jsonl",
        "A .jsonl file, or .html for responses coloured by segment reward.",
        writes="file",
    )


@dataclass(frozen=True)
class Scored:
    """The segments of one response."""

    ends: np.ndarray  # [K] int, response token at which each ends
    rewards: np.ndarray  # [K] fp32
    positions: np.ndarray  # [K] fp64, (k + 1) / K


@dataclass
class Response:
    """A response to score. ``entropy`` fp32 [tokens] is read for segments only."""

    name: str  # for messages
    prompt_ids: list[int]
    ids: list[int]
    terminated: bool
    entropy: np.ndarray | None = None


def load_reward_model(config: RewardModelConfig) -> SegmentRewardModel:
    """The frozen reward model on this process's device; UserError for a granularity that is not
    its own."""
    model = SegmentRewardModel.from_pretrained(
        config.reward_model, config.granularity, config.entropy_threshold, dtype=config.dtype
    )
    model.granularity  # noqa: B018 - raises where nobody says
    return model.to(processes().device).eval().requires_grad_(False)


def entropy_model_name(model: SegmentRewardModel, config: RewardModelConfig) -> str:
    """Name of the LM that divides text for a segment model; UserError where none is known."""
    name = config.entropy_model or model.entropy_model
    if name is None:
        raise UserError(
            f"entropy_model: expected the frozen LM whose entropies divide text into segments, got "
            f"none in the config of {config.reward_model}; pass --entropy_model"
        )
    return name


def reward_tokenizer(config: RewardModelConfig, model: SegmentRewardModel) -> Any:
    """The tokenizer that stands beside the reward model, or the one that is named; UserError where
    it has ids that the model has not."""
    tokenizer = load_tokenizer(
        ModelConfig(
            config.reward_model,
            tokenizer_name_or_path=config.tokenizer_name_or_path,
            chat_template_path=config.chat_template_path,
        )
    )
    check_vocabulary(model.config, tokenizer)
    return tokenizer


def tokenization(config: RewardModelConfig) -> dict[str, Any]:
    """Arguments of ``tokenize_pairs``: as given, else as in the reward model's training."""
    known = trained_with(config.reward_model)
    given = {name: getattr(config, name) for name in PairConfig().tokenization}
    return {name: known[name] if value is None else value for name, value in given.items()}


@torch.inference_mode()
def score_responses(
    model: SegmentRewardModel,
    responses: Sequence[Response],
    options: PackingConfig | None = None,
) -> list[Scored]:
    """The segments of each response, in order.

    Responses that follow each other and have the same prompt are read together, as ``options`` say.
    Under torchrun or accelerate the processes share the work and each returns everything. Raises
    NonFiniteError naming the first response with a NaN or infinite segment reward.
    """
    if not responses:
        return []
    state = processes()
    examples, numbers = _examples(responses)
    sizes = Sizes.of(examples)
    widths = sizes.widths("none")
    longest = int(widths.argmax())
    check_positions(model, int(widths[longest]), responses[numbers[longest][0]].name)
    reader = make_reader(
        model, options or PackingConfig(), response_rewards, sizes, examples.__getitem__
    )
    plan = reader.plan(sizes)[state.process_index :: state.num_processes]
    found: list[tuple[int, Scored]] = []
    for of_batch in tqdm(plan, desc="rewards", disable=not state.is_main_process):
        read = [examples[index] for index in of_batch]
        order = [numbers[of_batch[index]][place] for index, place in responses_of(read)]
        rows = [responses[number] for number in order]
        batch = reader.batch(read, model.device)
        rewards = response_rewards(model, batch, reader.packing)
        entropy = None
        if rows[0].entropy is not None:
            values = np.concatenate([row.entropy for row in rows])  # type: ignore[misc]
            entropy = torch.from_numpy(values).to(rewards.device)
        terminated = torch.tensor([row.terminated for row in rows], device=rewards.device)
        ends = model.segment_ends(entropy, batch.mask, terminated, batch.cu_seqlens)
        # Positions of segments, one after the other; those of a response follow each other.
        positions = segment_positions(ends, batch.mask, cu_seqlens=batch.cu_seqlens).cpu().numpy()
        at_ends, at = rewards[ends].cpu(), ends.nonzero().squeeze(1).cpu().numpy()
        first = batch.cu_seqlens.cpu().numpy()
        of_row = np.searchsorted(at, first)
        for k, (number, row) in enumerate(zip(order, rows, strict=True)):
            part = slice(of_row[k], of_row[k + 1])
            bad = (~at_ends[part].isfinite()).nonzero()
            if bad.numel():
                raise NonFiniteError(
                    f"reward: expected finite numbers, got {float(at_ends[part][bad[0, 0]])} at "
                    f"segment {int(bad[0, 0])} of {row.name}; the reward model's weights or that "
                    "row are at fault"
                )
            tokens, of_segments = at[part] - first[k], at_ends[part].numpy()
            found.append((number, Scored(tokens, of_segments, positions[part])))
    return [scored for _, scored in sorted(gather_object(found), key=lambda item: item[0])]


def _examples(responses: Sequence[Response]) -> tuple[list[Example], list[list[int]]]:
    """Responses that follow each other and have one prompt as one example; their numbers."""
    examples: list[Example] = []
    numbers: list[list[int]] = []
    for number, response in enumerate(responses):
        if examples and len(numbers[-1]) < 2 and _same(examples[-1].prompt, response.prompt_ids):
            examples[-1] = Example(response.prompt_ids, [*examples[-1].responses, response.ids])
            numbers[-1].append(number)
        else:
            examples.append(Example(response.prompt_ids, [response.ids]))
            numbers.append([number])
    return examples, numbers


def _same(a: Ids, b: Ids) -> bool:
    return len(a) == len(b) and np.array_equal(a, b)


@dataclass
class _Rows:
    """Responses read from a dataset, and what belongs to each."""

    responses: list[Response]
    notes: list[dict[str, Any]]  # id, prompt, label
    skipped: int


def _read(rows: Any, name: str, tokenizer: Any, options: dict[str, Any]) -> _Rows:
    columns = set(rows.column_names)
    pairs = {"chosen", "rejected"} <= columns
    if not pairs and not {"prompt", "response"} <= columns:
        raise UserError(
            "dataset: expected the columns prompt and response, or chosen and rejected, got "
            f"{', '.join(rows.column_names)} in {name}; rename the columns"
        )
    lengths = dict(options)
    renderer = Renderer(tokenizer, lengths.pop("strip_system_header"))
    out = _Rows([], [], 0)
    for number, row in enumerate(rows):
        row = checked_row(row, number)
        if pairs:
            prompt, *texts = split_pair(row)
        else:
            prompt, texts = row["prompt"], [row["response"]]
        if prompt is None or not all(texts):
            out.skipped += 1
            continue
        prompt_ids, ids = renderer.pair(prompt, texts)
        cut = cut_to_length(prompt_ids, ids, **lengths)
        if not prompt_ids or cut is None:
            out.skipped += 1
            continue
        labels = SIDES if pairs else (None,)
        for label, kept, terminated in zip(labels, cut.responses, cut.terminated, strict=True):
            name = f"row {number}" + (f" ({label})" if label else "")
            out.responses.append(Response(name, cut.prompt, kept, terminated))
            out.notes.append(
                {
                    "id": _json_id(row.get("id", number), number),
                    "prompt": renderer.prompt_text(prompt),
                    "label": label,
                }
            )
    if not out.responses:
        raise UserError(
            f"dataset: expected at least one usable row, got {out.skipped} with an empty response "
            f"or a prompt that is empty or over {options['max_prompt_length']} tokens"
        )
    return out


def _json_id(value: Any, row: int) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"id: expected a text or a finite number, which json can write, got {value!r} in row "
            f"{row}; convert the column id, or drop it"
        ) from error
    return value


def pieces(tokenizer: Any, ids: list[int], ends: np.ndarray) -> tuple[str, list[tuple[int, int]]]:
    """(text of a response, characters start..stop of each segment), for ``Scored.ends``."""

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    # Prefixes, because a tokenizer may write a piece differently on its own; one that stops inside
    # a character shows a mark that the next piece completes.
    stops = [len(text(ids[: end + 1]).rstrip("\ufffd")) for end in ends.tolist()]
    return text(ids), list(zip([0, *stops], stops, strict=False))


def run(data: DataConfig, config: ScoreConfig) -> dict[str, Any]:
    """``segrlhf score``: one line of json per response, or one html page.

    Rows are preference rows, or have ``prompt`` and ``response``. A line has id, prompt, response,
    label (chosen, rejected or null), score (mean or sum of the segment rewards, as in training) and
    segments, each with text, start and end (characters of the response), reward, and normalized
    (null without a fitted normaliser). Returns ``{"output", "responses", "skipped"}`` and, for
    preference rows, ``accuracy`` and ``longer_wins`` (of "the longer response wins", ties half).

    Raises UserError for a granularity that is not the model's, other columns, no usable row, and an
    output that exists; NonFiniteError naming the row of a non-finite reward.
    """
    output = Path(config.output)
    if output.suffix not in (".jsonl", ".html"):
        raise UserError(f"output: expected a name ending in .jsonl or .html, got {output}")
    if output.exists():
        raise UserError(f"output: expected a new file, got {output}, which exists; choose another")
    model = load_reward_model(config)
    tokenizer = reward_tokenizer(config, model)
    split = load_rows(data.dataset_name, data.dataset_train_split, data.dataset_config)
    if data.max_samples is not None:
        split = split.select(range(min(data.max_samples, len(split))))
    rows = _read(split, data.dataset_name, tokenizer, tokenization(config))
    if model.granularity == "segment":
        name = entropy_model_name(model, config)
        add_entropies(rows.responses, name, tokenizer, config)
    scored = score_responses(model, rows.responses, config)

    normalizer = model.normalizer
    reduction = trained_with(config.reward_model)["score_reduction"]
    lines = []
    for response, note, one in zip(rows.responses, rows.notes, scored, strict=True):
        text, spans = pieces(tokenizer, response.ids, one.ends)
        rewards = torch.from_numpy(one.rewards)
        positions = torch.from_numpy(one.positions).float()
        normal = normalizer(rewards, positions).tolist() if normalizer else [None] * len(rewards)
        score = segment_scores(
            rewards[None], torch.ones(1, len(rewards), dtype=torch.bool), reduction=reduction
        )
        lines.append(
            {
                **note,
                "response": text,
                "score": float(score),
                "segments": [
                    {
                        "text": text[start:end],
                        "start": start,
                        "end": end,
                        "reward": reward,
                        "normalized": normalized,
                    }
                    for (start, end), reward, normalized in zip(
                        spans, one.rewards.tolist(), normal, strict=True
                    )
                ],
            }
        )
    if processes().is_main_process:
        if output.suffix == ".html":
            page = [
                {
                    "prompt": line["prompt"],
                    "segments": [(s["text"], s["reward"]) for s in line["segments"]],
                    "score": line["score"],
                    "label": line["label"],
                }
                for line in lines
            ]
            files.write_text(output, responses_html(page, f"Scores of {data.dataset_name}"))
        else:
            files.write_text(output, "".join(f"{json.dumps(line)}\n" for line in lines))
    result: dict[str, Any] = {
        "output": str(output),
        "responses": len(lines),
        "skipped": rows.skipped,
    }
    if lines[0]["label"] is not None:
        result |= _pair_accuracy(
            np.array([line["score"] for line in lines]),
            np.array([len(response.ids) for response in rows.responses]),
        )
        say(
            f"accuracy {result['accuracy']:.3f} on {len(lines) // 2} pairs; 'the longer response "
            f"wins' is right for {result['longer_wins']:.3f} of them"
        )
    say(
        f"{len(lines)} responses scored, {rows.skipped} rows skipped (empty response, or a prompt "
        f"that is empty or too long): {output}"
    )
    return result


def add_entropies(
    responses: list[Response], name: str, tokenizer: Any, options: PackingConfig | None = None
) -> None:
    """Fills ``entropy`` of every response, by the LM ``name``; the processes share the work."""
    model = load_entropy_model(name)
    check_vocabulary(model.config, tokenizer)
    examples, numbers = _examples(responses)
    computed = entropies(
        model,
        Sizes.of(examples),
        examples.__getitem__,
        lambda index, place: responses[numbers[index][place]].name,
        options,
    )
    found = [(numbers[index][place], entropy) for index, place, entropy in computed]
    for number, entropy in gather_object(found):
        responses[number].entropy = entropy


def _pair_accuracy(scores: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Over responses chosen_0, rejected_0, chosen_1, ...; a tie of scores is wrong, of lengths half
    right."""
    chosen, rejected = lengths[::2], lengths[1::2]
    return {
        "accuracy": float((scores[::2] > scores[1::2]).mean()),
        "longer_wins": float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean()),
    }
