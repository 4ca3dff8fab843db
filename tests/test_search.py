"""Step lengths against the closed form for parabolas, per task."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import Armijo, FixedStep

F64 = torch.float64
CURVATURES = st.lists(st.floats(-2, 6), min_size=1, max_size=6).map(
    lambda exponents: torch.tensor([10.0**e for e in exponents], dtype=F64)
)
SETTINGS = st.builds(
    Armijo,
    lr=st.sampled_from([1.0, 0.3, 8.0]),
    c1=st.sampled_from([1e-4, 0.1, 0.5, 0.9]),
    shrink=st.sampled_from([0.5, 0.1, 0.8]),
    max_trials=st.integers(1, 40),
)


def parabola(curvature, slope=-1.0, value=0.0):
    """`t -> value + slope t + curvature t^2 / 2`, which counts its evaluations."""
    calls = []

    def along(t):
        calls.append(t)
        return value + slope * t + curvature * t**2 / 2

    return along, calls


def first_trial(search, curvature, slope=-1.0):
    """Index of the first trial that meets the condition, `t <= 2 (1 - c1) |slope| / curvature`."""
    bound = 2 * (1 - search.c1) * abs(slope) / curvature
    trials = [search.lr * search.shrink**k for k in range(search.max_trials)]
    return next((k for k, t in enumerate(trials) if t <= bound), None)


@given(SETTINGS, CURVATURES)
def test_armijo_takes_the_first_trial_that_descends_enough(search, curvatures):
    along, calls = parabola(curvatures)
    zero = torch.zeros_like(curvatures)
    t, found = search.search(along, zero, zero - 1)
    indices = [first_trial(search, c) for c in curvatures.tolist()]
    expected = [0.0 if k is None else search.lr * search.shrink**k for k in indices]
    assert t.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.tolist() == [k is not None for k in indices]
    assert found.dtype == torch.bool
    last = max(search.max_trials - 1 if k is None else k for k in indices)
    assert len(calls) == last + 1


@given(SETTINGS, CURVATURES, st.floats(-3, 3), st.floats(-100, 100))
def test_armijo_satisfies_the_condition_and_the_trial_before_did_not(
    search, curvatures, log, value
):
    slope, start = -torch.full_like(curvatures, 10**log), torch.full_like(curvatures, value)
    along, _ = parabola(curvatures, slope, value)
    t, found = search.search(along, start, slope)
    rounding = 1e-14 * abs(value) + 1e-300
    excess = along(t) - (start + search.c1 * t * slope)
    assert torch.all(excess[found] <= rounding)
    before = t / search.shrink
    excess = along(before) - (start + search.c1 * before * slope)
    retried = found & (t < search.lr * (1 - 1e-9))
    assert torch.all(excess[retried] > -rounding)
    assert torch.equal(t[~found], torch.zeros_like(t[~found]))


@given(SETTINGS, CURVATURES)
def test_armijo_treats_every_task_alone(search, curvatures):
    zero = torch.zeros_like(curvatures)
    together = search.search(parabola(curvatures)[0], zero, zero - 1)
    for i, curvature in enumerate(curvatures):
        alone = search.search(parabola(curvature)[0], zero[i], zero[i] - 1)
        assert torch.equal(together[0][i], alone[0])
        assert torch.equal(together[1][i], alone[1])


def test_armijo_under_vmap_and_over_several_batch_dimensions():
    curvatures = torch.tensor([[0.1, 3.0, 1e9], [40.0, 500.0, 1.0]], dtype=F64)
    zero = torch.zeros_like(curvatures)
    expected = Armijo().search(parabola(curvatures)[0], zero, zero - 1)
    one = lambda c, z: Armijo().search(parabola(c)[0], z, z - 1)  # noqa: E731
    for got in (torch.func.vmap(one), torch.func.vmap(torch.func.vmap(one))):
        t, found = got(curvatures, zero)
        assert torch.equal(t, expected[0])
        assert torch.equal(found, expected[1])
    assert expected[1].tolist() == [[True, True, False], [True, True, True]]


def test_armijo_backs_out_of_values_that_are_not_finite():
    """The barrier `-log(1 - t)` is inf or NaN from 1 on."""
    nan = lambda t: torch.where(t >= 1, math.nan, -t)  # noqa: E731
    inf = lambda t: torch.where(t >= 1, math.inf, -t)  # noqa: E731
    for along in (nan, inf):
        t, found = Armijo(lr=4.0).search(along, torch.zeros(2), -torch.ones(2))
        assert t.tolist() == [0.5, 0.5]
        assert found.tolist() == [True, True]


def test_armijo_gives_up_on_ascent():
    along, calls = parabola(0.0, slope=1.0)
    t, found = Armijo(max_trials=7).search(along, torch.zeros(3), -torch.ones(3))
    assert t.tolist() == [0.0, 0.0, 0.0]
    assert found.tolist() == [False, False, False]
    assert len(calls) == 7


def test_armijo_gives_up_on_one_task_alone():
    slopes = torch.tensor([-1.0, 1.0, -1.0])
    t, found = Armijo().search(lambda t: slopes * t, torch.zeros(3), -torch.ones(3))
    assert t.tolist() == [1.0, 0.0, 1.0]
    assert found.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_armijo_forgives_rounding_of_the_objective_and_no_more(dtype):
    value = torch.full((2,), 1000.0, dtype=dtype)
    ulp = 1000 * torch.finfo(dtype).eps
    slope = torch.full((2,), -1e-20, dtype=dtype)
    noise = torch.tensor([2 * ulp, 1000 * ulp], dtype=dtype)
    _, found = Armijo().search(lambda t: value + noise, value, slope)
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_fixed_step(batch):
    def never(t):
        raise AssertionError("the objective was evaluated")

    value = torch.zeros(batch, dtype=F64)
    t, found = FixedStep(0.25).search(never, value, value - 1)
    assert torch.equal(t, torch.full(batch, 0.25, dtype=F64))
    assert torch.equal(found, torch.ones(batch, dtype=torch.bool))
    assert FixedStep().lr == 1.0


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (FixedStep, {"lr": 0.0}, "Invalid lr: 0.0: it must be finite and > 0"),
        (FixedStep, {"lr": math.nan}, "Invalid lr: nan"),
        (Armijo, {"lr": -1.0}, "Invalid lr: -1.0: it must be finite and > 0"),
        (Armijo, {"c1": 0.0}, r"Invalid c1: 0.0: it must lie in \(0, 1\)"),
        (Armijo, {"c1": 1.0}, "Invalid c1: 1.0"),
        (Armijo, {"shrink": 1.0}, r"Invalid shrink: 1.0: it must lie in \(0, 1\)"),
        (Armijo, {"shrink": 0.0}, "Invalid shrink: 0.0"),
        (Armijo, {"max_trials": 0}, "Invalid max_trials: 0: it must be >= 1"),
        (FixedStep, {"lr": math.inf}, "Invalid lr: inf"),
        (Armijo, {"lr": math.inf}, "Invalid lr: inf"),
    ],
)
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
