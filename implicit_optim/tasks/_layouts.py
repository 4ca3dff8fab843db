"""Labelled images in three parts: listed in csv files, or sorted into folders."""

import csv
from collections.abc import Iterator
from pathlib import Path

PARTS = ("train", "val", "test")
_COLUMNS = ("filename", "label")
_SUFFIXES = (".jpg", ".jpeg", ".png")

Classes = dict[str, list[str]]
"""The files of each class, by their names below the root; classes in sorted order."""


def find(root: Path) -> list[Classes]:
    """Find the classes of each of `PARTS`: by the csv files if all are there, or by the folders.

    Raises:
        FileNotFoundError: if `root` or a layout is missing.
        ValueError: if a csv file or a folder does not hold what it should.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder (give the folder of Mini-ImageNet)")
    tables = [root / f"{part}.csv" for part in PARTS]
    if all(table.is_file() for table in tables):
        listed: dict[str, Path] = {}
        return [_sort(_read_table(table, listed)) for table in tables]
    folders = [root / part for part in PARTS]
    if all(folder.is_dir() for folder in folders):
        return [_sort(_read_folder(folder)) for folder in folders]
    missing = ", ".join(table.name for table in tables if not table.is_file())
    without = ", ".join(folder.name for folder in folders if not folder.is_dir())
    raise FileNotFoundError(
        f"Mini-ImageNet is not in {root}: looked for train.csv, val.csv and test.csv, with the "
        f"images in a folder images (there is no {missing}), and for folders train, val and test "
        f"of class folders (there is no {without}); put one of the two there"
    )


def _sort(classes: Classes) -> Classes:
    return dict(sorted(classes.items()))


def _read_table(path: Path, listed: dict[str, Path]) -> Classes:
    """Read a csv file; `listed` has the names of those before it, and gets those of this one."""
    classes: Classes = {}
    for line, name, label in _rows(path):
        if not name or not label:
            raise ValueError(f"{path}, line {line}: no filename or no label (complete the line)")
        if name in listed:
            raise ValueError(
                f"{path}, line {line}: {name} is already in {listed[name].name} (list it once)"
            )
        listed[name] = path
        classes.setdefault(label, []).append(f"images/{name}")
    if not classes:
        raise ValueError(f"{path} is empty: it lists no image (copy it again)")
    return classes


def _rows(path: Path) -> Iterator[tuple[int, str | None, str | None]]:
    """Give the line number, file name and label of each row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames is None:
                return
            if not set(_COLUMNS) <= set(rows.fieldnames):
                raise ValueError(
                    f"{path} begins with {','.join(rows.fieldnames)[:80]!r}, which are not the "
                    f"columns {' and '.join(_COLUMNS)} (make {','.join(_COLUMNS)!r} its first line)"
                )
            for row in rows:
                yield rows.line_num, row["filename"], row["label"]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as csv: {error} (copy it again)") from error


def _read_folder(path: Path) -> Classes:
    classes: Classes = {}
    for folder in _visible(path):
        if folder.is_dir():
            files = [file.name for file in _visible(folder) if file.suffix.lower() in _SUFFIXES]
            if not files:
                raise ValueError(
                    f"{folder} is empty: it holds no {', '.join(_SUFFIXES)} file "
                    "(put the images of the class there, or remove the folder)"
                )
            classes[folder.name] = [f"{path.name}/{folder.name}/{name}" for name in sorted(files)]
    if not classes:
        raise ValueError(f"{path} is empty: it holds no class folders (extract it again)")
    return classes


def _visible(folder: Path) -> Iterator[Path]:
    """Give what is in a folder without the hidden files that systems leave there."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))
