"""Drawn inputs that are wrong: refused in words that help, or without effect on other tasks."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import implicit_optim as iopt
from drawn import (
    BATCHES,
    KINDS,
    NAMES,
    build,
    cases,
    close,
    differentiate,
    flatten,
    leaves_of,
    wanting,
)

DOUBLE = st.just(torch.float64)
BATCHED = cases(dtypes=DOUBLE, batches=BATCHES[1:])


@given(case=BATCHED, axis=st.integers(0, 1), by=st.sampled_from([-1, 1]), which=st.integers(0, 1))
def test_data_of_another_batch_size(case, axis, by, which):
    axis %= len(case.batch)
    data = list(case.data(case.inputs()))
    wrong = list(data[which].shape)
    wrong[axis] += by
    data[which] = torch.ones(wrong, dtype=torch.float64)
    theta, batch_ndim = case.theta(case.inputs()), len(case.batch)
    with pytest.raises(ValueError, match=rf"data\[{which}\] has shape .*phi's batch dimensions"):
        iopt.attach(case.tree(case.phi), case.objective(), theta, *data, batch_ndim=batch_ndim)


@given(case=BATCHED, leaf=st.integers(0, 2))
def test_leaves_of_phi_of_another_batch_size(case, leaf):
    leaves = leaves_of(case.tree(case.phi))
    leaf %= len(leaves)
    leaves[leaf] = torch.ones((case.batch[0] + 1, *leaves[leaf].shape[1:]), dtype=torch.float64)
    inputs, batch_ndim = case.inputs(), len(case.batch)
    with pytest.raises(ValueError, match="leading dimensions|phi's batch dimensions"):
        iopt.attach(
            build(case.kind, leaves), case.objective(), case.theta(inputs), *case.data(inputs),
            batch_ndim=batch_ndim,
        )  # fmt: skip


@given(case=cases(), leaf=st.integers(0, 2), dtype=st.sampled_from([torch.int64, torch.bool]))
def test_a_leaf_of_phi_that_is_no_float(case, leaf, dtype):
    leaves = leaves_of(case.tree(case.phi))
    leaves[leaf % len(leaves)] = leaves[leaf % len(leaves)].to(dtype)
    inputs = case.inputs()
    with pytest.raises(TypeError, match=r"phi.* must be a floating-point tensor, got torch"):
        iopt.attach(
            build(case.kind, leaves), case.objective(), case.theta(inputs), *case.data(inputs),
            batch_ndim=len(case.batch),
        )  # fmt: skip


@given(
    case=cases(kinds=KINDS[1:]).filter(lambda case: len(case.shapes) > 1), leaf=st.integers(0, 2)
)
def test_leaves_of_phi_of_two_dtypes(case, leaf):
    leaves = leaves_of(case.tree(case.phi))
    leaves[leaf % len(leaves)] = leaves[leaf % len(leaves)].half()
    inputs = case.inputs()
    with pytest.raises(ValueError, match="bring all leaves to one dtype and device"):
        iopt.attach(
            build(case.kind, leaves), case.objective(), case.theta(inputs), *case.data(inputs),
            batch_ndim=len(case.batch),
        )  # fmt: skip


@given(case=cases(dtypes=st.just(torch.float32)), which=st.sampled_from(["anchor", "lam"]))
def test_hyperparameters_in_double_precision(case, which):
    """Beside a single-precision phi: right, each gradient in the dtype of its leaf, or refused."""
    assume(case.clearly_convex())
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    inputs = case.inputs()
    inputs[which] = [t.double() for t in inputs[which]]
    total = case.weighed(case.attach(wanting(inputs, NAMES)), v)
    try:
        ours = differentiate(case, total, inputs, NAMES)
    except (RuntimeError, ValueError) as error:
        assert "dtype" in str(error) or "scalar type" in str(error)
        assert case.lam_kind != "scalar"  # which takes the dtype of the anchor
        if "lam has dtype" in str(error):
            lam, anchor = (
                torch.float64 if which == name else torch.float32 for name in ("lam", "anchor")
            )
            assert f"lam has dtype {lam} but the anchor has {anchor}" in str(error)
        return
    assert all(t.dtype == torch.float64 for t in ours[which])
    ours[which] = [t.float() for t in ours[which]]
    expected = case.gradients(case.tensor(v).double().numpy())
    for name in NAMES:
        close(ours[name], expected[name], case, name)


@given(case=cases(dtypes=DOUBLE), number=st.integers(1, 5))
def test_integers_where_they_are_numbers(case, number):
    """An int lam, int targets and an int anchor mean the same as floats."""
    case.lam_kind, case.lam = "scalar", np.array(float(number))
    case.y, case.anchor = np.round(case.y), np.round(3 * case.anchor)
    assume(case.clearly_convex())
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    inputs = wanting(case.inputs(), ["x"])
    for name in ("anchor", "lam", "y"):
        inputs[name] = [t.long() for t in inputs[name]]
    ours = differentiate(case, case.weighed(case.attach(inputs), v), inputs, ["x"])
    close(ours["x"], case.gradients(v)["x"], case, "x")


@given(
    case=cases(dtypes=DOUBLE, batches=[(2,), (4,)], shapes=[(), (1,), (2,), (2, 2)]),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    where=st.sampled_from(["x", "v"]),
    at=st.integers(0, 99),
)
def test_a_task_that_is_not_finite(case, bad, where, at):
    """It alone is NaN and flagged; the others have the very bits that they have without it."""
    if case.shared:  # then by copies
        case.x, case.shared = np.stack([case.x] * case.batch[0]), False
    assume(case.clearly_convex())
    v = np.random.default_rng(case.seed + 1).standard_normal((*case.batch, case.n))
    task, results, heard = at % case.batch[0], [], []
    for spoil in (False, True):
        if spoil:
            spoiled = (case.x if where == "x" else v)[task].reshape(-1)
            spoiled[at % spoiled.size] = bad
        inputs = wanting(case.inputs(), NAMES)
        attached = case.attach(inputs, on_solve=lambda _, s: heard.append(s))
        total = case.weighed(attached, v)
        results.append(differentiate(case, total, inputs, NAMES))
    clean, dirty = results
    others = [i for i in range(case.batch[0]) if i != task]
    for name in ("x", "y"):
        assert torch.equal(clean[name][0][others], dirty[name][0][others])
        assert dirty[name][0][task].isnan().all()
    assert all(t.isnan().all() for t in dirty["anchor"])
    expected = [iopt.Status.NONFINITE if i == task else 0 for i in range(case.batch[0])]
    assert [s.status.tolist() for s in heard] == [[0] * case.batch[0], expected]


@given(case=cases(kinds=["named"]), extra=st.booleans())
def test_lam_must_name_every_parameter(case, extra):
    inputs = wanting(case.inputs(), ["y"])
    anchor, lam = case.theta(inputs)
    other = {"other": torch.tensor(1.0, dtype=case.dtype)}
    lam = {**lam, **other} if extra else {k: v for k, v in lam.items() if k != "p9"}
    message = r"missing \[\], unknown \['other'\]" if extra else r"missing \['p9'\], unknown \[\]"
    attached = iopt.attach(
        case.tree(case.phi), case.objective(), (anchor, lam), *case.data(inputs),
        batch_ndim=len(case.batch),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        flatten(attached).sum().backward()


@given(batch=st.sampled_from(BATCHES), n=st.integers(1, 4), extra=st.sampled_from([0, 1]))
def test_a_right_hand_side_of_another_shape(batch, n, extra):
    matrix = torch.eye(n, dtype=torch.float64).expand(*batch, n, n)
    wrong = [torch.ones(*batch, n + 1), torch.ones(2, *batch, n)][extra]
    with pytest.raises(ValueError, match=r"b has shape .*, the operator takes"):
        iopt.linear_solve(iopt.Dense(matrix), wrong.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex128])
def test_a_right_hand_side_of_another_dtype(dtype):
    """It is refused, never quietly converted."""
    matrix = 2 * torch.eye(3, dtype=torch.float64)
    with pytest.raises((RuntimeError, TypeError), match="dtype|floating point"):
        iopt.linear_solve(iopt.Dense(matrix), torch.ones(3, dtype=dtype))
