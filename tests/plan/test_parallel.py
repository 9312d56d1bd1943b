"""A parallel run ends where the sequential one does, in few rounds, whatever the window, sampler and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from exact_problems import PROCESSES, guided_mixture, mixture
from fewstep.denoisers.base import BaseDenoiser
from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.plan import Plan
from fewstep.plan.parallel import Round
from fewstep.samplers import SamplerEntry
from sampler_cases import TRACED

VP = PROCESSES["vp"]
PARALLEL = [e for e in TRACED if "differentiable network" not in e.needs]
SEEDS = range(6)
DOUBLE = torch.float64


def noise(seeds: Any = SEEDS) -> fs.Noise:
    return fs.Noise(seeds, (2,), dtype=DOUBLE)


def plan(name: str, steps: int, process: fs.Process = VP, **options: Any) -> Plan:
    made = fs.plan(name, fs.schedulers.karras(process, steps=steps), **options)
    assert isinstance(made, Plan)
    return made


def start(plan: Plan, seeds: Any = SEEDS) -> Tensor:
    return plan.levels[0].sigma * noise(seeds).initial()


def rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("entry", PARALLEL, ids=[e.name for e in PARALLEL])
def test_every_sampler_ends_where_the_sequential_run_does(entry: SamplerEntry) -> None:
    made = plan(entry.name, 10)
    x, denoiser = start(made), guided_mixture(VP)
    expected = made.run(denoiser, x, noise())
    near = made.run_parallel(denoiser, x, noise())
    assert float(rms(near.x - expected).max()) <= 1e-3
    assert near.rounds < made.calls < near.calls
    same = made.run_parallel(denoiser, x, noise(), tolerance=0.0, window=4)
    assert float((same.x - expected).abs().max()) <= 1e-9
    assert same.rounds <= made.calls


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "ddpm"])
def test_fifty_steps_take_fewer_than_twenty_rounds(name: str, process: fs.Process) -> None:
    made = plan(name, 50, process)
    x, denoiser = start(made), mixture(process)
    done = made.run_parallel(denoiser, x, noise())
    assert float(rms(done.x - made.run(denoiser, x, noise())).max()) <= 1e-3
    assert done.rounds < 20
    everything = made.run_parallel(denoiser, x, noise(), window=50)
    assert everything.rounds <= done.rounds < done.calls < everything.calls


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddpm", "heun"])
def test_any_window_gives_the_same_result(name: str) -> None:
    made = plan(name, 7)
    x, denoiser = start(made), mixture(VP)
    expected = made.run(denoiser, x, noise())
    for window in range(1, made.calls + 2):
        done = made.run_parallel(denoiser, x, noise(), window=window, tolerance=1e-6)
        assert float(rms(done.x - expected).max()) <= 1e-6
        assert done.rounds <= made.calls
        if window == 1:
            assert (done.rounds, done.calls) == (made.calls, made.calls)


def test_after_k_rounds_k_calls_are_exact() -> None:
    """A model that carries neighbours apart: nothing but the guarantee is left."""

    def wild(x: Tensor, level: fs.Level) -> Tensor:
        return torch.sin(8 * x)

    made = plan("ddim", 12)
    rounds: list[Round] = []
    done = made.run_parallel(wild, start(made), window=12, tolerance=1e-9, on_round=rounds.append)
    assert done.x.allclose(made.run(wild, start(made)), rtol=0, atol=1e-9)
    assert done.rounds == len(rounds) > 9
    assert [r.number for r in rounds] == list(range(1, done.rounds + 1))
    assert all(r.finished >= r.number and r.calls == 12 for r in rounds)
    assert sum(r.evaluated for r in rounds) == done.calls
    assert rounds[-1].finished == 12


@pytest.mark.parametrize("window", [2, 5, None])
@pytest.mark.parametrize("name", ["dpmpp_2m", "ddpm"])
def test_an_image_does_not_depend_on_the_others(name: str, window: int | None) -> None:
    made = plan(name, 20)
    centres = torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]], dtype=DOUBLE)
    denoiser = fs.exact.GaussianMixture(centres, 0.02, process=VP)
    options: dict[str, Any] = {"window": window, "tolerance": 0.3}
    together = made.run_parallel(denoiser, start(made), noise(), **options)
    alone = [
        made.run_parallel(denoiser, start(made, [seed]), noise([seed]), **options)
        for seed in SEEDS
    ]
    assert len({a.rounds for a in alone}) > 1  # each has its own pace
    assert together.rounds == max(a.rounds for a in alone)
    apart = torch.cat([a.x for a in alone])
    assert float((together.x - apart).abs().max()) <= 1e-12
    assert float((apart - made.run(denoiser, start(made), noise())).abs().max()) > 1e-9


def test_data_that_are_one_gaussian_take_no_iteration() -> None:
    """With spread 1 the estimates are what the run takes them for, so the second round finds nothing moved."""
    made = plan("dpmpp_2m", 30)
    centre = torch.full((1, 2), 0.4, dtype=DOUBLE)
    denoiser = fs.exact.GaussianMixture(centre, 1.0, process=VP)
    assert made.run_parallel(denoiser, start(made), window=30).rounds <= 3


def test_each_draw_is_made_once_and_in_order() -> None:
    made = plan("euler_ancestral", 10)
    asked: list[tuple[fs.Level, fs.Level]] = []
    source = noise()

    def remembered(a: fs.Level, b: fs.Level) -> Tensor:
        asked.append((a, b))
        return source(a, b)

    made.run(mixture(VP), start(made), remembered)
    in_order, asked = asked, []
    made.run_parallel(mixture(VP), start(made), remembered, window=3)
    assert asked == in_order and len(asked) == made.draws


class Network(nn.Module):
    """A small network that counts its calls and depends on everything that it is given."""

    def __init__(self, dtype: torch.dtype = torch.float64, doubled: bool = False) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 6 if doubled else 3, 1, device="meta").to_empty(device="cpu")
        for weight in self.mix.parameters():
            weight.data = torch.linspace(-0.6, 0.7, weight.numel()).view(weight.shape).cos()
        self.mix.to(dtype).requires_grad_(False)
        self.calls = 0

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        self.calls += 1
        shift = 0.01 * (t + (0 if labels is None else labels)).to(x.dtype)
        return torch.tanh(self.mix(x) + shift.view(-1, 1, 1, 1)) * scale


def rows(level_count: int = 4) -> tuple[Tensor, list[fs.Level]]:
    x = torch.randn(
        level_count, 3, 3, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)
    )
    return x, VP.levels_at([0.1 * 3.0**k for k in range(level_count)])


def denoisers() -> dict[str, BaseDenoiser]:
    labels = torch.tensor([1, 2, 3])
    plain = {
        predicts: fs.Denoiser(Network(), VP, predicts)
        for predicts in ("noise", "data", "velocity", "flow", "score", "edm")
    }
    conditional = fs.Denoiser(Network(), VP, conditions={"labels": labels, "scale": 0.9})
    free = fs.ClassifierFree(conditional, 2.5, {"labels": 0})
    weak = fs.Denoiser(Network(), VP, "velocity")
    momentum = fs.ClassifierFree(
        conditional, 2.0, {"labels": 0}, projection=fs.Projection(momentum=-0.5)
    )
    return {
        **plain,
        "learned variance": fs.Denoiser(Network(doubled=True), VP),
        "one label for all": fs.Denoiser(Network(), VP, conditions={"labels": labels[:1]}),
        "labels": conditional,
        "classifier-free": free,
        "guidance off": fs.ClassifierFree(conditional, 1.0, {"labels": 0}),
        "in an interval": fs.ClassifierFree(conditional, 2.5, {"labels": 0}, interval=(0.2, 1.0)),
        "rescaled, projected": fs.ClassifierFree(
            conditional, 3.0, {"labels": 0}, rescale=0.7, projection=fs.Projection(limit=1.0)
        ),
        "momentum": momentum.for_run(),
        "autoguided": fs.AutoGuided(plain["noise"], weak, 1.7),
        "clipped": fs.Clipped(free),
        "thresholded": fs.DynamicThreshold(free, 0.8),
        "exact": fs.exact.GaussianMixture(
            torch.arange(24.0, dtype=DOUBLE).view(2, 3, 2, 2) / 12, 0.3, process=VP
        ),
    }


DENOISERS = list(denoisers())


@pytest.mark.parametrize("kind", DENOISERS)
def test_many_levels_at_once_are_each_level_by_itself(kind: str) -> None:
    x, levels = rows()
    at_once = denoisers()[kind].for_run().many(x, levels)
    one_by_one = denoisers()[kind].for_run()
    expected = torch.stack([one_by_one(*pair) for pair in zip(x, levels, strict=True)])
    assert at_once.shape == x.shape and at_once.dtype == x.dtype
    assert float((at_once - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize(
    "kind", ["classifier-free", "in an interval", "autoguided", "clipped", "momentum"]
)
def test_guided_pairs_at_once_are_each_pair_by_itself(kind: str) -> None:
    x, levels = rows()
    at_once = denoisers()[kind].for_run().guided_pairs(x, levels)
    one_by_one = denoisers()[kind].for_run()
    pairs = [one_by_one.guided_pair(*pair) for pair in zip(x, levels, strict=True)]
    for found, expected in zip(at_once, zip(*pairs, strict=True), strict=True):
        assert float((found - torch.stack(expected)).abs().max()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_keeps_the_type_of_the_state_and_that_of_the_network(dtype: torch.dtype) -> None:
    x, levels = rows()
    network = Network(dtype)
    at_once = fs.Denoiser(network, VP).many(x.float(), levels)
    assert at_once.dtype == torch.float32 and network.calls == 1
    expected = [fs.Denoiser(network, VP)(*pair) for pair in zip(x.float(), levels, strict=True)]
    assert float((at_once - torch.stack(expected)).abs().max()) <= 1e-4


def test_a_round_is_one_call_of_the_network() -> None:
    labels = torch.tensor([1, 2, 3])
    network = Network(torch.float32)
    denoiser = fs.ClassifierFree(
        fs.Denoiser(network, VP, "data", {"labels": labels}), 2.0, {"labels": 0}
    )
    made = plan("dpmpp_2m", 12)
    x = made.levels[0].sigma * fs.Noise([0, 1, 2], (3, 2, 2)).initial()
    done = made.run_parallel(denoiser, x)
    assert network.calls == done.rounds < 12
    assert done.x.dtype == torch.float32
    assert float(rms(done.x - made.run(denoiser, x)).max()) <= 1e-3
    assert not done.x.requires_grad


def test_a_plan_of_guided_pairs_runs_on_any_object_that_gives_them() -> None:
    class Pairs:
        def __init__(self) -> None:
            self.inner = guided_mixture(VP)

        def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
            return self.inner(x, level)

        def guided_pair(self, x: Tensor, level: fs.Level) -> tuple[Tensor, Tensor]:
            return self.inner.guided_pair(x, level)

    made = plan("euler_cfg_pp", 10)
    done = made.run_parallel(Pairs(), start(made), noise())
    assert float(rms(done.x - made.run(Pairs(), start(made), noise())).max()) <= 1e-3
    with pytest.raises(InvalidInputError, match="is not guided"):
        made.run_parallel(lambda x, level: x, start(made), noise())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number of calls >= 1"),
        ({"window": 2.5}, "window=2.5 must be"),
        ({"tolerance": -1e-3}, "tolerance=-0.001 must be a finite number >= 0"),
        ({"tolerance": float("nan")}, "tolerance=nan must be"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    made = plan("ddim", 5)
    with pytest.raises(InvalidInputError, match=message):
        made.run_parallel(mixture(VP), start(made), **options)


def test_what_has_no_parallel_run_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="ttm/karras-5 asks for derivatives"):
        made = plan("ttm", 5)
        made.run_parallel(mixture(VP), start(made), noise())
    with pytest.raises(InvalidInputError, match="draws noise 4 times"):
        made = plan("ddpm", 5)
        made.run_parallel(mixture(VP), start(made))
    with pytest.raises(InvalidInputError, match="shape"):
        made.run_parallel(lambda x, level: x[:1], start(made), noise())
    projection = fs.Projection(momentum=-0.5)
    guided = fs.AutoGuided(mixture(VP), mixture(VP), 2.0, projection=projection)
    with pytest.raises(InvalidInputError, match=r"AutoGuided\(Mixture\) remembers earlier calls"):
        made.run_parallel(guided, start(made), noise())


def test_values_that_are_not_finite_are_found_where_they_begin() -> None:
    made = plan("ddim", 10)
    third = made.levels[2]

    def broken(x: Tensor, level: fs.Level) -> Tensor:
        return x / 0 if level == third else 0 * x

    with pytest.raises(NonFiniteError, match=r"output at call 3 of 10, level t="):
        made.run_parallel(broken, start(made))


def test_the_bundled_model_takes_fewer_rounds_than_calls() -> None:
    model = fs.load("digits").with_conditions(labels=torch.tensor([3]))
    made = plan("ddim", 12, model.process)
    x = made.levels[0].sigma * fs.Noise([3], (1, 28, 28)).initial()
    done = made.run_parallel(model, x)
    assert done.rounds < 12
    assert float(rms(done.x - made.run(model, x)).max()) <= 1e-3
