"""Fitting a table to a model by least squares: where to call the network, and how to mix its answers.

A plan of n calls is a few dozen numbers, and what they are fitted to is the difference of whole pictures. So the
Gauss-Newton method is at home here: it needs a dozen iterations where gradient descent needs hundreds. The derivatives
are differences of runs, of which only the calls that a number reaches are made again, so no gradients of the network
are needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import NonFiniteError
from fewstep.plan import DenoiserLike
from fewstep.process import Process
from fewstep.schedulers import Grid
from fewstep.threads import spread
from fewstep.tuning.losses import Loss, pixels, softened
from fewstep.tuning.table import Table, log_snr_bounds

LEVEL_MOVE, START_MOVE, WEIGHT_MOVE = 0.03, 0.01, 0.03
"""How far log_snr, starts and weights are moved for a derivative.

Far enough to see the trend: the estimate of a trained network changes with the level much rougher than that.
"""

LEAST_STEP = 0.05
"""Shortest step in log_snr that levels may come to."""

LONGEST_MOVE = 20.0
"""How far a number may move in one iteration, in the moves that derivatives are made of."""

DAMPING, EASE, RETREAT = 1e-2, 4.0, 4.0
"""Damping at first, and by what it falls or grows."""

GOOD, POOR = 0.75, 0.25
"""Shares of the hoped-for gain above which damping falls, and below which it grows."""

LEAST_DAMPING = 1e-9
"""Damping of numbers that hardly matter, against the one that matters most."""

TRIES = 5
"""Tries without success before derivatives are worked out anew."""

SLOW, PATIENCE = 0.99, 3
"""Iterations that lower the loss to no less than this share of it, in a row, before derivatives are worked out anew."""

WORTH = 0.97
"""What the loss must come down to, as a share, with one set of derivatives for another set to be worked out."""

SOFTENING = 0.5
"""Share of the start's typical loss from which a picture counts for less."""

EXACT = 1e-6
"""Share of the first loss that is nothing."""

