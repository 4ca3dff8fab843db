"""vmap(vmap(grad(f))): nested tasks, theta shared by all, along one of the two dimensions, by none."""

import pytest
from torch.func import grad, vmap

from transforms.cases import FIRST, case, close

BATCH = (2, 3)


@pytest.mark.parametrize("own", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", FIRST)
def test_vmap_vmap_grad(name, own):
    """`own` are the dimensions along which theta differs: it has no others."""
    shared = case(name, BATCH)
    this = case(name, BATCH, own)
    args, outer, inner = [], [], []
    for arg, mapped in zip(this.args, shared.mapped, strict=True):
        outer.append(0 if mapped or 0 in own else None)
        inner.append(0 if mapped or 1 in own else None)
        arg = arg if inner[-1] == 0 else arg[:, 0]
        args.append(arg if outer[-1] == 0 else arg[0])

    v = this.cotangent
    of = tuple(i + 1 for i in this.argnums)
    one = grad(lambda v, *args: this.fn(*args) @ v, of)
    ours = vmap(vmap(one, (0, *inner)), (0, *outer))(v, *args)
    for mine, theirs in zip(ours, this.each, strict=True):
        close(mine, theirs)
