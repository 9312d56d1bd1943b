"""Guidance: its formula, its network passes, and what happens to the push."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch

import fewstep as fs

VP = fs.process.vp_linear()
LEVEL = VP.level(500.0)
DOUBLE = torch.float64


class Network:
    """Predicts x_0 as `sin(x) + embedding of the label + mean of the context`, and keeps its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels=None, context=None, **others):
        self.calls.append({"batch": len(x), "labels": labels, "context": context, **others})
        out = x.sin()
        each = (-1,) + (1,) * (x.ndim - 1)
        if labels is not None:
            out = out + (0.3 * labels.to(x.dtype).view(each) + 0.1 * labels.view(each) * x.cos())
        if context is not None:
            out = out + context.to(x.dtype).mean((1, 2)).view(each) * x
        return out


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def x():
    g = torch.Generator().manual_seed(5)
    return torch.randn(4, 2, 3, 3, generator=g, dtype=DOUBLE)


def labelled(network, labels=(1, 2, 3, 1)):
    return fs.Denoiser(network, VP, "data", {"labels": torch.tensor(labels)})


def strong_and_weak(x, labels=(1, 2, 3, 1), null=0):
    """What the network above gives, without any of our wrappers."""
    pair = [Network()(x, None, torch.tensor(v)) for v in (labels, [null] * len(labels))]
    return pair[0], pair[1]


def test_scale_1_is_one_pass_and_equals_the_conditional(network, x):
    guided = fs.ClassifierFree(labelled(network), 1.0, {"labels": 0}, rescale=1.0)
    assert torch.equal(guided(x, LEVEL), labelled(Network())(x, LEVEL))
    assert [call["batch"] for call in network.calls] == [4]
    assert guided.passes == 1


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.5, 7.5])
def test_scale_w_is_u_plus_w_times_c_minus_u_in_one_batched_call(network, x, scale):
    guided = fs.ClassifierFree(labelled(network), scale, {"labels": 0})
    conditional, unconditional = strong_and_weak(x)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided(x, LEVEL), expected, rtol=1e-13, atol=1e-13)
    assert [call["batch"] for call in network.calls] == [8]
    assert network.calls[0]["labels"].tolist() == [1, 2, 3, 1, 0, 0, 0, 0]
    assert network.calls[0]["labels"].dtype == torch.int64
    assert guided.passes == 2


@pytest.mark.parametrize("predicts", ["noise", "velocity", "score"])
def test_guiding_the_estimate_is_guiding_the_prediction(network, x, predicts):
    conditions = {"labels": torch.tensor([1, 2, 3, 1])}
    guided = fs.ClassifierFree(fs.Denoiser(network, VP, predicts, conditions), 3.0, {"labels": 0})
    conditional, unconditional = strong_and_weak(x)
    output = unconditional + 3.0 * (conditional - unconditional)
    expected = fs.Denoiser(lambda x, t: output, VP, predicts)(x, LEVEL)
    torch.testing.assert_close(guided(x, LEVEL), expected, rtol=1e-12, atol=1e-12)


def test_only_the_named_conditions_are_replaced_and_only_tensors_doubled(network, x):
    bound = fs.Denoiser(
        network,
        VP,
        "data",
        {
            "labels": torch.tensor([1, 2, 3, 1]),
            "size": torch.arange(8).view(4, 2),
            "shared": torch.tensor([[5.0]]),
            "strength": torch.tensor(0.5),
            "text": "a cat",
        },
    )
    fs.ClassifierFree(bound, 2.0, {"labels": torch.tensor(9)})(x, LEVEL)
    call = network.calls[0]
    assert call["labels"].tolist() == [1, 2, 3, 1, 9, 9, 9, 9]
    assert torch.equal(call["size"], torch.arange(8).view(4, 2).repeat(2, 1))
    assert torch.equal(call["shared"], torch.full((8, 1), 5.0))
    assert call["strength"].shape == () and call["text"] == "a cat"
    assert bound.conditions["labels"].tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("lead", [(), (1,), (4,)], ids=["(L, D)", "(1, L, D)", "(B, L, D)"])
