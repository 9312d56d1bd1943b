"""What every forward process can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.process.level import Kernel, Level, forward_kernel, posterior
from fewstep.process.path import Path

Number = TypeVar("Number", float, Tensor)


def _as_double(value: float | list[float] | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _like(value: float | Tensor, result: Tensor) -> Any:
    """A float for a float, a tensor for a tensor."""
    return result if isinstance(value, Tensor) or result.ndim else float(result)


def _first(values: Tensor, bad: Tensor) -> float | None:
    """The first bad value; on an accelerator nobody looks, because the answer would wait for the device."""
    if values.device.type != "cpu" or not bad.any():
        return None
    return float(values[bad].flatten()[0])


class Process(ABC):
    """A forward process: it says how noisy `x_t = alpha(t) x_0 + sigma(t) noise` is at each time.

    All numbers are computed in float64. A float gives a float, a tensor a float64 tensor of the same shape.

    Attributes:
        name: The name that `from_dict` knows the process by.
        options: The arguments that make it again.
        t_min: The least noisy time that a network of this process is trained on.
        t_max: The noisiest time.
        clean_time: The time that stands for data without noise.
        training_steps: Entries of the training table; a continuous process is given a table of 1000.
    """

    path: ClassVar[Path]
    name: str
    options: dict[str, Any]
    t_min: float
    t_max: float
    clean_time: float
    training_steps: int = 1000

    @abstractmethod
    def _log_snr(self, t: Tensor) -> Tensor:
        """log_snr for times in [t_min, t_max] or at the clean time."""

    def _ratio(self, t: Tensor) -> Tensor:
        """`sigma / alpha` for the same times."""
        return (-self._log_snr(t)).exp()

    @abstractmethod
    def _time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `_log_snr`, before it is held to the trained range."""

    def table_time(self, index: float) -> float:
        """Time at a (fractional) index of the training table; index 0 is least noisy, `training_steps - 1` noisiest."""
        return self.t_min + (self.t_max - self.t_min) * index / (self.training_steps - 1)

    def table_index(self, t: Tensor) -> Tensor:
        """Inverse of `table_time`."""
        return (t - self.t_min) / (self.t_max - self.t_min) * (self.training_steps - 1)

    def log_snr(self, t: Number) -> Number:
        """`log(alpha / sigma)` at time t."""
        return _like(t, self._log_snr(self._checked(t)))

    def ratio(self, t: Number) -> Number:
        """`sigma / alpha` at time t."""
        return _like(t, self._ratio(self._checked(t)))

    def alpha(self, t: Number) -> Number:
        """Weight of the data at time t."""
        return _like(t, self.path.alpha_of(_as_double(self.ratio(_as_double(t)))))

    def sigma(self, t: Number) -> Number:
        """Weight of the noise at time t."""
        return _like(t, self.path.sigma_of(_as_double(self.ratio(_as_double(t)))))

    def time(
        self,
        *,
        ratio: float | Tensor | None = None,
        log_snr: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        sigma: float | Tensor | None = None,
    ) -> Any:
        """Time of a given ratio, log_snr, alpha or sigma: the inverse of the method of that name.

        Times between the entries of a table are fractional. What lies outside the trained range gets the nearest
        trained time, except that no noise at all gives `clean_time`.

        Raises:
            InvalidInputError: Unless exactly one of the four is given, and it is one that a level can have.

        >>> from fewstep.process import vp_linear
        >>> vp_linear().time(log_snr=vp_linear().log_snr(400.25))
        400.25
        """
        given = {"ratio": ratio, "log_snr": log_snr, "alpha": alpha, "sigma": sigma}
        named = [(name, value) for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise InvalidInputError(
                f"time() takes exactly one of {', '.join(given)}; got {len(named)}"
            )
        name, value = named[0]
        number = raw = _as_double(value)
        if name == "alpha":
            number = -self.path.ratio_of_alpha(number).log()
        elif name == "sigma":
            number = -self.path.ratio_of_sigma(number).log()
        elif name == "ratio":
            number = -number.log()
        bad = _first(raw, number.isnan())
        if bad is not None:
            raise InvalidInputError(
                f"no level of {self.name} has {name}={bad:g}; ratio and sigma are >= 0, alpha and sigma of "
                "variance-preserving and flow processes in [0, 1]"
            )
        trained = self._time(number).clamp(self.t_min, self.t_max)
        return _like(value, torch.where(number == math.inf, self.clean_time, trained))

    def level(self, t: float) -> Level:
        """The level at time t.

        >>> from fewstep.process import flow
        >>> flow().level(0.25)
        Level(t=0.25, alpha=0.75, sigma=0.25)
        """
        return self.levels([t])[0]

    def levels(self, times: list[float]) -> list[Level]:
        """The levels at several times."""
        t = _as_double(times)
        return self._levels(t, self.ratio(t))

    def levels_at(self, ratios: list[float]) -> list[Level]:
        """The levels at given ratios `sigma / alpha`, in [0, inf], exactly as given; t is the nearest trained time.

        Raises:
            InvalidInputError: If a ratio is negative or not a number, or infinite where sigma would be so too.
        """
        ratio = _as_double(ratios)
        bad = _first(ratio, ~(ratio >= 0) | self.path.sigma_of(ratio).isinf())
        if bad is not None:
            remedy = (
                "its sigma would be infinite; start with a finite value"
                if bad == math.inf
                else "every value must be in [0, inf]"
            )
            raise InvalidInputError(f"sigma/alpha={bad:g} is not a level of {self.name}; {remedy}")
        return self._levels(self.time(ratio=ratio), ratio)

    def _levels(self, t: Tensor, ratio: Tensor) -> list[Level]:
        columns = t, self.path.alpha_of(ratio), self.path.sigma_of(ratio)
        return list(map(Level, *(column.tolist() for column in columns)))

    @property
    def noisiest(self) -> Level:
        """The level at `t_max`."""
        return self.level(self.t_max)

    @property
    def least_noisy(self) -> Level:
        """The level at `t_min`."""
        return self.level(self.t_min)

    @property
    def clean(self) -> Level:
        """The level without noise."""
        return Level(self.clean_time, 1.0, 0.0)

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Draw from `q(x_t | x_0)` in one jump: `alpha(t) x0 + sigma(t) noise`.

        Args:
            x0: Data, shape (B, ...), of a floating-point type.
            noise: Standard normal, the shape of x0.
            t: One time, or one for each image, shape (B,).

        Returns:
            The noised data, in x0's shape and type; computed in float32 or better.

        Raises:
            InvalidInputError: If x0 holds whole numbers, or the shapes do not fit.
        """
        times = _as_double(t)
        if not x0.is_floating_point():
            raise InvalidInputError(
                f"x0 is of type {x0.dtype}; give floating-point images in [-1, 1], such as x0 / 127.5 - 1"
            )
        if noise.shape != x0.shape or times.shape not in (torch.Size(), x0.shape[:1]):
            raise InvalidInputError(
                f"shapes do not fit: x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}, t {tuple(times.shape)}; "
                "noise must have the shape of x0, and t be one number or one for each image"
            )
        kind = torch.promote_types(x0.dtype, torch.float32)
        shape = times.shape + (1,) * (x0.ndim - times.ndim) if times.ndim else ()
        alpha, sigma = (
            weight(times).to(x0.device, kind).reshape(shape) for weight in (self.alpha, self.sigma)
        )
        return (alpha * x0.to(kind) + sigma * noise.to(kind)).to(x0.dtype)

    def forward_kernel(self, t: float, s: float | None = None) -> Kernel:
        """`q(x_t | x_s)`; s defaults to the entry of the table before t. See `fewstep.process.forward_kernel`."""
        return forward_kernel(self.level(self._before(t, s)), self.level(t))

    def posterior(
        self, x_t: Tensor, x0: Tensor, t: float, s: float | None = None
    ) -> tuple[Tensor, float]:
        """Mean and standard deviation of `q(x_s | x_t, x_0)`; s defaults to the entry of the table before t.

        The formula stands in `fewstep.process.posterior`.
        """
        on_x, on_x0, std = posterior(self.level(t), self.level(self._before(t, s)))
        return on_x * x_t + on_x0 * x0, std

    def to_dict(self) -> dict[str, Any]:
        """Name and options as plain data; `fewstep.process.from_dict` makes the process again."""
        return {"name": self.name, **self.options}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    def _before(self, t: float, s: float | None) -> float:
        if s is not None:
            return s
        raise InvalidInputError(
            f"{self.name} is continuous, so no time stands just before t={t:g}; give s"
        )

    def _covers(self, t: Tensor) -> Tensor:
        """Whether the formula holds at t; a continuous one holds below the trained times too, down to clean data."""
        return (t >= self.clean_time) & (t <= self.t_max)

    def _checked(self, t: float | Tensor) -> Tensor:
        times = _as_double(t)
        bad = _first(times, ~self._covers(times))
        if bad is not None:
            raise InvalidInputError(
                f"time {bad:g} is outside {self.name}'s range {self.t_min:g}..{self.t_max:g} "
                f"(clean: {self.clean_time:g})"
            )
        return times