Batch = tuple[DenoiserLike, Tensor, Tensor]
"""A denoiser, standard normal noise of shape (B, ...), and the converged results that belong to it."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of a table of n calls as one vector.

    These are, in order: log_snr of the calls; how far the starts of all but the first are off their levels,
    `log(starts_k / sigma_k)`; for each row its first weight, the sum of its first two, and so on to the sum of
    all, as shares of its level's alpha. Estimates are much alike, so sums say more apart from each other than weights.
    """

    process: Process
    calls: int

    @property
    def moves(self) -> np.ndarray:
        """How far each number is moved for a derivative."""
        n = self.calls
        counts = [n, n - 1, n * (n + 1) // 2]
        return np.repeat([LEVEL_MOVE, START_MOVE, WEIGHT_MOVE], counts)

    @property
    def reach(self) -> list[int]:
        """For each number the first call that it changes; the number of calls if it changes the result alone."""
        n = self.calls
        rows = [k + 1 for k in range(n) for _ in range(k + 1)]
        return [*range(n), *range(1, n), *rows]

    def of(self, table: Table) -> np.ndarray:
        """The vector of a table."""
        n = self.calls
        log_snrs = table.log_snrs
        alphas, sigmas = self._shares(log_snrs)
        return np.concatenate(
            [
                log_snrs,
                np.log(table.starts[1:n] / sigmas[1:n]),
                (table.weights.cumsum(1) / alphas[1:, None])[np.tril_indices(n)],
            ]
        )

    def table(self, vector: np.ndarray) -> Table:
        """The table of a vector."""
        n = self.calls
        log_snrs, off, shares = np.split(vector, [n, 2 * n - 1])
        alphas, sigmas = self._shares(log_snrs)
        sums = np.zeros((n, n))
        sums[np.tril_indices(n)] = shares
        weights = np.tril(np.diff(sums, axis=1, prepend=0))
        ratios = [*np.exp(-log_snrs), 0.0]
        grid = Grid(self.process, tuple(self.process.levels_at(ratios)), "learned")
        starts = sigmas * np.exp([0.0, *off, 0.0])
        return Table(grid, starts, alphas[1:, None] * weights)

    def held(self, vector: np.ndarray) -> np.ndarray:
        """The vector with its levels in range and falling."""
        held, (low, high) = vector.copy(), log_snr_bounds(self.process)
        for k in range(self.calls):
            held[k] = max(held[k], low if k == 0 else held[k - 1] + LEAST_STEP)
        for k in reversed(range(self.calls)):
            held[k] = min(held[k], high if k == self.calls - 1 else held[k + 1] - LEAST_STEP)
        return held

    def _shares(self, log_snrs: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Alpha and sigma of the calls, and of clean data."""
        ratios = torch.tensor([*np.exp(-np.asarray(log_snrs)), 0.0], dtype=torch.float64)
        path = self.process.path
        return path.alpha_of(ratios).numpy(), path.sigma_of(ratios).numpy()


@dataclass(frozen=True)
class Problem:
    """The pictures of a fit, and what is wrong with them as one vector.

    Args:
        numbers: How a table is a vector.
        batches: The pictures, in batches that go through the network together.
        loss: What is wrong with each picture.
        width: The loss from which a picture counts for less, see `fewstep.tuning.losses.pseudo_huber`.
        on_share: Told the share of the derivatives' work that is done, 0..1.
    """

    numbers: Numbers
    batches: Sequence[Batch]
    loss: Loss
    width: float
    on_share: Callable[[float], None]

    def residuals(self, vector: np.ndarray) -> Tensor:
        """The loss of all pictures, shape (M,)."""
        return self._losses(vector, self._estimates(vector))

    def jacobian(self, vector: np.ndarray) -> Tensor:
        """Its derivatives by the numbers, times how far these were moved for it, shape (numbers, M).

        A number whose derivative is not finite gets zeros, which leave it as it is.
        """
        estimates = self._estimates(vector)
        here = self._losses(vector, estimates)
        moves = list(zip(self.numbers.moves, self.numbers.reach, strict=True))

        def moved(case: tuple[int, int]) -> Tensor:
            k, b = case
            (move, call), batch = moves[k], self.batches[b]
            table = self.numbers.table(vector + move * np.eye(len(vector))[k])
            return self._loss(table, batch, table.estimates(*batch[:2], estimates[b][:call]))

        cases = list(itertools.product(range(len(moves)), range(len(self.batches))))
        parts = []
        for part in spread(moved, cases, here.device):
            parts.append(part)
            self.on_share(len(parts) / len(cases))
        jacobian = torch.cat(parts).reshape(len(moves), -1) - here
        jacobian[~jacobian.isfinite().all(1)] = 0.0
        return jacobian

    def _estimates(self, vector: np.ndarray) -> list[list[Tensor]]:
        """The estimates of all calls, for each batch."""
        table = self.numbers.table(vector)
        return list(
            spread(
                lambda batch: table.estimates(*batch[:2]), self.batches, self.batches[0][1].device
            )
        )

    def _losses(self, vector: np.ndarray, estimates: Sequence[Sequence[Tensor]]) -> Tensor:
        table, pairs = self.numbers.table(vector), zip(self.batches, estimates, strict=True)
        return torch.cat([self._loss(table, batch, found) for batch, found in pairs])

    def _loss(self, table: Table, batch: Batch, estimates: Sequence[Tensor]) -> Tensor:
        wrong = _wrong(table, batch, estimates, self.loss)
        return softened(wrong, self.width).flatten()


def _wrong(table: Table, batch: Batch, estimates: Sequence[Tensor], loss: Loss) -> Tensor:
    _, noise, target = batch
    return loss(table.point(table.calls, noise, estimates), target)


def typical_loss(table: Table, batches: Sequence[Batch], loss: Loss) -> float:
    """The median over the pictures of the root mean square of the loss."""
    sizes = [
        _wrong(table, batch, table.estimates(*batch[:2]), loss).flatten(1).square().mean(1).sqrt()
        for batch in batches
    ]
    return float(torch.cat(sizes).median())


def fit(
    start: Table,
    batches: Sequence[Batch],
    *,
    loss: Loss = pixels,
    soften: bool = False,
    on_share: Callable[[float], None] = lambda share: None,
) -> Iterator[Table]:
    """Fit a table by the damped Gauss-Newton method; yields each iteration that came nearer.

    Derivatives are worked out anew only where the ones at hand no longer help: until then each run, whether it came
    nearer or not, corrects them by what it shows.

    Args:
        start: The table to start from.
        batches: The pictures, in batches that go through the network together.
        loss: What is wrong with each picture.
        soften: Whether each picture's mean square is softened to its pseudo-Huber form, half of a typical loss wide.
            Pictures that go another way altogether then do not decide the fit alone.
        on_share: Told the share of the derivatives' work that is done, 0..1.

    Yields:
        The table of each iteration. It ends where fresh derivatives bring it no nearer.

    Raises:
        NonFiniteError: If the start's loss is not finite, or no longer that of any try.

    Source: Levenberg 1944, Marquardt 1963; the corrections, Broyden 1965.
    """
    numbers = Numbers(start.grid.process, start.calls)
    vector = numbers.of(start)
    typical = typical_loss(numbers.table(vector), batches, loss) if soften else 0.0
    width = SOFTENING * typical or math.inf
    problem = Problem(numbers, batches, loss, width, on_share)
    here = problem.residuals(vector)
    first = size = reached = _size(here)
    damping = DAMPING
    if not math.isfinite(first):
        raise NonFiniteError(f"the loss of {start.grid} is not finite before any fit")
    while True:
        before = size
        jacobian, failed, slow = problem.jacobian(vector), 0, 0
        if not jacobian.any():
            return
        while failed < TRIES and slow < PATIENCE:
            move = _move(jacobian, here, damping)
            tried = numbers.held(vector + numbers.moves * move)
            there = problem.residuals(tried)
            reached = _size(there)
            hoped = size - _size(here + torch.from_numpy(move).to(here) @ jacobian)
            kept = (size - reached) / hoped if hoped > 0 else -math.inf
            damping *= 1 / EASE if kept > GOOD else 1 if kept > POOR else RETREAT
            _correct(jacobian, (tried - vector) / numbers.moves, there - here)
            if kept <= 0:
                failed += 1
                continue
            slow = slow + 1 if reached > SLOW * size else 0
            vector, here, size, failed = tried, there, reached, 0
            yield numbers.table(vector)
            if size < EXACT * first:
                return
        if not math.isfinite(reached):
            raise NonFiniteError(
                f"the loss is not finite however little the plan is changed from one with a loss of {size:g}"
            )
        if size > WORTH * before:
            return


def _move(jacobian: Tensor, here: Tensor, damping: float) -> np.ndarray:
    """The damped Gauss-Newton step, in `moves`, shortened so that no number moves too far."""
    squares = (jacobian @ jacobian.T).cpu().double().numpy()
    slope = (jacobian @ here).cpu().double().numpy()
    scale = np.diag(squares)
    damped = squares + np.diag(damping * scale + LEAST_DAMPING * scale.max())
    move = np.linalg.solve(damped, -slope)
    return move / max(1.0, np.abs(move).max() / LONGEST_MOVE)


def _correct(jacobian: Tensor, move: np.ndarray, change: Tensor) -> None:
    """Make derivatives agree with what a move has changed, and change them as little as that takes (Broyden)."""
    if not move.any() or not bool(change.isfinite().all()):
        return
    step = torch.from_numpy(move).to(jacobian)
    jacobian += torch.outer(step / step.dot(step), change - step @ jacobian)


def _size(residuals: Tensor) -> float:
    """Root mean square; infinite if anything is not finite."""
    size = math.sqrt(float(residuals.square().mean()))
    return size if math.isfinite(size) else math.inf
