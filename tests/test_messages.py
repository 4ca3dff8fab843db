"""Wrong arguments: every message names the argument and the remedy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt

VMAP, LOOP = iopt.Batching(), iopt.Batching(chunk_size=1)
SOLVER = iopt.gd(lr=0.1, max_steps=2)


def learner(model=None, **settings):
    model = nn.Linear(4, 1) if model is None else model
    return iopt.MetaLearner(model, F.mse_loss, **({"solver": SOLVER} | settings))


def episodes(device="cpu"):
    return [tuple(torch.randn(3, 5, n, device=device) for n in (4, 1)) for _ in range(2)]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_strength_that_is_not_positive(value):
    whole = torch.ones(5)
    whole[2] = value
    for lam in (value, torch.tensor(value), whole):
        with pytest.raises(ValueError, match=r"Invalid lam: .* must be finite and > 0"):
            learner(lam=lam)
    for lam in ({"weight": 1.0, "bias": value}, {"weight": 1.0, "bias": torch.tensor([value])}):
        with pytest.raises(ValueError, match=r"Invalid bias: .* must be finite and > 0"):
            learner(lam=lam)
    for learned in (True, False):
        with pytest.raises(ValueError, match=r"Invalid lam: .* must be finite and > 0"):
            iopt.Proximal(value, learned=learned)


def test_a_strength_of_the_wrong_shape():
    with pytest.raises(
        ValueError, match=r"a scalar tensor, a vector \[5\], a matrix .* got \(4,\)"
    ):
        learner(lam=torch.ones(4))
    with pytest.raises(ValueError, match=r"a matrix \[5, 5\] .* got \(4, 4\)"):
        learner(lam=torch.eye(4))
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \[\]"):
        learner(lam={"weight": 1.0})
    theta = (torch.zeros(3), 2.0)
    fit = iopt.Objective(lambda phi, x: x * phi, F.mse_loss, iopt.proximal)
    with pytest.raises(ValueError, match=r"lam must be a scalar tensor, .* got float"):
        iopt.minimize(fit, torch.zeros(3), theta, torch.ones(3), torch.ones(3), solver=SOLVER)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"running_stats": "frozen"}, r"running_stats must be RunningStats\.BATCH, FROZEN, .* str"),
        ({"batching": "loop"}, r"batching must be Batching\(\.\.\.\) or None, got str"),
        ({"meta_gradient": iopt.Implicit}, r"meta_gradient must be Implicit\(\.\.\.\), .* type"),
    ],
)
def test_settings_of_the_wrong_kind(settings, message):
    with pytest.raises(TypeError, match=message):
        learner(**settings)


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_data_on_another_device(batching):
    (here, query), (there, asked) = episodes(), episodes("meta")
    meta = learner(batching=batching)
    with pytest.raises(ValueError, match=r"data\[0\] is on meta but phi is on cpu: move one"):
        meta(there, query)
    with pytest.raises(ValueError, match=r"data\[1\] is on meta but phi is on cpu: move one"):
        meta((here[0], there[1]), query)
    with pytest.raises(RuntimeError, match=r"two devices: move the data, support and query, to"):
        meta(here, asked)
    with pytest.raises(ValueError, match=r"data\[0\] is on cpu but phi is on meta: move one"):
        learner(nn.Linear(4, 1, device="meta"))(here, query)
    split = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"1\.weight.* on cpu but .* on meta: bring all leaves to"):
        learner(split)(here, query)
    theta = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"theta is on meta but phi is on cpu: move one"):
        iopt.attach(torch.zeros(2), lambda phi, theta: (phi - theta) @ phi, theta)


@pytest.mark.parametrize("batching", [VMAP, LOOP])
def test_numbers_of_tasks_that_do_not_agree(batching):
    (support, query), meta = episodes(), learner(batching=batching)
    phi = meta.adapt(support)
    message = r"phi and inputs must hold tensors that lead with the same number of tasks"
    with pytest.raises(ValueError, match=message):
        meta.predict(phi, query[0][:2])
    with pytest.raises(ValueError, match=message):
        meta.predict({k: p[:2] for k, p in phi.items()}, query[0])
    with pytest.raises(ValueError, match=r"for a single task add a dimension: x\.unsqueeze\(0\)"):
        meta((support[0][0], support[1][0, 0, 0]), query)
    empty = tuple(t[:0] for t in support)
    for wrong in ((empty, query), (support, empty)):
        with pytest.raises(ValueError, match=r"(support|query) must .* number of tasks T >= 1"):
            meta(*wrong)


def test_batch_dimensions_that_are_not_there():
    with pytest.raises(ValueError, match=r"Invalid batch_ndim: -1: it must be >= 0"):
        iopt.minimize(lambda p, t: p @ p, torch.zeros(2), (), solver=SOLVER, batch_ndim=-1)
    with pytest.raises(ValueError, match=r"phi has shape \(2,\): with batch_ndim=3"):
        iopt.minimize(lambda p, t: p @ p, torch.zeros(2), (), solver=SOLVER, batch_ndim=3)
    with pytest.raises(ValueError, match=r"the batch dimensions \(2, 0\) are empty: give at least"):
        iopt.attach(torch.zeros(2, 0, 3), lambda p, t: p @ p, (), batch_ndim=2)