def test_context_embeddings(network, x, lead):
    g = torch.Generator().manual_seed(2)
    context, null = torch.randn(4, 5, 6, generator=g), torch.randn(*lead, 5, 6, generator=g)
    bound = fs.Denoiser(network, VP, "data", {"context": context})
    result = fs.ClassifierFree(bound, 2.0, {"context": null})(x, LEVEL)
    halves = network.calls[0]["context"]
    assert torch.equal(halves[:4], context) and torch.equal(halves[4:], null.expand(4, 5, 6))
    conditional = Network()(x, None, context=context)
    unconditional = Network()(x, None, context=null.expand(4, 5, 6))
    torch.testing.assert_close(result, 2 * conditional - unconditional)


@pytest.mark.parametrize(
    ("null", "message"),
    [
        ({"label": 0}, "'label' has no counterpart; bind it first"),
        ({"labels": 0, "context": 0}, "'context' has no counterpart"),
        ({}, "nothing to push away from"),
        ({"labels": torch.zeros(3)}, r"\(3,\) does not broadcast to .* \(4,\)"),
        ({"text": ""}, "'a cat'; .* must be a tensor"),
    ],
)
def test_a_null_that_does_not_fit(null, message):
    bound = labelled(Network()).with_conditions(text="a cat")
    with pytest.raises(fs.errors.InvalidInputError, match=message):
        fs.ClassifierFree(bound, 2.0, null)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.nan}, "scale=nan must be a finite number"),
        ({"scale": math.inf}, "scale=inf must be a finite number"),
        ({"rescale": 2.0}, r"rescale=2.0 must be in 0\.\.1"),
        ({"rescale": math.nan}, "rescale=nan"),
        ({"interval": (5.0, 0.2)}, r"interval=\(5.0, 0.2\) must be \(low, high\)"),
        ({"interval": (1.0, 1.0)}, "0 <= low < high"),
        ({"interval": (-1.0, 1.0)}, "0 <= low < high"),
    ],
)
def test_bad_numbers(options, message):
    options = {"scale": 2.0, **options}
    with pytest.raises(fs.errors.InvalidInputError, match=message):
        fs.ClassifierFree(labelled(Network()), null={"labels": 0}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": math.nan}, "parallel=nan"),
        ({"limit": 0.0}, "limit=0.0 must be above 0; inf is none"),
        ({"limit": math.nan}, "limit=nan"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \(-1, 1\)"),
    ],
)
def test_bad_projections(options, message):
    with pytest.raises(fs.errors.InvalidInputError, match=message):
        fs.Projection(**options)


def test_interval_is_open_below_and_closed_above(network, x):
    guided = fs.ClassifierFree(labelled(network), 3.0, {"labels": 0}, interval=(0.5, 2.0))
    edm = fs.process.edm()
    conditional = labelled(Network())
    for ratio, acts in [(0.4, False), (0.5, False), (0.51, True), (2.0, True), (2.01, False)]:
        level = edm.level(ratio)
        same = torch.equal(guided(x, level), conditional(x, level))
        assert (network.calls[-1]["batch"] == 8, same) == (acts, not acts), ratio
    assert len(network.calls) == 5


def test_an_interval_up_to_infinity_takes_pure_noise_in():
    level = fs.process.flow().noisiest
    network = Network()
    bound = fs.Denoiser(network, fs.process.flow(), "flow", {"labels": torch.tensor([1])})
    fs.ClassifierFree(bound, 3.0, {"labels": 0}, interval=(0, math.inf))(torch.ones(1, 2), level)
    assert network.calls[0]["batch"] == 2


def test_interval_passes_in_a_run(network, x):
    process = fs.process.edm()
    bound = fs.Denoiser(network, process, "data", {"labels": torch.tensor([1, 2, 3, 1])})
    guided = fs.ClassifierFree(bound, 3.0, {"labels": 0}, interval=(0.3, 5.0))
    grid = fs.Grid.from_ratios(process, [80, 10, 5, 1, 0.3, 0.1, 0])
    fs.plan("euler", grid).run(guided, 80 * x)
    assert [call["batch"] for call in network.calls] == [4, 4, 8, 8, 4, 4]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_rescale_brings_back_the_standard_deviation(network, x, share):
    guided = fs.ClassifierFree(labelled(network), 4.0, {"labels": 0}, rescale=share)
    conditional, unconditional = (v.numpy() for v in strong_and_weak(x))
    plain = unconditional + 4.0 * (conditional - unconditional)
    each = (1, 2, 3)
    rescaled = plain * conditional.std(each, keepdims=True) / plain.std(each, keepdims=True)
    expected = share * rescaled + (1 - share) * plain
    result = guided(x, LEVEL).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    if share == 1.0:
        np.testing.assert_allclose(result.std(each), conditional.std(each), rtol=1e-12)


