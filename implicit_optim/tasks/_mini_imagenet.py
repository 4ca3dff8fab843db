"""Mini-ImageNet: every image of the data set as bytes mapped from one file, in its three splits."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from os import PathLike
from pathlib import Path

import torch

from implicit_optim.tasks._cache import mapped
from implicit_optim.tasks._checks import check_positive
from implicit_optim.tasks._layouts import PARTS, Classes, find
from implicit_optim.tasks._splits import Splits

try:
    from PIL import Image
except ImportError:
    Image = None  # type: ignore[assignment]

_FORMAT = "implicit_optim mini_imagenet 1"  # raise the number when the bytes of a cache change


def mini_imagenet(
    root: str | PathLike[str],
    *,
    size: int = 84,
    cache: bool | str | PathLike[str] = True,
    progress: Callable[[int, int], None] | None = None,
) -> Splits:
    """Read Mini-ImageNet: 100 classes of ImageNet, 600 images of each, in three splits.

    Two layouts are found by themselves; where both are there, the first is read:

    - `train.csv`, `val.csv` and `test.csv` in `root`, with the columns `filename` and `label`, and
      the images in `root/images`: the files of Ravi and Larochelle;
    - a folder for each class, `root/{train,val,test}/CLASS`, of `.jpg`, `.jpeg` or `.png` files.

    Classes come in sorted order of their labels; the images of a class in the order of the csv
    file, or by file name. The images may be of any size and in any mode of 8 bits or of 16 bits of
    grey; they are turned to RGB, without transparency, and then squeezed to a square by Pillow's
    Lanczos filter, as MAML's were. An image that already has this size stays as it is.

    The whole set is 1.27 GB, so it is decoded image by image into a file and mapped from there: a
    page is read when it is first used. The tensors are the caller's own, and a change to them never
    reaches the file.

    Args:
        root: folder of the data set.
        size: height and width of the result in pixels.
        cache: where the file is kept, which makes the next call fast: True for `root` (nowhere if
            `root` cannot be written), or a folder, False for nowhere. Without a place it is a
            temporary file of the system's, which goes with the tensors. A file of another length,
            or made from files of other names, sizes or times of change, is made anew.
        progress: called with the number of images decoded so far and of all, after each.

    Returns:
        `Splits(train, val, test)`: uint8 `[classes, images, 3, size, size]` on the CPU; with the
        files of Ravi and Larochelle 64, 16 and 20 classes of 600 images.

    Raises:
        FileNotFoundError: if `root`, a layout or any image is missing.
        ImportError: if pillow is missing.
        OSError: if the folder `cache` cannot be written.
        ValueError: if `size` is not positive, a file cannot be read as an image or as a csv file
            of these columns, an image is listed twice, a split or a class is empty, a class is in
            two splits, or the classes of a split differ in their number of images.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> folder = TemporaryDirectory()
        >>> for part, color in ("train", "red"), ("val", "lime"), ("test", "blue"):
        ...     path = Path(folder.name, part, f"n0{len(part)}")
        ...     path.mkdir(parents=True)
        ...     Image.new("RGB", (500, 375), color).save(path / "1.png")
        >>> train, val, test = mini_imagenet(folder.name)
        >>> folder.cleanup()
        >>> train.shape, train.dtype, val[0, 0, :, 0, 0].tolist()
        (torch.Size([1, 1, 3, 84, 84]), torch.uint8, [0, 255, 0])

    Source: Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning" (2017), after
    Vinyals et al., "Matching Networks for One Shot Learning" (2016); resizing as in Finn et al.
    (2017).
    """
    check_positive(size=size)
    size, root = int(size), Path(root)
    parts = find(root)
    _check_disjoint(parts)
    shapes = [
        (len(classes), _count(part, classes), 3, size, size)
        for part, classes in zip(PARTS, parts, strict=True)
    ]
    names = [name for classes in parts for name in chain(*classes.values())]
    folder = root if isinstance(cache, bool) else Path(cache)
    pixels = mapped(
        folder / f"mini_imagenet_{size}.cache" if cache is not False else None,
        key=f"{_FORMAT} {(size, parts, _stamps(root, names))!r}",
        length=sum(map(math.prod, shapes)),
        make=lambda: _decode(root, names, size, progress),
        required=not isinstance(cache, bool),
    )
    images, start = [], 0
    for shape in shapes:
        count = math.prod(shape)
        part = torch.frombuffer(pixels, dtype=torch.uint8, count=count, offset=start)
        images.append(part.view(shape))
        start += count
    return Splits(*images)


def _check_disjoint(parts: list[Classes]) -> None:
    for (first, some), (second, others) in combinations(zip(PARTS, parts, strict=True), 2):
        for label in some:
            if label in others:
                raise ValueError(
                    f"Mini-ImageNet's splits must be disjoint, but class {label} is in {first} and "
                    f"in {second} (remove it from one)"
                )


def _count(part: str, classes: Classes) -> int:
    """Count the images of each class; refuse a class that differs from most."""
    usual = Counter(map(len, classes.values())).most_common(1)[0][0]
    for label, names in classes.items():
        if len(names) != usual:
            raise ValueError(
                f"Mini-ImageNet is incomplete: class {label} of {part} has {len(names)} images, "
                f"others have {usual} (copy or extract the data set again)"
            )
    return usual


def _stamps(root: Path, names: list[str]) -> list[tuple[int, int]]:
    """Give for each file two numbers that change when the file does."""
    stamps, missing = [], []
    for name in names:
        try:
            stat = (root / name).stat()
            stamps.append((stat.st_size, stat.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images are missing: the first is {root / missing[0]} "
            f"(put it there; csv files in {root} win over folders, so take them away if they are "
            "not meant)"
        )
    return stamps


def _decode(
    root: Path, names: list[str], size: int, progress: Callable[[int, int], None] | None
) -> Iterator[bytes]:
    """Give the `3 * size * size` bytes of each image in turn."""
    if Image is None:
        raise ImportError(
            "reading Mini-ImageNet needs pillow: pip install 'implicit_optim[vision]'"
        )
    for done, name in enumerate(names, 1):
        yield _read(root / name, size)
        if progress is not None:
            progress(done, len(names))


def _read(path: Path, size: int) -> bytes:
    try:
        with Image.open(path) as image:
            # Colours before resizing: the filter would drop pixels of a palette, not average them.
            small = _to_rgb(image).resize((size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # pillow's decoders raise many kinds
        raise ValueError(f"cannot read {path} as an image: {error} (copy it again)") from error
    return b"".join(channel.tobytes() for channel in small.split())


def _to_rgb(image: "Image.Image") -> "Image.Image":
    if image.mode.startswith("I;16"):
        # Pillow alone would clip at 255.
        image = image.point(lambda value: value / 256).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range (convert it to 8 bits)")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparent colours
    return image.convert("RGB")
