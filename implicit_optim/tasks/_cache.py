"""Results kept in files that are safe: checked before use, and never seen half written."""

import hashlib
import mmap
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cached(
    path: Path | None, *, key: str, length: int, make: Callable[[], bytes], required: bool
) -> bytearray:
    """Return `make()`, from the file `path` if that holds the very same.

    The file is `sha256(key, content)` and the content, so that a damaged file and one for another
    key fail the same check and are made anew.

    Raises:
        OSError: if the file cannot be written and `required` is True.
    """

    def digest(content: bytes | bytearray) -> bytes:
        return hashlib.sha256(f"{key} ".encode() + content).digest()

    if path is not None:
        try:
            kept = path.read_bytes()
        except OSError:
            kept = b""
        content = bytearray(kept[32:])
        if len(content) == length and kept[:32] == digest(content):
            return content
    content = bytearray(make())
    if path is not None:
        try:
            with _replacing(path) as temporary:
                temporary.write_bytes(digest(content) + content)
        except OSError:
            if required:
                raise
    return content


def mapped(
    path: Path | None, *, key: str, length: int, make: Callable[[], Iterable[bytes]], required: bool
) -> mmap.mmap:
    """Return the pieces of `make()` end to end, as `length` bytes mapped from the file `path`.

    For what is too large to hold or to hash on every call. The file is the content and then
    `sha256(key)`, which is written last: a file for another key, a short one and a long one fail
    the same check and are made anew. A byte changed inside the content is not noticed.

    The mapping is private: what is written to it stays in memory. Where no file is wanted or
    possible, the bytes are in a temporary file without a name, which goes with the mapping.

    Raises:
        OSError: if the file cannot be written and `required` is True, or no temporary file can be.
    """
    mark = hashlib.sha256(key.encode()).digest()
    if path is not None:
        try:
            return _open(path, length, mark)
        except OSError:
            pass  # not there, or not this content: made anew
        try:
            with _replacing(path) as temporary, temporary.open("wb") as file:
                _write(file, make(), mark)
                os.fsync(file.fileno())  # or a power cut might keep the new name and not the bytes
            return _open(path, length, mark)
        except OSError:
            if required:
                raise
    with tempfile.TemporaryFile() as file:
        _write(file, make(), mark)
        return _map(file, length, mark)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file takes the place of `path` if all goes well.

    It is moved there at once: no other process ever sees a part of it.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: IO[bytes], pieces: Iterable[bytes], mark: bytes) -> None:
    for piece in pieces:
        file.write(piece)
    file.write(mark)
    file.flush()


def _open(path: Path, length: int, mark: bytes) -> mmap.mmap:
    with path.open("rb") as file:
        return _map(file, length, mark)


def _map(file: IO[bytes], length: int, mark: bytes) -> mmap.mmap:
    """Map the first `length` bytes; raise OSError unless `mark`, and no more, follows them."""
    file.seek(length)
    if file.read(len(mark) + 1) != mark:
        raise OSError(f"{file.name} does not hold what was asked for")
    return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY)
