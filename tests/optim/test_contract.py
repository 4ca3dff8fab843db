"""What torch expects of every optimizer: state, copies, hooks, schedulers, groups, messages."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from implicit_optim import CG, FixedStep, GaussNewton, Status
from implicit_optim.optim import (
    AGD,
    GD,
    NesterovAGD,
    NewtonCG,
    NonlinearCG,
    ProximalGradient,
    TrustRegion,
    __all__,
)

FIRST_ORDER = [GD, NesterovAGD, ProximalGradient]
SECOND_ORDER = (NewtonCG, TrustRegion)
JOINT = (*SECOND_ORDER, NonlinearCG)  # one group, one flat vector
CLASSES = [*FIRST_ORDER, *JOINT]
each = pytest.mark.parametrize("cls", CLASSES)
each_first_order = pytest.mark.parametrize("cls", FIRST_ORDER)
both_paths = pytest.mark.parametrize("foreach", [True, False])
X, Y = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(9, 4).sin(), torch.arange(9) % 3


def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return net.to(dtype)


def make(cls, params, **settings):
    if cls not in JOINT:
        settings = {"lr": 0.2, **settings}
    if cls is ProximalGradient:
        settings = {"l1": 0.0, **settings}
    if cls is TrustRegion:
        settings = {"radius": settings.pop("lr", 0.5), **settings}
    return cls(params, **settings)


def step(opt, loss):
    """One step in the manner of the class; returns what `step` does."""

    def closure():
        if isinstance(opt, SECOND_ORDER):
            return loss()
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return opt.step(closure)


def train(opt, net, steps):
    dtype = net[0].weight.dtype
    for _ in range(steps):
        step(opt, lambda: F.cross_entropy(net(X.to(dtype)), Y))
    return flat(net.parameters())


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def saved(state):
    """Through a file that may hold nothing but tensors and plain Python values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_public_names():
    names = [
        "AGD",
        "GD",
        "NesterovAGD",
        "NewtonCG",
        "NonlinearCG",
        "ProximalGradient",
        "TrustRegion",
    ]
    assert __all__ == names
    assert all(issubclass(c, torch.optim.Optimizer) for c in (AGD, *CLASSES))


@each
def test_a_run_resumed_from_a_file_is_the_uninterrupted_one(cls):
    net = network()
    whole = train(make(cls, net.parameters()), net, 6)
    net = network()
    opt = make(cls, net.parameters())
    train(opt, net, 3)
    checkpoint = saved({"net": net.state_dict(), "opt": opt.state_dict()})
    other = network()
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    fresh = make(cls, other.parameters(), lr=0.7)
    other.load_state_dict(checkpoint["net"])
    fresh.load_state_dict(checkpoint["opt"])
    assert torch.equal(train(fresh, other, 3), whole)
    assert torch.equal(train(opt, net, 3), whole)
    if cls in JOINT:
        assert fresh.state[other[0].weight]["n_iter"] == 6


@each
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_as_the_original(cls, copier):
    settings = {"linear_solver": CG(max_steps=3)} if cls is NewtonCG else {}
    net = network()
    opt = make(cls, net.parameters(), **settings)
    train(opt, net, 3)
    other_net, other = copier((net, opt))
    assert type(other) is cls
    assert other.param_groups[0]["params"][0] is other_net[0].weight
    before = flat(net.parameters())
    moved = train(other, other_net, 3)
    assert torch.equal(flat(net.parameters()), before)
    assert torch.equal(train(opt, net, 3), moved)
    assert not torch.equal(before, moved)


@each
def test_a_state_from_before_an_option_existed(cls):
    net = network()
    opt = make(cls, net.parameters())
    train(opt, net, 2)
    state = opt.state_dict()
    for name in ("maximize", "foreach", "damping"):
        state["param_groups"][0].pop(name, None)
    opt.load_state_dict(state)
    expected = {"foreach": None} if cls in FIRST_ORDER else {}
    expected |= {"damping": 0.0} if cls in SECOND_ORDER else {}
    assert {"maximize": False, **expected}.items() <= opt.param_groups[0].items()
    twin = network()
    assert torch.equal(train(opt, net, 2), train(make(cls, twin.parameters()), twin, 4))


