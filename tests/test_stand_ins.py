"""Layers that stand in for torch's inside a solve: torch's own values, gradients and Hessian products.

The oracle is torch's layer in plain autograd, whose second derivatives are right for one task.
"""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

import implicit_optim as iopt
from implicit_optim._layers import STAND_INS, recording
from implicit_optim._layers._base import solving
from implicit_optim._module import _PLAIN, _View

CASES = {
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 7)),
    "conv2d": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 7, 6)),
    "conv2d without bias": (nn.Conv2d(2, 3, (2, 3), bias=False), (4, 2, 5, 6)),
    "conv2d in groups, dilated": (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (3, 4, 7, 8)),
    "conv2d of gray images": (
        nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (4, 1, 7, 6),
    ),
    "conv2d of gray images without bias": (nn.Conv2d(1, 4, 2, bias=False), (4, 1, 5, 6)),
    "conv2d of gray images, few outputs": (nn.Conv2d(1, 3, 2), (4, 1, 5, 6)),
    "conv2d, padding=same": (nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 5, 5)),
    "conv2d, reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (4, 2, 5, 5)),
    "conv3d": (nn.Conv3d(2, 2, 2), (2, 2, 3, 4, 3)),
    "linear": (nn.Linear(2, 3), (4, 2)),
    "linear without bias": (nn.Linear(2, 3, bias=False), (4, 2)),
    "linear of sequences": (nn.Linear(2, 3), (4, 5, 2)),
    "linear of one example": (nn.Linear(2, 3), (2,)),
    "batch norm 1d": (nn.BatchNorm1d(3, track_running_stats=False), (5, 3)),
    "batch norm of sequences": (nn.BatchNorm1d(3, track_running_stats=False), (4, 3, 5)),
    "batch norm 2d": (nn.BatchNorm2d(3, track_running_stats=False, eps=0.3), (4, 3, 2, 5)),
    "batch norm 3d": (nn.BatchNorm3d(2, track_running_stats=False), (3, 2, 2, 3, 2)),
    "batch norm without weights": (
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        (4, 3, 2, 5),
    ),
    "batch norm in eval mode": (nn.BatchNorm2d(3).eval(), (4, 3, 2, 5)),
}

LEARNED = [name for name, (layer, _) in CASES.items() if list(layer.parameters())]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def derivatives(call, state, x, directions, *, wrt_x):
    """Value, gradient and Hessian product of a cubic of the layer's output."""
    leaves = {name: t.clone().requires_grad_() for name, t in state.items()}
    x = x.clone().requires_grad_(wrt_x)
    wrt = [*leaves.values(), x] if wrt_x else [*leaves.values()]
    y = call(leaves, x)
    total = (y**3 / 3 + y.sin()).sum()
    slopes = torch.autograd.grad(total, wrt, create_graph=True)
    products = torch.autograd.grad(slopes, wrt, directions[: len(wrt)])
    return [y, *slopes, *products]


@pytest.mark.parametrize(
    ("name", "wrt_x"),
    [*((name, True) for name in CASES), *((name, False) for name in LEARNED)],
)
def test_a_layer_has_the_derivatives_of_torch(name, wrt_x):
    torch.manual_seed(0)
    layer, shape = CASES[name]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64) + 2
    state = {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    directions = [*(torch.randn_like(t) for t in state.values()), torch.randn_like(x)]
    view = _View(layer)
    assert type(view.module) in STAND_INS.values()
    own = lambda leaves, x: torch.func.functional_call(layer, leaves, (x,))  # noqa: E731
    with recording(2):
        ours = derivatives(view, state, x, directions, wrt_x=wrt_x)
    theirs = derivatives(own, state, x, directions, wrt_x=wrt_x)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_of_tasks_is_a_loop_over_them(name):
    """Under vmap tasks are channels of one layer; data that all tasks share is expanded."""
    torch.manual_seed(0)
    layer, shape = CASES[name]
    view = _View(layer.double())
    x = torch.randn(3, *shape, dtype=torch.float64)
    state = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in layer.named_parameters()}
    batched = torch.func.vmap(view, in_dims=(0, 0))
    directions = [torch.randn_like(t) for t in [*state.values(), x]]
    with recording(2):
        got = derivatives(batched, state, x, directions, wrt_x=True)
        shared = torch.func.vmap(view, in_dims=(0, None))(state, x[1])
    own = lambda leaves, x: torch.func.functional_call(layer, leaves, (x,))  # noqa: E731
    for i in range(3):
        task = {n: t[i] for n, t in state.items()}
        one = derivatives(own, task, x[i], [d[i] for d in directions], wrt_x=True)
        assert relative_error(shared[i], own(task, x[1])) < 1e-12
        for a, b in zip(got, one, strict=True):
            assert relative_error(a[i], b) < 1e-12


