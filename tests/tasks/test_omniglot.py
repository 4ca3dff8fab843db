"""The Omniglot loader on small drawings made here: folders, zips, caches and damage."""

import importlib.util
import sys
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from implicit_optim.tasks import _drawings, _omniglot, omniglot, omniglot_splits, rotate_classes

Image = pytest.importorskip("PIL.Image")

PARTS = ("images_background", "images_evaluation")
# Written to disk in this order; the loader's is background first, then by name.
CHARACTERS = {
    "images_background": ["Latin (old)/character01", "Latin/character02", "Latin/character01"],
    "images_evaluation": ["Angelic/character01"],
}
ORDER = ["Latin/character01", "Latin/character02", "Latin (old)/character01", "Angelic/character01"]
DRAWINGS = 3


def draw(character: int, drawing: int) -> bytes:
    """Draw 14x14 pixels of 1-bit paper; rows of ink count the character, columns the drawing."""
    picture = Image.new("1", (14, 14), 1)
    for i in range(character + 1):
        for j in range(drawing + 1):
            picture.putpixel((j, i), 0)
    file = BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def expected() -> torch.Tensor:
    images = torch.zeros(4, DRAWINGS, 1, 14, 14, dtype=torch.uint8)
    for c in range(4):
        for d in range(DRAWINGS):
            images[c, d, 0, : c + 1, : d + 1] = 255
    return images


def files() -> dict[str, bytes]:
    return {
        f"{part}/{name}/{9 - ORDER.index(name):04}_{d:02}.png": draw(ORDER.index(name), d)
        for part in PARTS
        for name in CHARACTERS[part]
        for d in range(DRAWINGS)
    }


def write_folders(root: Path, contents: dict[str, bytes] | None = None) -> Path:
    for name, content in (files() if contents is None else contents).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zips(root: Path, contents: dict[str, bytes] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        with ZipFile(root / f"{part}.zip", "w") as file:
            file.mkdir(f"{part}/") if hasattr(file, "mkdir") else None
            file.writestr(f"__MACOSX/{part}/Latin/._0001_01.png", b"not a drawing")
            for name, content in (files() if contents is None else contents).items():
                if name.startswith(part):
                    file.writestr(name, content)
    return root


@pytest.mark.parametrize("write", [write_folders, write_zips])
@pytest.mark.parametrize("below", ["", "omniglot-py"])
def test_reads_folders_and_zips_in_order_with_ink_255(tmp_path, write, below):
    write(tmp_path / below)
    images = omniglot(tmp_path, size=14)
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected())


def test_a_folder_is_preferred_to_a_zip_and_the_two_may_be_mixed(tmp_path):
    write_zips(tmp_path)
    blank = {
        name: draw(13, 13) for name in files() if name.startswith("images_background")
    }  # all ink
    write_folders(tmp_path / "omniglot-py", blank)
    images = omniglot(tmp_path, size=14)
    assert images[:3].unique().tolist() == [255]
    assert torch.equal(images[3], expected()[3])


def test_resizing_is_lanczos_on_grey_paper(tmp_path):
    """Halve by Lanczos-3 written out: rows, rounded and clipped to a byte, then columns."""
    images = omniglot(write_folders(tmp_path), size=7)
    centre = 2 * torch.arange(7) + 1.0
    distance = (torch.arange(14) + 0.5 - centre[:, None]) / 2
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    weights /= weights.sum(1, keepdim=True)  # [7, 14]; the part outside the paper is left out
    paper = 255.0 - expected()
    rows = (paper @ weights.T).round().clamp(0, 255)
    oracle = 255 - (weights @ rows).round().clamp(0, 255)
    assert (images - oracle).abs().max() <= 1  # pillow computes in fixed point
    assert len(images.unique()) > 10


def test_the_second_call_reads_the_cache_and_decodes_nothing(tmp_path, monkeypatch):
    first = omniglot(write_zips(tmp_path), size=14)
    assert [p.name for p in tmp_path.glob("*.cache*")] == ["omniglot_14.cache"]
    monkeypatch.setattr(_drawings, "Image", None)  # pillow is needed only to decode
    second = omniglot(tmp_path, size=14)
    assert torch.equal(first, second)
    second.zero_()  # it is the caller's own
    assert torch.equal(omniglot(tmp_path, size=14), first)
    with pytest.raises(ImportError, match=r"needs pillow: pip install 'implicit_optim\[vision\]'"):
        omniglot(tmp_path, size=13)


@pytest.mark.parametrize("where", [0, 40, -1])
def test_a_damaged_cache_is_made_anew(tmp_path, where):
    omniglot(write_folders(tmp_path), size=14)
    cache = tmp_path / "omniglot_14.cache"
    good = cache.read_bytes()
    bad = bytearray(good)
    bad[where] ^= 1
    for content in (bytes(bad), good[:-1], b""):
        cache.write_bytes(content)
        assert torch.equal(omniglot(tmp_path, size=14), expected())
        assert cache.read_bytes() == good


