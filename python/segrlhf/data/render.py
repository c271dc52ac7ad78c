"""What a row says, as text and token ids: where its prompt ends and its responses begin.

Rows are TRL's: a *preference* row has ``chosen`` and ``rejected``, with ``prompt`` or with the
prompt implicit in their common beginning; a *prompt* row has ``prompt``. Each is a string, or a
list of messages ``{"role": ..., "content": ...}``, which the tokenizer's chat template renders.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Message = dict[str, Any]
Text = str | list[Message]


def checked_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    """The row with its margin as a number; UserError where a column holds something else."""
    for name in ("prompt", "chosen", "rejected", "response"):
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


def _essence(message: Message) -> tuple[Any, Any]:
    return message.get("role"), message.get("content")


def prompt_key(row: dict[str, Any]) -> str:
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


class Renderer:
    """Prompts and responses as token ids of one tokenizer.

    A plain prompt is tokenized as the tokenizer does it (with BOS if it adds one). A conversation
    is rendered by the chat template with its generation prompt. The ids of a response are those
    that it has after its prompt, where the prompt's own ids stand unchanged in front; where a token
    would reach across the border, the response is tokenized on its own. A response ends with one
    end token: EOS, or the token with which the chat template ends a turn (what the template writes
    after that is dropped).

    With ``strip_system_header`` a conversation is rendered without what the template writes before
    the first message of one without system message: BOS, and a system message of the template's
    own. A conversation that brings a system message keeps its beginning.

    Raises UserError for a tokenizer without EOS and, on first use, for conversations without a chat
    template or with one whose rendering of prompt and response does not begin with that of the
    prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strip_system_header: bool = False
    ) -> None:
        check_eos(tokenizer)
        self.tokenizer = tokenizer
        self.strip_system_header = strip_system_header
        self._ending: tuple[str, str, int] | None = None
        self._header: str | None = None

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
        text = self._rendered(messages, generation)
        return text.removeprefix(self._before_turns()) if self.strip_system_header else text

    def _rendered(self, messages: list[Message], generation: bool = False) -> str:
        clean = [{k: v for k, v in m.items() if v is not None} for m in messages]
        with reading(
            "chat template",
            "one that renders these messages",
            f"that of {self.tokenizer.name_or_path!r} for roles {[m.get('role') for m in clean]}",
            "pass --chat_template_path with another, or mend the rows",
        ):
            return self.tokenizer.apply_chat_template(
                clean, tokenize=False, add_generation_prompt=generation
            )

    def _before_turns(self) -> str:
        """What the chat template writes before the first message: what a user's first turn has and
        a later one has not."""
        if self._header is None:
            question = {"role": "user", "content": "question"}
            answer = {"role": "assistant", "content": "answer"}
            first = self._rendered([question])
            before = self._rendered([question, answer])
            whole = self._rendered([question, answer, question])
            later = whole.removeprefix(before)
            if later == whole or not first.endswith(later):
                raise UserError(
                    "chat template: expected all turns of a user to be rendered alike, got "
                    f"{first[-40:]!r} for the first and {whole[-40:]!r} for a later one; drop "
                    "--strip_system_header"
                )
            self._header = first.removesuffix(later)
        return self._header

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
