"""torch's own checks: finite differences of the solution against both modes, batched too.

The differences are of problems that are solved anew, by the oracle, at every point.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from transforms.cases import FIRST, SECOND, case

CLOSE = {"eps": 1e-5, "atol": 1e-8, "rtol": 1e-8}
# The second derivative of torch 2.13's group norm mixes up the shapes in a batch of gradients
# (`is_grads_batched`, the older vmap); torch 2.15's is right, and so is what stands in for it while a
# model runs, on both.
BROKEN_GROUP_NORM = torch.__version__.startswith("2.13.")


@pytest.mark.parametrize("name", FIRST)
def test_gradcheck(name):
    plane = case(name).plane

    assert gradcheck(
        plane.solved,
        plane.origin.requires_grad_(),
        **CLOSE,
        check_forward_ad=True,
        check_batched_grad=True,
    )


@pytest.mark.xfail(BROKEN_GROUP_NORM, raises=RuntimeError, reason="torch 2.13's own group norm")
def test_torchs_group_norm_takes_a_batch_of_gradients_in_its_second_derivative():
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = F.group_norm(x, 2, weight).pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    v = torch.randn(2, *x.shape, dtype=torch.float64)
    one_by_one = [torch.autograd.grad(first, weight, each, retain_graph=True)[0] for each in v]
    (together,) = torch.autograd.grad(first, weight, v, is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(one_by_one))


@pytest.mark.parametrize("name", SECOND)
def test_gradgradcheck(name):
    plane = case(name).plane
    assert gradgradcheck(
        plane.solved,
        plane.origin.requires_grad_(),
        **CLOSE,
        check_fwd_over_rev=True,
        fast_mode=True,
    )
