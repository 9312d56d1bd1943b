"""Supreme: its solvers by their order, and each of its effects by an independent implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fewstep as fs
from exact_problems import PROCESSES, mixture, run, truth
from fewstep.errors import InvalidInputError
from fewstep.plan import EagerPlan
from fewstep.samplers.supreme import CORRECTED, PUBLISHED

EDM = PROCESSES["edm"]
PLAIN: dict[str, Any] = {
    "centralization": 0.0,
    "normalization": 0.0,
    "edge_enhancement": 0.0,
    "perphist": 0.0,
    "noise_modulation": "none",
    "substeps": 1,
}
STILL = {**PLAIN, "eta": 0.0, "reversible_eta": 0.0}
IMAGES = (3, 2, 5, 6)
METHODS = [
    "euler",
    "trapezoidal",
    "rk4",
    "rkf45",
    "bogacki_shampine",
    "RES",
    "dpm_1s",
    "dpm_2s",
    "dpm_3s",
    "reversible_heun",
    "reversible_heun_1s",
    "reversible_bogacki_shampine",
    "dynamic",
    "adaptive_rk",
]


def normal(seed: int, shape: tuple[int, ...] = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def supreme(ratios: list[float], process: fs.Process = EDM, **options: Any) -> EagerPlan:
    plan = fs.plan("supreme", fs.Grid.from_ratios(process, ratios), **options)
    assert isinstance(plan, EagerPlan)
    return plan


def parted(images: Tensor, other: Tensor) -> Tensor:
    """The inner product of each image, in a shape that multiplies images."""
    return torch.stack([(a * b).sum() for a, b in zip(images, other, strict=True)]).view(
        -1, 1, 1, 1
    )


# ---- the solvers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("euler", 1),
        ("dpm_1s", 1),
        ("reversible_heun_1s", 1),
        ("trapezoidal", 2),
        ("dpm_2s", 2),
        ("RES", 2),
        ("reversible_heun", 2),
        ("dpm_3s", 3),
        ("rk4", 4),
        ("rkf45", 4),
    ],
)
def test_order_of_the_step_methods(method: str, order: int) -> None:
    options = {**STILL, "step_method": method}
    errors = [
        float((run("supreme", options, EDM, n, 100.0) - truth(100.0)).abs().max())
        for n in (40, 80)
    ]
    nearly = (
        0.5 if method == "rkf45" else 0.25
    )  # whose fourth-order error is small beside the fifth
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=nearly)


@pytest.mark.parametrize("method", ["bogacki_shampine", "reversible_bogacki_shampine"])
def test_the_published_third_order_is_the_first(method: str) -> None:
    for corrected, least, most in ((False, -3.0, 1.8), (True, 2.8, 3.2)):
        options = {**STILL, "step_method": method, "corrected": corrected}
        errors = [
            float((run("supreme", options, EDM, n, 100.0) - truth(100.0)).abs().max())
            for n in (80, 160)
        ]
        assert least < math.log2(errors[0] / errors[1]) < most


@pytest.mark.parametrize("name", ["adaptive_2", "adaptive_3", "adaptive_4", "bogacki_shampine"])
def test_published_stages_break_a_condition_of_second_order(name: str) -> None:
    nodes, rows, weights = PUBLISHED[name]
    moved = sum(w * sum(row) for w, row in zip(weights[1:], rows, strict=True))
    placed = sum(w * node for w, node in zip(weights[1:], nodes, strict=True))
    assert max(abs(moved - 1 / 2), abs(placed - 1 / 2)) > 0.05


@pytest.mark.parametrize("order", [2, 3, 4])
def test_corrected_adaptive_stages_meet_the_conditions_of_their_order(order: int) -> None:
    """Where steps are short the fourth order is chosen always, so no measured order would tell the others."""
    nodes, rows, weights = CORRECTED[f"adaptive_{order}"]
    assert [sum(row) for row in rows] == pytest.approx(list(nodes))
    full = np.zeros((order, order))
    for k, row in enumerate(rows):
        full[k + 1, : k + 1] = row
    b, c, ones = np.array(weights), np.array([0, *nodes]), np.ones(order)
    conditions = {
        1: [(b @ ones, 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ full @ c, 1 / 6)],
        4: [
            (b @ c**3, 1 / 4),
            (b @ (c * (full @ c)), 1 / 8),
            (b @ full @ c**2, 1 / 12),
            (b @ full @ full @ c, 1 / 24),
        ],
    }
    for p in range(1, order + 1):
        for got, wanted in conditions[p]:
            assert got == pytest.approx(wanted)


def written_out(
    method: str, x: Tensor, old: Tensor, t: float, s: float, end: float, back: float
) -> Tensor:
    """The original's formulas for a step from t to the kept noise s of the level `end`."""
    denoiser = mixture(EDM)

    def d(x: Tensor, ratio: float) -> Tensor:
        return (x - denoiser(x, fs.Level(ratio, 1.0, ratio))) / ratio

    dt, d1 = s - t, d(x, t)
    match method:
        case "trapezoidal":
            return x + dt * (d1 + d(x + d1 * (end - t), end)) / 2
        case "reversible_heun":
            d2 = d(x + d1 * dt, s)
            return x + dt * (d1 + d2) / 2 - back * (d2 - d1) / 4
        case "reversible_heun_1s":
            before = (x - old) / t
            there = (x + before * dt - denoiser(x, fs.Level(t, 1.0, t))) / s
            return x + dt * (before + there) / 2 - back * (there - before) / 4
        case "dpm_2s":
            middle = math.sqrt(t * s)
            return x + dt * d(x + (middle - t) * d1, middle)
    k1 = d1 * dt
    k2 = d(x + k1 / 2, t + dt / 2) * dt
    k3 = d(x + 3 * k1 / 4 + k2 / 4, t + 3 * dt / 4) * dt
    correction = back * (k3 - k2) / 6 if method == "reversible_bogacki_shampine" else 0
    return x + 2 * k1 / 9 + k2 / 3 + 4 * k3 / 9 - correction


