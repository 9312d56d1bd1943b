"""Pictures out: bytes, grids, sheets, and files that survive failures."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import (
    ImageSet,
    image_grid,
    labelled_sheet,
    load_images,
    read_metadata,
    save_folder,
    save_image,
    to_uint8,
)
from fewstep.errors import DataError, FewstepError, NonFiniteError

SETTINGS = {"sampler": "dpmpp_2m", "note": "é 漢 \n", "levels": [1.5, 0.25], "seed": 7}
GREY = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8) * 4


def test_bytes_survive_the_round_trip() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    floats, _ = ImageSet(every_byte).batch(range(256))
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert torch.equal(to_uint8(floats.to(dtype)), every_byte)


@given(st.floats(-3, 3, width=32))
def test_to_uint8_rounds_to_the_nearest_byte(x: float) -> None:
    byte = to_uint8(torch.tensor([x])).item()
    exact = min(max((x + 1) * 127.5, 0.0), 255.0)
    assert abs(byte - exact) <= 0.5 + 2e-5


def test_to_uint8_half_goes_up_and_ends_are_clamped() -> None:
    # Zero lies at 127.5, the only half that a float holds exactly.
    assert to_uint8(torch.tensor([0.0, -1.5, 1.5])).tolist() == [128, 0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_uint8_names_non_finite_values(value: float) -> None:
    with pytest.raises(NonFiniteError, match="1 of 3"):
        to_uint8(torch.tensor([0.0, value, 1.0]))


def test_grid_places_every_image() -> None:
    images = torch.stack([GREY + k for k in range(5)])
    grid = image_grid(images, columns=2, padding=3)
    assert grid.dtype == np.uint8 and grid.shape == (3 + 3 * 11, 3 + 2 * 11, 3)
    rest = grid.copy()
    for k, image in enumerate(images):
        y, x = 3 + k // 2 * 11, 3 + k % 2 * 11
        for channel in range(3):
            np.testing.assert_array_equal(grid[y : y + 8, x : x + 8, channel], image[0])
        rest[y : y + 8, x : x + 8] = 255
    assert (rest == 255).all()


def test_grid_of_floats_equals_grid_of_bytes() -> None:
    images = torch.stack([GREY] * 4).repeat(1, 3, 1, 1)
    floats, _ = ImageSet(images).batch(range(4))
    np.testing.assert_array_equal(image_grid(floats), image_grid(images))


@pytest.mark.parametrize(
    ("count", "columns", "cells"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (7, None, (3, 3)), (3, 8, (1, 3)), (5, 1, (5, 1))],
)
def test_grid_shape(count: int, columns: int | None, cells: tuple[int, int]) -> None:
    grid = image_grid(torch.zeros(count, 3, 8, 9), columns, padding=0)
    assert grid.shape == (8 * cells[0], 9 * cells[1], 3)


def test_grid_refuses_what_it_cannot_draw() -> None:
    for images in (torch.zeros(1, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(0, 1, 8, 8)):
        with pytest.raises(DataError, match="needed is"):
            image_grid(images)
    with pytest.raises(DataError, match="columns is 0"):
        image_grid(torch.zeros(2, 1, 8, 8), columns=0)


def test_sheet_shows_titles_and_enlarged_pixels() -> None:
    images = torch.stack([GREY] * 2)
    sheet = np.asarray(labelled_sheet([("row", images), ("other", images[:1])], ["a", "b"]))
    enlarged = np.kron(GREY[0].numpy(), np.ones((8, 8), np.uint8))
    found = [
        (y, x)
        for y in range(sheet.shape[0] - 63)
        for x in range(sheet.shape[1] - 63)
        if np.array_equal(sheet[y : y + 64, x : x + 64, 0], enlarged)
    ]
    assert len(found) == 3
    (top, left), (_, second), (below, left_again) = sorted(found)
    assert left == left_again < second and below >= top + 64
    # Ink left of each row and above each column: the titles.
    for y in (top, below):
        assert (sheet[y : y + 64, :left] < 100).any()
    for x in (left, second):
        assert (sheet[:top, x : x + 64] < 100).any()
    assert (sheet[below:, second:] == 255).all()


def test_sheet_widens_for_long_titles() -> None:
    narrow = labelled_sheet([("a", torch.zeros(3, 1, 8, 8))], ["t"] * 3)
    long = labelled_sheet(
        [("a" * 30, torch.zeros(3, 1, 8, 8))], ["a long title\nof two lines"] * 3
    )
    assert long.width > narrow.width + 200 and long.height > narrow.height


def test_sheet_refuses_unequal_shapes() -> None:
    with pytest.raises(DataError, match="0 rows"):
        labelled_sheet([])
    with pytest.raises(DataError, match="one shape"):
        labelled_sheet([("a", torch.zeros(1, 1, 64, 64)), ("b", torch.zeros(1, 1, 64, 80))])


def test_metadata_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    save_image(path, GREY, SETTINGS)
    assert read_metadata(path) == SETTINGS
    with Image.open(path) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), GREY[0])
    save_image(path, GREY)
    assert read_metadata(path) == {}


def test_metadata_after_the_pixels_is_found(tmp_path: Path) -> None:
    """Other programs may move text entries behind the image data."""
    path = tmp_path / "a.png"
    save_image(path, GREY, SETTINGS)
    content = path.read_bytes()
    start = content.index(b"tEXt") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    tail = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[end:tail] + content[start:end] + content[tail:])
    assert read_metadata(path) == SETTINGS


@pytest.mark.parametrize(
    "image",
    [
        GREY.repeat(3, 1, 1),
        GREY.repeat(3, 1, 1) / 127.5 - 1,
        GREY.repeat(3, 1, 1).permute(1, 2, 0).numpy(),
        Image.fromarray(GREY.repeat(3, 1, 1).permute(1, 2, 0).numpy()),
    ],
    ids=["bytes", "floats", "array", "picture"],
)
def test_every_kind_of_picture_is_written(tmp_path: Path, image: torch.Tensor) -> None:
    save_image(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as written:
        np.testing.assert_array_equal(np.asarray(written), GREY.repeat(3, 1, 1).permute(1, 2, 0))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "gif", "tif"])
def test_other_formats_say_that_settings_are_dropped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with pytest.warns(UserWarning, match="only .png carries metadata"):
        save_image(path, GREY, SETTINGS)
    assert read_metadata(path) == {}
    with Image.open(path) as written:
        difference = np.asarray(written.convert("L")).astype(int) - GREY[0].numpy()
    assert np.abs(difference).max() <= 8


@pytest.mark.parametrize("name", ["picture", "picture.xyz"])
def test_unknown_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"\.png"):
        save_image(tmp_path / name, GREY)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="JSON"):
        save_image(tmp_path / "a.png", GREY, {"x": object()})


def test_unusable_arrays(tmp_path: Path) -> None:
    for array in (np.zeros((8, 8)), np.zeros((8, 8, 2), np.uint8), np.zeros(8, np.uint8)):
        with pytest.raises(DataError, match="needed is uint8"):
            save_image(tmp_path / "a.png", array)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("os.replace", PermissionError(13, "Permission denied")),
        ("PIL.Image.Image.save", OSError(28, "No space left on device")),
    ],
)
def test_failed_save_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, error: OSError
) -> None:
    path = tmp_path / "a.png"
    save_image(path, GREY, SETTINGS)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(FewstepError, match=f"{path}: {error.strerror}.*another place"):
            save_image(path, 255 - GREY)
    assert read_metadata(path) == SETTINGS
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(FewstepError, match="Permission denied"):
            save_image(tmp_path / "a.png", GREY)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FewstepError, match="cannot write"):
        save_image(tmp_path / "file" / "a.png", GREY)


def test_unreadable_metadata(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_metadata(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match="cannot read"):
        read_metadata(tmp_path / "text.png")
    save_image(tmp_path / "a.png", GREY, {"a": 1})
    content = (tmp_path / "a.png").read_bytes().replace(b'{"a": 1}', b'{"a": 1)')
    crc_at = content.index(b'{"a": 1)') + 8
    body = content[content.index(b"tEXt") : crc_at]
    crc = zlib.crc32(body).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content[:crc_at] + crc + content[crc_at + 4 :])
    with pytest.raises(DataError, match="not JSON"):
        read_metadata(tmp_path / "a.png")


def test_saved_folder_loads_again(tmp_path: Path) -> None:
    images = torch.stack([GREY + k for k in range(3)])
    floats, _ = ImageSet(images).batch(range(3))
    paths = save_folder(tmp_path / "out", floats, [{"seed": k} for k in range(3)])
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    assert [read_metadata(path) for path in paths] == [{"seed": k} for k in range(3)]
    assert torch.equal(load_images(tmp_path / "out").images, images)

    save_folder(tmp_path / "out", floats, SETTINGS)
    assert all(read_metadata(path) == SETTINGS for path in paths)
    with pytest.raises(DataError, match="2 metadata entries for 3 images"):
        save_folder(tmp_path / "out", floats, [{}, {}])
