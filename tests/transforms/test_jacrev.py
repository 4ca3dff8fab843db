"""jacrev: the whole Jacobian, of one task and of a batch, in chunks and under vmap."""

import pytest
from torch.func import jacrev, vmap

from transforms.cases import FIRST, SECOND, case, close


@pytest.mark.parametrize("name", FIRST)
def test_jacrev(name):
    this = case(name)
    ours = jacrev(this.whole, tuple(range(len(this.moving))))(*this.moving)
    for mine, theirs in zip(ours, this.jacobians(()), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("name", FIRST)
def test_jacrev_of_a_batch(name):
    """In chunks; the value of the second task has no derivative in the others' data."""
    this = case(name, (3,))
    second = jacrev(
        lambda *moving: this.whole(*moving)[1], tuple(range(len(this.moving))), chunk_size=7
    )
    triples = zip(this.argnums, second(*this.moving), this.jacobians((1,)), strict=True)
    for i, ours, theirs in triples:
        if this.mapped[i]:
            assert not ours[:, [0, 2]].any()
            ours = ours[:, 1]
        close(ours, theirs)


@pytest.mark.parametrize("name", SECOND)
def test_vmap_jacrev(name):
    """Not through torch's batch and instance norm, which have no such batching rule."""
    this = case(name, (3,), (0,))
    ours = vmap(jacrev(this.fn, this.argnums), this.dims)(*this.args)
    for mine, theirs in zip(ours, this.jacobians((1,)), strict=True):
        close(mine[1], theirs)


@pytest.mark.parametrize("name", SECOND)
def test_jacrev_of_jacrev(name):
    plane = case(name).plane
    close(jacrev(jacrev(plane.fn))(plane.origin), plane.hessian)
