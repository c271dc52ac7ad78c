"""Rows from files or the hub, as token ids: preference pairs for reward models, prompts for PPO.

Rows are TRL's: a *preference* row has ``chosen`` and ``rejected``, with ``prompt`` or with the
prompt implicit in their common beginning; a *prompt* row has ``prompt``. Each is a string, or a
list of messages ``{"role": ..., "content": ...}``, which the tokenizer's chat template renders.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .configs import DataConfig
from .errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Suffix of a file, the last ".gz" apart -> builder of `datasets`.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

Message = dict[str, Any]
Text = str | list[Message]


def load_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """All rows of one split.

    ``name`` is a json, jsonl, parquet or csv file (also .gz), a directory of those (split by file
    name: train, test, ...), a directory written by ``save_to_disk``, or a hub name with its
    ``config``. A single file is the split "train". Raises UserError for what cannot be read, a
    split that is not there (naming those that are) and for no rows.
    """
    splits = _open(name, config)
    if split not in splits:
        raise UserError(
            f"split: expected one of {', '.join(splits)} of {name}, got {split!r}; "
            "pass --dataset_train_split or --dataset_test_split"
        )
    return _rows_of(splits, split, name)


def load_split(data: DataConfig, split: str) -> Dataset | None:
    """The rows to train on (``split="train"``) or to evaluate on (``"eval"``).

    Evaluation rows are the split ``dataset_test_split`` where the dataset has it; else the pairs
    of ``eval_size`` of the prompts, drawn by a hash of the prompt so that every process and every
    run holds out the same ones; else None. ``max_samples`` takes the first rows before the
    hold-out. Raises UserError as ``load_rows`` does, and for an ``eval_size`` outside [0, 1).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: expected 'train' or 'eval', got {split!r}")
    if not 0.0 <= data.eval_size < 1.0:
        raise UserError(f"eval_size: expected a share in [0, 1), got {data.eval_size}")
    if data.max_samples is not None and data.max_samples < 1:
        raise UserError(f"max_samples: expected at least 1, got {data.max_samples}")
    name = data.dataset_name
    splits = _open(name, data.dataset_config)
    train, test = data.dataset_train_split, data.dataset_test_split
    if train not in splits:
        raise UserError(
            f"dataset_train_split: expected one of {', '.join(splits)} of {name}, got {train!r}"
        )
    has_test = test in splits and test != train
    rows = _rows_of(splits, test if split == "eval" and has_test else train, name)
    if data.max_samples is not None:
        rows = rows.select(range(min(data.max_samples, len(rows))))
    if has_test:
        return rows
    if data.eval_size == 0.0:
        return rows if split == "train" else None
    return rows.select(_side(rows, data.eval_size, split))


def _open(name: str, config: str | None) -> dict[str, Dataset]:
    """Every split of a dataset."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(name)
    try:
        if path.is_file():
            builder = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
            if builder is None:
                raise UserError(
                    f"dataset_name: expected a file ending in {', '.join(FORMATS)} (or those with "
                    f".gz), got {name}; convert it, one row per line of json"
                )
            if not _holds_bytes(path):
                raise UserError(f"dataset_name: expected rows, got the empty file {name}")
            return datasets.load_dataset(builder, data_files={"train": name})
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        if path.is_dir() and (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(name)}
        if path.exists() and not path.is_dir():
            raise UserError(f"dataset_name: expected a file or directory, got {name}")
        return datasets.load_dataset(name, config)
    except (DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"dataset_name: expected a json, jsonl, parquet or csv file, a directory of those, a "
            f"save_to_disk directory or a hub name, got {name}, which cannot be read: "
            f"{_first_line(error.__cause__ or error)}"
        ) from error


def _holds_bytes(path: Path) -> bool:
    import gzip

    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
        while block := handle.read(1 << 16):
            if block.strip():
                return True
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rows_of(splits: dict[str, Dataset], split: str, name: str) -> Dataset:
    rows = splits[split]
    if len(rows) == 0:
        raise UserError(f"dataset_name: expected rows in split {split!r} of {name}, got none")
    return rows


def _side(rows: Dataset, eval_size: float, split: str) -> list[int]:
    """Row numbers on one side of the hold-out; all rows of a prompt are on the same side."""
    if not set(rows.column_names) & {"prompt", "chosen"}:
        raise UserError(
            f"dataset_name: expected a column prompt (or chosen and rejected) to hold prompts out "
            f"with --eval_size, got {', '.join(rows.column_names)}"
        )
    keys = [_prompt_key(_checked(row, i)) for i, row in enumerate(rows)]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise UserError(
            f"eval_size: expected at least two different prompts to divide, got {len(prompts)}; "
            "drop --eval_size or bring a test split"
        )
    n_held = min(max(round(eval_size * len(prompts)), 1), len(prompts) - 1)
    held = set(prompts[:n_held])
    return [i for i, key in enumerate(keys) if (key in held) == (split == "eval")]


def _prompt_key(row: dict[str, Any]) -> str:
    """Hash of a row's prompt."""
    if "chosen" in row and "rejected" in row:
        prompt = split_pair(row)[0]
        # The common beginning of two strings may reach into the answers: up to the last line break
        # it is the same for all pairs of a prompt.
        if isinstance(prompt, str) and not isinstance(row.get("prompt"), str) and "\n" in prompt:
            prompt = prompt[: prompt.rindex("\n")]
    else:
        prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = json.dumps([_essence(message) for message in prompt])
    return hashlib.blake2b(str(prompt).encode(), digest_size=16).hexdigest()


