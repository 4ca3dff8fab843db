"""MetaLearner: the few lines of the README, against closed forms, on every kind of module."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from implicit_optim._vectors import Layout
from implicit_optim.tasks import ConvNet
from memory import PeakMemory

EXACT = iopt.Implicit(iopt.CG(rtol=1e-13, max_steps=300))
NEWTON = iopt.newton_cg(linear_solver=iopt.CG(rtol=1e-13, max_steps=300), tol=1e-12)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


def regression(tasks=3, examples=6, features=4, outputs=1):
    def batch():
        return torch.randn(tasks, examples, features), torch.randn(tasks, examples, outputs)

    return batch(), batch()


def ridge(theta, lam, support, query):
    """Query loss of one task of linear regression without bias, by dense algebra alone."""
    (x, y), (xq, yq) = support, query
    n = x.shape[-1]
    A = 2 * x.T @ x / len(x)
    phi = torch.linalg.solve(A + lam * torch.eye(n), 2 * x.T @ y[:, 0] / len(x) + lam * theta)
    return ((xq @ phi - yq[:, 0]) ** 2).mean()


@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_loss_and_meta_gradient_of_ridge_regression(double, curvature):
    support, query = regression()
    model = nn.Linear(4, 1, bias=False)
    prox = iopt.Proximal(0.8, learned=True)
    meta = iopt.MetaLearner(
        model, F.mse_loss, solver=NEWTON, lam=prox,
        meta_gradient=iopt.Implicit(iopt.CG(rtol=1e-13, max_steps=99), curvature),
    )  # fmt: skip
    losses = meta(support, query)
    losses.mean().backward()

    theta = model.weight.detach()[0].requires_grad_()
    log_lam = torch.tensor(0.8).log().requires_grad_()
    per_task = [[tuple(t[i] for t in part) for part in (support, query)] for i in range(3)]
    expected = torch.stack([ridge(theta, log_lam.exp(), *task) for task in per_task])
    g, g_lam = torch.autograd.grad(expected.mean(), (theta, log_lam))
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model.weight.grad[0], g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(prox.lam.grad, g_lam, rtol=1e-10, atol=1e-12)


def test_the_curvature_asked_for_is_the_one_used(double):
    """Where Hessian and Gauss-Newton differ: against the dense `lam (G + lam I)^-1 v` of one task."""
    support, query = regression(tasks=1)
    model, lam = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)), 3.0
    layout = Layout.of(dict(model.named_parameters()))
    gradients = {}
    for curvature in (iopt.Hessian, iopt.GaussNewton):
        rule = iopt.Implicit(iopt.CG(rtol=1e-13, max_steps=99), curvature)
        meta = iopt.MetaLearner(model, F.mse_loss, solver=NEWTON, lam=lam, meta_gradient=rule)
        g = torch.autograd.grad(meta(support, query).sum(), list(model.parameters()))
        gradients[curvature] = torch.cat([p.reshape(-1) for p in g])

    with torch.no_grad():
        phi = torch.cat([p.reshape(-1) for p in meta.adapt(support).values()])

    def output(flat, x):
        return torch.func.functional_call(model, layout.unravel(flat), (x,))

    def loss(flat, batch):
        return F.mse_loss(output(flat, batch[0][0]), batch[1][0])

    v = torch.autograd.functional.jacobian(lambda p: loss(p, query), phi)
    J = torch.autograd.functional.jacobian(lambda p: output(p, support[0][0])[:, 0], phi)
    H = torch.autograd.functional.hessian(lambda p: loss(p, support), phi)
    dense = {iopt.Hessian: H, iopt.GaussNewton: 2 / len(J) * J.T @ J}
    assert (dense[iopt.Hessian] - dense[iopt.GaussNewton]).abs().max() > 0.01
    for curvature, matrix in dense.items():
        expected = lam * torch.linalg.solve(matrix + lam * torch.eye(layout.n), v)
        torch.testing.assert_close(gradients[curvature], expected, rtol=1e-8, atol=1e-10)


def test_first_order_is_implicit_with_zero_cg_steps_and_its_closed_form(double):
    support, query = regression()
    solver = iopt.gd(lr=0.1, max_steps=7)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    gradients = []
    for rule in (iopt.FirstOrder(), iopt.Implicit(iopt.CG(max_steps=0))):
        meta = iopt.MetaLearner(model, F.mse_loss, solver=solver, lam=2.0, meta_gradient=rule)
        gradients.append(torch.autograd.grad(meta(support, query).mean(), list(model.parameters())))

    phi = {k: p.detach().expand(3, *p.shape).clone() for k, p in model.named_parameters()}
    closed = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for i in range(3):  # gradient descent and the query gradient, task by task, in plain torch
        net = copy.deepcopy(model)
        anchor = [p.detach().clone() for p in net.parameters()]
        for _ in range(7):
            loss = F.mse_loss(net(support[0][i]), support[1][i])
            loss = loss + sum(
                ((p - a) ** 2).sum() for p, a in zip(net.parameters(), anchor, strict=True)
            )
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p -= 0.1 * g
        loss = F.mse_loss(net(query[0][i]), query[1][i])
        for k, g in zip(phi, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            closed[k] += g / 3
    for first, zero_steps, g in zip(*gradients, closed.values(), strict=True):
        torch.testing.assert_close(first, g, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(zero_steps, g, rtol=1e-12, atol=1e-14)


def test_lam_by_name_reaches_its_parameter(double):
    support, query = regression()
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    lam = {"0.weight": 1e9, "0.bias": 1e9, "2.weight": 0.5, "2.bias": torch.tensor([0.5])}
    quiet = {"meta_gradient": EXACT, "solver": NEWTON, "on_solve": iopt.Ignore()}
    meta = iopt.MetaLearner(model, F.mse_loss, lam=lam, **quiet)
    phi = meta.adapt(support)
    moved = {k: (phi[k] - p).abs().max().item() for k, p in model.named_parameters()}
    assert (
        max(moved["0.weight"], moved["0.bias"])
        < 1e-7
        < 0.1
        < min(moved["2.weight"], moved["2.bias"])
    )

    learned = iopt.Proximal({k: 1.5 for k in lam}, learned=True)
    meta = iopt.MetaLearner(model, F.mse_loss, lam=learned, **quiet)
    parameters = dict(learned.named_parameters())
    assert set(parameters) == {"0/weight", "0/bias", "2/weight", "2/bias"}
    gradients = torch.autograd.grad(meta(support, query).mean(), list(parameters.values()))
    for p, g in zip(parameters.values(), gradients, strict=True):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5
                ends.append(meta(support, query).mean())
                p -= sign * 1e-5
        torch.testing.assert_close(g, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_adapt_and_predict(double):
    support, query = regression()
    meta = iopt.MetaLearner(nn.Linear(4, 1), F.mse_loss, solver=NEWTON, meta_gradient=EXACT)
    before = {k: p.detach().clone() for k, p in meta.state_dict().items()}
    with torch.no_grad():
        phi = meta.adapt(support)
    assert not any(p.requires_grad for p in phi.values())
    outputs = meta.predict(phi, query[0])
    for i in range(3):
        expected = query[0][i] @ phi["weight"][i].T + phi["bias"][i]
        torch.testing.assert_close(outputs[i], expected)
    losses = ((outputs - query[1]) ** 2).mean((1, 2))
    torch.testing.assert_close(meta(support, query), losses, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(p, before[k]) for k, p in meta.state_dict().items())


class Tied(nn.Module):
    """Tied weights, a frozen layer, a 0-d parameter, an unused one and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.tensor(2))

    def forward(self, x):
        return (self.second(torch.tanh(self.first(self.frozen(x)))) * self.scale + self.shift).sum(
            -1
        )


