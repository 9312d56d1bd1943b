"""DPM-Solver-v3: its statistics and what they are worth, its integrals, its order, and what it is without any."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, START, grid, mixture, truth
from fewstep.cli import main
from fewstep.errors import CheckpointError, InvalidInputError
from fewstep.plan import EagerPlan, Plan
from fewstep.process import log_snr_step
from fewstep.samplers.dpm_solver_v3 import Stretch
from fewstep.samplers.statistics import ModelStatistics, model_statistics
from fewstep.samplers.steps import Output, exponential_rule, noise_estimate


def table(*values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same_everywhere(l: float, s: float, b: float) -> ModelStatistics:  # noqa: E741
    return ModelStatistics(table(-9.0, 9.0), *(table([v], [v]) for v in (l, s, b)))  # type: ignore[arg-type]


DATA, NOISE = same_everywhere(1, 0, 0), same_everywhere(0, -1, 0)
UNEVEN = ModelStatistics(
    table(-2.0, 0.1, 1.0, 4.0),  # type: ignore[arg-type]
    table([1.0, 0.9], [0.4, 0.7], [0.3, 0.0], [0.1, 0.2]),
    table([0.2, 0.1], [0.5, -0.3], [-0.9, -1.1], [-1.5, -0.7]),
    table([0.1, 0.0], [-0.4, 0.3], [0.6, 0.2], [0.0, 0.1]),
)


def smooth(knots: int = 8001) -> ModelStatistics:
    """Statistics with curves of their own, which at high noise are the data form."""
    log_snr = torch.linspace(-3, 4, knots, dtype=torch.float64)
    rows = log_snr[:, None]
    return ModelStatistics(
        log_snr,
        table([1.0, 0.8]) / (1 + 2 * (2 * rows).exp()) + table([0.0, 0.2]),
        -torch.sigmoid(2 * rows - 2) * table([1.0, 0.7]),
        0.3 * (-3 * (rows - 1) ** 2).exp() * table([1.0, -1.0]),
    )


def end(name: str | Callable[..., Any], process: fs.Process, steps: int, **options: Any) -> Tensor:
    """The end of the mixture's path in the coordinates of alpha = 1."""
    levels = grid(process, steps)
    x = levels.levels[0].alpha * START
    return fs.plan(name, levels, **options).run(mixture(process), x) / levels.levels[-1].alpha


def multistep(tape: fs.Tape, levels: fs.Grid, order: int, noise_form: bool) -> fs.Vector:
    """The exact exponential multistep method of either form."""
    x, outputs = tape.start, []
    for t, s in levels.steps:
        denoised = tape.denoise(x, t)
        value = noise_estimate(x, denoised, t) if noise_form else denoised
        outputs = [Output(t, value), *outputs][:order]
        x = exponential_rule(x, outputs, s, noise_form=noise_form)
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", ["data", "noise"])
def test_plain_statistics_make_it_the_multistep_method_of_a_form(
    form: str, order: int, process: fs.Process
) -> None:
    statistics = DATA if form == "data" else NOISE
    options = {"statistics": statistics, "order": order, "corrector": False}
    got = end("dpm_solver_v3", process, 9, **options)
    wanted = end(multistep, process, 9, order=order, noise_form=form == "noise")
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_plain_statistics_make_it_dpm_solver_plus_plus() -> None:
    options = {"statistics": DATA, "order": 2, "corrector": False}
    got = end("dpm_solver_v3", PROCESSES["vp"], 9, **options)
    wanted = end("dpmpp_2m", PROCESSES["vp"], 9, solver_type="heun")
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_the_integrals_are_those_of_quadrature() -> None:
    process = PROCESSES["vp"]
    t, s = process.levels_at([math.exp(1.3), math.exp(-2.1)])
    stretch = Stretch.between(UNEVEN, t, s, START, 2)
    knots = UNEVEN.log_snr.tolist()

    def line(name: str, pixel: int) -> Callable[[float], float]:
        tables = {"l": 0, "s": 1, "b": 2}
        return lambda u: float(UNEVEN.at(torch.tensor([u]).double())[tables[name]][0, pixel])

    def integral(function: Callable[[float], float], to: float) -> float:
        inside = [k for k in knots if t.log_snr < k < to]
        return quad(function, t.log_snr, to, points=inside or None, epsabs=1e-9, limit=60)[0]

    for pixel in (0, 1):
        l, rate, b = (line(name, pixel) for name in "lsb")  # noqa: E741
        growth = math.exp(integral(rate, s.log_snr))
        shift = integral(lambda u, b=b, r=rate: b(u) * math.exp(-integral(r, u)), s.log_snr)
        assert float(stretch.decay[pixel]) == pytest.approx(math.exp(-integral(l, s.log_snr)))
        assert float(stretch.growth[pixel]) == pytest.approx(growth, rel=1e-6)
        assert float(stretch.shift[pixel]) == pytest.approx(shift, rel=1e-6)
        for k, moment in enumerate(stretch.moments):
            weighted = integral(
                lambda u, k=k, pair=(l, rate): (
                    math.exp(integral(pair[0], u) + integral(pair[1], u))
                    * ((u - t.log_snr) / log_snr_step(t, s)) ** k
                ),
                s.log_snr,
            )
            assert float(moment[pixel]) == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_linear_model_that_the_statistics_know_is_solved_exactly(order: int) -> None:
    """Where `df / dlog_snr = s f + b` holds, one step of any length is exact: solved here by tiny steps of RK4."""
    process = PROCESSES["flow"]
    log_snr = UNEVEN.log_snr.tolist()
    levels = fs.Grid.from_ratios(process, [math.exp(-v) for v in (log_snr[0], 0.7, log_snr[-1])])
    x, f = START[:1].clone() / 5, START[1:2].clone() / 10
    values = {levels.levels[0]: f}
    state = x
    for (t, s), n in zip(levels.steps, (4000, 4000), strict=True):
        h = log_snr_step(t, s) / n
        for k in range(n):
            state, f = rk4(state, f, t.log_snr + k * h, h)
        values[s] = f

    def denoiser(point: Tensor, level: fs.Level) -> Tensor:
        kept = 1 - UNEVEN.at(torch.tensor([level.log_snr]).double())[0][0]
        return kept * point / level.alpha - values[level]

    options = {"statistics": UNEVEN, "order": order}
    got = fs.plan("dpm_solver_v3", levels, **options).run(denoiser, levels.levels[0].alpha * x)
    torch.testing.assert_close(got / levels.levels[-1].alpha, state, rtol=1e-6, atol=1e-6)


