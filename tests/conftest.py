"""What every test starts from: a seeded torch, its default dtype, and a hypothesis profile."""

import os

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core: threads on top of that only get in the way


class _TorchRandom:
    """Torch's generator in the words of `random.Random`, for hypothesis to seed and restore.

    Each example then starts from the same torch seed: an example that wants other numbers draws
    its own seed from hypothesis.
    """

    def seed(self, seed):
        torch.manual_seed(seed)

    def getstate(self):
        return torch.get_rng_state()

    def setstate(self, state):
        torch.set_rng_state(state)


TORCH_RANDOM = _TorchRandom()  # hypothesis holds it by a weak reference
hypothesis.register_random(TORCH_RANDOM)

hypothesis.settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=250, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Seed torch before each test (docstring examples too); undo a changed default dtype after."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
