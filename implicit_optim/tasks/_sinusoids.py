"""Sinusoids: the classical few-shot regression tasks."""

from math import pi
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim.tasks._checks import check_positive
from implicit_optim.tasks._stream import Episode, Stream


def sinusoids(
    *,
    tasks: int,
    shots: int,
    queries: int,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Stream:
    r"""Few-shot regression on random sine waves.

    $$y = a \,\sin(x - b), \quad a \sim U[0.1, 5],\; b \sim U[0, \pi],\; x \sim U[-5, 5]$$

    with one amplitude `a` and one phase `b` (radians) a task, no noise.

    Args:
        tasks: T, tasks in an episode.
        shots: support points of each task.
        queries: query points of each task.
        seed: seed of the stream's own generator.
        steps: episodes in one pass; None for a stream without end.
        device: where the episodes are drawn.
        dtype: their dtype; None for torch's default dtype.

    Returns:
        A stream of `(support, query)`: `x [T, shots, 1]`, `y [T, shots, 1]`, and the same with
        `queries` in place of `shots`.

    Raises:
        ValueError: if a count is not positive.

    Examples:
        >>> (x, y), (query_x, query_y) = sinusoids(tasks=4, shots=10, queries=20, seed=0).sample()
        >>> x.shape, y.shape, query_y.shape
        (torch.Size([4, 10, 1]), torch.Size([4, 10, 1]), torch.Size([4, 20, 1]))
        >>> waves = torch.cat([x.sin(), x.cos()], dim=-1)  # y = a cos(b) sin(x) - a sin(b) cos(x)
        >>> fit = torch.linalg.lstsq(waves, y).solution
        >>> [round(a, 2) for a in fit.norm(dim=(1, 2)).tolist()]  # the amplitudes
        [2.53, 3.86, 0.53, 0.75]

    Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks"
    (2017), section 5.1.
    """
    return _Sinusoids(tasks, shots, queries, seed, steps, device, dtype)


@final
class _Sinusoids(Stream):
    def __init__(
        self,
        tasks: int,
        shots: int,
        queries: int,
        seed: int,
        steps: int | None,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        check_positive(tasks=tasks, shots=shots, queries=queries)
        super().__init__(seed=seed, device=device, steps=steps)
        self.tasks, self.shots, self.queries, self.dtype = tasks, shots, queries, dtype

    def sample(self) -> Episode:
        amplitude = self._uniform(0.1, 5.0, 1)
        phase = self._uniform(0.0, pi, 1)
        x = self._uniform(-5.0, 5.0, self.shots + self.queries)
        y = amplitude * torch.sin(x - phase)
        k = self.shots
        return (x[:, :k], y[:, :k]), (x[:, k:], y[:, k:])

    def _uniform(self, low: float, high: float, count: int) -> Float[Tensor, "T count 1"]:
        unit = torch.rand(
            (self.tasks, count, 1),
            generator=self.generator,
            device=self.generator.device,
            dtype=self.dtype,
        )
        return low + (high - low) * unit
