"""The Mini-ImageNet loader on small images made here: both layouts, the cache, and damage."""

import importlib.util
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from implicit_optim.tasks import ConvNet, Episodes, Splits, _cache, _mini_imagenet, mini_imagenet

Image = pytest.importorskip("PIL.Image")

PARTS = ("train", "val", "test")
# Labels in the order in which they are written; the loader's is sorted.
LABELS = {"train": ["n03", "n01", "n02"], "val": ["n11", "n10"], "test": ["n20"]}
IMAGES = {"train": 3, "val": 2, "test": 4}
FILES = 3 * 3 + 2 * 2 + 1 * 4
CACHE = "mini_imagenet_4.cache"


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


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "cache" in path.name)


# ------------------------------------------------------------------------------------- layouts


@WRITE
def test_reads_both_layouts_in_order(tmp_path, write):
    assert_equal(mini_imagenet(str(write(tmp_path)), size=4), expected())


def test_csv_files_win_over_folders(tmp_path):
    write_csv(tmp_path)
    paint(tmp_path / "train" / "n77" / "1.png", (0, 0, 0))
    paint(tmp_path / "val" / "n78" / "1.png", (0, 0, 0))
    paint(tmp_path / "test" / "n79" / "1.png", (0, 0, 0))
    assert_equal(mini_imagenet(tmp_path, size=4), expected())
    (tmp_path / "val.csv").unlink()  # no longer the layout of the csv files
    assert [part.unique().tolist() for part in mini_imagenet(tmp_path, size=4)] == [[0]] * 3


def test_csv_files_may_have_a_byte_order_mark_more_columns_crlf_and_blank_lines(tmp_path):
    write_csv(tmp_path)
    path = tmp_path / "val.csv"
    lines = path.read_text().splitlines()
    rows = [f"7,{line}" for line in lines[1:]]
    text = "\r\n".join(["\ufeffnumber,filename,label", "", *rows, ""])
    path.write_bytes(text.encode())
    assert_equal(mini_imagenet(tmp_path, size=4), expected())


