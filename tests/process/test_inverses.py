"""`Process.time` undoes ratio, log_snr, alpha and sigma."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import process as fp
from fewstep.errors import InvalidInputError
from fewstep.process import Process

PROCESSES = [
    fp.vp_linear(),
    fp.vp_linear(zero_terminal_snr=True),
    fp.vp_scaled_linear(),
    fp.vp_cosine(),
    fp.vp_cosine(zero_terminal_snr=True),
    fp.vp_sigmoid(),
    fp.vp_sigmoid_beta(),
    fp.vp_from_betas([0.3, 0.5]),
    fp.vp_from_betas([0.3, 0.5, 1.0]),
    fp.vp_continuous(),
    fp.ve(),
    fp.edm(),
    fp.flow(),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:50])


def time_of(process: Process, name: str, value: Any) -> Any:
    return process.time(**{name: value})


def invertible(process: Process) -> list[str]:
    return ["ratio", "log_snr", "sigma", *(["alpha"] if process.name not in ("ve", "edm") else [])]


@every_process
@settings(max_examples=40)
@given(u=st.floats(0, 1))
def test_time_undoes_each_function(process: Process, u: float) -> None:
    t = process.t_min + u * (process.t_max - process.t_min)
    span = process.t_max - process.t_min
    for name in invertible(process):
        value = getattr(process, name)(t)
        found = time_of(process, name, value)
        assert process.t_min <= found <= process.t_max
        # At either end of a path some of the four hardly move with t and others hardly move t: the time comes back,
        # or the value.
        assert found == pytest.approx(t, rel=0, abs=1e-13 * span) or getattr(process, name)(
            found
        ) == pytest.approx(value, rel=1e-10, abs=1e-14)
        if name in ("ratio", "log_snr") and math.isfinite(value):
            assert found == pytest.approx(t, rel=1e-9, abs=1e-9 * span)


@every_process
@settings(max_examples=40)
@given(u=st.floats(0.01, 0.99))
def test_sigma_and_alpha_lead_to_the_same_time_where_both_move(process: Process, u: float) -> None:
    ratio = math.exp(
        (1 - u) * math.log(max(process.least_noisy.ratio, 0.05))
        + u * math.log(min(process.noisiest.ratio, 20.0))
    )
    level = process.levels_at([ratio])[0]
    for name in invertible(process):
        assert time_of(process, name, getattr(level, name)) == pytest.approx(level.t, rel=1e-9)


@every_process
def test_ends_clean_data_and_pure_noise(process: Process) -> None:
    for name in invertible(process):
        assert time_of(process, name, getattr(process.clean, name)) == process.clean_time
        for level in (process.least_noisy, process.noisiest):
            found = time_of(process, name, getattr(level, name))
            assert found == pytest.approx(level.t, rel=1e-6, abs=1e-6)
    assert process.time(ratio=math.inf) == pytest.approx(process.t_max, rel=1e-15)
    assert process.time(log_snr=-math.inf) == pytest.approx(process.t_max, rel=1e-15)


@every_process
def test_beyond_the_trained_range_is_the_nearest_trained_time(process: Process) -> None:
    assert process.time(ratio=process.least_noisy.ratio / 3) == process.t_min
    assert process.time(ratio=1e-200) == process.t_min
    noisiest = min(process.noisiest.ratio, 1e30)
    assert process.time(ratio=noisiest * 3) == pytest.approx(process.t_max, rel=1e-15)


def test_pure_noise_by_alpha_and_sigma() -> None:
    for process in (fp.vp_linear(), fp.vp_linear(zero_terminal_snr=True), fp.flow()):
        assert process.time(alpha=0.0) == process.t_max
        assert process.time(sigma=1.0) == process.t_max


def test_tensors_keep_their_shape() -> None:
    t = torch.tensor([[0.0, 3.25], [998.5, 999.0]], dtype=torch.float64)
    for process in (fp.vp_linear(), fp.vp_linear(zero_terminal_snr=True)):
        torch.testing.assert_close(process.time(log_snr=process.log_snr(t)), t)


def test_continuous_vp_inverse_is_the_root_of_the_quadratic() -> None:
    """`t (beta_max - beta_min) t / 2 + beta_min t = log(1 + ratio^2)`."""
    for ratio in (0.02, 0.5, 3.0, 100.0):
        t = fp.vp_continuous().time(ratio=ratio)
        assert 19.9 * t**2 / 2 + 0.1 * t == pytest.approx(math.log1p(ratio**2), rel=1e-12)


@pytest.mark.parametrize("process", [fp.vp_linear(), fp.vp_continuous(), fp.flow()], ids=repr)
@pytest.mark.parametrize(
    "given",
    [
        {"ratio": -0.5},
        {"sigma": -0.25},
        {"sigma": 1.5},
        {"alpha": 1.2},
        {"alpha": -0.5},
        {"log_snr": math.nan},
        {"ratio": torch.tensor([1.0, -0.5])},
    ],
    ids=repr,
)
def test_a_value_that_no_level_has(process: Process, given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    shown = float(value.min()) if isinstance(value, torch.Tensor) else value
    with pytest.raises(InvalidInputError, match=f"no level of {process.name} has {name}={shown}"):
        process.time(**given)


@pytest.mark.parametrize("given", [{}, {"ratio": 1.0, "sigma": 0.5}])
def test_exactly_one_value(given: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="exactly one of ratio, log_snr, alpha, sigma"):
        fp.edm().time(**given)


@pytest.mark.parametrize("process", [fp.ve(), fp.edm()], ids=repr)
def test_alpha_does_not_tell_the_time_of_variance_exploding(process: Process) -> None:
    with pytest.raises(InvalidInputError, match="give sigma or ratio"):
        process.time(alpha=1.0)


@pytest.mark.parametrize(
    ("process", "t"),
    [
        (fp.vp_linear(), 1000),
        (fp.vp_linear(), 999.001),
        (fp.vp_linear(), -0.5),
        (fp.vp_linear(), -2),
        (fp.vp_linear(), math.nan),
        (fp.vp_continuous(), 1.001),
        (fp.vp_continuous(), -1e-9),
        (fp.ve(), 1.5),
        (fp.edm(), 81),
        (fp.edm(), -1),
        (fp.flow(), 2),
    ],
    ids=repr,
)
def test_a_time_out_of_range_is_named_with_the_range(process: Process, t: float) -> None:
    for call in (process.alpha, process.sigma, process.ratio, process.log_snr, process.level):
        with pytest.raises(InvalidInputError) as caught:
            call(t)
        for part in (f"time {t:g} ", process.name, f"{process.t_min:g}..{process.t_max:g}"):
            assert part in str(caught.value)
    with pytest.raises(InvalidInputError, match=f"time {t:g} "):
        process.alpha(torch.tensor([process.t_max, t], dtype=torch.float64))


@every_process
@settings(max_examples=40)
@given(exponent=st.floats(-180, 180))
def test_levels_at_are_the_ratios_asked_for(process: Process, exponent: float) -> None:
    ratio = 10**exponent
    (level,) = process.levels_at([ratio])
    assert level.ratio == pytest.approx(ratio, rel=1e-15)
    assert level.t == process.time(ratio=ratio)


@pytest.mark.parametrize("process", [fp.vp_cosine(), fp.vp_continuous(), fp.flow()], ids=repr)
def test_pure_noise_is_a_level_where_sigma_is_bounded(process: Process) -> None:
    (level,) = process.levels_at([math.inf])
    assert (level.alpha, level.sigma, level.ratio) == (0.0, 1.0, math.inf)
    assert level.t == pytest.approx(process.t_max, rel=1e-15)


@pytest.mark.parametrize("process", [fp.ve(), fp.edm()], ids=repr)
def test_pure_noise_is_no_level_where_sigma_is_not(process: Process) -> None:
    with pytest.raises(InvalidInputError, match="sigma/alpha=inf .* start with a finite value"):
        process.levels_at([math.inf, 1.0])
