"""The captions of many images, held as bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import overload

import numpy as np

SURROGATES = "surrogatepass"
"""JSON may bring half characters, which UTF-8 itself would refuse."""


class Captions(Sequence[str | None]):
    """One caption, or None, for each image: a view of text that may lie in a file.

    Args:
        text: All captions one after the other, UTF-8, uint8.
        ends: Where each ends, int64; one of no length is None.

    >>> made = CaptionList()
    >>> for caption in ("a cat", None):
    ...     made.append(caption)
    >>> list(made.captions())
    ['a cat', None]
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str | None]: ...

    def __getitem__(self, index: int | slice) -> str | None | Sequence[str | None]:
        """Return the caption of an image, or those of several."""
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        k = range(len(self))[index]
        start = int(self.ends[k - 1]) if k else 0
        return self.text[start : int(self.ends[k])].tobytes().decode("utf-8", SURROGATES) or None


class CaptionList:
    """Captions that are gathered one by one."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q")

    def append(self, caption: str | None) -> None:
        """Add the caption of the next image."""
        self._text += (caption or "").encode("utf-8", SURROGATES)
        self._ends.append(len(self._text))

    def captions(self) -> Sequence[str | None]:
        """Return them; nothing if no image has one."""
        if not self._text:
            return ()
        return Captions(np.frombuffer(self._text, np.uint8), np.frombuffer(self._ends, np.int64))