def rk4(x: Tensor, f: Tensor, at: float, h: float) -> tuple[Tensor, Tensor]:
    y = torch.cat([x, f])
    l, s, b = UNEVEN.at(torch.tensor([at, at + h / 2, at + h]).double())  # noqa: E741

    def slope(y: Tensor, k: int) -> Tensor:
        return torch.stack([-l[k] * y[0] - y[1], s[k] * y[1] + b[k]])

    one = slope(y, 0)
    two = slope(y + h / 2 * one, 1)
    three = slope(y + h / 2 * two, 1)
    four = slope(y + h * three, 2)
    y = y + h / 6 * (one + 2 * two + 2 * three + four)
    return y[:1], y[1:]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_it_has_its_order_for_any_statistics(order: int, process: fs.Process) -> None:
    options = {"statistics": smooth(), "order": order}

    def error(steps: int, corrector: bool) -> float:
        result = end("dpm_solver_v3", process, steps, **options, corrector=corrector)
        return float((result - truth()).abs().max())

    coarse, fine = (error(steps, corrector=False) for steps in (60, 120))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    corrected = error(60, corrector=True)
    assert corrected < coarse / 2 if order > 1 else corrected == coarse


def gaussian_path(levels: fs.Grid, mean: Tensor, width: float) -> Tensor:
    """Where the ODE takes START for data N(mean, width^2), in the coordinates of alpha = 1."""
    first, last = (math.hypot(width, levels.ratios[k]) for k in (0, -1))
    return mean + (START - mean) * last / first


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_on_gaussian_data_five_calls_beat_every_other_sampler(process: fs.Process) -> None:
    """There the remainder is the same for all points, so the statistics leave nothing but their own interpolation."""
    mean, levels = table([0.7, -0.3]), grid(process, 5)
    denoiser = fs.exact.GaussianMixture(mean, 0.5, process=process)
    statistics = model_statistics(denoiser, (2,), n=8)
    x = levels.levels[0].alpha * START

    def error(name: str, **options: Any) -> float:
        result = fs.plan(name, levels, **options).run(denoiser, x) / levels.levels[-1].alpha
        return float((result - gaussian_path(levels, mean, 0.5)).abs().max())

    own = error("dpm_solver_v3", statistics=statistics)
    assert own < 1e-3
    for name in ("dpmpp_2m", "unipc", "deis"):
        assert own < error(name) / 10


