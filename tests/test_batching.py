"""Chunks and threads: the numbers of one batch, under every transform, and who chooses them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jacrev, vmap

import implicit_optim as iopt
from implicit_optim.tasks import MLP, ConvNet
from problems import ridge

WAYS = {
    "threads": iopt.Batching(threads=2),
    "chunks": iopt.Batching(chunk_size=3),
    "loop": iopt.Batching(chunk_size=1),
    "loop in threads": iopt.Batching(chunk_size=1, threads=3),
}
EXACT = iopt.CG(rtol=1e-13, max_steps=200)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def attached(problem, theta, data, batching):
    solver = iopt.newton_cg(linear_solver=EXACT, max_steps=2)
    settings = {"batch_ndim": 1, "batching": batching}
    solution = iopt.minimize(
        problem.objective, problem.init, theta, *data, solver=solver, **settings
    )
    return iopt.attach(
        solution.value, problem.objective, theta, *data, linear_solver=EXACT, **settings
    )


@pytest.mark.parametrize("tasks", [4, 1])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_the_minimiser_and_its_gradient(way, tasks):
    problem = ridge(batch=(tasks,))
    theta = tuple(t.clone().requires_grad_() for t in problem.theta)
    data = tuple(t.clone().requires_grad_() for t in problem.data)
    phi = attached(problem, theta, data, WAYS[way])
    v = torch.randn_like(phi)
    gradients = torch.autograd.grad((v * phi).sum(), (*theta, *data))
    torch.testing.assert_close(phi, problem.minimiser, rtol=1e-9, atol=1e-11)
    expected = problem.meta_gradient(v)
    torch.testing.assert_close(gradients[:2], expected, rtol=1e-8, atol=1e-10)
    for i in range(tasks):  # the data's gradient is each task's own
        alone = tuple(t.detach()[i].clone().requires_grad_() for t in problem.data)
        x, y = alone
        A = x.mT @ x / len(x) + problem.theta[1] * torch.eye(5, dtype=x.dtype)
        one = torch.linalg.solve(A, x.mT @ y / len(x) + problem.theta[1] * problem.theta[0])
        own = torch.autograd.grad(v[i] @ one, alone)
        for ours, theirs in zip(gradients[2:], own, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batch", [(1,), (1, 3), (3, 1)])
def test_a_dimension_of_one_task_is_there_in_all_that_comes_back(batch):
    """It is taken away for the solve: what is reported must be that of the task as one of two."""
    problem, heard = ridge(batch=batch), []
    theta = tuple(t.clone().requires_grad_() for t in problem.theta)
    start, settings = problem.init, {"batch_ndim": len(batch)}
    solver = iopt.gd(lr=0.05, max_steps=20)
    solution = iopt.minimize(
        problem.objective, start, theta, *problem.data, solver=solver, **settings
    )
    assert all(tuple(t.shape) == batch for t in (solution.status, *solution.stats.values()))
    phi = iopt.attach(
        solution.value,
        problem.objective,
        theta,
        *problem.data,
        linear_solver=iopt.CG(max_steps=3),
        on_solve=lambda _, solved: heard.append(solved),
        **settings,
    )
    phi.sum().backward()
    (solved,) = heard
    twice = lambda t: torch.cat([t, t])  # noqa: E731
    pairs = iopt.minimize(
        problem.objective, twice(start), theta, *map(twice, problem.data), solver=solver, **settings
    )
    torch.testing.assert_close(pairs.value[: batch[0]], solution.value, rtol=1e-12, atol=1e-13)
    for name, number in solution.stats.items():
        torch.testing.assert_close(pairs.stats[name][: batch[0]], number, rtol=1e-9, atol=1e-12)
    again = iopt.attach(
        twice(solution.value),
        problem.objective,
        theta,
        *map(twice, problem.data),
        linear_solver=iopt.CG(max_steps=3),
        on_solve=lambda _, solved: heard.append(solved),
        **settings,
    )
    doubled = torch.autograd.grad(again.sum(), theta)
    torch.testing.assert_close(doubled, tuple(2 * t.grad for t in theta), rtol=1e-9, atol=1e-12)
    assert solved.stats["lanczos"].shape == (*batch, 3, 2)
    for name, number in heard[1].stats.items():
        torch.testing.assert_close(number[: batch[0]], solved.stats[name], rtol=1e-8, atol=1e-11)


TRANSFORMS = {
    "grad": lambda f, theta, data: grad(f)(theta, data),
    "vmap": lambda f, theta, data: vmap(f, in_dims=(0, None))(stacked(theta), data),
    "vmap of grad": lambda f, theta, data: vmap(grad(f), in_dims=(0, None))(stacked(theta), data),
    "grad of vmap": lambda f, theta, data: grad(
        lambda t: vmap(lambda a: f((a, t[1]), data))(stacked(t)[0]).sum()
    )(theta),
    "jacfwd": lambda f, theta, data: jacfwd(f)(theta, data),
    "jacrev of jacrev": lambda f, theta, data: jacrev(jacrev(f))(theta, data),
    "jacfwd of jacrev": lambda f, theta, data: jacfwd(jacrev(f))(theta, data),
}


def stacked(theta):
    return tuple(torch.stack([t, 2 * t]) for t in theta)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, way):
    """What `torch.func` keeps belongs to one thread: a second one would not know of it."""
    problem = ridge(batch=(4,))

    def f(theta, data):
        return attached(problem, theta, data, WAYS[way]).sin().sum()

    def exact(theta, data):
        (anchor, lam), (x, y) = theta, data
        A = x.mT @ x / x.shape[1] + lam * torch.eye(5, dtype=x.dtype)
        rhs = (x.mT @ y.unsqueeze(-1)).squeeze(-1) / x.shape[1] + lam * anchor
        return torch.linalg.solve(A, rhs).sin().sum()

    apply = TRANSFORMS[transform]
    ours = apply(f, problem.theta, problem.data)
    theirs = apply(exact, problem.theta, problem.data)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("asked", [None, iopt.Batching(), iopt.Batching(chunk_size=1, threads=2)])
def test_threads_are_taken_where_they_are_asked_for(asked, two_threads):
    """And the numbers are the same; large images on a CPU are no reason to take any by oneself."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = torch.rand(3, 14, 1, 28, 28), torch.tensor([0, 1] * 7).expand(3, 14)
    model = ConvNet(2, filters=2, blocks=2, zero_head=False)
    results, here = [], set()
    model.register_forward_hook(lambda *_: here.add(threading.get_ident()))
    for batching in (asked, iopt.Batching(chunk_size=2)):
        here.clear()
        meta = iopt.MetaLearner(
            model, F.cross_entropy, solver=iopt.gd(lr=0.1, max_steps=3), lam=5.0, batching=batching
        )
        losses = meta((x, y), (x, y))
        results.append((losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))))
        others = here - {threading.get_ident()}
        assert bool(others) == (batching is not None and batching.threads > 1)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("way", WAYS)
def test_inference_mode_reaches_the_threads(way):
    """A thread starts without it, and refuses to differentiate what was made inside."""
    settings = {"solver": iopt.gd(lr=0.1, max_steps=3), "on_solve": iopt.Ignore()}
    meta = iopt.MetaLearner(MLP(2, (3,), 1), F.mse_loss, batching=WAYS[way], **settings)
    episode = torch.randn(4, 5, 2), torch.randn(4, 5, 1)
    expected = meta(episode, episode).detach()
    with torch.inference_mode():
        inside = tuple(t.clone() for t in episode)
        assert torch.equal(meta(inside, inside), expected)
        phi = meta.adapt(inside)
        assert torch.equal(meta.predict(phi, inside[0])[0], meta.predict(phi, episode[0])[0])
    meta(episode, episode).mean().backward()  # and does not stay


def test_settings_out_of_range():
    for settings in ({"chunk_size": 0}, {"chunk_size": -1}, {"threads": 0}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"Invalid {name}: .* must be >= 1"):
            iopt.Batching(**settings)