def test_frozen_tied_unused_and_scalar_parameters(double):
    support, query = regression()
    support, query = ((x, y[..., 0]) for x, y in (support, query))
    model = Tied()
    meta = iopt.MetaLearner(
        model,
        F.mse_loss,
        solver=iopt.newton_cg(tol=1e-11, linear_solver=iopt.CG(rtol=1e-12)),
        lam=9.0,
        meta_gradient=EXACT,
    )
    assert set(meta.anchor()) == {"first.weight", "first.bias", "second.bias", "scale", "unused"}
    meta(support, query).mean().backward()
    assert model.frozen.weight.grad is None
    assert torch.equal(model.unused.grad, torch.zeros(2))
    for p in (model.first.weight, model.first.bias, model.second.bias, model.scale):
        direction = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                ends.append(meta(support, query).mean())
                p -= sign * 1e-5 * direction
        torch.testing.assert_close(
            (p.grad * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8
        )


def images(tasks=2, dtype=torch.float32, device="cpu"):
    def batch(shots):
        x = torch.rand(tasks, 5 * shots, 1, 28, 28, dtype=dtype, device=device)
        return x, torch.arange(5, device=device).repeat_interleave(shots).expand(tasks, -1)

    return batch(1), batch(3)


SOLVERS = {
    "gd": iopt.gd(lr=0.1, max_steps=3),
    "agd": iopt.agd(lr=0.1, momentum=0.5, max_steps=3),
    "newton_cg": iopt.newton_cg(max_steps=2),
    "newton_cg, Gauss-Newton": iopt.newton_cg(max_steps=2, curvature=iopt.GaussNewton),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("curvature", [iopt.Hessian, iopt.GaussNewton])
def test_a_whole_meta_step_runs_on_the_meta_device(solver, curvature):
    """The meta device refuses .item() and stray CPU tensors: what it runs, a GPU runs without a stop."""
    model = ConvNet(5, filters=4).to("meta")
    meta = iopt.MetaLearner(
        model, F.cross_entropy, solver=SOLVERS[solver], lam=2.0,
        meta_gradient=iopt.Implicit(curvature=curvature),
    )  # fmt: skip
    opt = torch.optim.Adam(meta.parameters(), lr=1e-3)
    support, query = images(device="meta")
    losses = meta(support, query)
    losses.mean().backward()
    opt.step()
    assert losses.shape == (2,) and losses.device.type == "meta"
    assert all(p.grad.shape == p.shape for p in meta.parameters())


def test_peak_memory_does_not_grow_with_the_inner_steps():
    torch.set_num_threads(1)
    model = ConvNet(5, filters=8)
    support, query = images()

    def peak(steps, rule):
        meta = iopt.MetaLearner(
            model, F.cross_entropy, solver=iopt.gd(lr=0.01, max_steps=steps), meta_gradient=rule,
            on_solve=iopt.Ignore(),
        )  # fmt: skip
        gc.collect()
        with PeakMemory() as memory:
            meta(support, query).mean().backward()
        meta.zero_grad()
        return memory.peak

    implicit = iopt.Implicit(iopt.CG(max_steps=5))
    peak(1, implicit)  # the first solve of a process has glibc keep memory, by a block of its own
    assert peak(32, implicit) <= 1.03 * peak(1, implicit)
    more_cg = iopt.Implicit(iopt.CG(max_steps=40))
    assert peak(1, more_cg) <= 1.03 * peak(1, implicit)


def test_peak_memory_counter_sees_an_unroll():
    def peak(steps):
        with PeakMemory() as memory:
            phi = torch.ones(1000, requires_grad=True)
            for _ in range(steps):
                phi = phi.sin()
            phi.sum().backward()
        return memory.peak

    assert peak(64) > 10 * peak(2)


def test_nothing_is_left_behind_by_many_meta_steps():
    support, query = regression()
    meta = iopt.MetaLearner(nn.Linear(4, 1), F.mse_loss, solver=iopt.gd(lr=0.1, max_steps=2))
    opt = torch.optim.SGD(meta.parameters(), lr=1e-3)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for step in range(200):
        opt.zero_grad()
        meta(support, query).mean().backward()
        opt.step()
        if step in (50, 199):
            counts.append(tensors())
    assert counts[1] <= counts[0]


def test_the_same_seed_gives_the_same_bits():
    support, query = images()
    gradients = []
    for _ in range(2):
        torch.manual_seed(3)
        meta = iopt.MetaLearner(ConvNet(5, filters=4, zero_head=False), F.cross_entropy,
                                solver=iopt.gd(lr=0.1, max_steps=3), lam=2.0,
                                on_solve=iopt.Ignore())  # fmt: skip
        meta(support, query).mean().backward()
        gradients.append([p.grad for p in meta.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nan_in_one_task_is_loud_and_the_other_losses_are_right(double):
    support, query = regression()
    meta = iopt.MetaLearner(nn.Linear(4, 1), F.mse_loss, solver=iopt.gd(lr=0.1, max_steps=5),
                            meta_gradient=iopt.FirstOrder())  # fmt: skip
    clean = meta(support, query)
    support[0][1, 0, 0] = torch.nan
    with pytest.warns(iopt.SolveWarning, match="minimize: 2 of 3 success, 1 nonfinite: .*data"):
        losses = meta(support, query)
    assert losses.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(losses[[0, 2]], clean[[0, 2]], rtol=0, atol=0)


def test_state_dict_round_trip(tmp_path):
    def build():
        return iopt.MetaLearner(nn.Linear(4, 1), F.mse_loss, solver=iopt.gd(lr=0.1, max_steps=2),
                                lam=iopt.Proximal(3.0, learned=True))  # fmt: skip

    one, two = build(), build()
    torch.save(one.state_dict(), tmp_path / "meta.pt")
    two.load_state_dict(torch.load(tmp_path / "meta.pt", weights_only=True))
    support, query = regression()
    assert torch.equal(one(support, query), two(support, query))


def test_any_torch_optimizer_adapts():
    support, query = regression()
    meta = iopt.MetaLearner(
        nn.Linear(4, 1), F.mse_loss, lam=1.0, meta_gradient=iopt.Implicit(iopt.CG(rtol=1e-6)),
        solver=iopt.from_torch(torch.optim.Adam, lr=0.05, max_steps=400),
    )  # fmt: skip
    reference = iopt.MetaLearner(meta.model, F.mse_loss, lam=1.0, meta_gradient=meta.meta_gradient,
                                 solver=iopt.newton_cg(max_steps=5))  # fmt: skip
    gradients = []
    for learner in (meta, reference):
        losses = learner(support, query)
        gradients.append(torch.autograd.grad(losses.mean(), list(meta.model.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_errors_name_the_argument_and_the_remedy():
    solver = iopt.gd(lr=0.1, max_steps=1)
    model = nn.Linear(4, 1)
    support, query = regression()

    def learner(model=model, **kwargs):
        return iopt.MetaLearner(model, F.mse_loss, **{"solver": solver} | kwargs)

    with pytest.raises(TypeError, match=r"model must be an nn.Module, got function"):
        learner(F.relu)
    with pytest.raises(TypeError, match=r"solver must be gd\(...\)"):
        learner(solver="gd")
    with pytest.raises(TypeError, match=r"meta_gradient must be Implicit"):
        learner(meta_gradient="implicit")
    for lam in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Invalid lam: .* finite and > 0"):
            learner(lam=lam)
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \['head'\]"):
        learner(lam={"weight": 1.0, "head": 1.0})
    with pytest.raises(ValueError, match=r"lam must be a scalar tensor, a vector \[5\]"):
        learner(lam=torch.ones(7))
    with pytest.raises(ValueError, match="no trainable parameter"):
        learner(nn.Linear(4, 1).requires_grad_(False))
    with pytest.raises(ValueError, match=r"support must be a tuple \(x"):
        learner()(support[0], query)
    with pytest.raises(ValueError, match="support has 3 tasks but query has 2"):
        learner()(support, tuple(t[:2] for t in query))
    with pytest.raises(ValueError, match="the same number of tasks"):
        learner()((support[0], support[1][:2]), query)
    with pytest.raises(ValueError, match="the same number of tasks T >= 1"):
        learner()(tuple(t[:0] for t in support), tuple(t[:0] for t in query))
    normed = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(
        ValueError, match=r"0 \(BatchNorm1d\) .*RunningStats.BATCH, FROZEN .* track_running_stats"
    ):
        learner(normed)(support, query)
    normed.eval()
    assert learner(normed)(support, query).shape == (3,)
    with pytest.raises(ValueError, match="one scalar per task"):
        iopt.MetaLearner(model, lambda z, y: (z - y) ** 2, solver=solver)(support, query)


def test_lam_of_a_float64_model_is_not_rounded_to_float32():
    model = torch.nn.Linear(2, 1).double()
    lam = {"weight": 0.7, "bias": 0.1}
    for given in (0.7, lam):
        meta = iopt.MetaLearner(model, F.mse_loss, solver=iopt.gd(lr=0.1), lam=given)
        stored = meta.proximal()
        assert stored == 0.7 if given == 0.7 else {k: v.item() for k, v in stored.items()} == lam


def test_sparse_data_are_an_error_whose_advice_works():
    """A sparse adjacency of each task: built in forward from indices and values it is right."""
    torch.manual_seed(0)
    a, x, y = torch.rand(2, 4, 4), torch.randn(2, 4, 3), torch.randn(2, 4, 1)

    class Graph(torch.nn.Linear):
        def forward(self, x, a):
            return a @ super().forward(x)

    class FromParts(torch.nn.Linear):
        def forward(self, x, at, values):
            return torch.sparse_coo_tensor(
                at, values, (4, 4), check_invariants=True
            ) @ super().forward(x)

    def losses(kind, *data, batching=None):
        torch.manual_seed(1)
        solver = iopt.gd(lr=0.1, max_steps=3)
        meta = iopt.MetaLearner(
            kind(3, 1), torch.nn.functional.mse_loss, solver=solver, batching=batching
        )
        return meta(data, data)

    dense = losses(Graph, x, a, y)
    with pytest.raises(ValueError, match="support holds a sparse tensor, .* build it in forward"):
        losses(Graph, x, a.to_sparse(), y)
    parts = [t.to_sparse().coalesce() for t in a]
    at, values = (torch.stack([getattr(p, n)() for p in parts]) for n in ("indices", "values"))
    ours = losses(FromParts, x, at, values, y, batching=iopt.Batching(chunk_size=1))
    torch.testing.assert_close(ours, dense)
