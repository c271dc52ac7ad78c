"""One function that calls every op, as one graph."""

import ast
import inspect
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import segkernels as sk
from segkernels import backend

V, D = 17, 8


def everything(hidden, weight, bias, targets, rewards, values, old, mask, normalizer):
    """(a loss, everything else), from hidden states and rewards to losses."""
    temperature = 0.7
    logits = hidden @ weight.T + bias
    entropy = sk.entropy_from_logits(logits, mask=mask)
    logprobs, again = sk.logprobs_and_entropy(logits, targets, temperature, mask)
    linear, and_again = sk.linear_logprobs_and_entropy(
        hidden, weight, targets, bias=bias, temperature=temperature, mask=mask
    )
    states = sk.vocab_shard_stats(logits, targets, 0, temperature, mask)
    merged = sk.merge_vocab_stats(states[None], logits, targets, 0, temperature, mask)
    ends = sk.segment_ends(entropy, threshold=1.5, mask=mask)
    offsets = sk.segment_offsets(ends, mask=mask)
    scores = sk.segment_scores(rewards, ends, mask=mask)
    preference = sk.segment_bradley_terry(rewards, ends, center_coef=0.1, mask=mask)
    token_rewards = sk.scatter_segment_rewards(rewards, ends, normalizer=normalizer, mask=mask)
    estimate = sk.gae(token_rewards, values, mask=mask)
    whole = sk.segment_advantages(
        rewards, ends, logprobs, old, values, normalizer=normalizer, mask=mask
    )
    at_once = sk.segment_ends_and_advantages(
        entropy, rewards, logprobs, old, values, threshold=1.5, normalizer=normalizer, mask=mask
    )
    advantages = sk.whiten(whole[0], mask)
    policy = sk.policy_loss(linear, old, advantages, mask, entropy=entropy, entropy_coef=0.01)
    value = sk.value_loss(values, values.detach() - 0.1, whole[1], mask=mask)
    fused = sk.linear_policy_loss(
        hidden,
        weight,
        targets,
        old,
        advantages,
        bias=bias,
        temperature=temperature,
        mask=mask,
    )
    losses = (
        scores.sum(),
        preference.loss,
        policy.loss,
        value,
        fused.loss,
        and_again.sum(),
        *(x.sum() for x in merged),
    )
    rest = (
        ends,
        *offsets,
        *preference[1:],
        *policy[1:],
        token_rewards,
        *estimate,
        *whole,
        *at_once,
        advantages,
    )
    return sum(losses) + entropy.sum() + again.sum(), (*rest, *fused[1:])


def draw(rows, length, seed):
    g = torch.Generator().manual_seed(seed)
    shape = rows, length

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g)

    leaves = normal(*shape, D), normal(V, D), normal(V), normal(*shape), normal(*shape)
    hidden, weight, bias, rewards, values = (x.requires_grad_() for x in leaves)
    targets = torch.randint(0, V, shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.8
    old = normal(*shape, scale=0.1) - 2.8
    return hidden, weight, bias, targets, rewards, values, old, mask


def run(function, args, normalizer):
    loss, rest = function(*args, normalizer)
    leaves = [x for x in args if x.requires_grad]
    return loss.detach(), *rest, *torch.autograd.grad(loss, leaves)


def test_every_op_in_one_graph():
    torch._dynamo.reset()
    counters.clear()
    # aot_eager: inductor's C++ compiler would take half a minute.
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, (rows, length) in enumerate([(4, 9), (6, 12), (8, 7), (2, 31)]):
        # Nothing is compiled again for other sizes or another fit.
        normalizer = sk.LocationNormalizer(0.8 + seed, 0.5, 0.3, 2.5)
        args = draw(rows, length, seed)
        for a, b in zip(*(run(f, args, normalizer) for f in (compiled, everything)), strict=True):
            assert torch.equal(a, b)
    assert counters["stats"]["unique_graphs"] == 1


def test_everything_is_every_op():
    source = inspect.getsource(everything)
    # Its update changes a normaliser, and has a test of its own.
    ops = set(backend.DEVICES) - {"RunningLocationNormalizer"}
    assert {op for op in ops if f"sk.{op}(" not in source} == set()


def test_a_running_normalizer_in_one_graph():
    def step(rewards, ends, mask, normalizer):
        normalizer.update(rewards, ends, mask)
        return sk.scatter_segment_rewards(rewards, ends, mask, normalizer=normalizer)

    g = torch.Generator().manual_seed(0)
    running, again = (sk.RunningLocationNormalizer(bins=10, min_std=0.1) for _ in range(2))
    for normalizer in (running, again):
        normalizer.update(torch.arange(9.0)[None], *torch.ones(2, 1, 9, dtype=torch.bool))
        normalizer.refit()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        rewards = torch.randn(4, 9, generator=g)
        mask = torch.rand(4, 9, generator=g) < 0.9
        ends = mask & (torch.rand(4, 9, generator=g) < 0.4)
        out = compiled(rewards, ends, mask, running)
        assert torch.equal(out, step(rewards, ends, mask, again))
        assert running == again
        assert running.refit().line == again.refit().line


def test_every_operator_has_a_check():
    """torch.library.opcheck is called in some test for every operator that is registered."""
    handles = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("segkernels.")]:
        for name, value in vars(module).items():
            operator = getattr(value, "_opoverload", value)  # of torch.library.custom_op
            if isinstance(operator, torch._ops.OpOverload):
                handles[name] = operator._schema.name
    checked = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.library.opcheck":
                checked.add(handles.get(ast.unparse(node.args[0])))
    registered = torch._C._dispatch_get_all_op_names()
    assert {op for op in registered if op.startswith("segkernels::")} - checked == set()