def _essence(message: Message) -> tuple[Any, Any]:
    return message.get("role"), message.get("content")


def split_pair(row: dict[str, Any]) -> tuple[Text, Text, Text]:
    """(prompt, chosen response, rejected response) of a preference row.

    Without a ``prompt``, or where ``chosen`` is a whole conversation and ``prompt`` only its text,
    the prompt is the longest common beginning: of the messages, or of the strings up to a space, so
    that no word is cut in two. An absent text is the empty one.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"] or "", row["rejected"] or ""
    if isinstance(chosen, str) != isinstance(rejected, str) and chosen and rejected:
        raise UserError(
            "chosen, rejected: expected two strings or two lists of messages, got "
            f"{type(chosen).__name__} and {type(rejected).__name__}"
        )
    if isinstance(chosen, list) and isinstance(rejected, list):
        if isinstance(prompt, list):
            n = len(prompt)
            start = [_essence(message) for message in prompt]
            if [_essence(message) for message in chosen[:n]] == start:
                chosen = chosen[n:]
            if [_essence(message) for message in rejected[:n]] == start:
                rejected = rejected[n:]
            return prompt, chosen, rejected
        n = _common(chosen, rejected, _essence)
        # Equal conversations: the last turn is the (equal) answer of both.
        n = min(n, len(chosen) - 1, len(rejected) - 1)
        return chosen[:n], chosen[n:], rejected[n:]
    if prompt is not None:
        return prompt, chosen, rejected
    n = _common(chosen, rejected, lambda character: character)
    while n and not chosen[n - 1].isspace():
        n -= 1
    n = max(n - 1, 0)  # the space belongs to the word after it
    return chosen[:n], chosen[n:], rejected[n:]


def _common(a: Sequence[Any], b: Sequence[Any], key: Callable[[Any], Any]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if key(x) != key(y):
            break
        n += 1
    return n


class Renderer:
    """Prompts and responses as token ids of one tokenizer.

    A plain prompt is tokenized as the tokenizer does it (with BOS if it adds one). A conversation
    is rendered by the chat template with its generation prompt. The ids of a response are those
    that it has after its prompt, where the prompt's own ids stand unchanged in front; where a token
    would reach across the border, the response is tokenized on its own. A response ends with one
    end token: EOS, or the token with which the chat template ends a turn (what the template writes
    after that is dropped).

    Raises UserError for a tokenizer without EOS and, on first use, for conversations without a chat
    template or with one whose rendering of prompt and response does not begin with that of the
    prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_eos(tokenizer)
        self.tokenizer = tokenizer
        self._ending: tuple[str, str, int] | None = None

    def end_token_id(self, conversational: bool) -> int:
        """The token that ends a response."""
        return self._turn_end()[2] if conversational else self.tokenizer.eos_token_id

    def prompt_text(self, prompt: Text) -> str:
        return prompt if isinstance(prompt, str) else self._template(prompt, generation=True)

    def prompt_ids(self, prompts: Sequence[Text]) -> list[list[int]]:
        return self._encode(
            [self.prompt_text(p) for p in prompts], [isinstance(p, str) for p in prompts]
        )

    def pair(self, prompt: Text, responses: Sequence[Text]) -> tuple[list[int], list[list[int]]]:
        """(prompt ids, ids of each response with its end token)."""
        return self.pairs([(prompt, responses)])[0]

    def pairs(
        self, rows: Sequence[tuple[Text, Sequence[Text]]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """``pair`` of many rows, in few calls of the tokenizer."""
        starts = [self.prompt_text(prompt) for prompt, _ in rows]
        texts, owners = [], []
        for row, (prompt, responses) in enumerate(rows):
            for response in responses:
                texts.append(self._response_text(prompt, response, starts[row]))
                owners.append(row)
        plain = [isinstance(prompt, str) for prompt, _ in rows]
        prompt_ids = self._encode(starts, plain)
        wholes = self._encode(
            [starts[row] + text for row, text in zip(owners, texts, strict=True)],
            [plain[row] for row in owners],
        )
        out: list[tuple[list[int], list[list[int]]]] = [(ids, []) for ids in prompt_ids]
        for row, text, whole in zip(owners, texts, wholes, strict=True):
            n = len(prompt_ids[row])
            if whole[:n] == prompt_ids[row]:
                ids = whole[n:]
            else:
                ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            end = self.end_token_id(conversational=not plain[row])
            if not ids or ids[-1] != end:
                ids.append(end)
            out[row][1].append(ids)
        return out

    def _encode(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        """Ids of texts that go on; a rendered template already holds its special tokens."""
        out: list[list[int]] = [[] for _ in texts]
        eos = self.tokenizer.eos_token_id
        for special in (True, False):
            rows = [i for i, is_plain in enumerate(plain) if is_plain == special]
            if not rows:
                continue
            batch = self.tokenizer([texts[i] for i in rows], add_special_tokens=special)
            for i, ids in zip(rows, batch["input_ids"], strict=True):
                # Some tokenizers close every text with EOS.
                added = special and ids and ids[-1] == eos
                added = added and not texts[i].rstrip().endswith(self.tokenizer.eos_token)
                out[i] = list(ids[:-1] if added else ids)
        return out

    def _template(self, messages: list[Message], generation: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"tokenizer: expected a chat template for conversational rows, got "
                f"{self.tokenizer.name_or_path!r} without one; pass --chat_template_path with a "
                "jinja file, or use rows of plain text"
            )
        clean = [{k: v for k, v in m.items() if v is not None} for m in messages]
        return self.tokenizer.apply_chat_template(
            clean, tokenize=False, add_generation_prompt=generation
        )

    def _after_prompt(self, prompt: list[Message], response: list[Message], start: str) -> str:
        whole = self._template([*prompt, *response], generation=False)
        if not whole.startswith(start):
            at = _common(whole, start, lambda character: character)
            raise UserError(
                "chat template: expected the rendering of prompt and response to begin like that "
                f"of the prompt, got {whole[at : at + 40]!r} instead of {start[at : at + 40]!r} at "
                f"character {at}; pass --chat_template_path with a template that keeps earlier "
                "turns as they are"
            )
        return whole[len(start) :]

    def _response_text(self, prompt: Text, response: Text, start: str) -> str:
        """The response as rendered, up to and with the text of its end token."""
        if isinstance(prompt, str):
            if isinstance(response, str):
                return response
            raise UserError(
                "response: expected a string after a prompt that is a string, got a list of "
                "messages; give the prompt as messages too"
            )
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        keep, drop, _ = self._turn_end()
        text = self._after_prompt(prompt, response, start)
        if not text.endswith(keep + drop):
            raise UserError(
                f"chat template: expected every answer to end with {keep + drop!r}, got "
                f"{text[-40:]!r}; pass --chat_template_path with a template that ends all turns "
                "alike"
            )
        return text[: len(text) - len(drop)]

    def _turn_end(self) -> tuple[str, str, int]:
        """(kept text after an answer, dropped text, end token id) of the chat template."""
        if self._ending is None:
            prompt = [{"role": "user", "content": "question"}]
            start = self._template(prompt, generation=True)
            answer = "answer"
            text = self._after_prompt(prompt, [{"role": "assistant", "content": answer}], start)
            tail = text[text.rindex(answer) + len(answer) :] if answer in text else text
            special = {
                str(token): index
                for index, token in self.tokenizer.added_tokens_decoder.items()
                if token.special
            }
            found = [(tail.index(t), -len(t), t) for t in special if t in tail]
            if found:
                at, _, token = min(found)
                cut = at + len(token)
                self._ending = tail[:cut], tail[cut:], special[token]
            else:  # a template that ends turns in plain text: EOS in its place
                self._ending = "", tail, self.tokenizer.eos_token_id
        return self._ending


def check_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS, which ends a response; UserError without one."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer: expected one with an EOS token, got {tokenizer.name_or_path!r} without; "
            "set eos_token to an existing token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding: the pad token, else EOS.

    Padding is masked by ``attention_mask``, so the id is never read and no token has to be added
    to the vocabulary for it.
    """
    return check_eos(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> list[int]:
    """Tokens at which generation stops: EOS, and the chat template's end of turn."""
    renderer = Renderer(tokenizer)
    return sorted({renderer.end_token_id(False), renderer.end_token_id(conversational)})


@dataclass
class DataReport:
    """What became of the rows. All but ``truncated`` (kept, response cut) were dropped."""

    n_rows: int = 0
    n_kept: int = 0
    prompt_too_long: int = 0
    no_prompt: int = 0
    equal: int = 0
    empty: int = 0
    malformed: int = 0
    truncated: int = 0
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
        return "; ".join(parts)


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
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
    renderer = Renderer(tokenizer)
    has_margin = "margin" in dataset.column_names
    empty: dict[str, Any] = {f"{part}_ids": [] for part in ("prompt", "chosen", "rejected")}
    empty |= {f"{side}_terminated": False for side in ("chosen", "rejected")}

    def tokenize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        out = [{"fate": _fate_of_texts(*split_pair(row)), **empty} for row in rows]
        if has_margin:
            out = [{**new, "margin": row["margin"]} for new, row in zip(out, rows, strict=True)]
        usable = [i for i, new in enumerate(out) if new["fate"] == "kept"]
        texts = [split_pair(rows[i]) for i in usable]
        encoded = renderer.pairs([(prompt, responses) for prompt, *responses in texts])
        for i, (prompt_ids, pair) in zip(usable, encoded, strict=True):
            room = max_length - len(prompt_ids)
            cut = [ids[: max(room, 0)] for ids in pair]
            if not prompt_ids:
                out[i]["fate"] = "no_prompt"
            elif len(prompt_ids) > max_prompt_length or room <= 0:
                out[i]["fate"] = "prompt_too_long"
            elif cut[0] == cut[1]:
                out[i]["fate"] = "equal"
            else:
                out[i] |= {
                    "prompt_ids": prompt_ids,
                    "chosen_ids": cut[0],
                    "rejected_ids": cut[1],
                    "chosen_terminated": len(pair[0]) <= room,
                    "rejected_terminated": len(pair[1]) <= room,
                }
        return out

    from datasets import Value

    columns: dict[str, Any] = _ids_features("prompt_ids", "chosen_ids", "rejected_ids")
    columns |= {f"{side}_terminated": Value("bool") for side in ("chosen", "rejected")}
    if has_margin:
        columns["margin"] = Value("float64")
    kept, fates = _map(dataset, tokenize, columns, tokenizer, (max_length, max_prompt_length))
    report = _report(fates, max_length=max_length, max_prompt_length=max_prompt_length)
    ended = [kept.with_format("numpy")[f"{side}_terminated"][:] for side in ("chosen", "rejected")]
    report.truncated = sum(not (a and b) for a, b in zip(*ended, strict=True))
    return kept, report


def tokenize_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int
) -> tuple[Dataset, DataReport]:
    """Prompts as token ids, from prompt rows or from the prompts of preference rows.

    Returns the kept rows in their order, with columns ``prompt_ids`` (list of int32), ``prompt``
    (the text as rendered) and ``conversational`` (bool), and a report. Dropped and counted: a
    prompt over ``max_prompt_length`` tokens, an empty prompt. Raises UserError for missing columns,
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
            elif len(ids) > max_prompt_length:
                fate = "prompt_too_long"
            out.append(
                {
                    "fate": fate,
                    "prompt_ids": ids,
                    "prompt": renderer.prompt_text(prompt),
                    "conversational": isinstance(prompt, list),
                }
            )
        return out

    from datasets import Value

    columns = _ids_features("prompt_ids")
    columns |= {"prompt": Value("string"), "conversational": Value("bool")}
    kept, fates = _map(dataset, tokenize, columns, tokenizer, (max_prompt_length,))
    return kept, _report(fates, max_prompt_length=max_prompt_length)


def _ids_features(*names: str) -> dict[str, Any]:
    from datasets import List, Value

    return {name: List(Value("int32")) for name in names}


def _check_limits(**limits: int) -> None:
    for name, value in limits.items():
        if value < 1:
            raise UserError(f"{name}: expected at least 1 token, got {value}")


def _checked(row: dict[str, Any], index: int) -> dict[str, Any]:
    """The row with its margin as a number; UserError where a column holds something else."""
    for name in ("prompt", "chosen", "rejected"):
        value = row.get(name)
        if value is None or isinstance(value, str):
            continue
        if isinstance(value, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
        ):
            continue
        raise UserError(
            f"{name}: expected a string or a list of messages with role and content, got "
            f"{type(value).__name__} {repr(value)[:60]} in row {index}"
        )
    return {**row, "margin": _margin(row.get("margin"), index)}


def _margin(value: Any, index: int) -> float:
    if value is None:
        return 0.0
    try:
        margin = float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise UserError(f"margin: expected a finite number, got {value!r} in row {index}")
    return margin


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
    options: tuple[int, ...],
) -> tuple[Dataset, Counter[str]]:
    """(rows whose fate is "kept", without that column; how many met each fate)."""
    from datasets import Features, Value

    def on_columns(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        out = function([_checked(row, i) for row, i in zip(rows, indices, strict=True)])
        return {name: [new[name] for new in out] for name in out[0]}

    # `datasets` would hash the pickled closure, which a fast tokenizer changes by being used. This
    # file stands in the key so that another version of it never reads an older result.
    source = Path(__file__).read_bytes()
    key = f"{dataset._fingerprint} {tokenizer_key(tokenizer)} {options} {sorted(columns)}"
    mapped = dataset.map(
        on_columns,
        with_indices=True,
        batched=True,
        batch_size=256,
        remove_columns=dataset.column_names,
        features=Features({"fate": Value("string"), **columns}),
        new_fingerprint=hashlib.sha256(key.encode() + source).hexdigest()[:32],
        desc="tokenizing",
    )
    fates = mapped["fate"][:]
    kept = [i for i, fate in enumerate(fates) if fate == "kept"]
    return mapped.select(kept).remove_columns("fate"), Counter(fates)


def _report(fates: Counter[str], **limits: int) -> DataReport:
    report = DataReport(n_rows=fates.total(), n_kept=fates.pop("kept", 0), **fates, **limits)
    if report.n_kept == 0:
        raise UserError(f"dataset: expected at least one usable row, got {report.summary()}")
    return report


@dataclass
class PairCollator:
    """Rows of ``tokenize_pairs`` as one batch: all chosen, then all rejected, right padding.

    Returns ``input_ids`` and ``attention_mask`` int64 [2B, T], ``action_mask`` bool [2B, T] (the
    response tokens), ``terminated`` bool [2B], ``margin`` fp32 [B] or None, and, where the rows
    carry ``chosen_entropy`` and ``rejected_entropy`` (nats, one per response token, of the
    distribution which produced it), ``entropy`` fp32 [2B, T], 0 elsewhere. T is the longest row,
    rounded up to ``pad_to_multiple_of``.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor | None]:
        sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
        longest = max(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row, side in sides)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(sides), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        action_mask = torch.zeros(shape, dtype=torch.bool)
        has_entropy = "chosen_entropy" in rows[0]
        entropy = torch.zeros(shape) if has_entropy else None
        for n, (row, side) in enumerate(sides):
            start = len(row["prompt_ids"])
            end = start + len(row[f"{side}_ids"])
            input_ids[n, :start] = torch.as_tensor(row["prompt_ids"])
            input_ids[n, start:end] = torch.as_tensor(row[f"{side}_ids"])
            attention_mask[n, :end] = 1
            action_mask[n, start:end] = True
            if entropy is not None:
                entropy[n, start:end] = torch.tensor(row[f"{side}_entropy"])
        batch: dict[str, Tensor | None] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "action_mask": action_mask,
            "terminated": torch.tensor([bool(row[f"{side}_terminated"]) for row, side in sides]),
            "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
            if "margin" in rows[0]
            else None,
        }
        if entropy is not None:
            batch["entropy"] = entropy
        return batch