@each_first_order
def test_state_follows_the_dtype_of_the_parameter(cls):
    net = network()
    opt = make(cls, net.parameters())
    train(opt, net, 2)
    single = network(torch.float32)
    single.load_state_dict(net.state_dict())
    fresh = make(cls, single.parameters())
    fresh.load_state_dict(opt.state_dict())
    assert fresh.state_dict()["state"].keys() == opt.state_dict()["state"].keys()
    for p in single.parameters():
        assert all(v.dtype == torch.float32 for v in fresh.state[p].values())
    torch.testing.assert_close(
        train(fresh, single, 2), train(opt, net, 2).float(), rtol=1e-5, atol=1e-6
    )


@each
def test_hooks(cls):
    net, calls = network(), []
    opt = make(cls, net.parameters())
    start = flat(net.parameters())

    def pre(optimizer, args, kwargs):
        assert optimizer is opt
        calls.append(("pre", torch.equal(flat(net.parameters()), start)))

    def post(optimizer, args, kwargs):
        calls.append(("post", torch.equal(flat(net.parameters()), start)))

    handles = [opt.register_step_pre_hook(pre), opt.register_step_post_hook(post)]
    train(opt, net, 1)
    assert calls == [("pre", True), ("post", False)]
    opt.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    assert opt.state_dict()["extra"] == 1
    for handle in handles:
        handle.remove()
    train(opt, net, 1)
    assert len(calls) == 2


@each
def test_step_returns_the_loss_at_the_start(cls):
    net = network()
    opt = make(cls, net.parameters())
    loss = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    expected = loss().item()
    assert step(opt, loss).item() == expected
    assert loss().item() < expected


@pytest.mark.parametrize(
    "cls", [*FIRST_ORDER, NewtonCG]
)  # the others: no lr, or another first trial
@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5), [0.2, 0.2, 0.1, 0.1]),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 2), [0.2, 0.1, 0.0, 0.1]),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0), [0.2, 0.2, 0.02, 0.002]),
        (lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 2), [0.0, 0.1, 0.2, 0.3]),
    ],
    ids=["step", "cosine", "plateau", "warm-up"],
)
def test_schedulers(cls, scheduler, expected):
    settings = {"linear_solver": CG(max_steps=3), "line_search": FixedStep(1.0)}
    x = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    opt = make(cls, [x], lr=0.2, **(settings if cls is NewtonCG else {}))
    schedule = scheduler(opt)
    rates = []
    for _ in range(4):
        at, rate = x.detach().clone(), opt.param_groups[0]["lr"]
        step(opt, lambda: x.square().sum() / 2)  # the gradient is x, Newton's direction -x
        new = opt.state[x]["x"] if cls is NesterovAGD else x.detach()
        torch.testing.assert_close(new, at - rate * at, rtol=1e-12, atol=1e-15)
        rates.append(rate)
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    assert rates == pytest.approx(expected, abs=1e-12)


def test_one_cycle_moves_the_momentum_too():
    x = torch.ones(1, requires_grad=True)
    opt = NesterovAGD([x], lr=0.1)
    schedule = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5, pct_start=0.5)
    seen = []
    for _ in range(4):
        step(opt, lambda: x.square().sum())
        seen.append(opt.param_groups[0]["momentum"])
        schedule.step()
    assert (seen[0], min(seen)) == pytest.approx((0.95, 0.85), abs=2e-2)


@each_first_order
@both_paths
def test_add_param_group(cls, foreach):
    a, b, twin_a, twin_b = (
        torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    opt = make(cls, [a], lr=0.1, foreach=foreach)
    one, two = make(cls, [twin_a], lr=0.1), make(cls, [twin_b], lr=0.3)
    for k in range(4):
        if k == 2:
            opt.add_param_group({"params": b, "lr": 0.3})
        opt.zero_grad()
        (a.cosh() + b.cosh()).sum().backward()
        opt.step()
        step(one, lambda: twin_a.cosh().sum())
        if k >= 2:
            step(two, lambda: twin_b.cosh().sum())
    torch.testing.assert_close(a, twin_a, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(b, twin_b, rtol=1e-14, atol=1e-14)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.3]


@pytest.mark.parametrize("cls", JOINT)
def test_it_has_one_group(cls):
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="give all of them in one list"):
        cls([{"params": [a]}, {"params": [b]}])
    opt = cls([a])
    with pytest.raises(ValueError, match=f"{cls.__name__} takes one parameter group"):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
    assert opt.status is None


