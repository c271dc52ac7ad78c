"""A small written world for the demonstration: texts, a language model of them, a known taste.

Texts are strings of phrases such as ``quiet lanterns wait by moonlight``. Which phrase
comes next is an open choice; the words inside one are nearly fixed. A language model of them is
therefore unsure between phrases and sure within, which is what segments are cut by.

The *gold* rules are known rewards of phrases: what one is worth depends on which two of its parts
come together. Single tokens reveal a part of that; a bag of tokens, printed beside the reward
models, says how much. A pure exclusive or would reveal nothing, but then a bandit reward model
learns next to nothing either from a few thousand pairs.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from segrlhf.errors import UserError
from segrlhf.models.lm_head import token_stats
from segrlhf.ppo.rollout import generate

# Each line: two qualities and two things, which combine to four phrases.
GROUPS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = (
    (("quiet", "golden"), ("lanterns", "bells")),
    (("brave", "hungry"), ("foxes", "sparrows")),
    (("frozen", "hidden"), ("rivers", "gardens")),
    (("silver", "broken"), ("mirrors", "keys")),
    (("gentle", "stubborn"), ("horses", "shepherds")),
    (("distant", "ruined"), ("towers", "bridges")),
)
TAILS = (
    "wait by moonlight",
    "gather near mills",
    "drift across valleys",
    "vanish into mist",
    "return after harvest",
    "tremble in darkness",
)
# What the gold rule thinks of quality i with thing j of a group.
TASTE = ((1.0, -0.5), (-0.5, 0.0))
ASIDES = (
    "nothing else happens",
    "it rains until noon",
    "nobody says a word",
    "the lamp burns low",
    "somebody laughs outside",
    "we count the hours",
)
CONNECTORS = (", and", ", but", ", while", "; later", ". Then", ". Soon")
TIMES = (
    "At dawn", "At night", "In winter", "In summer", "In spring", "Every autumn", "On Mondays",
    "On Sundays", "Long ago", "Years later", "One evening", "One morning", "After the flood",
    "Before the feast", "During the war", "Since the fire", "Until today", "On holidays",
    "This week", "That month", "Next year", "Most days", "Some nights", "Once more",
)  # fmt: skip
PLACES = (
    "in our village", "near the border", "at the lighthouse", "in the mountains", "by the school",
    "on the coast", "along the canal", "below the castle", "in the harbour", "at the mill",
    "behind the church", "across the bay", "on the island", "in the capital", "near the forest",
    "at the station", "by the river", "on the farm", "in the desert", "over the hills",
    "around the lake", "in the south", "up north", "beyond the wall",
)  # fmt: skip
ASIDE_SHARE = 0.2
MIN_PHRASES = 5
STOP_SHARE = 0.3  # chance that a text ends after each phrase from the MIN_PHRASES-th on

SAMPLED_AT_ONCE = 256  # responses


def phrases() -> dict[str, float]:
    """Every phrase of a quality and a thing, and its gold value.

    Each tail ends one phrase of each kind, of four different groups: it tells nothing by itself,
    and to write it a language model has to know the whole phrase. A quality or thing alone is worth
    a quarter of its good phrase on average, one way or the other.
    """
    found = {}
    for group, (qualities, things) in enumerate(GROUPS):
        for i, quality in enumerate(qualities):
            for j, thing in enumerate(things):
                tail = TAILS[(group + 2 * i + j) % len(TAILS)]
                found[f"{quality} {thing} {tail}"] = TASTE[i][j]
    return found


class Text(NamedTuple):
    opening: str  # what a prompt is
    body: str  # starts with a space


def openings() -> list[str]:
    """All openings, in a fixed order."""
    return [f"{time} {place}" for time in TIMES for place in PLACES]


def write_texts(n: int, seed: int) -> list[Text]:
    """``n`` texts of the generator."""
    rng = random.Random(seed)
    starts, tasted = openings(), list(phrases())
    texts = []
    for _ in range(n):
        parts: list[str] = []
        while len(parts) < MIN_PHRASES or rng.random() >= STOP_SHARE:
            aside = rng.random() < ASIDE_SHARE
            parts.append(rng.choice(ASIDES if aside else tasted))
        body = f", {parts[0]}"
        for part in parts[1:]:
            body += f"{rng.choice(CONNECTORS)} {part}"
        texts.append(Text(rng.choice(starts), body + "."))
    return texts


# ---- gold rewards ------------------------------------------------------------------------------


class GoldScore(NamedTuple):
    value: float  # sum over the phrases found
    spans: list[tuple[int, int, float]]  # start and end character, value of each phrase


@dataclass(frozen=True)
class Gold:
    """A known reward: the sum of the values of a text's phrases, each counted once.

    A phrase repeated in the same text adds nothing, so that a policy that says one good thing
    again and again is not better for it. ``scale`` is the weight of one phrase in a Bradley-Terry
    draw.
    """

    name: str
    about: str
    scale: float
    find: Callable[[str], Iterable[tuple[int, int, str, float]]]  # start, end, phrase, value

    def __call__(self, text: str) -> GoldScore:
        seen, spans = set(), []
        for start, end, phrase, value in self.find(text):
            if phrase not in seen:
                seen.add(phrase)
                spans.append((start, end, value))
        return GoldScore(sum((value for _, _, value in spans), 0.0), spans)

    def reward(self, text: str) -> float:
        return self(text).value


_TASTE = phrases()
_PHRASE = re.compile("|".join(re.escape(phrase) for phrase in _TASTE))


def _find_phrases(text: str) -> Iterable[tuple[int, int, str, float]]:
    for match in _PHRASE.finditer(text):
        yield match.start(), match.end(), match.group(), _TASTE[match.group()]


_SHE = ("she", "Lily", "mom", "mommy", "girl", "Mia", "Sue", "Lucy", "Anna", "Sara")
_HE = ("he", "Tim", "Timmy", "Tom", "Max", "Ben", "boy", "Bob", "Sam", "Jack")
_MIND = ("was", "wanted", "felt", "loved", "liked", "thought", "knew", "decided", "tried")
_DEED = ("saw", "went", "had", "found", "asked", "told", "took", "came", "ran", "got")
_STORY = re.compile(
    rf"\b(?:(?P<she>{'|'.join(_SHE)})|(?P<he>{'|'.join(_HE)}))"
    rf" (?:(?P<mind>{'|'.join(_MIND)})|(?P<deed>{'|'.join(_DEED)})) [a-z']+ [a-z']+",
    re.IGNORECASE,
)


def _find_story_phrases(text: str) -> Iterable[tuple[int, int, str, float]]:
    for match in _STORY.finditer(text):
        value = TASTE[match["she"] is None][match["mind"] is None]
        yield match.start(), match.end(), match.group().lower(), value


GOLD = {
    rule.name: rule
    for rule in (
        Gold(
            "phrases",
            "of the four phrases that two qualities and two things make, one is worth +1 (quiet "
            "lanterns), two -0.5 (quiet bells, golden lanterns) and one nothing (golden bells)",
            3.0,
            _find_phrases,
        ),
        Gold(
            "stories",
            "she may wish, feel or think (+1) rather than see, go or do (-0.5); he may not wish, "
            "feel or think (-0.5); each with the next two words of the phrase",
            3.0,
            _find_story_phrases,
        ),
    )
}


def gold_rule(name: str) -> Gold:
    """The gold rule ``name``; UserError for an unknown one."""
    if name not in GOLD:
        raise UserError(f"gold: expected one of {', '.join(GOLD)}, got {name!r}")
    return GOLD[name]


def prefers_first(first: float, second: float, scale: float, rng: random.Random) -> bool:
    """A Bradley-Terry draw: True with probability sigmoid(scale (first - second))."""
    return rng.random() < 1 / (1 + math.exp(-scale * (first - second)))


# ---- tokenizer and language model --------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE, small enough that the rarer words take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


SMALL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def pretrain_lm(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    **size: int,
) -> LlamaForCausalLM:
    """A small Llama, trained from scratch for ``steps`` batches of ``texts``.

    ``size`` holds arguments of LlamaConfig other than the vocabulary's.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **(SMALL | size),
        )
    )
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    rng = random.Random(seed)
    model.train()
    bar = tqdm(range(steps), desc="language model", unit="step")
    for _ in bar:
        batch = rng.sample(rows, min(batch_size, len(rows)))
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
        learned = attention.bool()
        learned[:, 0] = False  # nothing comes before the first token
        logprobs, _ = token_stats(model, ids, attention, learned)
        loss = -logprobs.sum() / learned.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


