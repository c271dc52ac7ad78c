"""The written world: phrases that are sure inside and open between, tastes of combinations."""

import math
import random
import re
from collections import Counter, defaultdict

import corpus
import pytest
import torch

from segrlhf.errors import UserError


@pytest.fixture(scope="module")
def texts():
    return corpus.write_texts(4000, seed=3)


@pytest.fixture(scope="module")
def small():
    """Tokenizer and untrained model."""
    lines = [t.opening + t.body for t in corpus.write_texts(200, seed=0)]
    tokenizer = corpus.train_tokenizer(lines)
    return lines, tokenizer, corpus.pretrain_lm(lines, tokenizer, steps=1, batch_size=4)


def entropy(counts):
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_texts_depend_on_the_seed_alone(texts):
    assert corpus.write_texts(50, seed=3) == texts[:50]
    assert corpus.write_texts(50, seed=4) != texts[:50]


def test_next_word_is_open_between_phrases_and_nearly_fixed_inside(texts):
    after = defaultdict(Counter)
    for text in texts:
        words = re.findall(r"[a-z]+|[,;.]", text.body.lower())
        for context in zip(words, words[1:], words[2:], words[3:], strict=False):
            after[context[:3]][context[3]] += 1
    tails = [tail.split() for tail in corpus.TAILS]
    between, choice, inside = [], [], []
    for context, counts in after.items():
        if sum(counts.values()) < 50:
            continue
        if context[-1] in ("and", "but", "while", "later", "then", "soon"):
            between.append(entropy(counts))
        elif any(context[-1] in qualities for qualities, _ in corpus.GROUPS):
            choice.append(entropy(counts))
        elif any(context[-1] == word for tail in tails for word in tail[:-1]):
            inside.append(entropy(counts))
    assert min(between) > 2.5
    assert max(choice) < 0.75  # one bit: which of two things
    assert max(inside) < 0.05


def test_a_combination_decides_what_a_phrase_is_worth():
    """A tail tells nothing; a quality or thing alone at most a quarter of a good phrase."""
    found = corpus.phrases()
    assert len(found) == 4 * len(corpus.GROUPS)
    values = defaultdict(list)
    for phrase, taste in found.items():
        for word in set(phrase.split()):
            values[word].append(taste)
    parts = {word for group in corpus.GROUPS for side in group for word in side}
    for word, seen in values.items():
        mean = sum(seen) / len(seen)
        assert abs(mean) <= 0.25 if word in parts else mean == 0
    assert sum(found.values()) == 0
    pairs = [(q, t) for quality, thing in corpus.GROUPS for q in quality for t in thing]
    assert len(set(pairs)) == len(pairs)


def test_phrases_gold_counts_whole_phrases_once():
    gold = corpus.gold_rule("phrases")
    good = "quiet lanterns wait by moonlight"
    bad = next(p for p, v in corpus.phrases().items() if p.startswith("quiet bells"))
    assert corpus.phrases()[good] == 1.0
    text = f" {good}, and {bad}; later {good}. Then {good[:20]}"
    score = gold(text)
    assert score.value == 0.5
    assert [(text[a:b], v) for a, b, v in score.spans] == [(good, 1.0), (bad, -0.5)]
    assert gold("").value == 0.0
    assert gold("quiet lanterns stand along walls").spans == []


def test_stories_gold_is_of_subject_and_verb_together():
    gold = corpus.gold_rule("stories")
    values = {
        "She wanted to play": 1.0,
        "she saw a bird": -0.5,
        "He saw a bird": 0.0,
        "Tim wanted to play": -0.5,
        "the cat saw a bird": 0.0,
        "she wanted to": 0.0,
    }
    assert {text: gold(text).value for text in values} == values
    assert gold("She wanted to play. she wanted to play").value == 1.0


def test_unknown_gold_rule():
    with pytest.raises(UserError, match="gold: expected one of phrases, stories, got 'taste'"):
        corpus.gold_rule("taste")