@pytest.mark.parametrize(
    "method",
    [
        "trapezoidal",
        "reversible_heun",
        "reversible_heun_1s",
        "dpm_2s",
        "bogacki_shampine",
        "reversible_bogacki_shampine",
    ],
)
def test_the_second_step_is_the_published_formula(method: str) -> None:
    """After the warm-up, without the fresh noise, with some of the next level's noise kept."""
    t, end = 2.0, 1.2
    down = math.sqrt(end**2 - (0.6 * end) ** 2 * (1 - (end / t) ** 2))
    back = math.sqrt(end**2 - (0.3 * end) ** 2 * (1 - (end / t) ** 2)) - t
    options = {**PLAIN, "step_method": method, "eta": 0.6, "reversible_eta": 0.3}
    seen: list[tuple[float, Tensor, Tensor]] = []
    plan = supreme([5.0, t, end], **{**options, "s_noise": 0.0})
    got = plan.run(
        mixture(EDM),
        5 * normal(8, (6, 2)),
        on_step=lambda p: seen.append((p.level.ratio, p.x, p.denoised)),
    )
    first, second = (next(s for s in seen if s[0] == ratio) for ratio in (5.0, t))
    wanted = written_out(method, second[1], first[2], t, down, end, back**2)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("method", METHODS)
def test_every_path_is_the_same_path(method: str, process: str) -> None:
    options = {"step_method": method, "eta": 0.0, "reversible_eta": 0.5}
    wanted = run("supreme", options, EDM, 12)
    torch.testing.assert_close(run("supreme", options, PROCESSES[process], 12), wanted)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_plain_euler_steps_are_euler_ancestral(eta: float) -> None:
    """But for the first step, which is Runge-Kutta: with the last step alone to look at, on a grid of two steps."""
    ratios = [5.0, 2.0, 0.5, 0.2]
    denoiser = mixture(EDM)
    noise = fs.Noise(range(6), (2,), dtype=torch.float64)
    options = {**PLAIN, "eta": eta, "step_method": "euler", "substeps": 3}
    seen: list[Tensor] = []
    end = supreme(ratios, **options).run(
        denoiser,
        5 * noise.initial(),
        noise,
        lambda p: seen.append(p.x) if p.level.ratio == 2 else None,
    )
    rest = fs.plan("euler_ancestral", fs.Grid.from_ratios(EDM, ratios[1:]), eta=eta)
    torch.testing.assert_close(end, rest.run(denoiser, seen[-1], noise), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "option", [{"step_method": m} for m in METHODS] + [{"substep_method": "dpm_3s"}], ids=str
)
def test_an_ancestral_step_is_a_step_to_the_kept_noise(option: dict[str, str]) -> None:
    """On data of one point correct methods are exact: every step leaves `x_0` plus kept and fresh noise."""
    x0, t, m, s = normal(0), 6.0, 2.5, 1.0
    options = {**PLAIN, "eta": 0.7, "reversible_eta": 0.2, "substeps": 2, "corrected": True}
    noise = {t: normal(1), m: normal(2)}
    x = x0 + t * normal(3)
    plan = supreme([t, m, s], **{**options, **option})
    got = plan.run(lambda x, level: x0, x, lambda a, b: noise[a.ratio])
    spread = normal(3) * t
    for a, b in ((t, m), (m, s)):
        up = 0.7 * b * math.sqrt(1 - (b / a) ** 2)
        spread = math.sqrt(b**2 - up**2) / a * spread + up * noise[a]
    torch.testing.assert_close(got, x0 + spread, rtol=1e-10, atol=1e-10)


