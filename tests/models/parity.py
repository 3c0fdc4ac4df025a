"""What every native network's tests share: random weights, relative error, names and plans held against the network."""

import inspect
from collections.abc import Mapping
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from models.names import NameMap
from models.plan import ParallelPlan


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Random numbers in every parameter, biases, gains and tables too, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.7 * noise / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def listen(network: nn.Module, *parts: str, gain: float) -> None:
    """Larger numbers in the parameters whose names contain one of the parts, so that attention prefers some tokens."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if any(part in name for part in parts):
                parameter.mul_(gain)


def rel_l2(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, which must have one shape and be finite."""
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


def assert_names_map(ours: nn.Module, theirs: Mapping[str, Tensor], names: NameMap) -> None:
    """Every published tensor has one of ours of the same shape, and the other way round, with nothing left over."""
    mine = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    published = {names.to_native(name): tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(published) == len(theirs)
    assert published == mine
    assert {names.to_published(name) for name in mine} == set(theirs)


def assert_plan_fits(network: nn.Module, plan: ParallelPlan) -> None:
    """Every name of a plan is found in the network: stacks, arguments, and linears by pattern."""
    modules = dict(network.named_modules())
    for stack in plan.stacks:
        blocks = modules[stack.blocks]
        assert isinstance(blocks, nn.ModuleList)
        assert len(blocks) > 0
        arguments = inspect.signature(blocks[0].forward).parameters
        assert {*stack.sharded, *stack.replicated, *stack.outputs} <= set(arguments)
        assert set(stack.outputs) <= set(stack.sharded)
    for pattern in (*plan.column, *plan.row):
        found = [name for name in modules if fnmatch(name, pattern)]
        assert found, pattern
        assert all(isinstance(modules[name], nn.Linear) for name in found), pattern
    for pattern in plan.head_norms:
        found = [name for name in modules if fnmatch(name, pattern)]
        assert found, pattern
        assert all([p.ndim for p in modules[name].parameters()] == [1] for name in found), pattern
    assert plan.heads is None or hasattr(network.config, plan.heads)
