"""The Mini-ImageNet loader on small images made here: both layouts, modes, sizes, an episode."""

import pytest
import torch

from implicit_optim.tasks import ConvNet, Episodes, mini_imagenet
from mini_imagenet_files import (
    PARTS,
    WRITE,
    Image,
    assert_equal,
    expected,
    one_image,
    paint,
    write_csv,
    write_tree,
)

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