def test_dynamic_takes_the_method_that_the_change_of_the_slope_asks_for() -> None:
    """Five images whose slope changes by twice these jumps at the second level; each method is run once."""
    jumps = torch.tensor([0.002, 0.01, 0.025, 0.05, 0.25], dtype=torch.float64).view(5, 1)
    x, calls = normal(4, (5, 3)), []

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        calls.append(level.ratio)
        return torch.zeros_like(x) if level.ratio > 2 else jumps[: len(x)] * x

    plan = supreme([4.0, 2.0, 1.5], **{**STILL, "step_method": "dynamic"})
    plan.run(denoiser, x)
    assert calls[:5] == pytest.approx([4, 3.5, 3.25, 4 - 2 * 12 / 13, 2], abs=0)
    by_method = [5, 4, 3, 2, 1]
    assert len(calls) == 5 + 1 + sum(n - 1 for n in by_method)
    for image, count in enumerate(by_method):
        calls.clear()
        own = jumps[image : image + 1]
        plan.run(
            lambda x, level, own=own: (calls.append(0), 0 * x if level.ratio > 2 else own * x)[1],
            x[image : image + 1],
        )
        assert len(calls) == 5 + count


# ---- the estimate ----------------------------------------------------------------------------


def enhanced(
    x: Tensor, denoised: Tensor, ratio: float, process: fs.Process = EDM, **on: Any
) -> Tensor:
    """What one step to clean data returns: the estimate, enhanced."""
    level = process.levels_at([ratio])[0]
    plan = supreme([ratio, 0.0], process, **{**PLAIN, **on})
    return plan.run(lambda x, level: denoised, level.alpha * x)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_centralization_takes_a_share_of_each_channels_mean(process: fs.Process) -> None:
    x, d = normal(0), normal(1) + 1
    got = enhanced(x, d, 4.0, process, centralization=0.1)
    means = torch.stack([torch.stack([c.mean() for c in image]) for image in d])
    torch.testing.assert_close(got, d - 0.1 * 2 * means[..., None, None])


def test_normalization_moves_each_channels_deviation_towards_one() -> None:
    x, d = normal(0), 3 * normal(1)
    got = enhanced(x, d, 4.0, normalization=0.1)
    deviation = torch.from_numpy(np.std(d.numpy(), axis=(2, 3), ddof=1, keepdims=True))
    torch.testing.assert_close(got, d * (1 + 0.2 * (1 / deviation - 1)))
    flat = torch.full_like(d, 0.5)
    assert enhanced(x, flat, 4.0, normalization=0.1).equal(flat)


def test_edges_are_sharpened_and_flat_parts_smoothed() -> None:
    """Against a convolution, and a filter that is written with loops over pixels."""
    x, d, ratio, share = normal(0), 0.05 * normal(1), 2.0, 0.3
    line = torch.exp(-0.5 * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / 1.5**2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = functional.pad(d, (1, 1, 1, 1), mode="reflect")
    blurred = functional.conv2d(padded, kernel.expand(2, 1, 3, 3), groups=2)
    flattened = torch.empty_like(x)
    height, width = x.shape[-2:]
    for i in range(height):
        for j in range(width):
            total, weight = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1).double()
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    k = height - 1 - abs(height - 1 - abs(i + di))
                    m = width - 1 - abs(width - 1 - abs(j + dj))
                    colour = (d[:, :, k, m] - d[:, :, i, j]).abs().sum(1, keepdim=True)
                    w = kernel[1 + di, 1 + dj] * torch.exp(-50 * colour**2)
                    total, weight = total + w * x[:, :, k, m], weight + w
            flattened[:, :, i, j] = total / weight
    wanted = d + ratio * share * ((d - blurred) + (flattened - x))
    torch.testing.assert_close(enhanced(x, d, ratio, edge_enhancement=share), wanted)


