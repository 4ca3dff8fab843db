"""Replacements of single functions: modules reach them, what they leave to torch or refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from implicit_optim._evaluation.replaced import replaced
from replaced_cases import Replacing, close


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv1d(2, 3, 1), dim=1)


@pytest.mark.parametrize(
    "make, x",
    [
        (nn.Hardsigmoid, torch.randn(2)),
        (nn.Mish, torch.randn(2)),
        (nn.CosineSimilarity, (torch.randn(2, 3), torch.randn(2, 3))),
        (lambda: torch._C._nn.hardsigmoid, torch.randn(2)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=None),
            torch.randn(2, 4),
        ),
        (old_weight_norm, torch.randn(2, 2, 4)),
        (lambda: nn.Embedding(3, 2, padding_idx=1), torch.tensor([1, 2])),
        (lambda: nn.EmbeddingBag(3, 2, padding_idx=1), torch.tensor([[1, 2]])),
    ],
)
def test_modules_reach_them(make, x):
    module, xs = make(), x if isinstance(x, tuple) else (x,)
    expected = module(*xs)
    with Replacing() as mode:
        got = module(*xs)
    assert mode.used
    torch.testing.assert_close(got, expected)


IDS_OF_ONE = torch.tensor([[0, 1]])


def test_what_torch_does_right_is_left_to_torch():
    w, out = torch.randn(3, 2), torch.empty(3, 2)
    z = torch.randn(3, 2, dtype=torch.complex64)
    calls = [
        lambda: F.embedding(IDS_OF_ONE, w),
        lambda: torch.embedding(w, IDS_OF_ONE, -2),  # no row, unlike F.embedding's
        lambda: torch.logaddexp(z, z),
        lambda: torch.logaddexp(w, w, out=out),
        lambda: F.normalize(w, out=out),
    ]
    for call in calls:
        expected = call().clone()
        with Replacing() as mode:
            assert torch.equal(call(), expected)
        assert not mode.used


def test_short_vectors_are_not_lengthened():
    x = torch.tensor([[0.03, 0.04], [3.0, 4.0]])
    with Replacing():
        y = F.normalize(x, eps=0.5)
    close(y, torch.tensor([[0.06, 0.08], [0.6, 0.8]]), 1e-6)


@pytest.mark.parametrize("fn", [F.embedding, F.embedding_bag])
@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_norm": 1.0}, r"with max_norm=1\.0 .* in place: use max_norm=None"),
        ({"sparse": True}, r"no second derivative: use sparse=False"),
        ({"scale_grad_by_freq": True}, r"of no function, .* use scale_grad_by_freq=False"),
    ],
)
def test_what_has_no_derivative_is_refused(fn, setting, message):
    w = torch.full((3, 2), 4.0)
    with Replacing(), pytest.raises(ValueError, match=f"^{fn.__name__}: .*{message}"):
        fn(IDS_OF_ONE, w, **setting)
    assert torch.equal(w, torch.full((3, 2), 4.0))


def test_bags_of_maxima_are_refused():
    with Replacing(), pytest.raises(ValueError, match=r'"sum" or "mean", or F\.embedding .* amax'):
        nn.EmbeddingBag(3, 2, mode="max")(IDS_OF_ONE)


def test_torch_says_itself_what_is_wrong():
    """Arguments that torch refuses come back to torch."""
    w, y = torch.zeros(3, 2), torch.tensor([0, 1])
    wrong = [
        (lambda: F.embedding(IDS_OF_ONE, w, 3), AssertionError, "within num_embeddings"),
        (lambda: F.embedding_bag(IDS_OF_ONE, w, padding_idx=-4), RuntimeError, "-3 through 2"),
        (lambda: F.embedding_bag(y, w), ValueError, "offsets has to be a 1D Tensor but got None"),
        (lambda: F.embedding_bag(IDS_OF_ONE, w, y), ValueError, "offsets has to be None"),
        (lambda: F.embedding_bag(IDS_OF_ONE, w, mode="max "), ValueError, "has to be one of"),
        (
            lambda: F.embedding_bag(IDS_OF_ONE, w, per_sample_weights=torch.ones(1, 2)),
            NotImplementedError,
            "only supported for mode='sum'",
        ),
    ]
    for call, kind, message in wrong:
        with Replacing() as mode, pytest.raises(kind, match=message):
            call()
        assert not mode.used


def test_norms_leave_what_torch_refuses_to_torch():
    x = torch.randn(2, 3, 4)
    wrong = [
        (lambda: F.layer_norm(x, (5,)), RuntimeError, r"Given normalized_shape=\[5\]"),
        (lambda: F.layer_norm(x, 4), TypeError, "must be tuple of ints"),
        (lambda: F.layer_norm(x, ()), RuntimeError, "at least 1-dimensional"),
        (lambda: F.group_norm(x, 2), RuntimeError, "divisible by num_groups"),
        (lambda: F.batch_norm(x, None, None, epsilon=1.0), TypeError, "epsilon"),
        (lambda: F.instance_norm(), TypeError, "missing 1 required positional argument"),
    ]
    for call, kind, message in wrong:
        with pytest.raises(kind, match=message):
            replaced(call)


def test_arguments_by_position_and_by_name():
    x, w, ids = torch.randn(2, 3, 4), torch.randn(4), torch.tensor([[0, 1]])
    calls = [
        lambda: F.layer_norm(x, [4], w, None, 1e-3),
        lambda: F.layer_norm(input=x, normalized_shape=(4,), eps=1e-3, weight=w),
        lambda: F.batch_norm(x, None, None, w[:3], None, True, 0.1, 1e-3),
        lambda: torch.embedding(w[:, None], ids, 1, sparse=False),
        lambda: torch.embedding(w[:, None], ids, 1, False, False),
        lambda: F.embedding_bag(ids, w[:, None], mode="sum"),
    ]
    for call in calls:
        torch.testing.assert_close(replaced(call), call())
