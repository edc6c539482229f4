"""The pure functions against their formulas, by autograd or by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from vramplan.retain.anchored import AnchoredPenalties
from vramplan.retain.early_stop import should_stop
from vramplan.retain.ewc import ewc_penalty, fisher_of
from vramplan.retain.interpolate import interpolated
from vramplan.retain.kl import CHUNK_TOKENS, kl_to_base
from vramplan.retain.l2sp import l2sp_penalty
from vramplan.retain.layer_lr import rate_groups, rate_share


def test_penalties_give_their_own_gradient():
    start, fisher = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    for penalty in (lambda d: l2sp_penalty(d, 0.3), lambda d: ewc_penalty(d, fisher, 0.3)):
        weights = torch.randn(7, dtype=torch.float64, requires_grad=True)
        value, gradient = penalty(weights - start)
        (expected,) = torch.autograd.grad(value, weights)
        assert torch.allclose(gradient, expected)


def test_a_fisher_of_ones_is_l2sp():
    distance = torch.randn(5)
    for ours, theirs in zip(ewc_penalty(distance, torch.ones(5), 2.0), l2sp_penalty(distance, 2.0), strict=True):
        assert torch.allclose(ours, theirs)


def test_fisher_is_the_mean_of_squares():
    assert fisher_of([torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])]).tolist() == [5.0, 2.0]


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("max_stiffness", [2.0, math.inf])
def test_the_fisher_diagonal_is_cut_and_has_a_mean_of_one(one_rank, max_stiffness):
    module = torch.nn.Linear(4, 1, bias=False)
    springs = AnchoredPenalties(module, 0, 1, ewc_weight=1.0, max_stiffness=max_stiffness)
    springs.anchor()
    inputs = torch.tensor([1.0, 1.0, 2.0, 10.0])  # the gradient of the sum
    springs.begin_sample(3.0, counts=True)
    (3.0 * module(inputs)).sum().backward()
    springs.end_samples()
    squares = (inputs**2).clamp(max=max_stiffness * float((inputs**2).mean()))
    assert springs.fisher("weight").tolist() == pytest.approx((squares / squares.mean()).tolist())
    assert module.weight.grad is None


@pytest.mark.parametrize("length", [3, CHUNK_TOKENS + 5])
def test_kl_is_torchs_with_its_gradient(length):
    torch.manual_seed(0)
    base = torch.randn(2, length, 11)
    counted = torch.rand(2, length) > 0.3
    ours = torch.randn(2, length, 11, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    value = kl_to_base(ours, base, counted)
    each = torch.nn.functional.kl_div(theirs.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none")
    expected = each.sum(-1)[counted].sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    (value * 3).backward()
    (expected * 3).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert kl_to_base(base, base, counted).item() == pytest.approx(0, abs=1e-4)


def test_rates_fall_from_the_head_to_the_embeddings():
    names = ("lm_head.weight", "model.norm.weight", "model.layers.2.a.weight", "model.layers.0.a.weight")
    assert [rate_share(name, 3, 0.5) for name in names] == [1.0, 1.0, 1.0, 0.25]
    assert rate_share("model.embed_tokens.weight", 3, 0.5) == 0.125
    groups = rate_groups([(name, name) for name in (*names, "model.embed_tokens.weight")], 3, 0.5)
    assert [(group["lr_share"], len(group["params"])) for group in groups] == [(1.0, 3), (0.25, 1), (0.125, 1)]


def test_early_stop_waits_for_its_patience():
    assert not should_stop([1.0], 0.1, 1)
    assert not should_stop([1.0, 1.09], 0.1, 1)  # 9.4 % more perplexity
    assert should_stop([1.0, 1.2], 0.1, 1)
    assert not should_stop([1.0, 1.2], 0.1, 2)
    assert not should_stop([1.0, 1.2, 1.0], 0.1, 2)
    assert should_stop([1.0, 0.9, 1.2, 1.3], 0.1, 2)


def test_interpolation_ends_at_both_models():
    trained, base = torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([3.0, -1.0])
    assert interpolated(trained, base, 0.0).equal(trained)
    assert interpolated(trained, base, 0.25).tolist() == [1.5, 2.0]
    assert interpolated(trained, base, 0.25).dtype is torch.bfloat16