def projected(network, scale=3.0, **options):
    options = {"projection": fs.Projection(**options)}
    return fs.ClassifierFree(labelled(network), scale, {"labels": 0}, **options)


def push_of(guided, x, scale=3.0):
    """The push that the guided estimate holds, one row per image."""
    conditional, _ = strong_and_weak(x)
    return ((guided(x, LEVEL) - conditional) / (scale - 1)).flatten(1), conditional.flatten(1)


def test_a_projection_that_changes_nothing(network, x):
    plain = fs.ClassifierFree(labelled(Network()), 3.0, {"labels": 0})(x, LEVEL)
    result = projected(network, parallel=1.0, limit=math.inf, momentum=0.0)(x, LEVEL)
    torch.testing.assert_close(result, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("parallel", [0.0, 0.4, 2.0])
def test_projection_splits_the_push_along_the_strong_estimate(network, x, parallel):
    push, strong = push_of(projected(network, parallel=parallel), x)
    conditional, unconditional = strong_and_weak(x)
    plain = (conditional - unconditional).flatten(1)
    along = (plain * strong).sum(1) / (strong * strong).sum(1)
    np.testing.assert_allclose(
        (push * strong).sum(1), parallel * (plain * strong).sum(1), rtol=1e-9, atol=1e-12
    )
    across = plain - along[:, None] * strong
    torch.testing.assert_close(
        push - parallel * along[:, None] * strong, across, rtol=1e-9, atol=1e-12
    )


def test_limit_bounds_each_image_by_itself(network, x):
    conditional, unconditional = strong_and_weak(x)
    lengths = (conditional - unconditional).flatten(1).norm(dim=1)
    limit = float(lengths.sort().values[1:3].mean())
    push, _ = push_of(projected(network, parallel=1.0, limit=limit), x)
    torch.testing.assert_close(push.norm(dim=1), lengths.clamp(max=limit), rtol=1e-12, atol=0)
    assert bool((lengths > limit).any()) and bool((lengths < limit).any())


def test_a_vanishing_push_or_estimate_stays_finite():
    zero = fs.Denoiser(lambda x, t, labels: 0 * x, VP, "data", {"labels": torch.tensor([1])})
    projection = fs.Projection(limit=1.0, momentum=0.5)
    guided = fs.ClassifierFree(zero, 2.0, {"labels": 0}, projection=projection, rescale=1.0)
    assert torch.equal(guided(torch.ones(1, 2), LEVEL), torch.zeros(1, 2))


def apg_by_hand(points, momentum, limit, parallel, scale=3.0):
    """Algorithm 1 of Sadat et al. 2024, in NumPy, image by image."""
    total, results = 0.0, []
    for x in points:
        conditional, unconditional = (v.flatten(1).numpy() for v in strong_and_weak(x))
        total = (conditional - unconditional) + momentum * total
        result = []
        for strong, push in zip(conditional, total, strict=True):
            push = push * min(1.0, limit / np.linalg.norm(push))
            direction = strong / np.linalg.norm(strong)
            along = (push @ direction) * direction
            result.append(strong + (scale - 1) * (push - along + parallel * along))
        results.append(np.stack(result).reshape(x.shape))
    return results


def test_adaptive_projected_guidance_over_a_run(network, x):
    options = {"momentum": -0.6, "limit": 1.2, "parallel": 0.3}
    guided = projected(network, **options)
    points = [x, x.flip(0), 2 * x, x - 1]
    run = guided.for_run()
    for result, expected in zip(
        [run(p, LEVEL) for p in points], apg_by_hand(points, **options), strict=True
    ):
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_momentum_is_of_one_run_alone(network, x):
    guided = projected(network, momentum=-0.5)
    grid = fs.schedulers.karras(VP, steps=6)
    start = grid.levels[0].sigma * x
    plan = fs.plan("dpmpp_2m", grid)
    first, second = plan.run(guided, start), plan.run(guided, start)
    assert torch.equal(first, second)
    assert torch.equal(guided(x, LEVEL), guided(x, LEVEL))
    without = plan.run(projected(network, momentum=0.0), start)
    assert not torch.allclose(first, without)


def test_momentum_survives_new_conditions_within_a_run(network, x):
    run = projected(network, momentum=-0.5).for_run()
    run(x, LEVEL)
    remembered = run(x, LEVEL)
    run = projected(network, momentum=-0.5).for_run()
    run.with_conditions(labels=torch.tensor([1, 2, 3, 1]))(x, LEVEL)
    assert torch.equal(run(x, LEVEL), remembered)


def test_runs_in_threads_do_not_share_momentum(x):
    class Calm(Network):
        def __call__(self, x, t, labels=None, context=None, **others):
            barrier.wait(timeout=10)  # both runs are in the middle of a call at the same time
            return super().__call__(x, t, labels, context, **others)

    barrier = threading.Barrier(1)
    guided = projected(Calm(), momentum=-0.7)
    plan = fs.plan("euler", fs.schedulers.karras(VP, steps=12))
    starts = [plan.levels[0].sigma * v for v in (x, x.flip(0).contiguous())]
    alone = [plan.run(guided, start) for start in starts]

    barrier = threading.Barrier(2)
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.update({k: plan.run(guided, starts[k])}))
        for k in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], alone[0]) and torch.equal(results[1], alone[1])