@each
def test_named_parameters(cls):
    net, twin = network(), network()
    named = make(cls, net.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(train(named, net, 2), train(make(cls, twin.parameters()), twin, 2))


@each
def test_maximize(cls):
    up, down = (torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True) for _ in "ab")
    rising, falling = make(cls, [up], maximize=True), make(cls, [down])
    for _ in range(3):
        step(rising, lambda: -up.cosh().sum())
        step(falling, lambda: down.cosh().sum())
        assert torch.equal(up, down)
    assert up.abs().max() < 1.0


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_stays(cls, dtype):
    net = network(dtype)
    opt = make(cls, net.parameters())
    before = F.cross_entropy(net(X.to(dtype)), Y).item()
    assert train(opt, net, 5).dtype == dtype
    assert F.cross_entropy(net(X.to(dtype)), Y).item() < before - 0.01
    tensors = [v for s in opt.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(v.dtype == dtype for v in tensors)
    assert len(tensors) == {NesterovAGD: 4, NonlinearCG: 3}.get(cls, 0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("cls", [GD, NesterovAGD])
def test_a_wider_tensor_lr_leaves_a_number_its_dtype(cls, foreach):
    """Two 0-d tensors promote: a float32 number met a float64 learning rate."""
    x, y = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    momentum = {"momentum": 0.9} if cls is NesterovAGD else {}
    opt = cls([x], lr=torch.tensor(0.1, dtype=torch.float64), foreach=foreach, **momentum)
    sgd = torch.optim.SGD([y], lr=0.1, nesterov=bool(momentum), **momentum)
    for _ in range(3):
        for one, z in ((opt, x), (sgd, y)):
            one.zero_grad()
            (z**2 / 2).backward()
            one.step()
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, y)
    assert all(v.dtype == torch.float32 for v in opt.state[x].values())


@each
def test_shapes_and_gradients_of_every_kind(cls):
    def leaf(*shape, grad=True):
        return torch.full(shape, 2.0, dtype=torch.float64, requires_grad=grad)

    scalar, empty, one, matrix = leaf(), leaf(0, 3), leaf(1), leaf(2, 2)
    frozen, unused = leaf(2, grad=False), leaf(3)
    opt = make(cls, [frozen, scalar, empty, one, matrix, unused])
    twin = torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
    twin_opt = make(cls, [twin])
    for _ in range(3):
        step(
            opt,
            lambda: (
                scalar.cosh() + sum(q.cosh().sum() for q in (empty, one, matrix * frozen[0] / 2))
            ),
        )
        step(twin_opt, lambda: twin.cosh().sum())
    torch.testing.assert_close(flat([scalar, one, matrix]), twin.detach(), rtol=1e-12, atol=1e-14)
    assert twin.detach().max() < 1.9
    assert frozen.tolist() == [2.0, 2.0]
    assert unused.tolist() == [2.0, 2.0, 2.0]


@each
def test_tied_parameters_move_once(cls):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).double()
    net[1].weight = net[0].weight
    assert len(list(net.parameters())) == 3
    start = flat(net.parameters())
    x = torch.eye(3, dtype=torch.float64)
    settings = {NonlinearCG: {"line_search": FixedStep(0.1)}}
    settings[NewtonCG] = {"line_search": FixedStep(1.0), "linear_solver": CG(max_steps=1)}
    settings[NewtonCG]["damping"] = 9.0
    settings[TrustRegion] = {"cg_steps": 1, "damping": 9.0}
    opt = make(cls, net.parameters(), **settings.get(cls, {}))
    loss = net(x).square().sum() / 2
    grad = flat(torch.autograd.grad(loss, list(net.parameters())))
    step(opt, lambda: net(x).square().sum() / 2)
    moved = flat(net.parameters()) - start
    if cls in JOINT:
        length = moved.norm() / grad.norm()
        assert 0 < length < 1
    else:
        length = 0.2 * (1.9 if cls is NesterovAGD else 1.0)
    torch.testing.assert_close(moved, -length * grad, rtol=1e-10, atol=1e-12)


@each
def test_zero_grad(cls):
    x = torch.ones(2, requires_grad=True)
    opt = make(cls, [x])
    x.sum().backward()
    opt.zero_grad(set_to_none=False)
    assert x.grad.tolist() == [0.0, 0.0]
    opt.zero_grad()
    assert x.grad is None


@each_first_order
@both_paths
def test_without_gradients_nothing_happens(cls, foreach):
    x = torch.ones(2, requires_grad=True)
    opt = make(cls, [x], foreach=foreach)
    assert opt.step() is None
    assert (x.tolist(), len(opt.state)) == ([1.0, 1.0], 0)


