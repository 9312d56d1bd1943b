"""Randomness that belongs to the image: one seed each, the same numbers in any batch and at any step count."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.process import Level

REACH = 32.0
"""The path covers log_snr from -REACH to REACH; noise levels beyond count as the end."""

DEPTH = 18
"""Halvings of that range: a cell is 2.4e-4 wide, below the shortest step of a table of 4000 entries."""

START, LEFT_END, RIGHT_END = 1 << 40, (1 << 40) + 1, (1 << 40) + 2
"""Draws that are not nodes of the tree, which are numbered 1, 2-3, 4-7, ..."""

REMEMBERED = 1 << 28
"""Bytes that a path may spend on remembering its last nodes; with larger batches it draws them again."""


class Noise:
    """The noise of a batch: for each image a start and a Brownian path, both functions of its seed alone.

    Calling it with two levels gives the path's increment between them, scaled to a standard normal. The path is
    Brownian in the signal-to-noise ratio `u = (alpha / sigma)^2`, because there the fresh noise of the reverse process
    adds up: with a constant estimate of x_0, two steps of DDPM from t to m to s use exactly the noise of one step from
    t to s. So runs with different numbers of steps follow the same path.

    Args:
        seeds: One non-negative whole number for each image.
        shape: Shape of one image, such as (3, 32, 32).
        device: Where the tensors are put; they are drawn on the CPU, so every device gets the same numbers.
        dtype: Type of the tensors.

    Raises:
        InvalidInputError: If a seed is not a whole number in [0, 2^63), or there is none.

    >>> Noise([0, 1, 2], (1, 2, 2)).initial()[2:].equal(Noise([2], (1, 2, 2)).initial())
    True
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seeds = _checked(seeds)
        self.shape, self.device, self.dtype = tuple(shape), device, dtype
        self._paths = _Paths(self.seeds, self.shape)

    def on_lap(self, lap: int) -> Noise:
        """The noise of the same seeds on another path, independent of this one; lap 0 is this one.

        For methods that pass a stretch of the path more than once, such as restarts.
        """
        other = copy.copy(self)
        other._paths = _Paths(self.seeds, self.shape, lap)
        return other

    def initial(self) -> Tensor:
        """The standard normal tensor that sampling starts from, shape (len(seeds), *shape)."""
        return self._tensor(self._paths.normal(START))

    def __call__(self, start: Level, end: Level) -> Tensor:
        """The noise of the path between two levels: standard normal, shape (len(seeds), *shape).

        Raises:
            InvalidInputError: If the levels are nearer than the path can tell apart, 2.4e-4 in log_snr.
        """
        return self._tensor(self._paths.increment(start.log_snr, end.log_snr))

    def _tensor(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).to(device=self.device, dtype=self.dtype)


def _checked(seeds: Sequence[int]) -> tuple[int, ...]:
    try:
        whole = tuple(operator.index(seed) for seed in seeds)
    except TypeError:
        whole = ()
    if not whole or any(not 0 <= seed < 2**63 for seed in whole):
        raise InvalidInputError(
            f"seeds must be a list of whole numbers in 0..2^63-1, one for each image; got {seeds!r}"
        )
    return whole


