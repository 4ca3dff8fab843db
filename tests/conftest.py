"""What every test starts from: a seeded torch, its default dtype, and a hypothesis profile."""

import os
import zipfile
from io import BytesIO

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


@pytest.fixture
def double():
    """Double precision by default: `pytestmark = pytest.mark.usefixtures("double")`."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def omniglot_zips(tmp_path_factory):
    """A folder with Omniglot's 964 + 659 characters as zips, four tiny random drawings of each."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("omniglot")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("images_background", 964), ("images_evaluation", 659)):
        characters = (torch.rand(count, 1, 7, 7, generator=generator) < 0.5).byte()
        noise = (torch.rand(count, 4, 7, 7, generator=generator) < 0.1).byte()
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as file:
            for c, character in enumerate(255 * (characters ^ noise)):
                for d, drawing in enumerate(character):
                    png = BytesIO()
                    pixels = bytes(drawing.flatten().tolist())
                    image.frombytes("L", (7, 7), pixels).save(png, "png")
                    name = f"{part}/Alphabet/character{c:04}/{c:04}_{d}.png"
                    file.writestr(name, png.getvalue())
    return folder