@each_first_order
@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_is_as_asked_or_as_torch_would(cls, foreach, monkeypatch):
    asked, calls = [], []

    def default(params, differentiable):
        asked.append((len(params), differentiable))
        return False, True

    monkeypatch.setattr("implicit_optim.optim._gd._default_to_fused_or_foreach", default)
    for name in ("_update", "_update_all"):
        monkeypatch.setattr(cls, name, lambda *args, name=name: calls.append(name))
    params = [p(), p()]
    opt = make(cls, params, foreach=foreach)
    for q in params:
        q.grad = torch.ones(2)
    opt.step()
    assert asked == ([(2, False)] if foreach is None else [])
    assert calls == (["_update", "_update"] if foreach is False else ["_update_all"])


@each_first_order
@pytest.mark.parametrize("foreach", [True, False, None])
def test_meta_device(cls, foreach):
    params = [torch.ones(s, device="meta", requires_grad=True) for s in [(2, 3), (), (0,)]]
    opt = make(cls, params, foreach=foreach)
    for p in params:
        p.grad = torch.empty_like(p)
    opt.step()
    assert [(p.device.type, tuple(p.shape)) for p in params] == [
        ("meta", (2, 3)),
        ("meta", ()),
        ("meta", (0,)),
    ]
    assert all(v.device.type == "meta" for s in opt.state.values() for v in s.values())
    assert len(opt.state) == (3 if cls is NesterovAGD else 0)


@each_first_order
@both_paths
def test_a_compiled_step_is_the_step(cls, foreach):
    params = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)]
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, twin = make(cls, params, foreach=foreach), make(cls, twins, foreach=foreach)
    compiled = torch.compile(opt.step, backend="eager")
    for k in range(3):
        for p in [*params, *twins]:
            p.grad = p.detach() * (k + 1)
        compiled()
        twin.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    assert params[0][0] < 1.0


@each_first_order
def test_with_a_grad_scaler(cls):
    x, twin = (torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    opt, plain = make(cls, [x]), make(cls, [twin])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True, False):  # an overflow skips the step
        opt.zero_grad()
        scaler.scale(x.square().sum() * (float("inf") if bad else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        if not bad:
            step(plain, lambda: twin.square().sum())
    torch.testing.assert_close(x, twin)
    assert x[0] < 0.7


# ---------------------------------------------------------------------------------------- messages


def p():
    return torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: GD([p()], lr=0.0), ValueError, "Invalid lr: 0.0: it must be finite and > 0"),
        (lambda: GD([p()], lr=float("inf")), ValueError, "Invalid lr: inf"),
        (lambda: GD([p()], lr=torch.ones(1)), ValueError, r"shape \(1,\): a tensor lr must be 0-d"),
        (lambda: NesterovAGD([p()], lr=torch.ones(2)), ValueError, "a tensor lr must be 0-d"),
        (lambda: GD([{"params": [p()], "lr": -1.0}], lr=1.0), ValueError, "Invalid lr: -1.0"),
        (lambda: NewtonCG([p()], lr=-1.0), ValueError, "Invalid lr: -1.0"),
        (lambda: NewtonCG([p()], damping=-1.0), ValueError, "Invalid damping: -1.0"),
        (lambda: NewtonCG([p()], linear_solver=CG), TypeError, "expected a LinearSolver object"),
        (lambda: NewtonCG([p()], line_search="armijo"), TypeError, "expected a Search object"),
        (lambda: NewtonCG([p()], curvature="hessian"), TypeError, "Hessian or GaussNewton"),
        (lambda: NonlinearCG([p()], lr=-1.0), ValueError, "Invalid lr: -1.0"),
        (lambda: NonlinearCG([p()], line_search=1), TypeError, "must be StrongWolfe"),
        (lambda: ProximalGradient([p()], lr=0.1, l1=-1.0), ValueError, "Invalid l1: -1.0"),
        (lambda: ProximalGradient([p()], lr=0.0, l1=1.0), ValueError, "Invalid lr: 0.0"),
        (
            lambda: ProximalGradient([{"params": [p()], "l1": float("inf")}], lr=0.1, l1=1.0),
            ValueError,
            "Invalid l1: inf",
        ),
        (lambda: TrustRegion([p()], radius=0.0), ValueError, "Invalid radius: 0.0"),
        (lambda: TrustRegion([p()], damping=-1.0), ValueError, "Invalid damping: -1.0"),
        (lambda: TrustRegion([p()], curvature="hessian"), TypeError, "Hessian or GaussNewton"),
        (lambda: TrustRegion([p()], lr=0.1), TypeError, "lr"),
        (lambda: GD([], lr=0.1), ValueError, "empty parameter list"),
        (lambda: GD(p(), lr=0.1), TypeError, "an iterable of Tensors"),
        (lambda: GD([p()], lr=0.1, momentum=0.9), TypeError, "momentum"),
        (lambda: NewtonCG([p()], max_iter=3), TypeError, "max_iter"),
    ],
)
def test_wrong_settings(call, error, match):
    with pytest.raises(error, match=match):
        call()


