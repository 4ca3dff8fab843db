"""Sinusoids against the closed form, recovered by linear least squares."""

import math

import pytest
import torch

from implicit_optim.tasks import sinusoids


def fit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Find `(a cos b, -a sin b)` `[T, 2]` of `y = a sin(x - b)`."""
    waves = torch.cat([x.sin(), x.cos()], dim=-1)
    return torch.linalg.lstsq(waves, y).solution.squeeze(-1)


def draw(**changes):
    settings: dict = dict(tasks=2000, shots=5, queries=7, seed=0, dtype=torch.float64)
    return sinusoids(**(settings | changes)).sample()


def test_shapes_and_dtype():
    (x, y), (query_x, query_y) = draw(tasks=3, dtype=None)
    assert x.shape == y.shape == (3, 5, 1)
    assert query_x.shape == query_y.shape == (3, 7, 1)
    assert {t.dtype for t in (x, y, query_x, query_y)} == {torch.float32}


def test_support_and_query_lie_on_one_wave_of_the_stated_amplitude_and_phase():
    (x, y), (query_x, query_y) = draw()
    wave = fit(x, y)
    predicted = wave[:, None, :1] * query_x.sin() + wave[:, None, 1:] * query_x.cos()
    torch.testing.assert_close(predicted, query_y, rtol=0, atol=1e-6)
    amplitude = wave.norm(dim=-1)
    phase = torch.atan2(-wave[:, 1], wave[:, 0])
    assert 0.1 - 1e-6 < amplitude.min() and amplitude.max() < 5 + 1e-6
    assert -1e-6 < phase.min() and phase.max() < math.pi + 1e-6


def test_amplitude_phase_and_inputs_are_uniform_and_independent():
    (x, y), (query_x, _) = draw()
    wave = fit(x, y)
    amplitude, phase = wave.norm(dim=-1), torch.atan2(-wave[:, 1], wave[:, 0])
    inputs = torch.cat([x, query_x], dim=1).flatten()
    for values, low, high in ((amplitude, 0.1, 5), (phase, 0, math.pi), (inputs, -5, 5)):
        unit = ((values - low) / (high - low)).sort().values
        steps = torch.arange(1, len(unit) + 1, dtype=torch.float64) / len(unit)
        distance = (unit - steps).abs().max().item()  # Kolmogorov-Smirnov
        assert distance < 1.95 / math.sqrt(len(unit)) + 1 / len(unit)  # p = 0.001
    correlation = torch.corrcoef(torch.stack([amplitude, phase]))[0, 1].item()
    assert abs(correlation) < 3.3 / math.sqrt(2000)


def test_seed_and_resume_decide_the_episodes():
    stream = sinusoids(tasks=2, shots=3, queries=3, seed=1, steps=4)
    assert len(stream) == 4
    reference = [x for (x, _), _ in stream]
    resumed = sinusoids(tasks=2, shots=3, queries=3, seed=1, steps=4)
    passes = iter(resumed)
    next(passes)
    other = sinusoids(tasks=2, shots=3, queries=3, seed=7, steps=4)
    other.load_state_dict(resumed.state_dict())
    remainder = [x for (x, _), _ in other]
    assert torch.equal(torch.stack(remainder), torch.stack(reference[1:]))


@pytest.mark.parametrize("name", ["tasks", "shots", "queries", "steps"])
def test_bad_counts_are_named(name):
    with pytest.raises(ValueError, match=f"Invalid {name}: 0"):
        draw(**{name: 0})
