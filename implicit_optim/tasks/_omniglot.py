"""Omniglot: every character of the data set as one uint8 tensor, and the splits of the papers."""

from os import PathLike
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from implicit_optim.tasks._cache import cached
from implicit_optim.tasks._checks import check_positive
from implicit_optim.tasks._drawings import Drawings, decode, find
from implicit_optim.tasks._episodes import rotate_classes, split_classes
from implicit_optim.tasks._splits import Splits

try:
    from torchvision import datasets
except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch
    datasets = None

_FORMAT = "implicit_optim drawings 1"  # raise the number when the bytes of a cache change
_PARTS = ("images_background", "images_evaluation")


def omniglot(
    root: str | PathLike[str],
    *,
    size: int = 28,
    download: bool = False,
    cache: bool | str | PathLike[str] = True,
) -> UInt8[Tensor, "characters drawings 1 size size"]:
    """Read Omniglot: 1,623 characters of 50 alphabets, each drawn once by 20 people.

    Characters come in one order everywhere: the 964 of the background set, then the 659 of the
    evaluation set, each by name of alphabet, then of character; drawings by file name. A drawing
    is turned to grey, resized by Pillow's Lanczos filter (that of MAML's own data) and inverted:
    ink is 255, paper 0.

    Each of the two sets is looked for as an extracted folder `images_background`
    (`images_evaluation`) in `root` and in `root/omniglot-py`, then as a zip of that name in the
    same places, which is read without extracting it.

    Args:
        root: folder of the data set.
        size: height and width of the result in pixels; the files have 105.
        download: let torchvision download what is not found.
        cache: keep the result as one file, which makes the next call fast: True for a file in
            `root` (none if `root` cannot be written), a folder to keep it there, False for none.
            A file that is damaged, or was made from other data, is made anew.

    Returns:
        `[1623, 20, 1, size, size]` on the CPU.

    Raises:
        FileNotFoundError: if a set is missing and `download` is False.
        ImportError: if pillow is missing, or torchvision where a download is asked for.
        ValueError: if `size` is not positive, a file cannot be read as an image, a set is empty,
            or characters differ in their number of drawings.

    Examples:
        >>> from io import BytesIO
        >>> from tempfile import TemporaryDirectory
        >>> from zipfile import ZipFile
        >>> from PIL import Image
        >>> folder, paper = TemporaryDirectory(), BytesIO()
        >>> Image.new("1", (105, 105), 1).save(paper, "png")  # a blank sheet
        >>> for part in ("images_background", "images_evaluation"):
        ...     with ZipFile(f"{folder.name}/{part}.zip", "w") as file:
        ...         file.writestr(f"{part}/Greek/character01/0001_01.png", paper.getvalue())
        >>> images = omniglot(folder.name)
        >>> folder.cleanup()
        >>> images.shape, images.dtype, images.max().item()
        (torch.Size([2, 1, 1, 28, 28]), torch.uint8, 0)

    Source: Lake et al., "Human-level concept learning through probabilistic program induction"
    (2015); resizing as in Finn et al. (2017).
    """
    check_positive(size=size)
    drawings = [_find_or_download(Path(root), part, download) for part in _PARTS]
    shape = (*_count(drawings), 1, size, size)
    folder = Path(root) if isinstance(cache, bool) else Path(cache)
    pixels = cached(
        folder / f"omniglot_{size}.cache" if cache is not False else None,
        key=f"{_FORMAT} {(shape, [source.stamps for source in drawings])!r}",
        length=torch.Size(shape).numel(),
        make=lambda: b"".join(decode(source, size) for source in drawings),
        required=not isinstance(cache, bool),
    )
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape)


def _find_or_download(root: Path, part: str, download: bool) -> Drawings:
    folders = (root, root / "omniglot-py")
    found = find(folders, part)
    if found is None and download:
        if datasets is None:
            raise ImportError(
                "downloading Omniglot needs torchvision: pip install 'implicit_optim[vision]'"
            )
        datasets.Omniglot(str(root), background=part == _PARTS[0], download=True)
        found = find(folders, part)
    if found is None:
        raise FileNotFoundError(
            f"Omniglot's {part} is not in {root}: looked for a folder {part} and a file "
            f"{part}.zip in {' and in '.join(map(str, folders))} "
            "(put one there, or give download=True)"
        )
    return found


def _count(sources: list[Drawings]) -> tuple[int, int]:
    """Count characters, and drawings of each; refuse a set with holes in it."""
    counts: dict[str, int] = {}
    for source in sources:
        for name in source.stamps:
            character = f"{source.path}/{name.rpartition('/')[0]}"
            counts[character] = counts.get(character, 0) + 1
    most = max(counts.values())
    for character, count in counts.items():
        if count != most:
            raise ValueError(
                f"Omniglot is incomplete: {character} has {count} drawings, others have {most} "
                "(extract or download the data set again)"
            )
    return len(counts), most


def omniglot_splits(
    images: UInt8[Tensor, "characters drawings 1 size size"],
    *,
    sizes: tuple[int, int, int] = (1100, 100, 423),
    seed: int = 0,
    rotations: bool = True,
) -> Splits:
    """Split Omniglot's characters as the papers do, at random and disjointly.

    The papers meta-train on 1,200 characters and test on the other 423, with every rotation by 90
    degrees a class of its own. Here the last 100 of those 1,200 are for validation. Rotations are
    made after the split, so all four of a character stay together.

    Args:
        images: `[characters, drawings, 1, size, size]`, from `omniglot()`.
        sizes: characters in each part, before rotation.
        seed: seed of the split.
        rotations: make a class of every rotation by 90 degrees.

    Returns:
        `Splits(train, val, test)`: with the default sizes `[4400, ...]`, `[400, ...]` and
        `[1692, ...]`, or a quarter of that without rotations.

    Raises:
        ValueError: if a size is not positive, or the sizes ask for more characters than there are.

    Examples:
        >>> images = torch.arange(1623).view(-1, 1, 1, 1, 1)
        >>> train, val, test = omniglot_splits(images, seed=0)
        >>> len(train), len(val), len(test), train.unique().numel()
        (4400, 400, 1692, 1100)

    Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks"
    (2017), section 5.2; after Santoro et al. (2016), section 4.
    """
    parts = (images[part.to(images.device)] for part in split_classes(len(images), sizes, seed))
    return Splits(*(rotate_classes(part) if rotations else part for part in parts))
