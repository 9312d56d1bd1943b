"""Folders of pictures: every mode and size, class sub-folders, broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fewstep.data import load_images
from fewstep.errors import DataError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


def test_pixels_arrive_unchanged(tmp_path: Path) -> None:
    pictures = [noise(12, 20, 3, seed=k) for k in range(3)]
    for k, (picture, suffix) in enumerate(zip(pictures, ("png", "bmp", "tiff"), strict=True)):
        put(tmp_path / f"{k}.{suffix}", picture)
    images = load_images(tmp_path)
    assert images.shape == (3, 12, 20)
    assert images.labels is None and images.class_names == () and images.num_classes == 0
    for image, picture in zip(images.images, pictures, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), picture)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "gif", "tif", "PNG"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / f"a.{suffix}", np.full((16, 16, 3), (200, 40, 90), np.uint8))
    image = load_images(tmp_path).images[0].float()
    expected = torch.tensor([200.0, 40.0, 90.0])[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(image, expected, atol=4, rtol=0)


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    put(tmp_path / "a.png", noise(10, 16, 3))
    put(tmp_path / "b.png", noise(12, 12, 3))
    with pytest.raises(DataError, match=r"a\.png is 16x10 and b\.png is 12x12.*size=64"):
        load_images(tmp_path)
    assert load_images(tmp_path, size=8).shape == (3, 8, 8)


def test_central_square_is_cut(tmp_path: Path) -> None:
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = noise(8, 8)
    put(tmp_path / "wide.png", wide)
    put(tmp_path / "tall.png", wide.T.copy())
    tall_image, wide_image = load_images(tmp_path, size=8).images[:, 0].numpy()
    np.testing.assert_array_equal(wide_image, wide[:, 8:16])
    np.testing.assert_array_equal(tall_image, wide[:, 8:16].T)


def test_shrinking_antialiases(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    put(tmp_path / "stripes.png", stripes)
    image = load_images(tmp_path, size=16).images.float()
    # Picking single pixels would give 0 or 255; the mean of black and white is 127.5.
    assert (image - 127.5).abs().max() < 12


def test_large_jpeg_is_close_to_full_decoding(tmp_path: Path) -> None:
    # Detail as fine as the result can show: decoding at a quarter of its edge would lose it.
    detail = Image.fromarray(noise(32, 32) // 4 + 96).resize((128, 128), Image.Resampling.BICUBIC)
    path = put(tmp_path / "a.jpg", detail, quality=98)
    full = Image.open(path).resize((32, 32), Image.Resampling.LANCZOS)
    image = load_images(tmp_path, size=32).images[0, 0].numpy()
    assert np.abs(image.astype(int) - np.asarray(full).astype(int)).max() <= 3


def test_grey_by_content_not_by_mode(tmp_path: Path) -> None:
    grey = noise(9, 9)
    put(tmp_path / "a.png", grey)
    put(tmp_path / "b.png", np.repeat(grey[..., None], 3, axis=-1))
    images = load_images(tmp_path)
    assert images.shape == (1, 9, 9)
    assert torch.equal(images.images[0], images.images[1])

    put(tmp_path / "c.png", noise(9, 9, 3))
    images = load_images(tmp_path)
    assert images.shape == (3, 9, 9)
    np.testing.assert_array_equal(images.images[0], np.stack([grey] * 3))


def test_channels_on_request(tmp_path: Path) -> None:
    colour = noise(9, 9, 3)
    put(tmp_path / "a.png", colour)
    grey = load_images(tmp_path, channels=1)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (1, 9, 9)
    assert np.abs(grey.images[0, 0].numpy() - luma).max() <= 0.51

    put(tmp_path / "a.png", noise(9, 9))
    assert load_images(tmp_path, channels=3).shape == (3, 9, 9)


def test_transparency_shows_white(tmp_path: Path) -> None:
    layer = np.zeros((4, 4, 4), np.uint8)
    layer[0, :] = (10, 20, 30, 255)
    layer[1, :] = (0, 0, 0, 128)
    put(tmp_path / "a.png", layer)
    image = load_images(tmp_path).images[0].permute(1, 2, 0)
    assert image[0, 0].tolist() == [10, 20, 30]
    assert image[1, 0].tolist() == [127, 127, 127]
    assert image[2, 0].tolist() == [255, 255, 255]


def test_grey_with_transparency_stays_grey(tmp_path: Path) -> None:
    put(tmp_path / "a.png", np.array([[[0, 255], [0, 0]]] * 2, np.uint8))
    assert load_images(tmp_path).images.tolist() == [[[[0, 255], [0, 255]]]]


def test_palette_and_bilevel(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    put(tmp_path / "p.png", palette, transparency=2)
    image = load_images(tmp_path).images[0].permute(1, 2, 0)
    assert image.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 255, 255]]]

    (tmp_path / "p.png").unlink()
    put(tmp_path / "b.png", Image.fromarray(np.array([[True, False]])))
    assert load_images(tmp_path).images.tolist() == [[[[255, 0]]]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65406, 65535]], np.uint16)
    put(tmp_path / f"a.{suffix}", values)
    image = load_images(tmp_path).images[0, 0]
    np.testing.assert_array_equal(image, np.round(values / 257))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    image = load_images(tmp_path).images[0].float().mean((1, 2))
    assert image[0] > 245 and image[1] < 10 and image[2] < 10


def test_floating_point_pixels_are_skipped_with_reason(tmp_path: Path) -> None:
    put(tmp_path / "a.tif", np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    put(tmp_path / "b.png", noise(4, 4))
    ((path, reason),) = load_images(tmp_path).skipped
    assert path.endswith("a.tif") and "floating-point" in reason


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    upright = noise(6, 10)
    # Orientation k says how to turn the stored pixels; store the inverse of that.
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = put(tmp_path / "a.png", np.ascontiguousarray(undo(upright)), exif=exif)
    assert ImageOps.exif_transpose(Image.open(path)).size == (10, 6)
    np.testing.assert_array_equal(load_images(tmp_path).images[0, 0], upright)


def test_broken_files_are_reported_and_skipped(tmp_path: Path) -> None:
    put(tmp_path / "good.png", noise(32, 32, 3))
    whole = put(tmp_path / "truncated.jpg", noise(32, 32, 3)).read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    whole = put(tmp_path / "cut.png", noise(32, 32, 3)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("this is no picture")
    images = load_images(tmp_path)
    assert len(images) == 1
    assert [Path(path).name for path, _ in images.skipped] == [
        "cut.png",
        "empty.png",
        "text.jpg",
        "truncated.jpg",
    ]
    assert all(reason for _, reason in images.skipped)


def test_only_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of the 1 images"):
        load_images(tmp_path)


def test_class_folders_become_labels(tmp_path: Path) -> None:
    for k, place in enumerate(["dog/b", "cat/x/deep", "dog/a", "ant/z", "cat/y"]):
        put(tmp_path / f"{place}.png", np.full((4, 4), k, np.uint8))
    images = load_images(tmp_path)
    assert images.class_names == ("ant", "cat", "dog")
    assert images.labels is not None and images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 1, 1, 2, 2]
    assert images.images[:, 0, 0, 0].tolist() == [3, 1, 4, 2, 0]


def test_labels_stay_with_their_images_when_files_are_broken(tmp_path: Path) -> None:
    for name, value in {"a/1": 10, "a/2": 11, "b/1": 20, "c/1": 30}.items():
        put(tmp_path / f"{name}.png", np.full((4, 4), value, np.uint8))
    (tmp_path / "a" / "1.png").write_bytes(b"")
    (tmp_path / "b" / "1.png").write_bytes(b"")
    images = load_images(tmp_path)
    assert images.class_names == ("a", "b", "c")
    assert images.labels is not None and images.labels.tolist() == [0, 2]
    assert images.images[:, 0, 0, 0].tolist() == [11, 30]


def test_hidden_and_foreign_files_are_ignored(tmp_path: Path) -> None:
    put(tmp_path / "a.png", noise(4, 4))
    put(tmp_path / ".hidden.png", noise(5, 5))
    put(tmp_path / ".thumbnails" / "a.png", noise(6, 6))
    put(tmp_path / "__MACOSX" / "a.png", noise(7, 7))
    (tmp_path / "notes.txt").write_text("notes")
    images = load_images(tmp_path)
    assert len(images) == 1 and images.skipped == () and images.labels is None


def test_pictures_beside_classes_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "a.png", noise(4, 4))
    put(tmp_path / "stray.png", noise(4, 4))
    with pytest.raises(DataError, match=r"1 images.*stray\.png"):
        load_images(tmp_path)


def test_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "train" / "cat" / "a.png", np.full((4, 4), 1, np.uint8))
    put(tmp_path / "train" / "dog" / "a.png", np.full((4, 4), 2, np.uint8))
    put(tmp_path / "test" / "cat" / "a.png", np.full((4, 4), 3, np.uint8))
    assert load_images(tmp_path).class_names == ("cat", "dog")
    assert load_images(tmp_path).images[:, 0, 0, 0].tolist() == [1, 2]
    assert load_images(tmp_path, split="test").images[:, 0, 0, 0].tolist() == [3]
    with pytest.raises(DataError, match="no 'test' split"):
        load_images(tmp_path / "train", split="test")


def test_circular_links_end(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "a.png", noise(4, 4))
    (tmp_path / "cat" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(load_images(tmp_path)) == 1


def test_a_link_to_nothing_is_skipped(tmp_path: Path) -> None:
    put(tmp_path / "a.png", noise(4, 4))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    images = load_images(tmp_path)
    assert len(images) == 1
    assert [Path(path).name for path, _ in images.skipped] == ["b.png"]


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*\.png"):
        load_images(tmp_path)


def test_unknown_source_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'mnist'"):
        load_images("mnits")
    file = put(tmp_path / "a.png", noise(4, 4))
    with pytest.raises(DataError, match="neither a folder"):
        load_images(file)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 2.5}, "size is 2.5"),
        ({"channels": 4}, "channels is 4"),
        ({"split": "val"}, "split is 'val'"),
    ],
)
def test_bad_requests(request_: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images("mnist-1000", **request_)


def test_a_lack_of_memory_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise MemoryError

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("fewstep.data.decoding.to_pixels", full)
    with pytest.raises(
        DataError, match=r"not enough memory to decode a\.png at 99999x99999 pixels"
    ):
        load_images(tmp_path, size=99_999)
