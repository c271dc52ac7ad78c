"""Runs of several variants, side by side."""

import math
import xml.etree.ElementTree as ET

import pytest

from segrlhf import compare


def run(golds, seed=0):
    """Gold rewards of evaluations every 2 updates; the KL grows by 1 nat each."""
    curve = [
        {
            "update": 2 * k,
            "gold": gold,
            "kl": float(k),
            "segments": 5.0 + k,
            "distinct_bigrams": 0.5,
            "length": 40.0,
            "score": 0.0,
        }
        for k, gold in enumerate(golds)
    ]
    return {"seed": seed, "seconds": 10.0, "curve": curve, "responses": {}}


RUNS = {
    "token": [run([0.0, 1.0, 2.0]), run([0.0, 2.0, 4.0], seed=1)],
    "segment": [run([0.0, 4.0, 3.0]), run([0.0, 2.0, 3.0], seed=1)],
}


def test_at_level_reads_between_evaluations():
    curve = RUNS["token"][0]["curve"]
    assert compare.at_level(curve, "gold", 0.5, "update") == 1.0
    assert compare.at_level(curve, "gold", -1.0, "update") == 0
    assert compare.at_level(curve, "kl", 1.5, "gold") == 1.5
    assert math.isnan(compare.at_level(curve, "gold", 2.5, "update"))


def test_common_levels_are_those_that_every_run_reaches():
    assert compare.common_levels(RUNS) == {"gold": 2.0, "kl": 2.0}


def test_table_has_means_and_deviations_over_seeds():
    accuracy = {"token": 0.75, "segment": 0.8}
    table = compare.result_table(RUNS, accuracy, {"longer response wins": 0.5})
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["longer response wins", compare.START, "token", "segment"]
    assert rows["longer response wins"]["held-out accuracy"] == "50.0 %"
    assert rows[compare.START]["segments"] == "5.00"
    assert rows["token"]["held-out accuracy"] == "75.0 %"
    assert rows["token"]["gold"] == "3.00 ± 1.4"
    assert rows["token"]["updates to gold 2.00"] == "3.00 ± 1.4"  # 4 and 2
    assert rows["segment"]["best gold"] == "3.50 ± 0.71"
    assert rows["segment"]["gold at KL 2.00"] == "3.00 ± 0"


def test_curves_show_every_variant():
    charts = compare.learning_curves(RUNS)
    assert set(charts) == {"gold_updates", "gold_kl", "segments", "kl", "bigrams", "length"}
    for chart in charts.values():
        ET.fromstring(chart)
        assert ">token</" in chart
        assert ">segment</" in chart
    assert "token: gold 3.00 at PPO update 4.00" in charts["gold_updates"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_has_no_deviation(seeds):
    runs = {name: found[:seeds] for name, found in RUNS.items()}
    table = compare.result_table(runs, dict.fromkeys(runs, 0.5), {})
    assert any("±" in cell for cell in table.rows[-1]) == (seeds > 1)
