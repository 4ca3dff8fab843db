"""Replacements of single functions: values and three derivatives, alone and under vmap.

The expected derivatives come from values of torch's own function alone: a polynomial through its values
along a line, and polarisation for mixed directions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replaced_cases import CASES, TASKS, Replacing, close, derivative, directions, from_values

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_values_and_three_derivatives(name):
    case = CASES[name]
    x, along, indices = case.point(), directions(3, case.size), case.indices(0)
    for n in range(4):
        held = [case.held(v) for v in along[:n]]
        expected = from_values(lambda x: case.torch(x, *indices), x, held, case.radius)
        got = derivative(lambda x: case.ours(x, *indices), x, along[:n])
        close(got, expected, (1e-12, 1e-8, 1e-6, 1e-5)[n])


@every_case
@pytest.mark.parametrize("shared", [False, True])
def test_under_vmap(name, shared):
    """Alone, twice over and with derivatives inside, as in a loop."""
    case = CASES[name]
    xs = torch.stack([case.point() for _ in range(TASKS)])
    tasks = [case.indices(0 if shared else task) for task in range(TASKS)]
    stacked = tasks[0] if shared else [torch.stack(t) for t in zip(*tasks, strict=True)]
    dims = (0, *(None if shared else 0 for _ in stacked))
    square = [t if shared else t.unflatten(0, (2, 2)) for t in stacked]
    ways = {
        "vmap": lambda x: torch.vmap(case.ours, dims)(x, *stacked),
        "nested": lambda x: torch.vmap(torch.vmap(case.ours, dims), dims)(
            x.unflatten(0, (2, 2)), *square
        ),
        "loop": lambda x: torch.stack([case.ours(x, *t) for x, t in zip(x, tasks, strict=True)]),
    }
    along = [v.reshape(xs.shape) for v in directions(3, xs.numel())]
    for n in range(4):
        vmapped, nested, looped = (
            derivative(lambda x, way=way: way(x).sum(), xs, along[:n]) for way in ways.values()
        )
        close(vmapped, looped, 1e-11)
        close(nested, looped, 1e-11)
    gradients = torch.vmap(torch.func.grad(case.ours), dims)(xs, *stacked)
    close(
        (gradients * along[0]).sum(),
        derivative(lambda x: ways["loop"](x).sum(), xs, along[:1]),
        1e-11,
    )


@every_case
def test_torch_func(name):
    case = CASES[name]
    x, (u, v, _) = case.point(), directions(3, case.size)
    ours = lambda x: case.ours(x, *case.indices(1))  # noqa: E731
    first, second = (derivative(ours, x, along) for along in ([u], [u, v]))
    close(torch.func.jvp(ours, (x,), (u,))[1], first, 1e-11)
    close(torch.func.grad(ours)(x) @ u, first, 1e-11)
    close(torch.func.jvp(torch.func.grad(ours), (x,), (v,))[1] @ u, second, 1e-11)
    close(torch.func.grad(lambda x: torch.func.grad(ours)(x) @ u)(x) @ v, second, 1e-11)


@pytest.mark.parametrize("padding", [0, -1, 2])
def test_the_padding_row_stays_in_every_task(padding):
    ids = torch.tensor([[0, 4, 2, 1], [2, 0, 0, 4], [4, 4, 2, 0]])
    w = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    with Replacing():
        rows = torch.vmap(lambda w, i: F.embedding(i, w, padding))(w, ids)
    assert torch.equal(rows, torch.stack([w[t, ids[t]] for t in range(3)]))
    (gradient,) = torch.autograd.grad(rows.exp().sum(), w)
    counts = torch.stack([torch.bincount(i, minlength=5) for i in ids])
    counts[:, padding] = 0
    torch.testing.assert_close(gradient, counts.unsqueeze(-1) * w.detach().exp())


@pytest.mark.parametrize("module, function", [(nn.Hardsigmoid, F.hardsigmoid), (nn.Mish, F.mish)])
def test_in_place_is_in_place(module, function):
    x = torch.tensor([-4.0, 1.5, 7.0])
    expected = function(x)
    with Replacing() as mode:
        y = module(inplace=True)(x)
        assert y is x
        torch.testing.assert_close(y, expected)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            function(torch.ones(2, requires_grad=True), inplace=True)
    assert mode.used == [function]
