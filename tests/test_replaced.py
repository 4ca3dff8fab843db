"""Convolution, linear layer and norms as they are replaced while a model runs.

The oracles are torch's own functions in plain autograd, whose first and second derivatives are right
for one task, and finite differences for the third.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_optim as iopt
from implicit_optim._evaluation.replaced import TABLE, recording, replaced

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
    "instance norm": (nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 5)),
    "instance norm without weights": (nn.InstanceNorm1d(3), (4, 3, 5)),
    "layer norm": (nn.LayerNorm(5, eps=0.3), (4, 3, 5)),
    "layer norm over two sides": (nn.LayerNorm((3, 5)), (4, 3, 5)),
    "layer norm without bias": (nn.LayerNorm(5, bias=False), (4, 5)),
    "group norm": (nn.GroupNorm(2, 4), (3, 4, 5)),
    "group norm without weights": (nn.GroupNorm(2, 4, affine=False), (3, 4, 2, 2)),
}

LEARNED = [name for name, (layer, _) in CASES.items() if list(layer.parameters())]


NORMS = [name for name in CASES if "norm" in name]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def case(name):
    torch.manual_seed(0)
    layer, shape = CASES[name]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64) + 2
    return layer, x, {n: torch.randn_like(p) for n, p in layer.named_parameters()}


def plainly(layer):
    return lambda state, x: functional_call(layer, state, (x,))


def ours(layer):
    return lambda state, x: replaced(plainly(layer), state, x)


def derivatives(call, state, x, directions, *, wrt_x):
    """Value, gradient and Hessian product of a cubic of the layer's output."""
    leaves = {name: t.clone().requires_grad_() for name, t in state.items()}
    x = x.clone().requires_grad_(wrt_x)
    wrt = [*leaves.values(), x] if wrt_x else [*leaves.values()]
    y = call(leaves, x)
    total = (y**3 / 3 + y.sin()).sum()
    slopes = torch.autograd.grad(total, wrt, create_graph=True)
    with torch.no_grad():
        products = torch.autograd.grad(slopes, wrt, directions[: len(wrt)], materialize_grads=True)
    return [y, *slopes, *products]


@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "wrt_x"),
    [*((name, True) for name in CASES), *((name, False) for name in LEARNED)],
)
def test_a_layer_has_the_derivatives_of_torch(name, wrt_x, taken):
    """In every form: written out, torch's own, ours."""
    layer, x, state = case(name)
    directions = [*(torch.randn_like(t) for t in state.values()), torch.randn_like(x)]
    with recording(taken):
        found = derivatives(ours(layer), state, x, directions, wrt_x=wrt_x)
    theirs = derivatives(plainly(layer), state, x, directions, wrt_x=wrt_x)
    for a, b in zip(found, theirs, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_of_tasks_is_a_loop_over_them(name, taken):
    """Under vmap tasks are channels of one layer; data that all tasks share is expanded."""
    layer, x, state = case(name)
    x = torch.randn(3, *x.shape, dtype=torch.float64)
    state = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in state.items()}
    directions = [torch.randn_like(t) for t in [*state.values(), x]]
    with recording(taken):
        got = derivatives(vmap(ours(layer)), state, x, directions, wrt_x=True)
        shared = vmap(ours(layer), in_dims=(0, None))(state, x[1])
    own = plainly(layer)
    for i in range(3):
        task = {n: t[i] for n, t in state.items()}
        one = derivatives(own, task, x[i], [d[i] for d in directions], wrt_x=True)
        assert relative_error(shared[i], own(task, x[1])) < 1e-12
        for a, b in zip(got, one, strict=True):
            assert relative_error(a[i], b) < 1e-12


@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d in groups, dilated", "linear", "batch norm 2d", "layer norm"]
)
def test_batches_of_batches(name):
    layer, x, state = case(name)
    x = torch.randn(2, 3, *x.shape, dtype=torch.float64)
    state = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in state.items()}
    with recording(2):
        got = vmap(vmap(ours(layer)), in_dims=(None, 0))(state, x)
    for i in range(2):
        for j in range(3):
            one = plainly(layer)({n: t[j] for n, t in state.items()}, x[i, j])
            assert relative_error(got[i, j], one) < 1e-12


def third(layer, state, x):
    """Whether the third derivative of a layer is a finite difference of the second."""
    state = {name: t.clone().requires_grad_() for name, t in state.items()}

    def second(x):
        y = layer(state, x) / 3
        (slope,) = torch.autograd.grad((y**3 / 3 + y.sin()).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x, create_graph=True)[0].sin().sum()

    return torch.autograd.gradcheck(second, x.clone().requires_grad_(), raise_exception=False)


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("name", [*NORMS, "conv2d", "conv1d", "conv2d in groups, dilated"])
def test_a_third_derivative_is_right(name, taken):
    layer, x, state = case(name)
    with recording(taken):
        assert third(ours(layer), state, x)


@pytest.mark.parametrize("name", ["batch norm 2d", "instance norm", "layer norm"])
def test_torch_has_no_right_third_derivative_of_a_norm(name):
    """On the day that this fails, the norm needs no replacement for its derivatives' sake."""
    layer, x, state = case(name)
    try:
        right = third(plainly(layer), state, x)
    except RuntimeError as error:
        right = "3rd+ order" not in str(error)
    assert not right


