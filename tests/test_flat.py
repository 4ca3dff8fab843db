"""The flat layout: round trips over random pytrees, views, batches, error messages."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from implicit_optim._vectors import Layout

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)  # 0-d, empty and one-element included
BATCH = st.lists(st.integers(1, 3), max_size=2).map(tuple)
DTYPES = st.sampled_from([torch.float16, torch.float32, torch.float64])
TREES = st.recursive(
    SHAPES.map(lambda shape: ("leaf", shape)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.dictionaries(st.text(min_size=1, max_size=4), inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


def fill(tree, batch, dtype):
    """A pytree of tensors that count upwards, and the leaves in order."""
    leaves = []

    def build(node):
        if isinstance(node, dict):
            return {key: build(node[key]) for key in node}
        if isinstance(node, list):
            return [build(item) for item in node]
        start = sum(leaf.numel() for leaf in leaves)
        shape = (*batch, *node[1])
        leaves.append(torch.arange(start, start + math.prod(shape)).reshape(shape).to(dtype))
        return leaves[-1]

    return build(tree), leaves


def in_order(tree):
    """Leaves of nested dicts and lists, read without the library."""
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in in_order(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in in_order(value)]
    return [tree]


@given(TREES, BATCH, DTYPES)
def test_round_trip(shapes, batch, dtype):
    tree, leaves = fill(shapes, batch, dtype)
    layout = Layout.of(tree, batch_ndim=len(batch))
    flat = layout.ravel(tree)
    width = sum(leaf.numel() for leaf in leaves) // math.prod(batch)
    assert layout.n == width
    assert flat.shape == (*batch, width)
    assert flat.dtype == dtype
    expected = [torch.tensor([], dtype=dtype).reshape(*batch, 0)]
    expected += [leaf.reshape(*batch, -1 if leaf.numel() else 0) for leaf in leaves]
    assert torch.equal(flat, torch.cat(expected, -1))
    back = layout.unravel(flat)
    assert pytree.tree_structure(back) == pytree.tree_structure(tree)
    for mine, theirs in zip(in_order(back), in_order(tree), strict=True):
        assert torch.equal(mine, theirs)


@given(TREES, BATCH)
def test_unravel_makes_views(shapes, batch):
    tree, _ = fill(shapes, (), torch.float64)
    layout = Layout.of(tree)
    flat = torch.zeros(*batch, layout.n, dtype=torch.float64)
    for number, leaf in enumerate(in_order(layout.unravel(flat))):
        assert leaf.numel() == 0 or leaf.untyped_storage().data_ptr() == (
            flat.untyped_storage().data_ptr()
        )
        leaf.fill_(number + 1.0)
    sizes = [leaf.numel() for leaf in in_order(tree)]
    expected = [i + 1.0 for i, size in enumerate(sizes) for _ in range(size)]
    assert torch.equal(flat, torch.tensor(expected, dtype=flat.dtype).expand_as(flat))


@given(TREES, BATCH)
def test_the_layout_does_not_depend_on_the_batch(shapes, batch):
    alone = Layout.of(fill(shapes, (), torch.float64)[0])
    batched = Layout.of(fill(shapes, batch, torch.float64)[0], batch_ndim=len(batch))
    assert alone == batched
    assert sum(alone.sizes) == alone.n


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_differentiates_both_ways(batch):
    tree = {"a": torch.randn(*batch, 2, 2).double(), "b": torch.randn(batch).double()}
    layout = Layout.of(tree, batch_ndim=len(batch))
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    grads = torch.func.grad(lambda t: (layout.ravel(t) * weights).sum())(tree)
    assert torch.equal(grads["a"], weights[:4].reshape(2, 2).expand(*batch, 2, 2))
    assert torch.equal(grads["b"], weights[4].expand(batch))
    flat = layout.ravel(tree)
    back = torch.func.grad(lambda f: (3 * layout.unravel(f)["b"]).sum())(flat)
    assert torch.equal(back, torch.tensor([0.0, 0, 0, 0, 3]).double().expand_as(flat))


def test_bare_tensor():
    layout = Layout.of(torch.ones(2, 2))
    assert layout.names == ("phi",)
    assert layout.unravel(torch.arange(4.0)).tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_names_are_those_of_the_tree():
    layout = Layout.of({"a.b": torch.ones(2), "c": [torch.ones(1)]}, name="theta")
    assert layout.names == ("theta['a.b']", "theta['c'][0]")


def test_under_vmap():
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(())})
    flat = torch.arange(12.0).reshape(4, 3)
    out = torch.func.vmap(lambda f: layout.ravel(layout.unravel(f)))(flat)
    assert torch.equal(out, flat)


def test_no_leaves():
    with pytest.raises(ValueError, match="phi has no tensors: give at least one parameter"):
        Layout.of({})


@pytest.mark.parametrize(
    ("leaf", "what"),
    [(torch.ones(2, dtype=torch.int64), "torch.int64"), (1.5, "float"), (None, "NoneType")],
)
def test_leaf_must_be_a_floating_point_tensor(leaf, what):
    with pytest.raises(TypeError, match=rf"phi\['b'\] must be a floating-point tensor, got {what}"):
        Layout.of({"a": torch.ones(1), "b": leaf})


def test_complex_leaf():
    with pytest.raises(TypeError, match="phi must be a floating-point tensor, got torch.complex64"):
        Layout.of(torch.ones(2, dtype=torch.complex64))


def test_mixed_dtypes():
    with pytest.raises(ValueError, match=r"phi\['b'\] is torch.float64 .* bring all leaves to one"):
        Layout.of({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.float64)})


def test_mixed_devices():
    with pytest.raises(ValueError, match=r"on meta but phi\['a'\] is torch.float32 on cpu"):
        Layout.of({"a": torch.ones(1), "b": torch.ones(1, device="meta")})


@pytest.mark.parametrize("leaf", [torch.ones(()), torch.ones(3, 2)])
def test_batch_dimensions_must_agree(leaf):
    with pytest.raises(ValueError, match=r"with batch_ndim=1 every leaf needs .* \(2,\) of phi"):
        Layout.of({"a": torch.ones(2, 4), "b": leaf}, batch_ndim=1)


@pytest.mark.parametrize("other", [{"a": torch.ones(2)}, [torch.ones(2), torch.ones(1)]])
def test_ravel_rejects_another_structure(other):
    layout = Layout.of({"a": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"expected a pytree with the leaves \(\"phi\['a'\]\""):
        layout.ravel(other)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (), (2, 1)])
def test_ravel_rejects_another_shape(shape):
    layout = Layout.of({"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"phi\['a'\] has shape"):
        layout.ravel({"a": torch.ones(shape)})