@each
def test_complex_parameters(cls):
    x = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="torch.view_as_real"):
        make(cls, [x])
    if cls not in JOINT:
        opt = make(cls, [p()])
        with pytest.raises(TypeError, match=f"{cls.__name__} does not take complex parameters"):
            opt.add_param_group({"params": [x]})
        assert len(opt.param_groups) == 1


@each_first_order
def test_sparse_gradients(cls):
    table = torch.nn.Embedding(5, 2, sparse=True)
    opt = make(cls, table.parameters())
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not take sparse.*SparseAdam"):
        opt.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("cls", SECOND_ORDER)
class TestSecondOrderClosures:
    """What a closure may return, and what it is told if it returns something else."""

    @pytest.mark.parametrize(
        ("closure", "error", "match"),
        [
            (None, RuntimeError, "needs a closure that returns the loss"),
            (lambda x: None, TypeError, "the loss, a scalar tensor, got NoneType"),
            (lambda x: x.sum().item(), TypeError, "a scalar tensor, got float"),
            (lambda x: x, TypeError, r"a scalar tensor, got shape \(2,\)"),
            (lambda x: (x.sum(), x), TypeError, "a scalar tensor, got tuple"),
            (lambda x: x.detach().sum(), RuntimeError, "without torch.no_grad"),
            (lambda x: torch.no_grad()(x.sum)(), RuntimeError, "without torch.no_grad"),
            (lambda x: p().sum(), RuntimeError, "no graph leads from the loss to the parameters"),
        ],
    )
    def test_hessian(self, cls, closure, error, match):
        x = p()
        opt = cls([x])
        with pytest.raises(error, match=match):
            opt.step(closure and (lambda: closure(x)))
        assert x.tolist() == [1.0, 1.0]
        assert len(opt.state) == 0

    @pytest.mark.parametrize(
        ("closure", "error", "match"),
        [
            (lambda x: x.sum(), TypeError, r"must return \(loss, output\)"),
            (lambda x: (x.sum(), x, x), TypeError, r"must return \(loss, output\)"),
            (lambda x: (x.sum(), 1.0), TypeError, r"must return \(loss, output\)"),
            (lambda x: (x, x.sum()), TypeError, "a scalar tensor"),
            (lambda x: (x.sum(), (2 * x)), RuntimeError, "from the very output returned"),
            (lambda x: (x.sum(), (2 * x).detach()), RuntimeError, "from the very output returned"),
        ],
    )
    def test_gauss_newton(self, cls, closure, error, match):
        x = p()
        with pytest.raises(error, match=match):
            cls([x], curvature=GaussNewton).step(lambda: closure(x))
        assert x.tolist() == [1.0, 1.0]

    def test_one_element_is_a_scalar(self, cls):
        x = p()
        cls([x], **({"radius": 2.0} if cls is TrustRegion else {})).step(
            lambda: x.square().sum().reshape(1, 1)
        )
        assert x.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)

    def test_parameters_of_two_dtypes(self, cls):
        x, y = p(), p().detach().double().requires_grad_()
        with pytest.raises(ValueError, match="bring all leaves to one dtype and device"):
            cls([x, y]).step(lambda: x.sum() + y.sum())

    def test_all_frozen(self, cls):
        with pytest.raises(RuntimeError, match=r"unfreeze one with requires_grad_\(True\)"):
            cls([torch.ones(1)]).step(lambda: torch.ones(1))

    def test_backward_is_refused_by_name(self, cls):
        x = p()

        def closure():
            loss = x.square().sum()
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match=rf"called backward\(\): {cls.__name__} diff"):
            cls([x]).step(closure)
        assert x.grad is None


def test_the_status_of_newton_cg_is_in_the_file():
    x = p()
    opt = NewtonCG([x])
    opt.step(lambda: -x.square().sum())
    state = saved(opt.state_dict())["state"][0]
    assert state.keys() == {"n_iter", "grad_norm", "step_length", "status"}
    assert state["grad_norm"] == pytest.approx(8**0.5)
    assert Status(state["status"]) is opt.status is Status.NEGATIVE_CURVATURE
    assert "GaussNewton" in opt.status.message
