"""The reward model and its loss under torch's fully sharded data parallelism, on gloo."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from segkernels import segment_bradley_terry
from segrlhf.models.reward_model import SegmentRewardModel


def gradients_of(model):
    """Loss and gradients of one batch that every process computes whole."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 12), generator=g)
    mask, ends = torch.ones_like(ids).bool(), torch.rand(4, 12, generator=g) < 0.4
    rewards = model(ids, attention_mask=mask.long())
    out = segment_bradley_terry(rewards, ends, mask, center_coef=0.1)
    out.loss.backward()
    return out.loss.item(), {name: p.grad for name, p in model.named_parameters()}


def _sharded(rank, port, directory, out):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    model = SegmentRewardModel.from_pretrained(directory, dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, gradients = gradients_of(model)
    whole = {name: grad.full_tensor() for name, grad in gradients.items()}
    if rank == 0:
        torch.save((loss, whole), out)
    dist.destroy_process_group()


def test_sharded_gradients_are_the_whole_models(tiny_lm_dir, tmp_path):
    directory, out = tmp_path / "rm", tmp_path / "gradients.pt"
    model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", dtype=torch.float32)
    model.save_pretrained(directory)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(_sharded, (port, str(directory), str(out)), nprocs=2)
    loss, whole = gradients_of(SegmentRewardModel.from_pretrained(directory))
    sharded_loss, sharded = torch.load(out)
    assert sharded_loss == loss
    assert sharded.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
