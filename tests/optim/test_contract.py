"""What torch expects of every optimizer: state, copies, hooks, closures, devices, compilation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from implicit_optim import CG
from implicit_optim.optim import NesterovAGD, NewtonCG, __all__
from optimizers import (
    CLASSES,
    FIRST_ORDER,
    JOINT,
    SECOND_ORDER,
    X,
    Y,
    both_paths,
    each,
    each_first_order,
    flat,
    make,
    network,
    saved,
    step,
    train,
)


def test_public_names():
    names = [
        "GD",
        "NesterovAGD",
        "NewtonCG",
        "NonlinearCG",
        "ProximalGradient",
        "TrustRegion",
    ]
    assert __all__ == names
    assert all(issubclass(c, torch.optim.Optimizer) for c in CLASSES)


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

    monkeypatch.setattr("implicit_optim._torch._default_to_fused_or_foreach", default)
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


def p():
    return torch.ones(2, requires_grad=True)