class _Generator(threading.local):
    """Standard normal numbers that depend on (seed, node, lap) alone; each thread has its own.

    The generator's state is their hash, so it is set rather than advanced.
    """

    def __init__(self) -> None:
        self._bits = np.random.SFC64(0)
        self._normal = np.random.Generator(self._bits).standard_normal

    def fill(self, image: np.ndarray, seed: int, node: int, lap: int) -> None:
        numbers = (seed, node, lap) if lap else (seed, node)
        key = b"".join(number.to_bytes(8, "little") for number in numbers)
        words = np.frombuffer(hashlib.blake2b(key, digest_size=32).digest(), dtype="<u8")
        self._bits.state = {
            "bit_generator": "SFC64",
            "state": {"state": words.astype(np.uint64)},
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._normal(out=image)


_GENERATOR = _Generator()


class _Paths:
    """Brownian motion B(u) of each image, by halving: the ends first, then midpoints given the points beside them.

    Kept as `U = B(u) / sqrt(u)` over `log_snr = log(u) / 2`, which has unit variance and covariance `e^-|distance|`.
    Each node's draw depends on the image's seed and the node's place in the tree alone. The last
    query's ends and the nodes on the way to it are remembered, but only to save work.
    """

    def __init__(self, seeds: tuple[int, ...], shape: tuple[int, ...], lap: int = 0) -> None:
        self.seeds, self.shape, self.lap = seeds, shape, lap
        self._remembers = 8 * len(seeds) * math.prod(shape) * DEPTH <= REMEMBERED
        self._last: dict[int, np.ndarray] = {}
        self._ends: dict[float, np.ndarray] = {}

    def normal(self, node: int) -> np.ndarray:
        """The draw of a node, shape (len(seeds), *shape)."""
        images = np.empty((len(self.seeds), *self.shape))
        for k, seed in enumerate(self.seeds):
            _GENERATOR.fill(images[k : k + 1], seed, node, self.lap)
        return images

    def increment(self, start: float, end: float) -> np.ndarray:
        """`(B(u_end) - B(u_start)) / sqrt|u_end - u_start|`, the sign that of the direction."""
        low, high = sorted((min(max(start, -REACH), REACH), min(max(end, -REACH), REACH)))
        if _cell(low) == _cell(high):
            raise InvalidInputError(
                f"there is no noise between log_snr {start:.9g} and {end:.9g}: the levels must differ by more than "
                f"{2 * REACH / 2**DEPTH:.1e} and lie between -{REACH:g} and {REACH:g}; spread the grid's levels"
            )
        decay = math.exp(low - high)
        known = self._ends  # a step begins where the last one ended
        ends = {end: known[end] if end in known else self._value(end) for end in (low, high)}
        self._ends = ends
        difference = ends[high] - decay * ends[low]
        scaled = difference / math.sqrt(-math.expm1(2 * (low - high)))
        return scaled if start < end else -scaled

    def _value(self, log_snr: float) -> np.ndarray:
        """U at a point: walk down from the whole range to its cell, and there draw for the point itself."""
        known = self._last
        left, right = -REACH, REACH  # so far apart that U is independent there
        at_left, at_right = (
            known[end] if end in known else self.normal(end) for end in (LEFT_END, RIGHT_END)
        )
        visited, node = {LEFT_END: at_left, RIGHT_END: at_right}, 1
        for _ in range(DEPTH):
            middle = (left + right) / 2
            if node in known:
                at_middle = known[node]
            else:
                at_middle = self._between(node, at_left, at_right, middle - left, right - middle)
            visited[node] = at_middle
            if log_snr < middle:
                right, at_right, node = middle, at_middle, 2 * node
            else:
                left, at_left, node = middle, at_middle, 2 * node + 1
        if self._remembers:
            self._last = visited
        return self._between(node, at_left, at_right, log_snr - left, right - log_snr)

    def _between(
        self,
        node: int,
        at_left: np.ndarray,
        at_right: np.ndarray,
        to_left: float,
        to_right: float,
    ) -> np.ndarray:
        """U between two known points, given the distances to them in log_snr, with the draw of a node."""
        on_left, on_right, std = _bridge(to_left, to_right)
        value = self.normal(node)
        value *= std
        value += on_left * at_left
        value += on_right * at_right
        return value


def _cell(log_snr: float) -> int:
    return min(int((log_snr + REACH) / (2 * REACH) * 2**DEPTH), 2**DEPTH - 1)


def _bridge(to_left: float, to_right: float) -> tuple[float, float, float]:
    """Weights of the two known points in the mean of U between them, and its standard deviation."""
    p, q = math.exp(-to_left), math.exp(-to_right)
    fresh_p, fresh_q, fresh = (
        -math.expm1(-2 * to_left),
        -math.expm1(-2 * to_right),
        -math.expm1(-2 * (to_left + to_right)),
    )
    return p * fresh_q / fresh, q * fresh_p / fresh, math.sqrt(fresh_p * fresh_q / fresh)
