"""The cache of the Mini-ImageNet loader: when it is used, made anew, or left alone."""

import os
import tracemalloc
from pathlib import Path

import pytest
import torch

from implicit_optim.tasks import _cache, _mini_imagenet, mini_imagenet
from mini_imagenet_files import (
    FILES,
    PARTS,
    WRITE,
    assert_equal,
    caches,
    expected,
    paint,
    write_csv,
)

CACHE = "mini_imagenet_4.cache"


@WRITE
def test_the_second_call_decodes_nothing(tmp_path, write, monkeypatch):
    mini_imagenet(write(tmp_path), size=4)
    assert caches(tmp_path) == [CACHE]
    monkeypatch.setattr(_mini_imagenet, "Image", None)  # pillow is needed only to decode
    called = []
    second = mini_imagenet(tmp_path, size=4, progress=lambda *args: called.append(args))
    assert_equal(second, expected())
    assert called == []
    with pytest.raises(ImportError, match=r"needs pillow: pip install 'implicit_optim\[vision\]'"):
        mini_imagenet(tmp_path, size=5)
    assert caches(tmp_path) == [CACHE]


@pytest.mark.parametrize("kept", [True, False])
def test_a_change_in_place_stays_with_the_caller(tmp_path, kept):
    write_csv(tmp_path)
    first, second = (mini_imagenet(tmp_path, size=4, cache=kept) for _ in range(2))
    for part in first:
        part.fill_(9)
    assert_equal(second, expected())
    assert_equal(mini_imagenet(tmp_path, size=4, cache=kept), expected())
    assert [part.unique().tolist() for part in first] == [[9]] * 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_tensors_are_mapped_from_the_cache(tmp_path):
    def mapped() -> bool:
        return str(tmp_path / CACHE) in Path("/proc/self/maps").read_text()

    splits = mini_imagenet(write_csv(tmp_path), size=4)
    assert mapped()
    test = splits.test
    del splits
    assert mapped() and test.max() > 0  # one part is enough to keep it
    del test
    assert not mapped()


@pytest.mark.parametrize("kept", [True, False])
def test_decoding_holds_one_image_at_a_time(tmp_path, kept):
    for part in PARTS:
        for i in range(20):
            paint(tmp_path / part / part / f"{i}.png", (i, i, i))
    mini_imagenet(tmp_path, size=3, cache=False)  # imports and the like
    tracemalloc.start()
    splits = mini_imagenet(tmp_path, size=128, cache=kept)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(part.numel() for part in splits)
    assert total == 60 * 3 * 128 * 128
    assert peak < total / 5


def flip(content: bytes, where: int) -> bytes:
    changed = bytearray(content)
    changed[where] ^= 1
    return bytes(changed)


