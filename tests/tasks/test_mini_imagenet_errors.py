"""What is missing or damaged in Mini-ImageNet is named."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from implicit_optim.tasks import _mini_imagenet, mini_imagenet
from mini_imagenet_files import FILES, WRITE, Image, caches, one_image, paint, write_csv, write_tree


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


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