def test_hidden_and_other_files_of_a_tree_are_not_images(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "train" / "n01" / "._n01_0.jpg").write_bytes(b"not an image")
    (tmp_path / "train" / "n01" / "notes.txt").write_bytes(b"not an image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "list.txt").write_bytes(b"not a class")
    assert_equal(mini_imagenet(tmp_path, size=4), expected())


# --------------------------------------------------------------------------------------- images


def one_image(root: Path, image, suffix: str = ".png", size: int = 4, **options) -> torch.Tensor:
    """Read `image` as the only one of train."""
    for part in PARTS:
        path = root / part / part / f"1{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    return mini_imagenet(root, size=size, cache=False).train[0, 0]


def palette(transparency: bytes | None):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


MODES = {
    "grey": (lambda: Image.new("L", (6, 6), 77), ".png", (77, 77, 77)),
    "grey and alpha": (lambda: Image.new("LA", (6, 6), (77, 9)), ".png", (77, 77, 77)),
    "1 bit": (lambda: Image.new("1", (6, 6), 1), ".png", (255, 255, 255)),
    # 0x4D4D is 77/255 of the range of 16 bits.
    "16-bit grey": (lambda: Image.new("I;16", (6, 6), 0x4D4D), ".png", (77, 77, 77)),
    "RGBA": (lambda: Image.new("RGBA", (6, 6), (10, 20, 30, 0)), ".png", (10, 20, 30)),
    "palette": (lambda: palette(None), ".png", (10, 20, 30)),
    "palette, transparent": (lambda: palette(b"\xff\x10"), ".png", (10, 20, 30)),
    "grey jpeg": (lambda: Image.new("L", (6, 6), 77), ".jpg", (77, 77, 77)),
    # Ink of a fifth and black of a half: light is (1 - ink) (1 - black).
    "CMYK jpeg": (lambda: Image.new("CMYK", (6, 6), (51, 0, 0, 128)), ".jpg", (102, 127, 127)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(tmp_path, name):
    make, suffix, rgb = MODES[name]
    image = one_image(tmp_path, make(), suffix)
    oracle = torch.tensor(rgb)[:, None, None].expand(3, 4, 4)
    assert (image.int() - oracle).abs().max() <= (2 if suffix == ".jpg" else 0)


def test_channels_rows_and_columns_are_in_torchs_order(tmp_path):
    pixels = torch.arange(4 * 4 * 3).view(4, 4, 3)  # row, column, channel, as Pillow has it
    picture = Image.frombytes("RGB", (4, 4), bytes(pixels.flatten().tolist()))
    assert torch.equal(one_image(tmp_path, picture), pixels.permute(2, 0, 1).to(torch.uint8))


def halve(length: int) -> torch.Tensor:
    """Weights [length / 2, length] of Lanczos-3 written out; what lies outside is left out."""
    centre = 2 * torch.arange(length // 2) + 1.0
    distance = (torch.arange(length) + 0.5 - centre[:, None]) / 2
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return weights / weights.sum(1, keepdim=True)


def test_resizing_is_lanczos_and_squeezes(tmp_path):
    """16 rows and 8 columns to 8 x 8: rows are halved, columns stay."""
    pixels = torch.randint(256, (16, 8, 3))
    picture = Image.frombytes("RGB", (8, 16), bytes(pixels.flatten().tolist()))
    image = one_image(tmp_path, picture, size=8)
    oracle = torch.einsum("yr,rxc->cyx", halve(16), pixels.float()).round().clamp(0, 255)
    assert (image - oracle).abs().max() <= 1  # Pillow computes in fixed point


def test_colours_are_mixed_before_the_palette_is_lost(tmp_path):
    """A board of two colours of a palette is averaged; the palette's own numbers would not be."""
    board = Image.frombytes("P", (8, 8), bytes((x + y) % 2 for y in range(8) for x in range(8)))
    board.putpalette([0, 0, 0, 200, 100, 40])
    image = one_image(tmp_path, board)
    inner = image[:, 1:3, 1:3].float().mean((1, 2))
    assert (inner - torch.tensor([100.0, 50.0, 20.0])).abs().max() < 3


# ---------------------------------------------------------------------------------------- cache


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


# --------------------------------------------------------------------------------------- errors


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder \(give the folder"):
        mini_imagenet(tmp_path / "nowhere")
    write_csv(tmp_path)
    (tmp_path / "val.csv").unlink()
    (tmp_path / "train").mkdir()
    message = r"looked for train\.csv, .*there is no val\.csv\).*there is no val, test\); put one"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        mini_imagenet(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_images_are_counted_before_any_is_decoded(tmp_path, monkeypatch):
    write_csv(tmp_path)
    for name in ("n0200000008", "n1100000009"):
        (tmp_path / "images" / f"{name}.jpg").unlink()
    monkeypatch.setattr(_mini_imagenet, "Image", None)  # to decode would be another error
    message = rf"2 of {FILES} images are missing: the first is .*images.n0200000008\.jpg \(put it"
    with pytest.raises(FileNotFoundError, match=message):
        mini_imagenet(tmp_path, size=4)
    assert caches(tmp_path) == []
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match=rf"{FILES} of {FILES} images are missing"):
        mini_imagenet(tmp_path, size=4)


@WRITE
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_a_damaged_image_is_named(tmp_path, write, damage):
    write(tmp_path)
    path = next(path for path in tmp_path.rglob("n01*") if path.is_file())
    Image.frombytes("RGB", (32, 32), os.urandom(32 * 32 * 3)).save(path, "jpeg")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"text", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=rf"cannot read .*{path.name} as an image: .*copy it"):
        mini_imagenet(tmp_path, size=4)
    assert caches(tmp_path) == []


def test_a_mode_without_a_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1\.jpg as an image: mode F has no fixed range"):
        one_image(tmp_path, Image.new("F", (6, 6), 0.5), ".jpg", format="tiff")


CSV_ERRORS = {
    "columns": ("filename,label\nn11", "file,label\nn11", r"begins with 'file,label'.*first line"),
    "twice": ("n1100000008.jpg", "n1100000009.jpg", r"line 4: n1100000009\.jpg is already in val"),
    "other csv": ("n1100000008.jpg", "n0100000009.jpg", r"n0100000009\.jpg is already in train"),
    "no label": ("n1100000008.jpg,n11", "n1100000008.jpg", "line 4: no filename or no label"),
    "no name": ("n1100000008.jpg,n11", ",n11", "line 4: no filename or no label"),
}


@pytest.mark.parametrize("name", CSV_ERRORS)
def test_a_wrong_csv_file_is_named(tmp_path, name):
    old, new, message = CSV_ERRORS[name]
    edit(write_csv(tmp_path) / "val.csv", old, new)
    with pytest.raises(ValueError, match=rf"val\.csv.*{message}"):
        mini_imagenet(tmp_path, size=4)


@pytest.mark.parametrize("content", [b"", b"filename,label\n", b"filename,label\n\n\n"])
def test_an_empty_csv_file_is_named(tmp_path, content):
    (write_csv(tmp_path) / "val.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"val\.csv is empty: it lists no image"):
        mini_imagenet(tmp_path, size=4)


@pytest.mark.parametrize("content", [b"\xff\xfe,n1\n", b'"' + 200_000 * b"x"])
def test_a_file_that_is_no_csv_is_named(tmp_path, content):
    (write_csv(tmp_path) / "val.csv").write_bytes(b"filename,label\n" + content)
    with pytest.raises(ValueError, match=r"cannot read .*val\.csv as csv: .*copy it again"):
        mini_imagenet(tmp_path, size=4)


def test_an_empty_class_and_an_empty_split_are_named(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "val" / "n12").mkdir()
    with pytest.raises(ValueError, match=r"val.n12 is empty: it holds no \.jpg, \.jpeg, \.png"):
        mini_imagenet(tmp_path, size=4)
    (tmp_path / "val").rename(tmp_path / "other")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="val is empty: it holds no class folders"):
        mini_imagenet(tmp_path, size=4)


@WRITE
def test_an_incomplete_class_is_named(tmp_path, write):
    write(tmp_path)
    if write is write_csv:
        edit(tmp_path / "train.csv", "n0200000008.jpg,n02\n", "")
    else:
        (tmp_path / "train" / "n02" / "n02_1.JPEG").unlink()
    with pytest.raises(ValueError, match=r"class n02 of train has 2 images, others have 3 \(copy"):
        mini_imagenet(tmp_path, size=4)


def test_the_class_that_differs_from_most_is_the_one_named(tmp_path):
    write_tree(tmp_path)
    paint(tmp_path / "train" / "n02" / "one more.png", (0, 0, 0))
    with pytest.raises(ValueError, match="class n02 of train has 4 images, others have 3"):
        mini_imagenet(tmp_path, size=4)


def test_a_class_in_two_splits_is_named(tmp_path):
    write_tree(tmp_path)
    for i in range(4):
        paint(tmp_path / "test" / "n10" / f"{i}.png", (0, 0, 0))
    with pytest.raises(ValueError, match="disjoint, but class n10 is in val and in test"):
        mini_imagenet(tmp_path, size=4)


def test_size_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="Invalid size: 0"):
        mini_imagenet(tmp_path, size=0)


def test_without_pillow_the_module_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    spec = importlib.util.spec_from_file_location("bare_mini_imagenet", _mini_imagenet.__file__)
    assert spec is not None and spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert bare.Image is None
    assert _mini_imagenet.Image is not None


# ---------------------------------------------------------------------------------- one meta-step


def test_an_episode_of_mapped_images_goes_through_the_papers_network(tmp_path):
    """Class c is of colour 40 c + m in image m, so an episode's labels can be read off its images."""
    for part in PARTS:
        for c in range(6):
            for m in range(16):
                paint(tmp_path / part / f"{part}{c}" / f"{m:02}.png", (40 * c + m,) * 3)
    train = mini_imagenet(tmp_path).train
    episodes = Episodes(train, ways=5, shots=1, queries=15, tasks=4)
    (x, y), (query_x, query_y) = episodes.sample()
    assert x.shape == (4, 5, 3, 84, 84) and query_x.shape == (4, 75, 3, 84, 84)
    classes, asked = (
        (images[:, :, 0, 0, 0] * 255).round().int() // 40 for images in (x, query_x)
    )  # [4, 5], [4, 75]
    assert torch.equal(classes.gather(1, query_y).int(), asked.int())
    assert torch.equal(y, torch.arange(5).expand(4, 5))
    net = ConvNet(5, in_channels=3, image_size=84, filters=32, max_pool=True, zero_head=False)
    logits = net(query_x[0])
    assert logits.shape == (75, 5) and logits.isfinite().all() and logits.std() > 0
