import math

import numpy as np
import pytest
import torch

from segkernels import segment_ends
from segrlhf import segment
from segrlhf.configs import DataConfig, ModelConfig
from segrlhf.data.batch import SIDES
from segrlhf.errors import UserError
from segrlhf.segment import SegmentConfig, cut


@pytest.mark.parametrize("threshold", [0.5, 2.5])
def test_cut_counts_the_segments_of_each_response(build_cache, pairs, threshold):
    cache = build_cache()
    row = cut(cache, pairs, threshold)
    counts, tokens = [], []
    for i in range(len(pairs)):
        for side, entropy in zip(SIDES, cache[i], strict=True):
            ends = segment_ends(
                torch.from_numpy(np.array(entropy))[None],
                torch.ones(1, len(entropy), dtype=torch.bool),
                threshold,
                entropy_of="current",
                exclude_last=pairs[i][f"{side}_terminated"],
            )[0]
            at = ends.nonzero().squeeze(1).tolist()
            counts.append(len(at))
            tokens += [end - start for start, end in zip([-1, *at], at, strict=False)]
    np.testing.assert_array_equal(row.segments, counts)
    np.testing.assert_array_equal(row.tokens, tokens)


def test_run_prints_a_table_and_how_to_choose(tiny_lm_dir, pairs_file, tmp_path, capsys):
    result = segment.run(
        ModelConfig(str(tiny_lm_dir)),
        DataConfig(str(pairs_file), eval_size=0.25),
        SegmentConfig(thresholds=[1.0, 4.0], entropy_cache_dir=str(tmp_path)),
    )
    out = capsys.readouterr().out
    assert "tokens per segment" in out
    assert "example at 4.0: " in out
    assert "Choose a threshold" in out
    low, high = result["thresholds"]
    assert low["segments_per_response"] > high["segments_per_response"] >= 1
    assert len(list(tmp_path.glob("*/entropy.npy"))) == 2  # train and eval rows


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_thresholds_are_checked(bad):
    wanted = r"thresholds: expected a finite number of nats, at least 0, got"
    with pytest.raises(UserError, match=wanted):
        SegmentConfig(thresholds=[1.0, bad])
