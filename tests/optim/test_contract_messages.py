"""What every optimizer refuses, and in which words; closures of second order; the status."""

import pytest
import torch

from implicit_optim import CG, GaussNewton, Status
from implicit_optim.optim import (
    GD,
    NesterovAGD,
    NewtonCG,
    NonlinearCG,
    ProximalGradient,
    TrustRegion,
)
from optimizers import JOINT, SECOND_ORDER, each, each_first_order, make, saved


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
