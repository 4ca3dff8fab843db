"""Mini-ImageNet on disk with small images made here, in both layouts."""

from pathlib import Path

import pytest
import torch

from implicit_optim.tasks import Splits, mini_imagenet

Image = pytest.importorskip("PIL.Image")
PARTS = ("train", "val", "test")

# Labels in the order in which they are written; the loader's is sorted.
LABELS = {"train": ["n03", "n01", "n02"], "val": ["n11", "n10"], "test": ["n20"]}

IMAGES = {"train": 3, "val": 2, "test": 4}
FILES = 3 * 3 + 2 * 2 + 1 * 4


def color(label: str, index: int) -> tuple[int, int, int]:
    return 10 * int(label[1:]), 20 * index, 255 - 3 * int(label[1:]) - index


def paint(path: Path, rgb: tuple[int, int, int], size: tuple[int, int] = (6, 5)) -> None:
    """Write one colour, without loss whatever the name says: Pillow goes by the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path, "png")


def expected(size: int = 4) -> Splits:
    def part(name: str) -> torch.Tensor:
        colors = [[color(label, i) for i in range(IMAGES[name])] for label in sorted(LABELS[name])]
        return torch.tensor(colors, dtype=torch.uint8)[..., None, None].expand(
            -1, -1, -1, size, size
        )

    return Splits(*map(part, PARTS))


def assert_equal(found: Splits, wanted: Splits) -> None:
    assert isinstance(found, Splits)
    for part, oracle in zip(found, wanted, strict=True):
        assert part.dtype == torch.uint8 and part.device.type == "cpu"
        assert torch.equal(part, oracle)


def write_csv(root: Path) -> Path:
    """Images named so that the csv's order is neither that of the names nor that of the classes."""
    for part in PARTS:
        lines = ["filename,label"]
        for i in range(IMAGES[part]):
            for label in LABELS[part]:
                name = f"{label}{9 - i:08}.jpg"
                paint(root / "images" / name, color(label, i))
                lines.append(f"{name},{label}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


def write_tree(root: Path) -> Path:
    for part in PARTS:
        for label in LABELS[part]:
            for i in reversed(range(IMAGES[part])):
                suffix = (".jpg", ".JPEG", ".Png", ".jpeg")[i]
                paint(root / part / label / f"{label}_{i}{suffix}", color(label, i))
    return root


WRITE = pytest.mark.parametrize("write", [write_csv, write_tree])


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "cache" in path.name)


def one_image(root: Path, image, suffix: str = ".png", size: int = 4, **options) -> torch.Tensor:
    """Read `image` as the only one of train."""
    for part in PARTS:
        path = root / part / part / f"1{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    return mini_imagenet(root, size=size, cache=False).train[0, 0]