# ---- prompts and pairs from a language model ----------------------------------------------------


def sample_openings(model: Any, tokenizer: Any, n: int, *, words: int, seed: int) -> list[str]:
    """``n`` different beginnings, of ``words`` words each, of texts sampled from BOS.

    Raises UserError for a tokenizer without BOS and for a model that repeats itself too much.
    """
    if tokenizer.bos_token_id is None:
        raise UserError(
            "model_name_or_path: expected a tokenizer with a BOS token, which stories start from, "
            "got none; use another model, or run without one"
        )
    found: dict[str, None] = {}
    for start in range(seed, seed + 20 * n, n):
        starts = [[tokenizer.bos_token_id]] * n
        rollout = generate(
            model, tokenizer, starts, max_new_tokens=4 * words, seeds=range(start, start + n)
        )
        for ids in rollout.responses():
            parts = tokenizer.decode(ids, skip_special_tokens=True).split()
            if len(parts) > words:
                found[" ".join(parts[:words])] = None
        if len(found) >= n:
            return list(found)[:n]
    raise UserError(
        f"n_prompts: expected {n} different openings in 20 tries each, got {len(found)}; "
        "ask for fewer"
    )


def sample_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    n: int,
    gold: Gold,
    *,
    response_length: int,
    seed: int,
    desc: str = "pairs",
) -> list[dict[str, Any]]:
    """``n`` preference pairs: two responses sampled for a prompt, labelled by a Bradley-Terry draw.

    Pairs whose gold rewards are equal are left out, as by a judge who sees no difference. A row
    has ``prompt``, ``chosen`` and ``rejected`` as text, their gold rewards ``chosen_gold`` and
    ``rejected_gold``, and the columns of ``data.tokenize_pairs`` with the very tokens sampled, so
    that a response cut at ``response_length`` is known as such. Raises UserError when 50 responses
    a pair do not suffice.
    """
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rng, drawn = random.Random(seed), 0
    rows: list[dict[str, Any]] = []
    with tqdm(total=n, desc=desc, unit="pair") as bar:
        while len(rows) < n:
            if drawn > 50 * n:
                raise UserError(
                    f"gold: expected {n} pairs of different gold reward, got {len(rows)} from "
                    f"{drawn} responses; the rule {gold.name!r} does not suit this model's texts"
                )
            count = min(SAMPLED_AT_ONCE, 2 * (n - len(rows)))
            chosen_prompts = [rng.randrange(len(prompts)) for _ in range(count // 2)]
            rollout = generate(
                model,
                tokenizer,
                [prompt_ids[p] for p in chosen_prompts for _ in range(2)],
                max_new_tokens=response_length,
                seeds=[rng.getrandbits(62) for _ in range(count)],
            )
            drawn += count
            ids, terminated = rollout.responses(), rollout.terminated.tolist()
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            values = [gold.reward(text) for text in texts]
            for k, p in enumerate(chosen_prompts):
                first, second = 2 * k, 2 * k + 1
                if values[first] == values[second] or not all(
                    map(str.strip, texts[first : second + 1])
                ):
                    continue
                if not prefers_first(values[first], values[second], gold.scale, rng):
                    first, second = second, first
                row: dict[str, Any] = {"prompt": prompts[p], "prompt_ids": prompt_ids[p]}
                for side, i in (("chosen", first), ("rejected", second)):
                    row[side], row[f"{side}_ids"] = texts[i], ids[i]
                    row[f"{side}_terminated"], row[f"{side}_gold"] = terminated[i], values[i]
                rows.append(row)
            bar.update(len(rows) - bar.n)
    return rows


# ---- the baselines that stand beside a reward model ---------------------------------------------


def _count_differences(pairs: Sequence[tuple[list[int], list[int]]], vocab_size: int) -> Tensor:
    """Token counts of the chosen minus those of the rejected response, ``[pairs, V]``."""
    counts = torch.zeros(len(pairs), vocab_size, dtype=torch.float64)
    for row, (chosen, rejected) in enumerate(pairs):
        counts[row] += torch.bincount(torch.tensor(chosen), minlength=vocab_size)
        counts[row] -= torch.bincount(torch.tensor(rejected), minlength=vocab_size)
    return counts


def bag_of_tokens_accuracy(
    train: Sequence[tuple[list[int], list[int]]],
    test: Sequence[tuple[list[int], list[int]]],
    vocab_size: int,
    ridge: float = 1.0,
) -> float:
    """Held-out accuracy of a Bradley-Terry model whose score is linear in the token counts.

    Minimises sum log(1 + exp(-w x)) + ridge/2 |w|^2 over count differences x, chosen minus
    rejected. What it gets right is what single tokens reveal. A tie counts one half.
    """
    x = _count_differences(train, vocab_size)
    weight = torch.zeros(vocab_size, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.softplus(-x @ weight).sum() + ridge / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(objective)
    margins = _count_differences(test, vocab_size) @ weight.detach()
    return float((margins.sign() + 1).mean() / 2)