def test_torch_has_no_derivative_in_given_statistics():
    """On the day that this fails, eval mode needs no replacement."""
    x, mean, var = torch.randn(4, 3), torch.randn(3).requires_grad_(), torch.rand(3) + 1
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument"):
        F.batch_norm(x, mean, var)
    (slope,) = torch.autograd.grad(replaced(F.batch_norm, x, mean, var).sum(), mean)
    torch.testing.assert_close(slope, -4 * (var + 1e-5).rsqrt())


def test_the_oldest_torch_has_a_wrong_group_norm():
    """A batch of second derivatives is wrong before 2.14: from there on the entry is needless."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    oldest = re.search(r'"torch>=(\d+)\.(\d+)', project.read_text("utf-8"))
    assert tuple(map(int, oldest.groups())) < (2, 14)


class Launches(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "linear", "batch norm 2d"])
def test_a_product_of_ours_takes_fewer_operations(name):
    """On the day that this fails, torch is as cheap, and the replacement is needless."""
    layer, x, state = case(name)
    x = torch.randn(3, *x.shape, dtype=torch.float64)
    state = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in state.items()}
    counts = []
    for call in (ours(layer), plainly(layer)):
        leaves = [t.clone().requires_grad_() for t in (*state.values(), x)]
        of_task = lambda *own, call=call: call(dict(zip(state, own[:-1], strict=True)), own[-1])  # noqa: E731
        with recording(2):
            y = vmap(of_task)(*leaves)
        slopes = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        with Launches() as launches, torch.no_grad():
            torch.autograd.grad(slopes, leaves, leaves)
        counts.append(launches.count)
    assert counts[0] < counts[1], counts


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_of_a_layer_under_vmap(bias):
    """torch does not see it where a linear layer has a bias; on that day the entry loses a line."""
    layer, x = nn.Linear(3, 2, bias=bias), torch.randn(4, 5, 3)
    state = {n: torch.randn(4, *p.shape) for n, p in layer.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        assert vmap(plainly(layer))(state, x).dtype == (torch.float32 if bias else torch.bfloat16)
        y = vmap(ours(layer))(state, x)
        one = layer(x[0])
    assert y.dtype == one.dtype == torch.bfloat16
    exact = x.double() @ state["weight"].double().mT
    exact = exact + state["bias"].double().unsqueeze(1) if bias else exact
    assert relative_error(y.double(), exact) < 1e-2


def test_autocast_of_a_convolution_under_vmap():
    """torch does not see it there; on the day that this fails the entry loses its cast."""
    layer, x = nn.Conv2d(1, 2, 3), torch.randn(4, 2, 1, 5, 5)
    state = {n: torch.randn(4, *p.shape) for n, p in layer.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        assert vmap(plainly(layer))(state, x).dtype == torch.float32
        y = vmap(ours(layer))(state, x)
        one = functional_call(layer, {n: t[2] for n, t in state.items()}, (x[2],))
    assert y.dtype == one.dtype == torch.bfloat16
    assert relative_error(y[2].double(), one.double()) < 1e-2


def test_autocast_of_a_convolution_is_torchs():
    """It casts for torch's own function; ours would compute another one."""
    layer, x = nn.Conv2d(1, 2, 3), torch.randn(2, 1, 5, 5)
    with torch.autocast("cpu", torch.bfloat16), recording(2):
        y = ours(layer)({}, x)
    assert y.dtype == torch.bfloat16 and type(y.grad_fn).__name__ != "_ConvolutionBackward"


def test_the_mode_is_active_around_the_model_alone():
    """Neither the solver's own operations nor the user's outside are looked up."""
    assert torch.overrides._get_current_function_mode_stack() == []
    depths = []

    class Looking(nn.Linear):
        def forward(self, x):
            depths.append(len(torch.overrides._get_current_function_mode_stack()))
            return super().forward(x)

    def loss(output, target):
        depths.append(len(torch.overrides._get_current_function_mode_stack()))
        return F.mse_loss(output, target)

    def told(*_):
        depths.append(-len(torch.overrides._get_current_function_mode_stack()))

    meta = iopt.MetaLearner(Looking(2, 1), loss, solver=iopt.gd(lr=0.1, max_steps=2), on_solve=told)
    batch = torch.randn(3, 4, 2), torch.randn(3, 4, 1)
    meta(batch, batch).mean().backward()
    assert set(depths) == {1, 0}
    assert torch.overrides._get_current_function_mode_stack() == []


def test_every_entry_has_a_reason():
    """Each file of entries begins with why: torch is wrong, torch lacks it, or ours is faster."""
    folder = Path(iopt.__file__).parent / "_evaluation" / "replaced"
    files = [
        path
        for path in folder.glob("*.py")
        if "import TABLE" in path.read_text("utf-8") or "@replaces" in path.read_text("utf-8")
    ]
    reasons = {path.name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for path in files}
    for name, reason in reasons.items():
        told = any(why in reason for why in ("is wrong", "lacks it", "is faster"))
        assert told or name == "__init__.py", name
    assert len(reasons) > 5 and len(TABLE) > 25


def test_hooks_of_a_layer_are_called():
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    meta = iopt.MetaLearner(model, nn.functional.mse_loss, solver=iopt.gd(lr=0.1, max_steps=2))
    meta.adapt((torch.randn(1, 3, 1, 5, 5), torch.randn(1, 3, 2, 3, 3)))
    assert seen == [nn.Conv2d] * 2


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