def test_draws_follow_bradley_terry():
    rng = random.Random(0)
    wins = sum(corpus.prefers_first(2.0, 1.0, 1.5, rng) for _ in range(20000))
    assert wins / 20000 == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.01)


def test_phrases_span_several_tokens_and_decode_exactly(small):
    lines, tokenizer, _ = small
    ids = tokenizer(lines)["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id for row in ids)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == lines
    lengths = [len(tokenizer.tokenize(f" {phrase}")) for phrase in corpus.phrases()]
    assert min(lengths) >= 4


def test_language_model_learns_and_is_reproducible(small):
    lines, tokenizer, first = small
    second = corpus.pretrain_lm(lines, tokenizer, steps=1, batch_size=4)
    state = second.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in first.state_dict().items())
    trained = corpus.pretrain_lm(lines, tokenizer, steps=25, batch_size=8)
    ids = torch.tensor([tokenizer(lines[0])["input_ids"]])
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for model in (first, trained)]
    assert losses[1] < losses[0] - 1


class WritesPhrases:
    """Stands in for a language model: ``generate`` gives texts of the generator."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bodies = [t.body for t in corpus.write_texts(5000, seed=9)]

    def __call__(self, model, tokenizer, prompt_ids, *, max_new_tokens, seeds, **_):
        rows = [
            tokenizer(self.bodies[seed % 5000], add_special_tokens=False)["input_ids"]
            for seed in seeds
        ]
        rows = [row[:max_new_tokens] for row in rows]

        class Found:
            terminated = torch.zeros(len(rows), dtype=torch.bool)

            def responses(self):
                return rows

        return Found()


def test_bag_of_tokens_sees_part_of_the_gold_rule(small, monkeypatch):
    _, tokenizer, model = small
    monkeypatch.setattr(corpus, "generate", WritesPhrases(tokenizer))
    gold = corpus.gold_rule("phrases")
    rows = corpus.sample_pairs(
        model, tokenizer, corpus.openings()[:20], 1500, gold, response_length=48, seed=1
    )
    assert all(row["chosen_gold"] != row["rejected_gold"] for row in rows)
    assert all(row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"] for row in rows)
    assert gold(rows[0]["chosen"]).value == rows[0]["chosen_gold"]
    right = sum(row["chosen_gold"] > row["rejected_gold"] for row in rows) / len(rows)
    assert 0.85 < right < 0.97
    ids = [(row["chosen_ids"], row["rejected_ids"]) for row in rows]
    seen = corpus.bag_of_tokens_accuracy(ids[:1000], ids[1000:], len(tokenizer))
    assert 0.55 < seen < 0.75 < right


def test_bag_of_tokens_finds_what_a_single_token_reveals():
    rng = random.Random(0)
    pairs = [([1] + [rng.randrange(3, 9) for _ in range(6)], [2, 4, 5]) for _ in range(60)]
    assert corpus.bag_of_tokens_accuracy(pairs[:40], pairs[40:], 9) == 1.0
    assert corpus.bag_of_tokens_accuracy(pairs[:40], [([3], [3])], 9) == 0.5


def test_sampled_pairs_need_a_rule_that_suits_the_texts(small):
    _, tokenizer, model = small
    with pytest.raises(UserError, match="gold: expected 1 pairs of different gold reward"):
        corpus.sample_pairs(
            model, tokenizer, ["At dawn"], 1, corpus.gold_rule("stories"), response_length=2, seed=0
        )


def test_openings_come_from_bos(small):
    _, tokenizer, model = small
    found = corpus.sample_openings(model, tokenizer, 5, words=2, seed=0)
    assert len(set(found)) == 5
    assert all(len(text.split()) == 2 for text in found)
    assert corpus.sample_openings(model, tokenizer, 5, words=2, seed=0) == found


def test_openings_need_a_bos_token(small):
    lines, _, model = small
    tokenizer = corpus.train_tokenizer(lines)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="expected a tokenizer with a BOS token"):
        corpus.sample_openings(model, tokenizer, 5, words=2, seed=0)