def test_the_statistics_of_a_gaussian_are_known() -> None:
    """`D = (w^2 x^ + r^2 m) / (w^2 + r^2)`, so `l = r^2 / (w^2 + r^2)` and f, its rate and b do not depend on x^."""
    process, mean, width = PROCESSES["edm"], table([0.7, -0.3]), 0.5
    denoiser = fs.exact.GaussianMixture(mean, width, process=process)
    statistics = model_statistics(denoiser, (2,), n=16, levels=400)
    noise = (-2 * statistics.log_snr).exp()[:, None]
    wanted = noise / (width**2 + noise)
    torch.testing.assert_close(statistics.l, wanted.expand(-1, 2), rtol=1e-5, atol=1e-5)
    inside = slice(1, -1)
    rate = 2 * wanted * (1 - wanted) * mean  # of f = -l mean
    predicted = statistics.s * -wanted * mean + statistics.b
    torch.testing.assert_close(predicted[inside], rate[inside], rtol=5e-3, atol=2e-3)
    assert float(statistics.s.abs().max()) < 1e-2  # all points have one f, which tells no line


def test_the_statistics_of_a_mixture_are_the_regression() -> None:
    """Taken again from the data with derivatives: all of the Jacobian's diagonal, and of f along the ODE."""
    process = PROCESSES["edm"]
    denoiser, generator = mixture(process), torch.Generator().manual_seed(0)
    got = model_statistics(denoiser, (2,), n=600, levels=100)
    x0 = denoiser.sample(4000, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)

    def form(log_snr: float) -> tuple[fs.Level, Tensor, Tensor]:
        (level,) = process.levels_at([math.exp(-log_snr)])
        x = x0 + level.sigma * noise
        still = denoiser.derivative(x, torch.zeros_like(x), level)
        diagonal = [
            (denoiser.derivative(x, unit.expand_as(x), level) - still)[:, i].mean()
            for i, unit in enumerate(torch.eye(2, dtype=torch.float64))
        ]
        return level, x, 1 - torch.stack(diagonal)

    for log_snr in (-1.2, -0.2, 0.5, 1.3):
        level, x, l = form(log_snr)  # noqa: E741
        slope = (form(log_snr + 0.01)[2] - form(log_snr - 0.01)[2]) / 0.02
        denoised = denoiser(x, level)
        rate = denoiser.derivative(x, denoised - x, level)
        f, change = (1 - l) * x - denoised, (1 - l) * (denoised - x) - slope * x - rate
        centred = f - f.mean(0)
        s = (centred * change).mean(0) / centred.square().mean(0)
        b = change.mean(0) - s * f.mean(0)
        at = [table[0] for table in got.at(torch.tensor([log_snr]).double())]
        for value, wanted in zip(at, (l, s, b), strict=True):
            torch.testing.assert_close(value, wanted, rtol=0.1, atol=0.1)


def test_on_a_mixture_the_statistics_lower_the_error_of_few_calls() -> None:
    process = PROCESSES["vp"]
    statistics = model_statistics(mixture(process), (2,), n=64, levels=60)
    for steps in (5, 8):
        own, plain, other = (
            float((end(name, process, steps, **options) - truth()).abs().max())
            for name, options in (
                ("dpm_solver_v3", {"statistics": statistics}),
                ("dpm_solver_v3", {"statistics": DATA}),
                ("dpmpp_2m", {}),
            )
        )
        assert own < 0.6 * min(plain, other)


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("statistics", [DATA, NOISE, UNEVEN], ids=["data", "noise", "uneven"])
def test_the_ends_of_the_path(pure: bool, clean: bool, statistics: ModelStatistics) -> None:
    """A step from pure noise is taken by itself, one to clean data gives the last estimate."""
    process = PROCESSES["flow"]
    denoiser = mixture(process)

    def run(x: Tensor, *ratios: float) -> Tensor:
        levels = fs.Grid.from_ratios(process, ratios)
        return fs.plan("dpm_solver_v3", levels, statistics=statistics).run(denoiser, x)

    ratios = [*[math.inf] * pure, 9.0, 3.0, 0.8, 0.2, *[0.0] * clean]
    x = START / START.std()
    whole = run(x, *ratios)
    assert torch.isfinite(whole).all()
    if pure:
        rest = run(run(x, math.inf, 9.0), *ratios[1:])
        torch.testing.assert_close(whole, rest, rtol=1e-12, atol=1e-12)
    if clean:
        last = fs.Grid.from_ratios(process, [0.2, 0.0]).levels[0]
        before = run(x, *ratios[:-1])
        torch.testing.assert_close(whole, denoiser(before, last), rtol=1e-12, atol=1e-12)


def test_every_path_is_the_same_path() -> None:
    options = {"statistics": UNEVEN}
    on_edm, *others = (end("dpm_solver_v3", p, 9, **options) for p in PROCESSES.values())
    for other in others:
        torch.testing.assert_close(other, on_edm, rtol=1e-9, atol=1e-9)


