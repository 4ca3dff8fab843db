"""Files of drawings: found in a folder or a zip, and decoded to bytes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import final
from zipfile import BadZipFile, ZipFile

try:
    from PIL import Image, ImageOps
except ImportError:
    Image = None  # type: ignore[assignment]


class Drawings(ABC):
    """A set of files `Alphabet/characterNN/NNNN_MM.png` in one place.

    `stamps` maps each name, in sorted order, to two numbers that change when the file does.
    """

    def __init__(self, path: Path) -> None:
        """Look at the files in `path`, but open none."""
        self.path = path
        self.stamps = dict(sorted(self._look(), key=lambda file: file[0].split("/")))
        if not self.stamps:
            raise ValueError(f"{path} holds no Alphabet/character/drawing.png (extract it again)")

    @abstractmethod
    def _look(self) -> Iterable[tuple[str, tuple[int, int]]]: ...

    @abstractmethod
    def read(self) -> Iterable[tuple[str, bytes]]:
        """Give the name and content of each file, in the order of `stamps`."""


@final
class _Folder(Drawings):
    def _look(self) -> Iterable[tuple[str, tuple[int, int]]]:
        for file in self.path.glob("*/*/*.png"):
            stat = file.stat()
            yield file.relative_to(self.path).as_posix(), (stat.st_size, stat.st_mtime_ns)

    def read(self) -> Iterable[tuple[str, bytes]]:
        for name in self.stamps:
            yield name, (self.path / name).read_bytes()


@final
class _Zip(Drawings):
    def _look(self) -> Iterable[tuple[str, tuple[int, int]]]:
        try:
            with ZipFile(self.path) as file:
                entries = file.infolist()
        except BadZipFile as error:
            raise ValueError(f"cannot read {self.path}: {error} (download it again)") from error
        for entry in entries:
            part, _, name = entry.filename.partition("/")
            if part == self.path.stem and name.endswith(".png") and name.count("/") == 2:
                yield name, (entry.file_size, entry.CRC)

    def read(self) -> Iterable[tuple[str, bytes]]:
        with ZipFile(self.path) as file:
            for name in self.stamps:
                try:
                    content = file.read(f"{self.path.stem}/{name}")
                except Exception as error:  # zipfile and zlib raise many kinds
                    raise ValueError(f"cannot read {name} in {self.path}: {error}") from error
                yield name, content


def find(folders: Iterable[Path], part: str) -> Drawings | None:
    """Find `part` in the first of `folders` that has it, extracted; failing that, as a zip."""
    folders = tuple(folders)
    for folder in folders:
        if (folder / part).is_dir():
            return _Folder(folder / part)
    for folder in folders:
        if (folder / f"{part}.zip").is_file():
            return _Zip(folder / f"{part}.zip")
    return None


def decode(drawings: Drawings, size: int) -> bytes:
    """Decode every drawing to `size * size` bytes, ink 255 on paper 0.

    Raises:
        ImportError: if pillow is missing.
        ValueError: if a file is no image, by its name.
    """
    if Image is None:
        raise ImportError("reading Omniglot needs pillow: pip install 'implicit_optim[vision]'")
    pixels = []
    for name, content in drawings.read():
        try:
            # Grey before resizing: in 1-bit mode Pillow would drop pixels, not average them.
            grey = Image.open(BytesIO(content)).convert("L")
        except Exception as error:  # pillow's decoders raise many kinds
            raise ValueError(f"cannot read {name} in {drawings.path}: {error}") from error
        small = grey.resize((size, size), Image.Resampling.LANCZOS)
        pixels.append(ImageOps.invert(small).tobytes())
    return b"".join(pixels)