def test_a_cache_of_other_drawings_is_made_anew(tmp_path):
    kept = tmp_path / "kept"
    omniglot(write_zips(tmp_path / "a"), size=14, cache=kept)
    changed = files()
    last = max(name for name in changed if name.startswith("images_evaluation"))
    changed[last] = draw(13, 13)
    images = omniglot(write_zips(tmp_path / "b", changed), size=14, cache=kept)
    assert images[3, -1].unique().tolist() == [255]
    assert len(list(kept.iterdir())) == 1


def test_no_cache_where_none_is_wanted_or_possible(tmp_path):
    write_folders(tmp_path)
    omniglot(tmp_path, size=14, cache=False)
    assert list(tmp_path.glob("*.cache*")) == []
    (tmp_path / "omniglot_14.cache").mkdir()  # stands in for a root that cannot be written
    assert torch.equal(omniglot(tmp_path, size=14), expected())
    with pytest.raises(OSError):
        omniglot(tmp_path, size=14, cache=str(tmp_path))
    assert [p.name for p in tmp_path.glob("*.cache*")] == ["omniglot_14.cache"]


def test_missing_data_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images_background\.zip in .*download=True"):
        omniglot(tmp_path)
    write_folders(tmp_path, {n: c for n, c in files().items() if n.startswith(PARTS[0])})
    with pytest.raises(FileNotFoundError, match=r"Omniglot's images_evaluation is not in"):
        omniglot(tmp_path)


def test_download_is_torchvisions_and_only_for_what_is_missing(tmp_path, monkeypatch):
    asked = []

    class Fake:
        @staticmethod
        def Omniglot(root, *, background, download):
            asked.append((root, background, download))
            write_folders(Path(root) / "omniglot-py")

    monkeypatch.setattr(_omniglot, "datasets", Fake)
    write_folders(tmp_path, {n: c for n, c in files().items() if n.startswith(PARTS[0])})
    assert torch.equal(omniglot(tmp_path, size=14, download=True), expected())
    assert asked == [(str(tmp_path), False, True)]
    monkeypatch.setattr(_omniglot, "datasets", None)
    with pytest.raises(ImportError, match="downloading Omniglot needs torchvision"):
        omniglot(tmp_path / "empty", download=True)


@pytest.mark.parametrize("write", [write_folders, write_zips])
@pytest.mark.parametrize("damage", [b"", b"not a picture", draw(1, 1)[:50]])
def test_a_damaged_drawing_is_named(tmp_path, write, damage):
    write(tmp_path, files() | {"images_background/Latin/character02/0008_01.png": damage})
    with pytest.raises(ValueError, match=r"Latin/character02/0008_01\.png in .*images_background"):
        omniglot(tmp_path, size=14)
    assert list(tmp_path.glob("*.cache*")) == []


def test_a_damaged_zip_is_named(tmp_path):
    path = write_zips(tmp_path) / "images_evaluation.zip"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0006_00\.png in .*images_evaluation\.zip: Bad CRC"):
        omniglot(tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip: .*download it again"):
        omniglot(tmp_path)


def test_an_incomplete_set_is_refused(tmp_path):
    contents = files()
    del contents["images_background/Latin/character01/0009_02.png"]
    with pytest.raises(ValueError, match="Latin/character01 has 2 drawings, others have 3"):
        omniglot(write_folders(tmp_path / "a", contents))
    write_folders(tmp_path / "b")
    (tmp_path / "b" / "omniglot-py").mkdir()
    (tmp_path / "c" / PARTS[0]).mkdir(parents=True)
    with pytest.raises(ValueError, match="images_background holds no Alphabet/character"):
        omniglot(tmp_path / "c")


def test_size_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="Invalid size: 0"):
        omniglot(tmp_path, size=0)


def imports(name):
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):  # of a torchvision that was built for another torch
        return False
    return True


def test_without_pillow_and_torchvision_the_modules_import(tmp_path, monkeypatch):
    there = {name: imports(name) for name in ("PIL", "torchvision")}
    for name in there:
        monkeypatch.setitem(sys.modules, name, None)
    cases = ((_drawings, "Image", "PIL"), (_omniglot, "datasets", "torchvision"))
    for module, missing, name in cases:
        spec = importlib.util.spec_from_file_location(f"bare{module.__name__}", module.__file__)
        assert spec is not None and spec.loader is not None
        bare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bare)
        assert getattr(bare, missing) is None
        assert (getattr(module, missing) is not None) == there[name]


def test_splits_are_the_papers_and_rotations_stay_together():
    images = torch.arange(1623).view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 3, 3)
    splits = omniglot_splits(images, seed=5)
    assert [len(part) for part in splits] == [4 * 1100, 4 * 100, 4 * 423]
    found = [set(part.flatten().tolist()) for part in splits]
    assert [len(ids) for ids in found] == [1100, 100, 423]
    assert set.union(*found) == set(range(1623))
    plain = omniglot_splits(images, seed=5, rotations=False)
    for part, whole in zip(plain, splits, strict=True):
        assert torch.equal(rotate_classes(part), whole)
    assert not torch.equal(plain.train, omniglot_splits(images, seed=6, rotations=False).train)


def test_splits_need_all_characters_or_other_sizes():
    images = torch.zeros(10, 2, 1, 3, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="ask for 1623 classes of 10"):
        omniglot_splits(images)
    assert [len(part) for part in omniglot_splits(images, sizes=(6, 1, 3))] == [24, 4, 12]