def test_statistics_are_saved_and_found_by_their_path(tmp_path: Path) -> None:
    path = tmp_path / "mixture.safetensors"
    process = PROCESSES["vp"]
    taken = model_statistics(mixture(process), (2,), n=4, levels=5)
    taken.save(path)
    loaded = ModelStatistics.load(path)
    for name in ("log_snr", "l", "s", "b"):
        assert torch.equal(getattr(loaded, name), getattr(taken, name))
    assert str(loaded) == str(taken) == "statistics of Mixture, 5 levels of 2"
    by_path = end("dpm_solver_v3", process, 5, statistics=str(path))
    assert torch.equal(by_path, end("dpm_solver_v3", process, 5, statistics=taken))


def test_pictures_have_statistics_of_their_own_seed_and_conditions() -> None:
    """A batch of another size takes the same statistics, to rounding."""
    process = PROCESSES["vp"]

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(x + labels[:, None])

    denoiser = fs.Denoiser(network, process, "noise", {"labels": table(0.0, 1.0, 2.0)})  # type: ignore[arg-type]
    seen: list[tuple[int, int]] = []
    together = model_statistics(
        denoiser, (2,), n=3, levels=4, on_level=lambda *at: seen.append(at)
    )
    one_by_one = model_statistics(denoiser, (2,), n=3, levels=4, batch_size=1)
    torch.testing.assert_close(together.l, one_by_one.l, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.s, one_by_one.s, rtol=1e-9, atol=1e-9)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    other = model_statistics(denoiser, (2,), n=3, levels=4, seed=1)
    assert not torch.equal(other.s, together.s)


def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    levels = grid(PROCESSES["vp"], 3)
    plan = fs.plan("dpm_solver_v3", levels)
    assert isinstance(plan, EagerPlan)
    assert not isinstance(plan, Plan)
    with pytest.raises(InvalidInputError, match="make them with fewstep statistics MODEL"):
        plan.run(mixture(PROCESSES["vp"]), START)
    wrong = ModelStatistics(UNEVEN.log_snr, *(torch.zeros(4, 3, 8, 8) for _ in range(3)))
    with pytest.raises(InvalidInputError, match=r"4 levels of 3x8x8 do not fit .* shape \(2,\)"):
        fs.plan("dpm_solver_v3", levels, statistics=wrong).run(mixture(PROCESSES["vp"]), START)
    with pytest.raises(InvalidInputError, match="l holds a NaN"):
        ModelStatistics(UNEVEN.log_snr, UNEVEN.l * math.nan, UNEVEN.s, UNEVEN.b)
    with pytest.raises(InvalidInputError, match="rising list of 2 or more levels"):
        ModelStatistics(UNEVEN.log_snr.flip(0), UNEVEN.l, UNEVEN.s, UNEVEN.b)
    with pytest.raises(InvalidInputError, match="must have one shape"):
        ModelStatistics(UNEVEN.log_snr, UNEVEN.l[1:], UNEVEN.s, UNEVEN.b)
    with pytest.raises(InvalidInputError, match="n=1 must be at least 2"):
        model_statistics(mixture(PROCESSES["vp"]), (2,), n=1)
    with pytest.raises(InvalidInputError, match="is not a ModelStatistics or the file of one"):
        fs.plan("dpm_solver_v3", levels, statistics=3)
    (tmp_path / "text").write_text("no statistics")
    for name in ("missing", "text"):
        with pytest.raises(CheckpointError, match="fewstep statistics MODEL --out FILE"):
            fs.plan("dpm_solver_v3", levels, statistics=str(tmp_path / name))
    with pytest.raises(CheckpointError, match="choose another place"):
        UNEVEN.save(tmp_path / "no folder" / "file")


def test_the_command_writes_what_the_sampler_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewstep.models import Model, ModelConfig
    from fewstep.networks import UNetConfig

    config = ModelConfig(
        network=UNetConfig(
            in_channels=1, channels=(8,), blocks=1, attention=(), num_classes=2, groups=4
        ),
        process=fs.process.vp_linear().to_dict(),
        shape=(1, 4, 4),
        class_names=("ant", "bee"),
        name="tiny",
    )
    with torch.random.fork_rng():
        Model(config.build_network(), config).save(tmp_path / "tiny")

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    file, picture = tmp_path / "tiny.safetensors", tmp_path / "tiny.png"
    words = ("--n", 4, "--levels", 4, "--out", file)
    assert "statistics of tiny, 4 levels of 1x4x4" in run("statistics", tmp_path / "tiny", *words)
    chosen = ("--sampler", "dpm_solver_v3", "--sampler-option", f"statistics={file}")
    out = run("sample", tmp_path / "tiny", *chosen, "--steps", 5, "--out", picture)
    assert "5 network calls each" in out
    assert picture.exists()