def test_history_adds_what_is_perpendicular_to_the_estimate() -> None:
    """With two substeps the second estimate has one before it; the mean of both is returned."""
    x, d = normal(0), [normal(1), normal(2)]
    estimates = iter(d)
    plan = supreme([3.0, 0.0], **{**PLAIN, "substeps": 2, "perphist": 0.8})
    got = plan.run(lambda x, level: next(estimates), x)
    second = 2 * got - d[0]
    added, now = second - d[1], 2 * x - d[1]
    then = 2 * x - d[0]
    zero = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(parted(added, now), zero, rtol=0, atol=1e-10)
    rest = 0.4 * then - added  # 0.8 shared by two substeps of Euler; the rest is along `now`
    torch.testing.assert_close(parted(rest, rest) * parted(now, now), parted(rest, now) ** 2)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"step_method": "rk4"}, 4),
        ({"step_method": "rkf45", "substeps": 3}, 8),
        ({"step_method": "trapezoidal", "substep_method": "dpm_3s", "substeps": 2}, 5),
    ],
    ids=str,
)
def test_effects_are_divided_among_the_calls(options: dict[str, Any], parts: int) -> None:
    x, d = normal(0), normal(1) + 1
    got = enhanced(x, d, 1.0, centralization=0.5, **options)
    torch.testing.assert_close(got, d - 0.5 / parts * d.mean((2, 3), keepdim=True))


# ---- the noise -------------------------------------------------------------------------------


