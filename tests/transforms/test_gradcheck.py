"""torch's own checks: finite differences of the solution against both modes, batched too.

The differences are of problems that are solved anew, by the oracle, at every point.
"""

import pytest
from torch.autograd import gradcheck, gradgradcheck

from transforms.cases import FIRST, SECOND, case


@pytest.mark.parametrize("name", FIRST)
def test_gradcheck(name):
    plane = case(name).plane
    assert gradcheck(
        plane.solved,
        plane.origin.requires_grad_(),
        eps=1e-5,
        atol=1e-8,
        rtol=1e-8,
        check_forward_ad=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("name", SECOND)
def test_gradgradcheck(name):
    plane = case(name).plane
    assert gradgradcheck(
        plane.solved,
        plane.origin.requires_grad_(),
        eps=1e-5,
        atol=1e-8,
        rtol=1e-8,
        check_fwd_over_rev=True,
        fast_mode=True,
    )
