"""Padded batches of pairs."""

from segrlhf.data.batch import PairCollator


def test_collator():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    for row in rows:
        row |= {"chosen_terminated": True, "rejected_terminated": False}
    batch = PairCollator(0)(rows)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 0, 0, 0],
        [1, 2, 6, 0, 0],
        [7, 9, 10, 0, 0],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [5, 2, 3, 3]
    assert batch["action_mask"].int().tolist() == [
        [0, 0, 1, 1, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 1, 0, 0],
    ]
    assert batch["terminated"].tolist() == [True, True, False, False]
    assert batch["margin"] is None
    assert "entropy" not in batch
    assert PairCollator(0, pad_to_multiple_of=4)(rows)["input_ids"].shape == (4, 8)

    for row in rows:
        row["chosen_entropy"] = [0.5] * len(row["chosen_ids"])
        row["rejected_entropy"] = [1.5] * len(row["rejected_ids"])
    entropy = PairCollator(0)(rows)["entropy"]
    assert entropy[0].tolist() == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert entropy[3].tolist() == [0.0, 1.5, 1.5, 0.0, 0.0]