@pytest.mark.parametrize("name", ["conv2d", "conv2d in groups, dilated", "linear", "batch norm 2d"])
def test_batches_of_batches(name):
    torch.manual_seed(0)
    layer, shape = CASES[name]
    view = _View(layer.double())
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    state = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in layer.named_parameters()}
    with recording(2):
        got = torch.func.vmap(torch.func.vmap(view), in_dims=(None, 0))(state, x)
        for i in range(2):
            for j in range(3):
                one = view({n: t[j] for n, t in state.items()}, x[i, j])
                assert relative_error(got[i, j], one) < 1e-12


def test_autocast_is_left_to_torch():
    """It casts for torch's own convolution; ours would compute another function."""
    view, x = _View(nn.Conv2d(1, 2, 3)), torch.randn(2, 1, 5, 5)
    with torch.autocast("cpu", torch.bfloat16), recording(2):
        y = view({}, x)
    assert y.dtype == torch.bfloat16 and type(y.grad_fn).__name__ != "_ConvolutionBackward"


def test_nobody_stands_in_outside_of_a_solve():
    """There a third derivative may be asked for, and forward mode."""
    view = _View(nn.Conv2d(1, 2, 3))
    x = torch.randn(2, 1, 5, 5)
    assert not solving(x)
    assert type(view({}, x).grad_fn).__name__ == "ConvolutionBackward0"
    with recording(2):
        assert type(view({}, x).grad_fn).__name__ == "_ConvolutionBackward"
        with recording(2):
            pass
        assert solving(x)
    assert not solving(x)


def test_the_users_module_keeps_its_class():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    meta = iopt.MetaLearner(
        model,
        nn.functional.mse_loss,
        solver=iopt.gd(lr=0.1, max_steps=1),
        meta_gradient=iopt.Implicit(curvature=iopt.GaussNewton),
    )
    batch = torch.randn(2, 3, 1, 5, 5), torch.randn(2, 3, 2, 3, 3)
    meta(batch, batch).sum().backward()
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d]


def test_hooks_of_a_layer_are_called():
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    meta = iopt.MetaLearner(model, nn.functional.mse_loss, solver=iopt.gd(lr=0.1, max_steps=2))
    meta.adapt((torch.randn(1, 3, 1, 5, 5), torch.randn(1, 3, 2, 3, 3)))
    assert len(seen) == 2


@pytest.mark.parametrize("layer", ["batch norm", "convolution"])
def test_a_layer_says_what_torch_says_of_bad_input(layer):
    model = (
        nn.BatchNorm2d(2, track_running_stats=False)
        if layer == "batch norm"
        else nn.Conv2d(2, 2, 3)
    )
    meta = iopt.MetaLearner(model, nn.functional.mse_loss, solver=iopt.gd(lr=0.1, max_steps=1))
    message = "Expected more than 1 value per channel" if layer == "batch norm" else "Kernel size"
    shape = (1, 1, 2, 1, 1)
    with pytest.raises((RuntimeError, ValueError), match=message):
        meta.adapt((torch.randn(shape), torch.randn(shape)))


