"""Pictures that people look at: grids, labelled sheets, and files that carry their settings."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from fewstep.data.files import replacing
from fewstep.data.fitting import as_picture, flatten
from fewstep.errors import DataError, NonFiniteError

METADATA_KEY = "fewstep"
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
# JPEG always loses something; at this quality the eye does not see it.
SAVE_OPTIONS = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
TEXT_SIZE = 15
GAP = 8
SMALLEST_CELL = 64

Picture = Image.Image | np.ndarray | Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Turn floats into bytes, ``round((x + 1) * 127.5)``, halves up, clamped to 0..255.

    Args:
        images: Floats of any shape, nominally in [-1, 1].

    Returns:
        uint8 tensor of the same shape.

    Raises:
        NonFiniteError: If a value is NaN or infinite.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0, 7.0])).tolist()
    [0, 128, 255, 255]
    """
    if not torch.isfinite(images).all():
        broken = int((~torch.isfinite(images)).sum())
        raise NonFiniteError(
            f"{broken} of {images.numel()} pixel values are NaN or infinite; sample again "
            "with the network in float32, or with less guidance"
        )
    scaled = (images.detach().to(torch.float32) + 1.0) * 127.5
    return (scaled + 0.5).floor().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """Lay images out in rows, left to right, on white.

    Args:
        images: ``(N, C, H, W)`` with C = 1 or 3; floats in [-1, 1], or uint8.
        columns: Images in a row, 1 or more; None makes the grid as square as it gets.
        padding: White pixels around each image, 0 or more.

    Returns:
        uint8 ``(height, width, 3)``, ready for ``PIL.Image.fromarray``.

    Raises:
        DataError: If the images or the numbers do not fit.

    >>> image_grid(torch.zeros(6, 1, 8, 8)).shape
    (22, 32, 3)
    """
    cells = _bytes(images)
    if columns is None:
        columns = math.ceil(math.sqrt(len(cells)))
    if columns < 1 or padding < 0:
        raise DataError(
            f"columns is {columns} and padding is {padding}; columns start at 1, padding at 0"
        )
    _, _, height, width = cells.shape
    rows, columns = math.ceil(len(cells) / columns), min(columns, len(cells))
    pitch_y, pitch_x = height + padding, width + padding
    shape = (rows * pitch_y + padding, columns * pitch_x + padding, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for k, cell in enumerate(cells.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = padding + k // columns * pitch_y, padding + k % columns * pitch_x
        canvas[y : y + height, x : x + width] = cell
    return canvas


def labelled_sheet(
    rows: Sequence[tuple[str, Tensor]], column_titles: Sequence[str] | None = None
) -> Image.Image:
    """Draw rows of images with a title to the left of each row and above each column.

    Small images are enlarged by a whole factor, so that every pixel stays a sharp square.

    Args:
        rows: Title (may hold line breaks) and images ``(N, C, H, W)``, floats in [-1, 1] or uint8;
            all images of one height and width.
        column_titles: One for each column, from the left.

    Returns:
        An RGB picture.

    Raises:
        DataError: If there are no rows or the images differ in size.

    >>> sheet = labelled_sheet([("DDIM", torch.zeros(4, 1, 28, 28))], ["0", "1", "2", "3"])
    >>> sheet.mode
    'RGB'
    """
    if not rows:
        raise DataError("a labelled sheet of 0 rows; give at least one (title, images) pair")
    titles = [title for title, _ in rows]
    heads = list(column_titles or ())
    stacks = [_enlarged(_bytes(images)) for _, images in rows]
    cells = {tuple(images.shape[-2:]) for images in stacks}
    if len(cells) > 1:
        raise DataError(f"enlarged rows have shapes {sorted(cells)}; give all images one shape")
    height, width = cells.pop()
    columns = max(len(heads), *(len(images) for images in stacks))

    font = ImageFont.load_default(size=TEXT_SIZE)
    title_width, title_height = _extent(titles, font)
    head_width, head_height = _extent(heads, font)
    cell_width, cell_height = max(width, head_width), max(height, title_height)
    left = title_width + 2 * GAP
    top = head_height + 2 * GAP if heads else GAP
    xs = [left + k * (cell_width + GAP) for k in range(columns + 1)]
    ys = [top + k * (cell_height + GAP) for k in range(len(rows) + 1)]

    sheet = Image.new("RGB", (xs[-1], ys[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for x, head in zip(xs, heads, strict=False):
        middle = (x + cell_width / 2, GAP)
        draw.multiline_text(middle, head, fill="black", font=font, anchor="ma", align="center")
    for y, title, images in zip(ys, titles, stacks, strict=False):
        middle = (GAP, y + cell_height / 2)
        draw.multiline_text(middle, title, fill="black", font=font, anchor="lm")
        for x, image in zip(xs, images, strict=False):
            corner = (x + (cell_width - width) // 2, y + (cell_height - height) // 2)
            sheet.paste(as_picture(image), corner)
    return sheet


def save_image(
    path: str | os.PathLike[str],
    image: Picture,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one picture; the old file survives any failure.

    Only PNG carries metadata (a text entry named ``fewstep`` that holds JSON); with another format
    the picture is written without it and a warning says so. Parent folders are created.

    Args:
        path: File to write; its suffix names the format.
        image: A Pillow picture, a uint8 array ``(H, W)`` or ``(H, W, 3)``, or a tensor
            ``(C, H, W)`` of floats in [-1, 1] or uint8.
        metadata: How the picture was made; names and values that JSON can hold.

    Raises:
        DataError: If the suffix or the picture is not usable, or the file cannot be written.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"cannot tell the picture format of {str(path)!r}; let the name end in "
            f"{', '.join(FORMATS)} (only .png carries metadata)"
        )
    options: dict[str, Any] = dict(SAVE_OPTIONS.get(kind, {}))
    if metadata is not None and kind == "PNG":
        options["pnginfo"] = _text_entry(metadata)
    elif metadata is not None:
        warnings.warn(
            f"{path.name} is written without its settings: only .png carries metadata",
            stacklevel=2,
        )
    picture = _picture(image)
    try:
        with replacing(path) as file:
            picture.save(file, format=kind, **options)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Check that the folder may be "
            "written to and that the disk has room, or choose another place; an existing file "
            "there is unchanged"
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read back what `save_image` stored in a PNG file.

    Args:
        path: A picture file.

    Returns:
        The settings; empty if the picture carries none.

    Raises:
        DataError: If the file is not a readable picture or its entry is not JSON.
    """
    try:
        with Image.open(path) as image:
            image.load()
            entry = image.info.get(METADATA_KEY, "{}")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read {path} as a picture: {error}; give a .png file") from error
    try:
        settings = json.loads(entry)
    except ValueError as error:
        raise DataError(
            f"the {METADATA_KEY!r} entry of {path} is not JSON ({error}); another program changed "
            "it: use the original file"
        ) from error
    return settings if isinstance(settings, dict) else {METADATA_KEY: settings}


def save_folder(
    folder: str | os.PathLike[str],
    images: Tensor,
    metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write images as single files ``000000.png``, ``000001.png``, ...

    Args:
        folder: Where to write; created if need be. Files of the same names are replaced.
        images: ``(N, C, H, W)``, floats in [-1, 1] or uint8.
        metadata: One for all images, or a sequence with one for each.

    Returns:
        The files in order.

    Raises:
        DataError: If there are not as many metadata as images, or a file cannot be written.
    """
    pixels = _bytes(images)
    if metadata is None or isinstance(metadata, Mapping):
        entries: Sequence[Mapping[str, Any] | None] = [metadata] * len(pixels)
    else:
        entries = metadata
    if len(entries) != len(pixels):
        raise DataError(
            f"{len(entries)} metadata entries for {len(pixels)} images; give one for each, or a "
            "single one for all"
        )
    paths = [Path(folder) / f"{k:06d}.png" for k in range(len(pixels))]
    for path, image, entry in zip(paths, pixels, entries, strict=True):
        save_image(path, image, entry)
    return paths


def _bytes(images: Tensor) -> Tensor:
    """Images as uint8 ``(N, C, H, W)`` with at least one image, C = 1 or 3."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"images have shape {tuple(images.shape)}; needed is (N, C, H, W) with one image or "
            "more and C = 1 (grey) or 3 (RGB)"
        )
    return images if images.dtype == torch.uint8 else to_uint8(images)


def _enlarged(images: Tensor) -> Tensor:
    """Repeat pixels until the longer edge of small images is at least `SMALLEST_CELL`."""
    factor = max(1, math.ceil(SMALLEST_CELL / max(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _extent(
    texts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[int, int]:
    """Width and height in pixels that hold each of the texts."""
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), text, font=font) for text in texts]
    widths, heights = [box[2] for box in boxes], [box[3] for box in boxes]
    return math.ceil(max(widths, default=0)), math.ceil(max(heights, default=0))


def _picture(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return flatten(image)
    if isinstance(image, Tensor):
        return as_picture(_bytes(image.unsqueeze(0))[0])
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise DataError(
            f"a picture array is {image.dtype} of shape {image.shape}; needed is uint8 (H, W) or "
            "(H, W, 3)"
        )
    return Image.fromarray(image)


def _text_entry(metadata: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    try:
        text = json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the metadata cannot be stored as JSON: {error}; use text, numbers, lists and dicts"
        ) from error
    entry = PngImagePlugin.PngInfo()
    entry.add_text(METADATA_KEY, text)
    return entry