def modulated(
    modulation: str, strength: float, dims: int, x: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """The shaped noise of the step from 2 to 1 for an estimate of 0, and the plain one."""
    options = {**PLAIN, "eta": 0.8, "noise_modulation": modulation}
    plan = supreme(
        [2.0, 1.0], **{**options, "modulation_strength": strength, "modulation_dims": dims}
    )
    up = 0.8 * math.sqrt(1 - 0.25)
    got = plan.run(lambda x, level: torch.zeros_like(x), x, lambda a, b: z)
    return got - math.sqrt(1 - up**2) / 2 * x, up * z


AXES = {1: (1,), 2: (2, 3), 3: (1, 2, 3)}


def scale(x: Tensor, strength: float, dims: int) -> np.ndarray:
    """One plus the factor by which the noise is scaled where the point has much contrast."""
    up = 0.8 * math.sqrt(1 - 0.25)
    point = math.sqrt(1 - up**2) / 2 * x.numpy()
    return 1 + 1 / (1 + abs(strength) * np.std(point, axis=AXES[dims], ddof=1, keepdims=True))


def blended(shaped: np.ndarray, plain: Tensor, strength: float) -> Tensor:
    """In the norm of the plain noise, image by image."""
    images = [a * float(b.norm()) / np.linalg.norm(a) for a, b in zip(shaped, plain, strict=True)]
    return strength * torch.from_numpy(np.stack(images)) + (1 - strength) * plain


@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_noise_by_intensity(dims: int, strength: float) -> None:
    x, z = normal(0) * torch.linspace(0.1, 3, 6).double(), normal(1)
    got, plain = modulated("intensity", strength, dims, x, z)
    wanted = blended(scale(x, strength, dims) * plain.numpy(), plain, strength)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_noise_by_frequency(dims: int, strength: float) -> None:
    x, z = normal(0) * torch.linspace(0.1, 3, 6).double(), normal(1)
    got, plain = modulated("frequency", strength, dims, x, z)
    spectrum = np.fft.fft2(scale(x, strength, dims) * plain.numpy())
    rows, columns = np.meshgrid(np.arange(5) / 5, np.arange(6) / 6, indexing="ij")
    high = 1 - np.exp(-(rows**2 + columns**2) * strength**2)
    shaped = np.abs(spectrum) * (1 + high) * np.exp(1j * np.angle(spectrum))
    torch.testing.assert_close(got, blended(np.fft.ifft2(shaped).real, plain, strength))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_noise_with_even_amplitudes(dims: int) -> None:
    x, z, strength = normal(0), 3 * normal(1), 1.5
    got, plain = modulated("spectral_signum", strength, dims, x, z)
    for image, noise in zip(got, plain.numpy(), strict=True):
        spectrum = np.fft.fftn(noise, axes=[axis - 1 for axis in AXES[dims]])
        log = np.log(np.abs(spectrum))
        low, high, top = np.quantile(np.abs(log), [0.05, 0.95, 1.0])
        for place, amplitude in np.ndenumerate(log):
            factor = 1.0
            if amplitude > high:
                factor *= 1 - min((amplitude - high) / (top - high), 0.5)
            if amplitude < low:
                factor *= 1 + min(1 - amplitude / low, 0.5)
            spectrum[place] *= factor**strength
        wanted = np.fft.ifftn(spectrum, axes=[axis - 1 for axis in AXES[dims]]).real
        torch.testing.assert_close(image, torch.from_numpy(wanted))


# ---- as a whole ------------------------------------------------------------------------------


def field(process: fs.Process, shape: tuple[int, ...]) -> Callable[[Tensor, fs.Level], Tensor]:
    """A mixture of two images of any shape."""
    means = normal(7, (2, math.prod(shape)))
    inner = fs.exact.GaussianMixture(means, 0.5, process=process)
    return lambda x, level: inner(x.flatten(1), level).view_as(x)


@pytest.mark.parametrize(
    "shape", [(2,), (1,), (1, 4, 4), (3, 6, 8), (2, 3, 5, 4), (3, 1, 5)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_method": "dynamic", "noise_modulation": "frequency", "modulation_dims": 1},
        {"step_method": "adaptive_rk", "noise_modulation": "spectral_signum", "eta": 2.0},
        {"step_method": "reversible_heun_1s", "substep_method": "RES", "s_noise": 0.0},
    ],
    ids=str,
)
def test_any_data_on_any_grid_and_each_image_for_itself(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """The original takes norms over the batch, so that its images depend on their neighbours."""
    process = fs.process.flow()
    denoiser = field(process, shape)
    for ratios in ([math.inf, 50.0, 9.0, 1.0, 0.2, 0.0], [9.0, 2.0, 0.05], [math.inf, 0.0]):
        ends = []
        for seeds in (range(4), [2]):
            noise = fs.Noise(seeds, shape, dtype=torch.float64)
            plan = supreme(ratios, process, **options)
            ends.append(plan.run(denoiser, plan.levels[0].sigma * noise.initial(), noise))
        assert ends[0].shape == (4, *shape)
        assert bool(ends[0].isfinite().all())
        torch.testing.assert_close(ends[0][2:3], ends[1], rtol=1e-9, atol=1e-9)


def test_frames_of_a_video_are_sharpened_like_images() -> None:
    x, d = normal(0, (2, 3, 4, 5, 6)), 0.1 * normal(1, (2, 3, 4, 5, 6))
    got = enhanced(x, d, 2.0, edge_enhancement=0.3)
    for frame in range(4):
        wanted = enhanced(x[:, :, frame], d[:, :, frame], 2.0, edge_enhancement=0.3)
        torch.testing.assert_close(got[:, :, frame], wanted)


def test_a_step_from_pure_noise_is_taken_by_itself() -> None:
    process, shape = fs.process.flow(), (2, 4, 4)
    denoiser, noise = field(process, shape), fs.Noise([0, 1], shape, dtype=torch.float64)

    def end(x: Tensor, *ratios: float) -> Tensor:
        return supreme(list(ratios), process).run(denoiser, x, noise)

    rest = (9.0, 3.0, 1.0, 0.0)
    in_two = end(end(noise.initial(), math.inf, 9.0), *rest)
    torch.testing.assert_close(
        end(noise.initial(), math.inf, *rest), in_two, rtol=1e-12, atol=1e-12
    )


def test_the_default_options_cost_two_calls_a_step() -> None:
    shape = (2, 4, 4)
    noise = fs.Noise([0], shape)
    for steps in (5, 9):
        plan = supreme(np.geomspace(20, 0.1, steps + 1).tolist())
        solution = plan.solve(field(EDM, shape), 20 * noise.initial(), noise)
        assert solution.calls == 2 * steps + 4  # the first step takes five calls in place of one


def test_bad_options_and_missing_noise_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="step_method='rk5' is not one of euler, dynamic"):
        supreme([3.0, 1.0], step_method="rk5")
    with pytest.raises(InvalidInputError, match="substeps=0 is not a whole number in 1..16"):
        supreme([3.0, 1.0], substeps=0)
    with pytest.raises(InvalidInputError, match=r"supreme.*draws noise; give noise="):
        supreme([3.0, 1.0]).run(lambda x, level: x, normal(0))
