"""Replacements of single functions: torch is still without them, or wrong."""

import re

import pytest
import torch
import torch.nn.functional as F

from replaced_cases import CASES, TASKS, Replacing, close, derivative, directions, from_values

NEEDLESS = "torch's own {} is right now: remove the entry"

# --------------------------------------------------------------------------------- where torch has NaN

# Of a function at a point where torch's second derivative is NaN the value and the derivatives along two
# directions, by hand.
NORMAL = torch.tensor([0.6, 0.8])

AT_EXTREMES = {
    "mish": (F.mish, 100.0 * torch.ones(2), [200.0, 5.0, 0.0]),
    "logaddexp": (lambda x: torch.logaddexp(*x), torch.tensor([-100.0, 20.0]), [20.0, 3.0, 0.0]),
    "logaddexp, back": (
        lambda x: torch.logaddexp(*x),
        torch.tensor([200.0, 20.0]),
        [200.0, 2.0, 0.0],
    ),
    "normalize": (lambda x: F.normalize(x, dim=0, eps=0.5), torch.zeros(2), [0.0, 10.0, 0.0]),
    "cosine_similarity": (
        lambda x: F.cosine_similarity(x, NORMAL, 0, eps=0.5),
        torch.zeros(2),
        [0.0, (2 * 0.6 + 3 * 0.8) / 0.5, 0.0],
    ),
    "cosine_similarity, both": (
        lambda x: F.cosine_similarity(x, x, 0, eps=0.5),
        torch.zeros(2),
        [0.0, 0.0, 2 * (2 * 5 + 3 * -7) / 0.25],
    ),
}


@pytest.mark.parametrize("name", AT_EXTREMES)
def test_where_torch_has_nan(name):
    fn, x, expected = AT_EXTREMES[name]
    along = [torch.tensor([2.0, 3.0]), torch.tensor([5.0, -7.0])]

    def number(x):
        return fn(x).sum()

    def ours(x):
        with Replacing():
            return number(x)

    for n in range(3):
        close(derivative(ours, x, along[:n]), torch.tensor(expected[n]), 1e-6)
    vmapped = derivative(lambda x: torch.vmap(ours)(x.view(1, -1)).sum(), x, along)
    close(vmapped, torch.tensor(expected[2]), 1e-6)
    close(derivative(number, x, along[:1]), torch.tensor(expected[1]), 1e-6)
    assert derivative(number, x, along).isnan(), NEEDLESS.format(name)


def test_dead_features_do_not_make_a_hessian_nan():
    """A row of zeros after a ReLU has no influence, as in the first derivative."""
    x, w = torch.randn(3, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    x[1] = -x[0].abs()
    ours = lambda x: F.normalize((x.abs() @ w * x.sign()).relu()).exp().sum()  # noqa: E731
    with Replacing():
        hessian = torch.func.hessian(ours)(x)
    alone = torch.func.hessian(ours)(x[2:])
    assert torch.equal(hessian[1], 0 * hessian[1])
    close(hessian[2, :, 2], alone[0, :, 0], 1e-12)


# --------------------------------------------------------------------------------- they are still needed


@pytest.mark.parametrize(
    "name, message",
    [
        ("hardsigmoid", "hardsigmoid_backward is not implemented"),
        ("embedding_bag sum", "_embedding_bag_backward' is not implemented"),
        ("embedding_bag weights", r"_embedding_bag\w*_backward\S* is not implemented"),
    ],
)
def test_torch_still_lacks(name, message):
    case = CASES[name]
    x, along, indices = case.point(), directions(2, case.size), case.indices(0)
    try:
        derivative(lambda x: case.torch(x, *indices), x, along)
    except RuntimeError as error:
        assert re.search(message, str(error))
    else:
        pytest.fail(NEEDLESS.format(name))


@pytest.mark.parametrize(
    "name",
    ["weight_norm 0"],
)
def test_torch_is_still_wrong(name):
    case = CASES[name]
    x, along, indices = case.point(), directions(2, case.size), case.indices(0)
    torchs = lambda x: case.torch(x, *indices)  # noqa: E731
    error = derivative(torchs, x, along) - from_values(torchs, x, along, case.radius)
    assert error.abs() > 1e-3, NEEDLESS.format(name)


@pytest.mark.parametrize("name", ["embedding", "torch.embedding", "select_scatter"])
def test_torch_is_still_wrong_under_vmap(name):
    case = CASES[name]
    xs = torch.stack([case.point() for _ in range(TASKS)]).requires_grad_()
    tasks = [case.indices(task) for task in range(TASKS)]
    stacked = [torch.stack(t) for t in zip(*tasks, strict=True)]
    vmapped = torch.vmap(case.torch)(xs, *stacked)
    looped = torch.stack([case.torch(x, *t) for x, t in zip(xs, tasks, strict=True)])
    close(vmapped, looped, 1e-12)
    g, h = (torch.autograd.grad(values.sum(), xs)[0] for values in (vmapped, looped))
    assert (g - h).abs().max() > 1e-3, NEEDLESS.format(name)


def test_gradients_scaled_by_frequency_are_still_of_no_function():
    ids, w = torch.tensor([0, 0, 1]), torch.randn(3, 2, dtype=torch.float64)
    fn = lambda w: F.embedding(ids, w, scale_grad_by_freq=True).sum(0).pow(3).sum()  # noqa: E731
    u, v = directions(2, 6)
    u, v = u.view(3, 2), v.view(3, 2)
    forth, back = derivative(fn, w, [u, v]), derivative(fn, w, [v, u])
    assert (forth - back).abs() > 1e-3, NEEDLESS.format("scale_grad_by_freq")