DAMAGE = {
    "empty": lambda good: b"",
    "short": lambda good: good[:-1],
    "first half": lambda good: good[: len(good) // 2],
    "zeros after half": lambda good: good[: len(good) // 2] + bytes(len(good) - len(good) // 2),
    "long": lambda good: good + b"\0",
    "byte lost": lambda good: good[1:],
    "mark, first": lambda good: flip(good, -32),
    "mark, last": lambda good: flip(good, -1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path, name):
    mini_imagenet(write_csv(tmp_path), size=4)
    good = (tmp_path / CACHE).read_bytes()
    assert len(good) == FILES * 3 * 4 * 4 + 32
    (tmp_path / CACHE).write_bytes(DAMAGE[name](good))
    assert_equal(mini_imagenet(tmp_path, size=4), expected())
    assert (tmp_path / CACHE).read_bytes() == good


@pytest.mark.parametrize("longer, later", [(1, 0), (0, 1000)])
def test_a_changed_image_makes_the_cache_anew(tmp_path, longer, later):
    """Another size or another time of change is enough."""
    path = write_csv(tmp_path) / "images" / "n0100000009.jpg"
    path.write_bytes(path.read_bytes().ljust(200, b"\0"))  # a png ends before what is added
    before = path.stat()
    old = mini_imagenet(tmp_path, size=4)
    paint(path, (1, 2, 3))
    path.write_bytes(path.read_bytes().ljust(200 + longer, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert path.stat().st_size == 200 + longer
    oracle = expected()
    train = oracle.train.clone()
    train[0, 0] = torch.tensor([1, 2, 3])[:, None, None]
    assert_equal(mini_imagenet(tmp_path, size=4), oracle._replace(train=train))
    assert_equal(old, expected())  # mapped from the file that is no longer there
    assert caches(tmp_path) == [CACHE]


def test_another_order_or_other_labels_make_the_cache_anew(tmp_path):
    mini_imagenet(write_csv(tmp_path), size=4)
    path = tmp_path / "train.csv"
    text = path.read_text()
    head, *rows = text.splitlines()
    path.write_text("\n".join([head, *reversed(rows)]))
    oracle = expected()
    flipped = oracle._replace(train=oracle.train.flip(1))
    assert_equal(mini_imagenet(tmp_path, size=4), flipped)
    path.write_text(text.replace(",n01", ",n99"))
    renamed = oracle._replace(train=oracle.train[[1, 2, 0]])
    assert_equal(mini_imagenet(tmp_path, size=4), renamed)


def test_sizes_have_caches_of_their_own(tmp_path):
    write_csv(tmp_path)
    for size in (4, 3, 4):
        assert_equal(mini_imagenet(tmp_path, size=size), expected(size))
    assert caches(tmp_path) == ["mini_imagenet_3.cache", CACHE]


def test_a_folder_for_the_cache(tmp_path, monkeypatch):
    write_csv(tmp_path / "root")
    kept = tmp_path / "some" / "folder"
    assert_equal(mini_imagenet(tmp_path / "root", size=4, cache=str(kept)), expected())
    assert caches(kept) == [CACHE] and caches(tmp_path / "root") == []
    monkeypatch.setattr(_mini_imagenet, "Image", None)
    assert_equal(mini_imagenet(tmp_path / "root", size=4, cache=kept), expected())


def test_no_cache_where_none_is_wanted_or_possible(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(_cache.tempfile, "tempdir", str(temporary))
    root = write_csv(tmp_path / "root")
    splits = mini_imagenet(root, size=4, cache=False)
    assert_equal(splits, expected())
    assert caches(root) == [] and list(temporary.iterdir()) == []
    (root / CACHE).mkdir()  # stands in for a root that cannot be written
    assert_equal(mini_imagenet(root, size=4), expected())
    with pytest.raises(OSError):
        mini_imagenet(root, size=4, cache=root)
    assert caches(root) == [CACHE] and list(temporary.iterdir()) == []
    with pytest.raises(OSError):
        mini_imagenet(root, size=4, cache=root / "train.csv")


def test_a_root_that_cannot_be_written_is_known_before_anything_is_decoded(tmp_path, monkeypatch):
    write_csv(tmp_path)
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *args, **options):
        if "w" in mode and path.is_relative_to(tmp_path):
            raise PermissionError(f"read-only: {path}")
        return opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    called = []
    splits = mini_imagenet(tmp_path, size=4, progress=lambda *args: called.append(args))
    assert_equal(splits, expected())
    assert called == [(i + 1, FILES) for i in range(FILES)]  # once, into the temporary file
    with pytest.raises(PermissionError, match="read-only"):
        mini_imagenet(tmp_path, size=4, cache=tmp_path)
    assert caches(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    write_csv(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "fsync", full)
    assert_equal(mini_imagenet(tmp_path, size=4), expected())
    with pytest.raises(OSError, match="No space left"):
        mini_imagenet(tmp_path, size=4, cache=tmp_path)
    assert caches(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("older", [b"", b"an older cache"])
def test_an_interruption_leaves_no_half_cache(tmp_path, error, older):
    write_csv(tmp_path)
    if older:
        (tmp_path / CACHE).write_bytes(older)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total, len(caches(tmp_path))))
        if done == 5:
            raise error

    with pytest.raises(error):
        mini_imagenet(tmp_path, size=4, progress=progress)
    # The file that was being written lay beside its place, and is gone.
    assert seen == [(i + 1, FILES, 1 + bool(older)) for i in range(5)]
    assert caches(tmp_path) == [CACHE] * bool(older)
    assert not older or (tmp_path / CACHE).read_bytes() == older
    assert_equal(mini_imagenet(tmp_path, size=4), expected())