def test_autoguidance(network, x):
    weak_network = Network()
    weak = fs.Denoiser(
        lambda x, t, labels: 0.5 * weak_network(x, t, labels),
        VP,
        "data",
        {"labels": torch.tensor([2, 2, 2, 2])},
    )
    guided = fs.AutoGuided(labelled(network), weak, 2.5)
    strong = strong_and_weak(x)[0]
    expected_weak = 0.5 * Network()(x, None, torch.tensor([2, 2, 2, 2]))
    expected = expected_weak + 2.5 * (strong - expected_weak)
    torch.testing.assert_close(guided(x, LEVEL), expected, rtol=1e-13, atol=1e-13)
    assert guided.passes == 2 and len(network.calls) == len(weak_network.calls) == 1

    other = guided.with_conditions(labels=torch.tensor([3, 3, 3, 3]))
    other(x, LEVEL)
    assert network.calls[-1]["labels"].tolist() == [3] * 4
    assert weak_network.calls[-1]["labels"].tolist() == [3] * 4
    guided(x, LEVEL)
    assert weak_network.calls[-1]["labels"].tolist() == [2] * 4


def test_autoguidance_off_or_outside_its_interval_leaves_the_weak_model_alone(network, x):
    weak_network = Network()
    weak = labelled(weak_network)
    assert fs.AutoGuided(labelled(network), weak, 1.0).passes == 1
    fs.AutoGuided(labelled(network), weak, 1.0)(x, LEVEL)
    fs.AutoGuided(labelled(network), weak, 2.0, interval=(0, 0.1))(x, LEVEL)
    assert weak_network.calls == [] and len(network.calls) == 2


def test_autoguidance_copies_a_weak_model_that_remembers(network, x):
    weak = projected(Network(), momentum=-0.5)
    guided = fs.AutoGuided(labelled(network), weak, 2.0)
    run = guided.for_run()
    first, second = run(x, LEVEL), run(x, LEVEL)
    assert not torch.allclose(first, second)
    assert torch.equal(guided.for_run()(x, LEVEL), first)
    plain = fs.AutoGuided(labelled(network), labelled(Network()), 2.0)
    assert plain.for_run() is plain


def test_autoguidance_needs_one_process(network):
    weak = fs.Denoiser(network, fs.process.edm())
    with pytest.raises(fs.errors.InvalidInputError, match="edm.*vp_linear.*one process"):
        fs.AutoGuided(labelled(network), weak, 2.0)


def test_guidance_within_guidance_counts_its_passes(network, x):
    inner = fs.AutoGuided(labelled(network), labelled(network), 2.0)
    outer = fs.ClassifierFree(inner, 3.0, {"labels": 0})
    outer(x, LEVEL)
    assert outer.passes == 4 == sum(call["batch"] for call in network.calls) // len(x)


def test_points_that_are_single_numbers_are_guided_one_by_one():
    x = torch.tensor([0.5, -1.0, 2.0])
    projection = fs.Projection(parallel=0.5, limit=0.4)
    together = fs.ClassifierFree(
        labelled(Network(), [1, 2, 3]), 2.0, {"labels": 0}, projection=projection
    )(x, LEVEL)
    alone = fs.ClassifierFree(labelled(Network(), [3]), 2.0, {"labels": 0}, projection=projection)
    torch.testing.assert_close(together[2:], alone(x[2:], LEVEL))
