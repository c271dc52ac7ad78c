"""The page of the demonstration: ``report``, made from what results.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segrlhf.charts import normalizer_chart
from segrlhf.compare import learning_curves
from segrlhf.markup import escape
from segrlhf.page import document, response_blocks
from segrlhf.tables import Table, number


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the demonstration's table has to know, one sentence group per line."""
    settings, levels = results["settings"], results["levels"]
    seeds, first = settings["seeds"], settings["seed"]
    last = first + seeds - 1
    lines = [
        "Gold is the known reward that labelled the pairs, on held-out prompts; no training reads "
        f"it. Here: {results['gold']['about']}; a phrase counts once a response.",
        "Segments: how many the frozen language model's entropy cuts a response into, measured the "
        "same way for every variant.",
        f"Gold {number(levels['gold'])} and KL {number(levels['kl'])} nats are the highest that "
        "every run reached; values there are read between evaluations on a straight line.",
        f"All variants ran with the same settings (beta {settings['kl_coef']:g}, lr "
        f"{settings['learning_rate']:g}, reduction {settings['reward_reduction']}); nothing was "
        f"tuned for one of them. Texts, pairs and reward models have seed {first}, PPO "
        + (
            f"seeds {first} to {last}; ± is the standard deviation."
            if seeds > 1
            else f"seed {first}. One seed proves little: --seeds 5 gives means and deviations."
        ),
    ]
    if settings["reward_reduction"] == "mean":
        lines.append(
            "The other side of it: --reward_reduction sum --updates 60 pays K times more against "
            "the same beta, and shows a policy that games its reward model."
        )
    return lines


def report(results: Mapping[str, Any]) -> str:
    """The demonstration's page: table, charts, normalisers, coloured responses, settings."""
    body = [
        "<h1>Segment-level RLHF on a small language model</h1>",
        "<p>Pairs of responses, labelled by a known rule, train a bandit, a token and a segment "
        "reward model; PPO then follows each. The last variant pays the segment model's mean at "
        "the last token: the same reward model without its placement of credit.</p>",
        Table(**results["table"]).html(),
        *(f'<p class="soft">{escape(note)}</p>' for note in notes(results)),
        "<h2>Learning curves</h2>",
        f'<div class="charts">{"".join(learning_curves(results["runs"]).values())}</div>',
    ]
    for granularity, model in results["reward_models"].items():
        if granularity == "bandit":
            continue
        body += [
            f"<h2>Normaliser of the {granularity} model: {escape(model['fit']['kind'])}</h2>",
            f'<div class="wide">{normalizer_chart(model["fit"])}</div>',
        ]
    body += [
        "<h2>Held-out responses before and after PPO with segment rewards</h2>",
        response_blocks(results["examples"]),
        "<h2>Settings</h2>",
    ]
    facts = {
        **results["settings"],
        **results["versions"],
        **{f"seconds: {name}": f"{value:.0f}" for name, value in results["seconds"].items()},
    }
    body.append(Table(["setting", "value"], [[k, str(v)] for k, v in facts.items()]).html())
    return document("segrlhf demo", body)
