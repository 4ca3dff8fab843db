"""Linear systems for the tests of CG: norms, products that are counted, plain CG in NumPy."""

import numpy as np
import torch
from hypothesis import strategies as st

from implicit_optim import Dense, Linearized
from problems import BATCHES

F64 = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 30)
BATCH = st.sampled_from(BATCHES)


def norm(x):
    return np.linalg.norm(x, axis=-1)


def product(matrix, x):
    return np.einsum("...ij,...j->...i", matrix, x)


def counted(matrix, precondition=lambda r: r):
    """The matrix as an operator that counts its products."""
    calls = []

    def mv(x):
        calls.append(x)
        return Dense(matrix).mv(x)

    return Linearized(mv, precondition), calls


def with_diagonal(matrix, seed):
    """A badly scaled `D A D` and its preconditioner `D^-2`, which is not its proximal term."""
    scale = torch.from_numpy(10 ** np.random.default_rng(seed).uniform(-1, 1, matrix.shape[-1]))
    scale = scale.to(matrix.dtype)
    return scale[:, None] * matrix * scale, lambda r: r / scale**2
