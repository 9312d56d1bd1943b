"""The front door: what it accepts, what it refuses, and that a picture belongs to its seed."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.data import read_metadata
from fewstep.models import Model, ModelConfig
from fewstep.networks import UNet, UNetConfig
from fewstep.sampling import Samples

InvalidInputError = fs.errors.InvalidInputError
VP = fs.process.vp_linear()


@pytest.fixture(scope="module")
def toy():
    """Exact denoiser of six small pictures; it knows its shape, (1, 4, 4)."""
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return fs.exact.Dataset(images, 0.05, process=VP)


def tiny(num_classes=3, predicts="noise"):
    """A small U-Net with random weights, its output zero nowhere."""
    config = UNetConfig(in_channels=1, channels=(8, 16), groups=4, num_classes=num_classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(config)
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return Model(
        network,
        ModelConfig(
            network=config,
            process=VP.to_dict(),
            shape=(1, 8, 8),
            predicts=predicts,
            class_names=tuple("abc"[:num_classes]),
            name="tiny",
        ),
    )


@pytest.fixture(scope="module")
def model():
    return tiny(predicts="velocity")


def counted(network):
    """The network as a callable, and the list of its batch sizes."""
    sizes = []

    def call(x, t, **conditions):
        sizes.append(len(x))
        return network(x, t, **conditions)

    return call, sizes


# What is made


def test_it_runs_the_plan_from_the_seeds_noise(toy):
    samples = fs.sample(toy, 3, sampler="ddpm", scheduler="leading", steps=7, seed=5)
    plan = fs.plan("ddpm", fs.schedulers.leading(VP, steps=7))
    noise = fs.Noise([5, 6, 7], (1, 4, 4))
    expected = plan.run(toy, plan.levels[0].sigma * noise.initial(), noise)
    assert torch.equal(samples.images, expected)
    assert samples.images.dtype == torch.float32 and len(samples) == 3


def test_it_finds_the_data(toy):
    images = fs.sample(toy, 12, sampler="dpmpp_2m", scheduler="karras", steps=25).images
    distance = (images[:, None] - toy.means).flatten(2).square().mean(2).sqrt().min(1).values
    assert distance.max() < 0.1


def test_clip_keeps_the_estimates_in_range(toy):
    far = fs.exact.Dataset(3 * toy.means, 0.05, process=VP)
    seen = []
    clipped = fs.sample(far, 4, steps=6, clip=True, on_step=lambda p: seen.append(p.denoised))
    assert max(float(d.abs().max()) for d in seen) == 1
    assert clipped.images.abs().max() <= 1.0001
    assert fs.sample(far, 4, steps=6).images.abs().max() > 1.5


def test_on_step_sees_every_call_of_every_batch(toy):
    seen = []
    fs.sample(toy, 5, steps=4, batch_size=2, on_step=lambda p: seen.append((p.call, len(p.x))))
    assert seen == [(call, size) for size in (2, 2, 1) for call in (1, 2, 3, 4)]


def test_a_float64_model_and_a_bfloat16_one_give_float32_pictures():
    for dtype in (torch.float64, torch.bfloat16):
        other = tiny()
        other.network.to(dtype)
        images = fs.sample(other, 2, steps=3, scheduler="karras").images
        assert images.dtype == torch.float32 and bool(torch.isfinite(images).all())


# Seeds


@pytest.mark.parametrize(
    "seed",
    [
        3,
        [3, 4, 5, 6],
        (3, 4, 5, 6),
        range(3, 7),
        np.int64(3),
        np.arange(3, 7),
        torch.tensor(3),
        torch.arange(3, 7),
        [np.int32(3), torch.tensor(4), 5, 6],
        (k for k in (3, 4, 5, 6)),
    ],
    ids=lambda seeds: type(seeds).__name__,
)
def test_seeds_in_any_form(toy, seed):
    expected = fs.sample(toy, seed=[3, 4, 5, 6], steps=3)
    samples = fs.sample(toy, 4, seed=seed, steps=3)
    assert torch.equal(samples.images, expected.images)
    assert samples.record["seeds"] == [3, 4, 5, 6]
    assert all(type(k) is int for k in samples.record["seeds"])


def assert_same_pictures(got, expected, rounding):
    """Floats within the network's rounding, and equal bytes but where that crosses a byte's border."""
    torch.testing.assert_close(got.images, expected.images, rtol=0, atol=rounding)
    position = (expected.images.clamp(-1, 1) + 1) * 127.5 + 0.5
    on_border = (position - position.round()).abs() < 127.5 * rounding
    assert torch.equal(got.uint8()[~on_border], expected.uint8()[~on_border])
    assert on_border.float().mean() < 0.02


def picked(samples, order):
    return Samples(samples.images[order], {})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("kind", ["network", "exact"])
def test_a_picture_depends_on_its_seed_alone(model, toy, sampler, kind):
    def make(seeds, batch_size=64):
        labels = {"labels": [k % 3 for k in seeds]} if kind == "network" else {}
        denoiser = model if kind == "network" else toy
        options = {"sampler": sampler, "steps": 6, "batch_size": batch_size}
        return fs.sample(denoiser, seed=seeds, **labels, **options)

    # The rounding of float32 kernels changes with the batch; the exact denoiser has none to show.
    rounding = 1e-5 if kind == "network" else 1e-6
    together = make(range(20, 28))
    for k in (0, 3, 7):
        assert_same_pictures(make([20 + k]), picked(together, [k]), rounding)
    order = [5, 0, 7, 2]
    assert_same_pictures(make([20 + k for k in order]), picked(together, order), rounding)
    for size in (1, 3, 8, 100):
        assert_same_pictures(make(range(20, 28), batch_size=size), together, rounding)
    if kind == "exact":
        assert torch.equal(make([23]).uint8()[0], together.uint8()[3])
    distances = torch.cdist(together.images.flatten(1), together.images.flatten(1))
    assert (distances + torch.eye(8)).min() > 0.01


def test_the_noise_is_bit_equal_in_any_batch(toy):
    points = {}

    def keep(progress):
        if progress.call == 1:
            points.setdefault(len(progress.x), []).append(progress.x.clone())

    fs.sample(toy, 6, seed=9, steps=2, on_step=keep)
    fs.sample(toy, 6, seed=9, steps=2, batch_size=1, on_step=keep)
    assert torch.equal(torch.cat(points[1]), points[6][0])


def test_threads_do_not_disturb_each_other(model):
    def run(steps):
        options = {"sampler": "ddpm", "labels": [0, 1], "guidance": 2.0}
        return fs.sample(model, 2, seed=steps, steps=steps, **options).images

    alone = {steps: run(steps) for steps in (5, 8)}
    results: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda s=s: results.update({s: run(s)})) for s in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[steps], alone[steps]) for steps in alone)


@pytest.mark.parametrize("seed", [-1, 2**63, [0, -5], [0] * 70 + [2**63]])
def test_seeds_out_of_range_are_refused_before_anything_is_made(toy, seed):
    seen = []
    with pytest.raises(InvalidInputError, match=r"0\.\.2\^63-1"):
        fs.sample(toy, seed=seed, steps=2, on_step=seen.append)
    assert seen == []


@pytest.mark.parametrize("seed", [1.5, "12", [0, 1.0], torch.tensor([0.5]), None, [[1, 2]]])
def test_seeds_that_are_no_whole_numbers(toy, seed):
    with pytest.raises(InvalidInputError, match="seed=.*whole number"):
        fs.sample(toy, seed=seed, steps=2)


# How many, and of what shape


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": np.int64(3)}, 3),
        ({"seed": [4, 5]}, 2),
        ({"shape": (3, 1, 4, 4)}, 3),
        ({"shape": (1, 4, 4)}, 1),
        ({"shape": [np.int64(2), 1, 4, 4], "seed": range(2), "n": 2}, 2),
    ],
)
def test_how_many(toy, arguments, count):
    samples = fs.sample(toy, steps=2, **arguments)
    assert samples.images.shape == (count, 1, 4, 4)
    assert samples.record["seeds"] == list(arguments.get("seed", range(count)))


def test_a_denoiser_that_does_not_know_its_shape():
    denoiser = fs.Denoiser(lambda x, t: torch.zeros_like(x), VP)
    assert fs.sample(denoiser, 2, shape=(3, 5), steps=2).images.shape == (2, 3, 5)
    assert fs.sample(denoiser, shape=(2, 3, 5, 4), steps=2).images.shape == (2, 3, 5, 4)
    with pytest.raises(InvalidInputError, match="give shape="):
        fs.sample(denoiser, steps=2)
    for shape in [(3, 0, 4), (3, -1), (1.5,), ("3",)]:
        with pytest.raises(InvalidInputError, match="shape"):
            fs.sample(denoiser, shape=shape, steps=2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 3, "seed": [1, 2]},
        {"seed": [1, 2], "labels": [0, 1, 2]},
        {"n": 8, "shape": (16, 1, 8, 8)},
        {"seed": range(3), "shape": (2, 1, 8, 8)},
        {"n": 4, "labels": torch.tensor([0, 1])},
    ],
)
def test_numbers_that_do_not_agree(model, arguments):
    with pytest.raises(InvalidInputError, match="asks for .*, .* asks for .* let them agree"):
        fs.sample(model, steps=2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number >= 1, got 0"),
        ({"n": 2.0}, "n=2.0"),
        ({"seed": []}, "number of seeds or labels must be .* >= 1"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"shape": (3, 8, 8)}, r"shape \(3, 8, 8\) does not fit a model of \(1, 8, 8\)"),
        ({"shape": (2, 3, 8, 8)}, r"shape \(3, 8, 8\) does not fit"),
        ({"device": "gpu7"}, "device='gpu7' does not exist"),
        ({"device": "meta"}, "the model is on 'cpu'; move it there first"),
    ],
)
def test_numbers_out_of_range(model, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        fs.sample(model, steps=2, **arguments)


def test_the_wrong_number_of_channels_is_named():
    denoiser = fs.Denoiser(tiny().network, VP)
    with pytest.raises(InvalidInputError, match=r"\(8, 3, 8, 8\).*\(B, 1, H, W\)"):
        fs.sample(denoiser, 2, shape=(3, 8, 8), steps=2)


def test_batches_have_one_size_and_the_filling_is_not_seen(model):
    network, sizes = counted(model.network)
    seen = Model(model.network, model.config)
    seen.network = network
    previews = []
    samples = fs.sample(
        seen,
        5,
        steps=1,
        batch_size=3,
        on_step=lambda p: previews.append((len(p.x), len(p.denoised))),
    )
    assert sizes == [3, 3]
    assert previews == [(3, 3), (2, 2)]
    assert len(samples) == 5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_is_the_same_to_the_bit_alone_and_among_others(model, threads):
    torch.set_num_threads(threads)
    among = fs.sample(model, seed=range(11), labels=[k % 3 for k in range(11)], steps=4)
    for k in (0, 4, 10):
        alone = fs.sample(model, seed=k, labels=k % 3, steps=4)
        assert torch.equal(alone.images[0], among.images[k])
    turned = fs.sample(model, seed=[10, 4, 0], labels=[1, 1, 0], steps=4)
    assert torch.equal(turned.images, among.images[[10, 4, 0]])


# Labels and guidance


@pytest.mark.parametrize(
    "labels", [2, np.int64(2), torch.tensor(2), [2, 2, 2], np.full(3, 2), torch.full((3,), 2)]
)
def test_labels_in_any_form(model, labels):
    expected = fs.sample(model.with_conditions(labels=torch.full((3,), 2)), 3, steps=3)
    samples = fs.sample(model, 3, labels=labels, steps=3)
    assert torch.equal(samples.images, expected.images)
    assert samples.record["labels"] == [2, 2, 2]
    assert not torch.equal(samples.images, fs.sample(model, 3, labels=1, steps=3).images)


def test_labels_alone_say_how_many(model):
    assert len(fs.sample(model, labels=[0, 1], steps=2)) == 2


def test_guidance_pushes_away_from_the_null_label(model):
    samples = fs.sample(model, labels=[0, 2, 1], guidance=2.5, steps=3, batch_size=2)
    by_hand = fs.ClassifierFree(
        model.with_conditions(labels=torch.tensor([0, 2, 1])), 2.5, {"labels": 3}
    )
    expected = fs.sample(by_hand, 3, steps=3)
    torch.testing.assert_close(samples.images, expected.images, rtol=1e-4, atol=1e-4)
    plain = fs.sample(model, labels=[0, 2, 1], steps=3).images
    assert not torch.allclose(samples.images, plain, atol=1e-2)
    assert samples.record["guidance"] == 2.5
    assert samples.record["network_calls"] == 3 and samples.record["passes_per_call"] == 2
    assert expected.record["model"] == "ClassifierFree(tiny)"


def test_guidance_is_one_batched_call(model):
    network, sizes = counted(model.network)
    seen = Model(model.network, model.config)
    seen.network = network
    fs.sample(seen, 3, labels=1, guidance=3.0, steps=4, batch_size=3)
    fs.sample(seen, 3, labels=1, guidance=1.0, steps=2, batch_size=3)
    assert sizes == [6] * 4 + [3] * 2


def test_a_model_asked_for_no_label_takes_the_null_label(model):
    null = model.with_conditions(labels=torch.tensor([3, 3]))
    expected = fs.sample(null, 2, steps=3).images
    assert torch.equal(fs.sample(model, 2, steps=3).images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 3}, r"label 3 is not one of the model's classes 0\.\.2"),
        ({"labels": [0, -1]}, r"label -1 is not one of"),
        ({"labels": [0.5]}, "labels=.*whole number"),
        ({"guidance": 2.0}, "needs labels to push towards"),
        ({"guidance": math.nan, "labels": 1}, "scale=nan must be a finite number"),
    ],
)
def test_labels_and_guidance_that_do_not_fit(model, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        fs.sample(model, steps=2, **arguments)


def test_labels_for_models_without(toy):
    with pytest.raises(InvalidInputError, match="trained without labels; leave labels out"):
        fs.sample(tiny(num_classes=0), labels=0, steps=2)
    with pytest.raises(InvalidInputError, match="takes no conditions, got labels"):
        fs.sample(toy, labels=0, steps=2)
    with pytest.raises(InvalidInputError, match="unknown condition 'labels'"):
        fs.sample(fs.Denoiser(lambda x, t: x, VP), shape=(1, 2, 2), labels=0, steps=2)
    with pytest.raises(InvalidInputError, match="wrap this one in fewstep.ClassifierFree"):
        denoiser = fs.Denoiser(lambda x, t, labels: x, VP)
        fs.sample(denoiser, shape=(1, 2, 2), labels=0, guidance=2.0, steps=2)


def test_wrapped_models_keep_what_they_know(model):
    expected = fs.sample(model, labels=[0, 1], guidance=2.0, steps=3, clip=True)
    samples = fs.sample(fs.Clipped(model), labels=[0, 1], guidance=2.0, steps=3)
    assert samples.images.shape == (2, 1, 8, 8)
    assert samples.record["model"] == "Clipped(tiny)" and expected.record["model"] == "tiny"
    with pytest.raises(InvalidInputError, match="label 9"):
        fs.sample(fs.DynamicThreshold(model), labels=9)


def test_conditions_of_the_denoiser_are_shared_out_over_the_batches():
    def network(x, t, context, style, factor):
        assert len(context) == len(x)
        return context.mean((1, 2)).view(-1, 1) * style * factor + 0 * x

    context = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    conditions = {"context": context, "style": torch.tensor([[2.0]]), "factor": 3}
    denoiser = fs.Denoiser(network, VP, "data", conditions)
    for wrapped in (
        denoiser,
        fs.Clipped(denoiser, -99, 99),
        fs.ClassifierFree(denoiser, 1.5, {"context": context.clone()[:1]}),
    ):
        whole = fs.sample(wrapped, 5, shape=(4,), steps=2)
        parts = fs.sample(wrapped, 5, shape=(4,), steps=2, batch_size=2)
        torch.testing.assert_close(parts.images, whole.images)
    expected = (6 * context.mean((1, 2))).view(-1, 1).expand(5, 4)
    result = fs.sample(denoiser, 5, shape=(4,), steps=2, batch_size=2).images
    torch.testing.assert_close(result, expected)


# Samplers, schedulers, grids and plans


def test_names_options_and_steps_are_checked(toy):
    with pytest.raises(fs.errors.UnknownNameError, match="'dpmpp_2m'"):
        fs.sample(toy, sampler="dpmpp2n")
    with pytest.raises(fs.errors.UnknownNameError, match="'karras'"):
        fs.sample(toy, scheduler="karas")
    with pytest.raises(fs.errors.UnknownNameError, match="'eta'"):
        fs.sample(toy, sampler="ddim", sampler_options={"etta": 1})
    with pytest.raises(fs.errors.UnknownNameError, match="'rho'"):
        fs.sample(toy, scheduler="karras", scheduler_options={"roh": 1})
    with pytest.raises(InvalidInputError, match="eta=-1"):
        fs.sample(toy, sampler="ddim", sampler_options={"eta": -1})


@pytest.mark.parametrize("steps", [0, -3, 2.5, "x", None, [5]])
def test_steps_out_of_range(toy, steps):
    with pytest.raises(InvalidInputError, match="steps"):
        fs.sample(toy, steps=steps)


@pytest.mark.parametrize("steps", [3, np.int32(3), torch.tensor(3)])
def test_steps_in_any_form(toy, steps):
    samples = fs.sample(toy, steps=steps)
    assert samples.record["steps"] == samples.record["network_calls"] == 3


@pytest.mark.parametrize(
    "process",
    [VP, fs.process.edm(), fs.process.flow(), fs.process.ve()],
    ids=lambda process: process.name,
)
def test_a_grid_is_run_exactly_as_given_and_recorded(process):
    ratios = [5.125, 3.3, 0.7, 0.0625, 0.011, 0.0]
    visited = []
    images = torch.zeros(1, 2)
    denoiser = fs.exact.Dataset(images, 1.0, process=process)
    grid = fs.Grid.from_ratios(process, ratios)
    samples = fs.sample(
        denoiser, scheduler=grid, sampler="euler", on_step=lambda p: visited.append(p.level)
    )
    record = samples.record
    assert [level.ratio for level in visited] == pytest.approx(ratios[:-1], rel=1e-12)
    assert record["sigma_over_alpha"] == pytest.approx(ratios, rel=1e-12)
    times = [str(t) if math.isinf(t) else t for t in grid.times]
    assert record["times"] == times
    assert (record["steps"], record["network_calls"]) == (5, 5)
    assert record["scheduler"] == "custom"


def test_a_grid_of_times_is_recorded_bit_for_bit(toy):
    times = [999.0, 640.25, 333.1, 7.0]
    record = fs.sample(toy, scheduler=fs.Grid.from_times(VP, times)).record
    assert record["times"] == [*times, -1.0]


def test_a_grid_or_plan_with_other_options_is_refused(toy):
    grid = fs.schedulers.karras(VP, steps=3)
    with pytest.raises(InvalidInputError, match="leave scheduler_options out"):
        fs.sample(toy, scheduler=grid, scheduler_options={"rho": 5})
    with pytest.raises(InvalidInputError, match="ready plan"):
        fs.sample(toy, plan=fs.plan("ddim", grid), sampler_options={"eta": 1})


def test_functions_of_ones_own(toy):
    def halves(process, steps, top=4.0):
        return fs.Grid.from_ratios(process, [*(top / 2**k for k in range(steps)), 0])

    def jump(tape, grid):
        return tape.denoise(tape.start, grid.levels[0])

    samples = fs.sample(
        toy, 2, sampler=jump, scheduler=halves, steps=3, scheduler_options={"top": 8.0}
    )
    assert samples.record["sigma_over_alpha"] == pytest.approx([8, 4, 2, 0])
    assert samples.record["sampler"] == "jump" and samples.record["network_calls"] == 1
    by_function = fs.sample(toy, 2, scheduler=fs.schedulers.karras, steps=3).record
    assert by_function["scheduler"] == "karras"


def test_a_ready_plan(toy):
    grid = fs.schedulers.karras(VP, steps=4, rho=5.0)
    plan = fs.Plan.from_json(fs.plan("ddim", grid, eta=0.5).to_json())
    samples = fs.sample(toy, 2, plan=plan)
    options = {"sampler_options": {"eta": 0.5}, "scheduler_options": {"rho": 5.0}}
    expected = fs.sample(toy, 2, sampler="ddim", scheduler="karras", steps=4, **options)
    assert torch.equal(samples.images, expected.images)
    assert samples.record == expected.record


def test_plans_and_grids_of_another_process_are_refused(toy):
    grid = fs.schedulers.karras(fs.process.edm(), steps=3)
    for arguments in ({"plan": fs.plan("ddim", grid)}, {"scheduler": grid}):
        with pytest.raises(InvalidInputError, match="plan is for edm.*model has vp_linear"):
            fs.sample(toy, **arguments)


# Faults of the network


class Broken(nn.Module):
    """Gives NaN from a call on."""

    def __init__(self, from_call):
        super().__init__()
        self.from_call, self.calls = from_call, 0

    def forward(self, x, t):
        self.calls += 1
        return x * (math.nan if self.calls >= self.from_call else 0.1)


@pytest.mark.parametrize("wrap", [lambda d: d, fs.Clipped], ids=["plain", "clipped"])
def test_a_nan_names_call_and_level(wrap):
    denoiser = wrap(fs.Denoiser(Broken(3), VP))
    with pytest.raises(fs.errors.NonFiniteError, match="network") as error:
        fs.sample(denoiser, shape=(1, 4, 4), steps=4, scheduler="trailing")
    assert "call 3 of 4" in str(error.value) and "t=499" in str(error.value)


# The record and files


def test_the_record_is_json_and_says_everything(toy):
    samples = fs.sample(
        toy,
        2,
        sampler="ddim",
        scheduler="karras",
        steps=3,
        sampler_options={"eta": np.float32(0.5)},
        guidance=np.float64(1.0),
        clip=True,
    )
    record = samples.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["software"] == f"fewstep {fs.__version__}"
    assert (record["model"], record["sampler"], record["scheduler"]) == (
        "Dataset",
        "ddim",
        "karras",
    )
    assert record["sampler_options"] == {"eta": 0.5, **record["sampler_options"]}
    assert record["scheduler_options"] == {"rho": 7.0, "tail": "zero"}
    assert record["clip"] is True and record["guidance"] == 1.0 and record["labels"] is None
    again = fs.sample(
        toy,
        sampler=record["sampler"],
        scheduler=record["scheduler"],
        steps=record["steps"],
        sampler_options=record["sampler_options"],
        scheduler_options=record["scheduler_options"],
        seed=record["seeds"],
        guidance=record["guidance"],
        clip=record["clip"],
    )
    assert torch.equal(again.images, samples.images) and again.record == record


def test_infinities_in_the_record_are_text():
    process = fs.process.flow()
    denoiser = fs.exact.Dataset(torch.zeros(1, 2), 1.0, process=process)
    record = fs.sample(denoiser, steps=2).record
    assert record["sigma_over_alpha"][0] == "inf" and record["sigma_over_alpha"][-1] == 0.0
    json.dumps(record, allow_nan=False)


def test_options_of_ones_own_sampler_never_break_the_record(toy):
    def jump(tape, grid, **options):
        return tape.denoise(tape.start, grid.levels[0])

    options = {"a": np.int64(3), "b": torch.tensor([1.0, math.inf]), "c": (1, None), "d": VP}
    record = fs.sample(toy, sampler=jump, steps=2, sampler_options=options).record
    expected = {"a": 3, "b": [1.0, "inf"], "c": [1, None], "d": repr(VP)}
    assert record["sampler_options"] == expected
    json.dumps(record, allow_nan=False)


def test_a_picture_file_carries_its_record(model, tmp_path):
    samples = fs.sample(model, labels=[0, 2], guidance=1.5, steps=2, seed=[7, 3])
    files = samples.save(tmp_path / "grid.png")
    assert files == [tmp_path / "grid.png"]
    assert read_metadata(files[0]) == samples.record


def test_a_folder_has_one_picture_each_with_its_own_seed_and_label(model, tmp_path):
    samples = fs.sample(model, labels=[0, 2], steps=2, seed=[7, 3])
    files = samples.save(f"{tmp_path}/v1.5/")
    assert [file.parent for file in files] == [tmp_path / "v1.5"] * 2
    for k, file in enumerate(files):
        record = read_metadata(file)
        assert (record["seeds"], record["labels"]) == ([[7], [3]][k], [[0], [2]][k])
        again = fs.sample(model, seed=record["seeds"], labels=record["labels"], steps=2)
        assert_same_pictures(again, picked(samples, [k]), rounding=1e-5)
    without = fs.sample(model, 1, steps=2).save(tmp_path / "plain")
    assert read_metadata(without[0])["labels"] is None


def test_uint8_is_the_nearest_byte():
    samples = Samples(torch.tensor([[[[-1.0, 0.0, 0.5, 1.0, 3.0]]]]), {})
    assert samples.uint8().flatten().tolist() == [0, 128, 191, 255, 255]


def test_what_is_no_picture_is_not_saved(tmp_path):
    denoiser = fs.exact.Dataset(torch.zeros(1, 2), 1.0, process=VP)
    with pytest.raises(fs.errors.DataError, match="shape"):
        fs.sample(denoiser, 3, steps=2).save(tmp_path / "points.png")
