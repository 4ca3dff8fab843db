"""A few-shot run made small: its settings, random patterns to tell apart, a network."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from benchmarks.paper import few_shot  # noqa: E402
from implicit_optim.tasks import ConvNet, Splits  # noqa: E402

SMALL = few_shot.Settings(
    method="imaml-gd",
    way=2,
    shot=1,
    train_shot=1,
    queries=3,
    lam=0.5,
    inner_lr=0.1,
    inner_steps=4,
    cg_steps=3,
    curvature="gauss-newton",
    zero_head=True,
    tasks=4,
    steps=6,
    meta_lr=1e-2,
    cycles=1,
    validate_every=3,
    test_tasks=12,
    seed=0,
)


def noisy(classes, seed):
    """Random patterns of 8 x 8 with a tenth of their pixels flipped; 20 examples of each."""
    generator = torch.Generator().manual_seed(seed)
    patterns = (torch.rand(classes, 1, 1, 8, 8, generator=generator) < 0.5).byte()
    flips = (torch.rand(classes, 20, 1, 8, 8, generator=generator) < 0.1).byte()
    return 255 * (patterns ^ flips)


SPLIT = Splits(noisy(12, 0), noisy(8, 1), noisy(10, 2))


def network():
    torch.manual_seed(0)
    return ConvNet(2, image_size=8, filters=8, blocks=2)
