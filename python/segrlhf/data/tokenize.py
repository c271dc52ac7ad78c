"""Rows as token ids: preference pairs for reward models, prompts for PPO."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..runtime.distributed import processes, say
from . import render
from .load import load_split
from .render import Renderer, Text, checked_row, split_pair

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..configs import DataConfig


PIECE = 20_000  # rows that are tokenized and kept at a time


@dataclass
class DataReport:
    """What became of the rows. All were dropped but ``truncated`` (kept, a response cut) and
    ``prompt_truncated`` (kept, the prompt cut)."""

    n_rows: int = 0
    n_kept: int = 0
    prompt_too_long: int = 0
    no_prompt: int = 0
    equal: int = 0
    empty: int = 0
    malformed: int = 0
    truncated: int = 0
    prompt_truncated: int = 0
    max_length: int | None = None
    max_prompt_length: int | None = None

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{self.n_rows:,} rows: {self.n_kept:,} kept"]
        reasons = {
            f"with a prompt over {self.max_prompt_length} tokens": self.prompt_too_long,
            "without a prompt token": self.no_prompt,
            "with chosen equal to rejected": self.equal,
            "with an empty text": self.empty,
            "whose answer is not one assistant message": self.malformed,
        }
        parts += [f"{count:,} dropped {why}" for why, count in reasons.items() if count]
        if self.truncated:
            parts.append(f"{self.truncated:,} kept with a response cut at {self.max_length} tokens")
        if self.prompt_truncated:
            parts.append(
                f"{self.prompt_truncated:,} kept with the last {self.max_prompt_length} tokens of "
                "the prompt"
            )
        return "; ".join(parts)


class Cut(NamedTuple):
    """A prompt and its responses, as long as they may be."""

    prompt: list[int]
    responses: list[list[int]]
    terminated: list[bool]  # by response: ends with its end token
    prompt_truncated: bool
    truncated: bool  # at least one of the responses


def cut_to_length(
    prompt_ids: list[int],
    responses: Sequence[list[int]],
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_side: str = "none",
    force_eos: bool = False,
) -> Cut | None:
    """One row as ``tokenize_pairs`` describes it; None where the prompt is too long."""
    kept = prompt_ids
    if truncation_side == "left":
        if len(prompt_ids) + max(map(len, responses)) > max_length:
            kept = prompt_ids[-max_prompt_length:]
    elif len(prompt_ids) > max_prompt_length:
        return None
    room = max_length - len(kept)
    if room <= 0:
        return None
    whole = [len(ids) <= room for ids in responses]
    cut = [
        [*ids[: room - 1], ids[-1]] if force_eos and not fits else ids[:room]
        for ids, fits in zip(responses, whole, strict=True)
    ]
    terminated = [force_eos or fits for fits in whole]
    return Cut(kept, cut, terminated, len(kept) < len(prompt_ids), not all(whole))


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_side: str = "none",
    force_eos: bool = False,
    strip_system_header: bool = False,
) -> tuple[Dataset, DataReport]:
    """Preference rows as token ids.

    Returns the kept rows in their order, with columns ``prompt_ids``, ``chosen_ids``,
    ``rejected_ids`` (lists of int32), ``chosen_terminated`` and ``rejected_terminated`` (bool: the
    response ends with its end token, see ``Renderer``), ``margin`` (float, where the rows have one;
    an absent value is 0), and a report. Prompt and response together take at most ``max_length``
    tokens: a longer response is cut, loses its end token, and is not terminated. Dropped and
    counted: a prompt over ``max_prompt_length`` tokens, a prompt that has no token (the first
    response token would have no distribution), equal responses (as text, or after the cut), an
    empty response, and an answer that is not a single assistant message.

    Three options give what the published reward models read. ``truncation_side="left"``: no row is
    dropped for its prompt; where prompt and the longer response take more than ``max_length``
    tokens, the prompt keeps its last ``max_prompt_length`` ones. ``force_eos``: a response that is
    cut gets its end token as the last one, and is terminated. ``strip_system_header``: see
    ``Renderer``.

    Raises UserError for missing columns (naming those there are), for columns of another type, for
    a margin that is not a finite number, and when no row is left.
    """
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        hint = (
            "these are prompts, which 'segrlhf ppo' takes"
            if "prompt" in dataset.column_names
            else "rename the columns"
        )
        raise UserError(
            "dataset: expected the columns chosen and rejected (and prompt, unless both begin with "
            f"it), got {', '.join(dataset.column_names)}; {hint}"
        )
    _check_limits(max_length=max_length, max_prompt_length=max_prompt_length)
    renderer = Renderer(tokenizer, strip_system_header)
    lengths: dict[str, Any] = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncation_side": truncation_side,
        "force_eos": force_eos,
    }
    counted = ["prompt_truncated", "truncated"]  # in the report, not in the dataset
    has_margin = "margin" in dataset.column_names
    empty: dict[str, Any] = {f"{part}_ids": [] for part in ("prompt", "chosen", "rejected")}
    empty |= {f"{side}_terminated": False for side in ("chosen", "rejected")}
    empty |= dict.fromkeys(counted, False)

    def tokenize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        out = [{"fate": _fate_of_texts(*split_pair(row)), **empty} for row in rows]
        if has_margin:
            out = [{**new, "margin": row["margin"]} for new, row in zip(out, rows, strict=True)]
        usable = [i for i, new in enumerate(out) if new["fate"] == "kept"]
        texts = [split_pair(rows[i]) for i in usable]
        encoded = renderer.pairs([(prompt, responses) for prompt, *responses in texts])
        for i, (prompt_ids, pair) in zip(usable, encoded, strict=True):
            cut = cut_to_length(prompt_ids, pair, **lengths)
            if not prompt_ids:
                out[i]["fate"] = "no_prompt"
            elif cut is None:
                out[i]["fate"] = "prompt_too_long"
            elif cut.responses[0] == cut.responses[1]:
                out[i]["fate"] = "equal"
            else:
                out[i] |= {
                    "prompt_ids": cut.prompt,
                    "chosen_ids": cut.responses[0],
                    "rejected_ids": cut.responses[1],
                    "chosen_terminated": cut.terminated[0],
                    "rejected_terminated": cut.terminated[1],
                    "prompt_truncated": cut.prompt_truncated,
                    "truncated": cut.truncated,
                }
        return out

    from datasets import Value

    columns: dict[str, Any] = _ids_features("prompt_ids", "chosen_ids", "rejected_ids")
    columns |= {f"{side}_terminated": Value("bool") for side in ("chosen", "rejected")}
    columns |= {name: Value("bool") for name in counted}
    if has_margin:
        columns["margin"] = Value("float64")
    options = (*lengths.values(), strip_system_header)
    kept, fates = _map(dataset, tokenize, columns, tokenizer, options)
    report = _report(fates, max_length=max_length, max_prompt_length=max_prompt_length)
    for name in counted:
        setattr(report, name, sum(kept[name][:]))
    return kept.remove_columns(counted), report


def tokenize_splits(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> dict[str, Dataset]:
    """``tokenize_pairs`` of the rows to train on, "train", and of those held out, "eval", where
    there are any; says what became of them."""
    pairs = {}
    for split in ("train", "eval"):
        rows = load_split(data, split)
        if rows is not None:
            pairs[split], report = tokenize_pairs(rows, tokenizer, **options)
            say(f"{split}: {report.summary()}")
    return pairs


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    truncation_side: str = "none",
) -> tuple[Dataset, DataReport]:
    """Prompts as token ids, from prompt rows or from the prompts of preference rows.

    Returns the kept rows in their order, with columns ``prompt_ids`` (list of int32), ``prompt``
    (the text as rendered) and ``conversational`` (bool), and a report. Dropped and counted: a
    prompt over ``max_prompt_length`` tokens (with ``truncation_side="left"`` its last ones are kept
    instead), an empty prompt. Raises UserError for missing columns,
    columns of another type, and when no row is left.
    """
    pairs = {"chosen", "rejected"} <= set(dataset.column_names)
    if "prompt" not in dataset.column_names and not pairs:
        raise UserError(
            f"dataset: expected a column prompt, got {', '.join(dataset.column_names)}; "
            "rename the column that holds the prompts"
        )
    _check_limits(max_prompt_length=max_prompt_length)
    renderer = Renderer(tokenizer)

    def tokenize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts = [(split_pair(row)[0] if pairs else row["prompt"]) or "" for row in rows]
        out = []
        for prompt, ids in zip(prompts, renderer.prompt_ids(prompts), strict=True):
            fate = "kept"
            if not prompt:
                fate = "empty"
            elif not ids:
                fate = "no_prompt"
            elif len(ids) > max_prompt_length and truncation_side == "none":
                fate = "prompt_too_long"
            out.append(
                {
                    "fate": fate,
                    "prompt_ids": ids[-max_prompt_length:],
                    "prompt_truncated": len(ids) > max_prompt_length,
                    "prompt": renderer.prompt_text(prompt),
                    "conversational": isinstance(prompt, list),
                }
            )
        return out

    from datasets import Value

    columns = _ids_features("prompt_ids")
    columns |= {"prompt": Value("string"), "conversational": Value("bool")}
    columns["prompt_truncated"] = Value("bool")
    options = (max_prompt_length, truncation_side)
    kept, fates = _map(dataset, tokenize, columns, tokenizer, options)
    report = _report(fates, max_prompt_length=max_prompt_length)
    report.prompt_truncated = sum(kept["prompt_truncated"][:])
    return kept.remove_columns("prompt_truncated"), report


def _ids_features(*names: str) -> dict[str, Any]:
    from datasets import List, Value

    return {name: List(Value("int32")) for name in names}


def _check_limits(**limits: int) -> None:
    for name, value in limits.items():
        if value < 1:
            raise UserError(f"{name}: expected at least 1 token, got {value}")


def _fate_of_texts(prompt: Text, chosen: Text, rejected: Text) -> str:
    if not chosen or not rejected:
        return "empty"
    if isinstance(prompt, list):
        if not prompt:
            return "no_prompt"
        answers = []
        for response in (chosen, rejected):
            if isinstance(response, str) or [m["role"] for m in response] != ["assistant"]:
                return "malformed"
            answers.append(response[0]["content"] or "")
        chosen, rejected = answers
    elif isinstance(chosen, list) or isinstance(rejected, list):
        return "malformed"
    if not str(chosen).strip() or not str(rejected).strip():
        return "empty"
    return "equal" if chosen == rejected else "kept"


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything of a tokenizer that decides about ids: two that agree share it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        # A call with padding or truncation leaves its setting behind; it does not change ids here.
        parts["padding"] = parts["truncation"] = None
    else:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([parts, tokenizer.chat_template, special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _map(
    dataset: Dataset,
    function: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    columns: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: tuple[Any, ...],
) -> tuple[Dataset, Counter[str]]:
    """(rows whose fate is "kept", without that column; how many met each fate).

    Rows go through in pieces, which the processes of a launch divide among themselves and which
    `datasets` keeps on disk: nobody waits for one process that does everything, and a run that was
    cut off goes on with the next piece. Rows that are in memory alone are read by every process.
    """
    from datasets import Features, Value, concatenate_datasets

    def on_columns(
        batch: dict[str, list[Any]], indices: list[int], start: int
    ) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        out = function([checked_row(row, start + i) for row, i in zip(rows, indices, strict=True)])
        return {name: [new[name] for new in out] for name in out[0]}

    # `datasets` would hash the pickled closure, which a fast tokenizer changes by being used. The
    # two files that decide about ids stand in the key, so that another version of them never
    # reads an older result.
    source = Path(render.__file__).read_bytes() + Path(__file__).read_bytes()
    key = f"{dataset._fingerprint} {tokenizer_key(tokenizer)} {options} {sorted(columns)}"

    def piece(start: int) -> Dataset:
        place = f" {start} {PIECE}" if len(dataset) > PIECE else ""
        return dataset.select(range(start, min(start + PIECE, len(dataset)))).map(
            on_columns,
            with_indices=True,
            fn_kwargs={"start": start},
            batched=True,
            batch_size=256,
            remove_columns=dataset.column_names,
            features=Features({"fate": Value("string"), **columns}),
            new_fingerprint=hashlib.sha256((key + place).encode() + source).hexdigest()[:32],
            desc="tokenizing",
        )

    state = processes()
    starts = range(0, len(dataset), PIECE)
    if state.num_processes > 1 and dataset.cache_files:
        for start in starts[state.process_index :: state.num_processes]:
            piece(start)
        state.wait_for_everyone()
    mapped = concatenate_datasets([piece(start) for start in starts])
    fates = mapped["fate"][:]
    kept = [i for i, fate in enumerate(fates) if fate == "kept"]
    return mapped.select(kept).remove_columns("fate"), Counter(fates)


def _report(fates: Counter[str], **limits: int) -> DataReport:
    report = DataReport(n_rows=fates.total(), n_kept=fates.pop("kept", 0), **fates, **limits)
    if report.n_kept == 0:
        raise UserError(f"dataset: expected at least one usable row, got {report.summary()}")
    return report