@pytest.fixture
def images():
    """A convolutional network with batch norm as an inner problem of two tasks, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.Softplus(),
        nn.Conv2d(2, 2, 2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(2 * 2 * 2, 2),
    ).double()
    meta = iopt.MetaLearner(model, nn.functional.cross_entropy, solver=iopt.gd(lr=0.1), lam=0.7)
    x, y = torch.randn(2, 4, 1, 5, 5, dtype=torch.float64), torch.tensor([[0, 1, 1, 0]] * 2)
    theta = ({n: p.detach() for n, p in model.named_parameters()}, meta.proximal())
    init = {n: torch.stack([p, 1.2 * p + 0.1]) for n, p in theta[0].items()}
    problem = iopt.InnerProblem.bind(meta.objective, init, theta, x, y, batch_ndim=1)
    return model, problem, problem.layout.ravel(init)


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_curvature_of_a_model_is_the_dense_one(images, curvature):
    """Oracle: plain autograd on the user's own module, task by task and column by column."""
    model, problem, phi = images
    with torch.no_grad():
        matrix = curvature(problem, phi).as_matrix()
    for i in range(2):
        x, y = problem.data[0][i], problem.data[1][i]
        outputs = lambda p, x=x: torch.func.functional_call(  # noqa: E731
            model, problem.layout.unravel(p), (x,)
        )
        fit = lambda z, y=y: nn.functional.cross_entropy(z, y)  # noqa: E731
        if curvature is iopt.Hessian:
            dense = hessian(lambda p, f=fit, o=outputs: f(o(p)), phi[i])
        else:
            J = torch.func.jacrev(outputs)(phi[i]).flatten(0, 1)
            at = outputs(phi[i]).detach()
            H_out = hessian(fit, at).reshape(J.shape[0], J.shape[0])
            dense = J.mT @ H_out @ J
        dense = dense + 0.7 * torch.eye(len(dense), dtype=dense.dtype)
        assert relative_error(matrix[i], dense) < 1e-12


class Viewing(nn.Module):
    """A network that looks at its activations as if the numbers of a channel lay side by side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3 * 3 * 3, 2)

    def forward(self, x):
        x = self.dropout(self.norm(self.conv(x)))
        return self.head(x.view(len(x), -1))


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_model_that_calls_view(stochastic):
    """It gets its images in the usual order: the same numbers as with reshape, dropout's too."""

    def adapted(forget):
        torch.manual_seed(0)
        model = Viewing().double().train(stochastic)
        meta = iopt.MetaLearner(
            model,
            nn.functional.cross_entropy,
            lam=0.7,
            solver=iopt.gd(lr=0.1, max_steps=3),
            stochastic=stochastic,
            on_solve=iopt.Ignore(),
        )
        x, y = torch.randn(1, 4, 1, 5, 5, dtype=torch.float64), torch.tensor([[0, 1, 1, 0]])
        if not forget:
            _PLAIN.add(model)
        torch.manual_seed(1)
        meta((x, y), (x + 1, y)).sum().backward()
        assert model in _PLAIN
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert relative_error(adapted(forget=True), adapted(forget=False)) < 1e-14


def test_images_are_packed_inside_and_plain_outside():
    strides = []
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].stride()))
    meta = iopt.MetaLearner(model, nn.functional.mse_loss, solver=iopt.gd(lr=0.1, max_steps=1))
    x = torch.randn(1, 2, 1, 7, 7)
    (y,) = meta.predict(meta.adapt((x, torch.randn(1, 2, 4, 3, 3))), x)
    assert set(strides) == {(4 * 5 * 5, 1, 4 * 5, 4)} and y.is_contiguous()


@pytest.mark.parametrize("tasks", [1, 3])
def test_few_images_beside_many_weights_are_not_packed(tasks):
    strides = []
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 64, 3), nn.Conv2d(64, 1, 1))
    model[2].register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].stride(-1)))
    meta = iopt.MetaLearner(model, nn.functional.mse_loss, solver=iopt.gd(lr=0.1, max_steps=1))
    for size, last in ((11, 64 * tasks), (10, 1)):  # 4 * 81 and 4 * 64 numbers, 8 * 288 weights
        x = torch.randn(tasks, 1, 1, size, size)
        meta.adapt((x, torch.zeros(tasks, 1, 1, size - 4, size - 4)))
        assert strides.pop() == last
