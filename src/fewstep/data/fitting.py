"""One picture of any kind to upright 8-bit pixels of the asked size and channels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


def to_pixels(image: Image.Image, size: int | None, channels: int | None) -> np.ndarray:
    """Decode, turn upright, flatten on white, crop, resize.

    Args:
        image: Any picture Pillow can open, not yet loaded.
        size: Edge of the square result in pixels, or None to keep the picture's own shape.
        channels: 1, 3, or None: 1 where the picture holds nothing but grey.

    Returns:
        uint8 ``(H, W)`` for grey or ``(H, W, 3)``.

    Raises:
        ValueError: If the pixels have no known range.
    """
    if size is not None:
        # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the size leaves the filter enough detail.
        image.draft(None, (2 * size, 2 * size))
    image = flatten(ImageOps.exif_transpose(image))
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image if size is None else fit(image, size))
    if channels is None and pixels.ndim == 3 and _is_grey(pixels):
        return np.ascontiguousarray(pixels[..., 0])
    return pixels


def flatten(image: Image.Image) -> Image.Image:
    """Bring any Pillow mode to 8-bit ``L`` or ``RGB``; transparent pixels show white paper."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; store 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        return _narrow(image)
    colour = "L" if image.mode in GREY_MODES else "RGB"
    if not image.has_transparency_data:
        return image.convert(colour)
    layer = image.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(paper, layer).convert(colour)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Cut the central square and resize it with an antialiasing (Lanczos) filter."""
    width, height = image.size
    if width == height == size:
        return image
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    square = (left, top, left + edge, top + edge)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=square)


def refit(images: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Give a stack of images another size or number of channels; unchanged if both fit already.

    Args:
        images: uint8 ``(N, C, H, W)`` with C = 1 or 3.
        size: Edge of the square result in pixels, or None to keep the shape.
        channels: 1, 3 or None to keep the channels.

    Returns:
        uint8 ``(N, channels, size, size)``.
    """
    _, stored, height, width = images.shape
    if size in (None, height) and size in (None, width) and channels in (None, stored):
        return images
    mode = "L" if (channels or stored) == 1 else "RGB"
    shape = (height, width) if size is None else (size, size)
    refitted = np.empty((len(images), channels or stored, *shape), np.uint8)
    for result, image in zip(refitted, images, strict=True):
        picture = as_picture(image).convert(mode)
        pixels = np.asarray(picture if size is None else fit(picture, size))
        result[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(refitted)


def as_picture(image: Tensor) -> Image.Image:
    """A uint8 ``(C, H, W)`` image with 1 or 3 channels as a Pillow picture."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _narrow(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits, ``round(v / 257)``, so that 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high} exceed 16 bits (0..65535)")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _is_grey(pixels: np.ndarray) -> bool:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return bool(np.array_equal(red, green) and np.array_equal(green, blue))
