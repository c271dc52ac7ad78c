"""Weights and the optimizer's state are looked at after every step."""

import pytest
import torch
from accelerate import Accelerator

from segrlhf.errors import NonFiniteError
from segrlhf.runtime.checkpoints import mark_complete
from segrlhf.runtime.finite import check_weights


@pytest.fixture
def trained():
    """(model, optimizer after a step); the bias is frozen."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def check(trained, output_dir):
    check_weights(Accelerator(cpu=True), *trained, "step 7", output_dir)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weight", "exp_avg of weight", "exp_avg_sq of weight"])
def test_one_number_is_enough(trained, where, value, tmp_path):
    check(trained, tmp_path)
    model, optimizer = trained
    key = where.partition(" ")[0]
    tensor = model.weight.data if key == "weight" else optimizer.state[model.weight][key]
    tensor[1, 2] = value
    with pytest.raises(NonFiniteError, match=f"after step 7, got NaN or infinity in {where}; no"):
        check(trained, tmp_path)


def test_the_message_names_the_newest_checkpoint(trained, tmp_path):
    (tmp_path / "checkpoint-6").mkdir()
    mark_complete(tmp_path / "checkpoint-6", 6)
    trained[0].weight.data[:] = torch.nan
    with pytest.raises(NonFiniteError, match=r"which is finite, is .*checkpoint-6: go on"):
        check(trained, tmp_path)


def test_huge_numbers_and_frozen_weights_are_no_matter(trained, tmp_path):
    trained[0].weight.data[:] = 3e38  # its square is not finite
    trained[0].bias.data[:] = torch.nan
    check(trained, tmp_path)
