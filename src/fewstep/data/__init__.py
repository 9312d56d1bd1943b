"""Images in and out: folders, archives and known sets to bytes; samples to picture files."""

from __future__ import annotations

from fewstep.data.archive import write_npz
from fewstep.data.checking import Finding, check_images
from fewstep.data.files import cache_dir
from fewstep.data.image_set import ImageSet, evenly
from fewstep.data.pictures import (
    image_grid,
    labelled_sheet,
    read_metadata,
    save_folder,
    save_image,
    to_uint8,
)
from fewstep.data.reading import load_images
from fewstep.data.sources import OnProgress

__all__ = [
    "Finding",
    "ImageSet",
    "OnProgress",
    "cache_dir",
    "check_images",
    "evenly",
    "image_grid",
    "labelled_sheet",
    "load_images",
    "read_metadata",
    "save_folder",
    "save_image",
    "to_uint8",
    "write_npz",
]
