"""torchvision's ResNet-18: batch norm by each policy against a plain loop, and finite differences."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vjp

import implicit_optim as iopt
from implicit_optim import RunningStats
from per_task import EXACT, NEWTON, assert_same, learned, slope_along, tasks_of

models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))

LAM, LR = 4.0, 0.02
CLASSES = 3
NORMS_AND_HEAD = ("bn", "downsample.1", "fc")  # 11,139 numbers of 11 million, in every block

pytestmark = pytest.mark.usefixtures("double")


@functools.cache
def pretrained():
    """ResNet-18 whose running statistics are not the initial ones."""
    net = models.resnet18(num_classes=CLASSES).double()
    for module in norms(net):
        module.running_mean.normal_(std=0.1)
        module.running_var.uniform_(0.8, 1.2)
        module.num_batches_tracked += 3
    return net


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def resnet(*, adapts=NORMS_AND_HEAD, smooth=False):
    """A copy in which what matches none of the names is frozen; smooth for finite differences."""
    net = copy.deepcopy(pretrained())
    for name, p in net.named_parameters():
        p.requires_grad_(any(part in name for part in adapts))
    for module in net.modules() if smooth else ():
        if hasattr(module, "relu"):
            module.relu = nn.GELU()
    return net


def episodes(tasks=2):
    def batch(n):
        labels = torch.arange(n).remainder(CLASSES).expand(tasks, n)
        return torch.randn(tasks, n, 3, 32, 32), labels

    return batch(4), batch(3)


def learner(model, policy, **settings):
    few = {"solver": iopt.gd(lr=LR, max_steps=2), "lam": LAM, "on_solve": iopt.Ignore()} | settings
    return iopt.MetaLearner(model, F.cross_entropy, running_stats=policy, **few)


def plain_loop(model, policy, support, query, steps):
    """Query losses after SGD, and the mean of their gradients at the adapted parameters."""
    losses, gradient = [], 0
    for (x, y), (xq, yq) in tasks_of(support, query):
        net = copy.deepcopy(model)
        net.train(policy is not RunningStats.FROZEN)
        adapted = [p for p in net.parameters() if p.requires_grad]
        anchor = [p.detach().clone() for p in adapted]
        sgd = torch.optim.SGD(adapted, lr=LR)
        for _ in range(steps):
            sgd.zero_grad()
            near = sum(((p - a) ** 2).sum() for p, a in zip(adapted, anchor, strict=True))
            (F.cross_entropy(net(x), y) + LAM / 2 * near).backward()
            sgd.step()
        if policy is RunningStats.PER_TASK:  # torch's own statistics, of the support set alone
            for module in norms(net):
                module.reset_running_stats()
                module.momentum = None
            net(x)
            net.eval()
        loss = F.cross_entropy(net(xq), yq)
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, adapted)
        gradient = gradient + torch.cat([g.reshape(-1) for g in gradients]) / len(support[0])
    return torch.stack(losses), gradient


def test_without_a_policy_the_first_norm_is_named():
    model, (support, query) = resnet(), episodes()
    message = r"bn1 \(BatchNorm2d\) would update its running statistics .*RunningStats\.BATCH"
    with pytest.raises(ValueError, match=message):
        learner(model, None)(support, query)


@pytest.mark.parametrize("policy", RunningStats)
def test_each_policy_is_what_plain_torch_does(policy):
    model, (support, query) = resnet(), episodes()
    before = copy.deepcopy(model.state_dict())
    losses, gradient = learned(
        learner(model, policy, meta_gradient=iopt.FirstOrder()), support, query
    )
    theirs, slope = plain_loop(model, policy, support, query, steps=2)
    torch.testing.assert_close(losses, theirs, rtol=1e-10, atol=1e-12)
    if policy is not RunningStats.PER_TASK:  # where torch stops the gradient at the statistics
        torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_all_eleven_million_parameters_adapt():
    model, (support, query) = resnet(adapts=[""]), episodes(tasks=1)
    one = {"solver": iopt.gd(lr=LR, max_steps=1), "meta_gradient": iopt.FirstOrder()}
    ours = learned(learner(model, RunningStats.BATCH, **one), support, query)
    # Batch norm over three numbers magnifies rounding: inputs that differ by 1e-15 move it by 1e-9.
    plain = plain_loop(model, RunningStats.BATCH, support, query, steps=1)
    assert_same(ours, plain, rtol=1e-7, atol=1e-8)


def check_directions(meta, support, query, count, eps):
    _, gradient = learned(meta, support, query)
    for _ in range(count):
        direction = F.normalize(torch.randn_like(gradient), dim=0)
        slope = slope_along(meta, support, query, direction, eps=eps)
        torch.testing.assert_close(gradient @ direction, slope, rtol=1e-5, atol=1e-8)
    return gradient


def test_through_two_steps_against_finite_differences():
    """Small ones: batch norm over a few numbers is so curved that larger ones amplify chaos."""
    solver = iopt.gd(lr=2e-5, max_steps=2)
    model, (support, query) = resnet(smooth=True), episodes(tasks=1)
    rule = iopt.Unrolled()
    meta = learner(model, RunningStats.PER_TASK, solver=solver, meta_gradient=rule)
    gradient = check_directions(meta, support, query, count=2, eps=1e-6)
    meta.meta_gradient = iopt.FirstOrder()
    _, first_order = learned(meta, support, query)
    assert (gradient - first_order).norm() > 1e-3 * gradient.norm()  # curvature has a part in it


def test_implicit_against_finite_differences():
    """The last norm and the head adapt, to the end."""
    model = resnet(adapts=["layer4.1.bn2", "fc"], smooth=True)
    parts = {"solver": NEWTON, "meta_gradient": EXACT, "on_solve": iopt.Raise()}
    meta = learner(model, RunningStats.PER_TASK, **parts)
    check_directions(meta, *episodes(tasks=1), count=1, eps=1e-4)


def test_gauss_newton_solves_its_equation_in_plain_autograd():
    """``(J^T H_out J + lam I) w = v`` with products of torch's, at the phi that two steps lead to."""
    rule = iopt.Implicit(iopt.CG(rtol=1e-9, max_steps=40), curvature=iopt.GaussNewton)
    meta = learner(resnet(), RunningStats.BATCH, meta_gradient=rule)
    (x, y), (xq, yq) = support, query = episodes(tasks=1)
    _, gradient = learned(meta, support, query)
    with torch.no_grad():
        phi = {k: p[0] for k, p in meta.adapt(support).items()}
    net = copy.deepcopy(meta.model)
    for module in norms(net):
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None

    def logits(phi):
        return functional_call(net, phi, (x[0],))

    w = {k: g.reshape(phi[k].shape) for k, g in split(gradient / LAM, phi)}
    z, along = jvp(logits, (phi,), (w,))
    _, back = jvp(torch.func.grad(lambda z: F.cross_entropy(z, y[0])), (z,), (along,))
    (product,) = vjp(logits, phi)[1](back)
    ahead = torch.func.grad(lambda p: F.cross_entropy(functional_call(net, p, (xq[0],)), yq[0]))
    for k, v in ahead(phi).items():
        torch.testing.assert_close(product[k] + LAM * w[k], v, rtol=1e-6, atol=1e-7)


def split(vector, phi):
    return zip(phi, vector.split([p.numel() for p in phi.values()]), strict=True)
