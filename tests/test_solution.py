"""Status codes, messages, shares, summaries; a Solution as a pytree."""

import pytest
import torch
from torch.utils import _pytree as pytree

from implicit_optim import Solution, Status


def solution(*codes):
    status = torch.tensor(codes, dtype=torch.int8)
    return Solution(torch.zeros(len(codes), 2), status, {"steps": torch.arange(len(codes))})


def test_codes_are_fixed():
    """Stored runs and dashboards compare these numbers."""
    assert {s.name: s.value for s in Status} == {
        "SUCCESS": 0,
        "MAX_STEPS": 1,
        "NEGATIVE_CURVATURE": 2,
        "NO_DESCENT": 3,
        "NONFINITE": 4,
        "SINGULAR": 5,
    }
    assert Status.LINE_SEARCH is Status.NO_DESCENT  # its name before 0.2


@pytest.mark.parametrize("status", list(Status))
def test_every_status_has_a_message_of_its_own(status):
    assert len(status.message) > 20
    assert [s for s in Status if s.message == status.message] == [status]


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (Status.MAX_STEPS, "max_steps"),
        (Status.NEGATIVE_CURVATURE, "GaussNewton"),
        (Status.NO_DESCENT, "float64"),
        (Status.NONFINITE, "lr"),
    ],
)
def test_the_message_of_a_failure_says_what_to_try(status, word):
    assert word in status.message


def test_share():
    done = solution(0, 2, 2, 1)
    assert [done.share(s).item() for s in Status] == [0.25, 0.25, 0.5, 0.0, 0.0, 0.0]
    assert done.share(Status.MAX_STEPS).ndim == 0


def test_share_over_several_batch_dimensions():
    done = solution(0, 2, 2, 1)._replace(status=torch.tensor([[0, 1], [4, 4], [4, 4]]))
    assert done.share(Status.NONFINITE).item() == pytest.approx(4 / 6)


def test_summary_counts_every_status_and_says_what_to_try():
    text = solution(0, 0, 2, 1, 3, 4, 4).summary()
    assert text.startswith("2 of 7 success, ")
    for count, status in ((1, "MAX_STEPS"), (1, "NO_DESCENT"), (2, "NONFINITE")):
        assert f"{count} {status.lower()}: {Status[status].message}" in text


def test_summary_of_success_is_short():
    assert solution(0, 0).summary() == "2 of 2 success"


def test_summary_of_one_task_without_batch():
    done = Solution(torch.zeros(2), torch.tensor(1, dtype=torch.int8), {})
    assert done.summary().startswith("0 of 1 success, 1 max_steps: ")


def test_is_a_pytree_that_vmap_understands():
    leaves = pytree.tree_leaves(solution(0, 1))
    assert [tuple(leaf.shape) for leaf in leaves] == [(2, 2), (2,), (2,)]
    doubled = torch.func.vmap(lambda s: s._replace(value=s.value + 1))(solution(0, 1, 2))
    assert isinstance(doubled, Solution)
    assert doubled.value.tolist() == [[1.0, 1.0]] * 3
    assert doubled.status.tolist() == [0, 1, 2]
