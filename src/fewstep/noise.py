"""Randomness that belongs to the image: one seed each, the same numbers in any batch, on any device, at any step count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.process import Level

REACH = 32.0
"""The path covers log_snr from -REACH to REACH; noise levels beyond count as the end."""

DEPTH = 20
"""Halvings of that range: a cell is 6e-5 wide, far below any step."""

START, LEFT_END, RIGHT_END = 1 << 40, (1 << 40) + 1, (1 << 40) + 2
"""Draws that are not nodes of the tree, which are numbered 1, 2-3, 4-7, ..."""


class Noise:
    """The noise of a batch: for each image a start and a Brownian path, both functions of its seed alone.

    Calling it with two levels gives the path's increment between them, scaled to a standard normal. The path is
    Brownian in the signal-to-noise ratio `u = (alpha / sigma)^2`, because there the fresh noise of the reverse process adds
    up: with a constant estimate of x_0, two steps of DDPM from t to m to s use exactly the noise of one step from t to s.
    So runs with different numbers of steps follow the same path.

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
        self.seeds = tuple(int(seed) for seed in seeds)
        if not self.seeds or any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise InvalidInputError(
                f"seeds must be whole numbers in 0..2^63-1, one for each image; got {list(seeds)!r}"
            )
        self.shape, self.device, self.dtype = tuple(shape), device, dtype
        self._paths = [_Path(seed, self.shape) for seed in self.seeds]

    def initial(self) -> Tensor:
        """The standard normal tensor that sampling starts from, shape (len(seeds), *shape)."""
        return self._stack([_normal(seed, START, self.shape) for seed in self.seeds])

    def __call__(self, start: Level, end: Level) -> Tensor:
        """The noise of the path between two levels: standard normal, shape (len(seeds), *shape)."""
        return self._stack([path.increment(start.log_snr, end.log_snr) for path in self._paths])

    def _stack(self, images: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(images)).to(device=self.device, dtype=self.dtype)


def _normal(seed: int, node: int, shape: tuple[int, ...]) -> np.ndarray:
    """A standard normal array that depends on (seed, node) alone: a counter-based generator, never advanced."""
    return np.random.Generator(np.random.Philox(key=(seed << 64) | node)).standard_normal(shape)


class _Path:
    """Brownian motion B(u) of one image, by halving: the ends first, then midpoints given the points beside them.

    Kept as `U = B(u) / sqrt(u)` over `log_snr = log(u) / 2`, which has unit variance and covariance `e^-|distance|`.
    Each node's draw depends on the seed and the node's place in the tree alone. The last
    query's ends and the nodes on the way to it are remembered, but only to save work.
    """

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.seed, self.shape = seed, shape
        self._last: dict[int, np.ndarray] = {}
        self._ends: dict[float, np.ndarray] = {}

    def increment(self, start: float, end: float) -> np.ndarray:
        """`(B(u_end) - B(u_start)) / sqrt|u_end - u_start|`, the sign that of the direction."""
        low, high = sorted((min(max(start, -REACH), REACH), min(max(end, -REACH), REACH)))
        if low == high:
            raise InvalidInputError(
                f"there is no noise between log_snr {start:g} and {end:g}; the levels must differ"
            )
        decay = math.exp(low - high)
        known = self._ends  # a step begins where the last one ended
        ends = {end: known[end] if end in known else self._value(end) for end in (low, high)}
        self._ends = ends
        difference = ends[high] - decay * ends[low]
        scaled = difference / math.sqrt((1 - decay) * (1 + decay))
        return scaled if start < end else -scaled

    def _value(self, log_snr: float) -> np.ndarray:
        """U at a point: walk down from the whole range to its cell, and there draw for the point itself."""
        known, visited = self._last, {}

        def value(node: int, mean: np.ndarray | float, std: float) -> np.ndarray:
            found = known.get(node)
            visited[node] = (
                mean + std * _normal(self.seed, node, self.shape) if found is None else found
            )
            return visited[node]

        left, right = -REACH, REACH
        at_left = value(LEFT_END, 0.0, 1.0)
        at_right = value(
            RIGHT_END, math.exp(left - right) * at_left, math.sqrt(-math.expm1(2 * (left - right)))
        )
        node = 1
        for _ in range(DEPTH):
            middle = (left + right) / 2
            at_middle = value(node, *_bridge(at_left, at_right, middle - left, right - middle))
            if log_snr < middle:
                right, at_right, node = middle, at_middle, 2 * node
            else:
                left, at_left, node = middle, at_middle, 2 * node + 1
        self._last = visited
        mean, std = _bridge(at_left, at_right, log_snr - left, right - log_snr)
        return mean + std * _normal(self.seed, node, self.shape)


def _bridge(
    at_left: np.ndarray, at_right: np.ndarray, to_left: float, to_right: float
) -> tuple[np.ndarray, float]:
    """Mean and standard deviation of U between two known points, given the distances in log_snr."""
    p, q = math.exp(-to_left), math.exp(-to_right)
    fresh_p, fresh_q, fresh = (
        -math.expm1(-2 * to_left),
        -math.expm1(-2 * to_right),
        -math.expm1(-2 * (to_left + to_right)),
    )
    mean = (p * fresh_q / fresh) * at_left + (q * fresh_p / fresh) * at_right
    return mean, math.sqrt(fresh_p * fresh_q / fresh)
