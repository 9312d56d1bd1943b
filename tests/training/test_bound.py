"""The variational bound, its Gaussians, and the variance that is learnt."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fewstep import process as processes
from fewstep.denoisers import Denoiser
from fewstep.denoisers.exact import GaussianMixture
from fewstep.errors import InvalidInputError
from fewstep.process import forward_kernel, posterior
from fewstep.training import Objective, bound, variational_bound
from fewstep.training.variance import (
    bound_term,
    decoder_loss,
    gaussian_divergence,
    learned_log_variance,
    log_variances,
)

STD = 0.3


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def byte_images(count: int, edge: int = 4) -> torch.Tensor:
    normal = torch.randn(count, 1, edge, edge, generator=random(0))
    return ((STD * normal + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def true_bits(images: torch.Tensor) -> float:
    """-log2 of the mass of N(0, STD^2) in the bin of each byte."""
    normal = Normal(torch.tensor(0.0, dtype=torch.float64), STD)
    x = images.double()
    return float(-(normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)).log2().mean())


def ideal(process) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 1, 4, 4), STD, process=process)


def test_divergence_is_that_of_torch():
    mean, log_v, other, other_log_v = torch.randn(4, 50, generator=random(0), dtype=torch.float64)
    expected = kl_divergence(
        Normal(mean, (log_v / 2).exp()), Normal(other, (other_log_v / 2).exp())
    )
    torch.testing.assert_close(gaussian_divergence(mean, log_v, other, other_log_v), expected)


@pytest.mark.parametrize("std", [1e-4, 0.003, 0.1, 2.0])
@pytest.mark.parametrize("mean", [-1.3, -0.998, 0.123, 1.0])
def test_the_decoder_sums_to_one_over_the_bytes(mean, std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    loss = decoder_loss(x, torch.full_like(x, mean), torch.tensor(math.log(std)).double())
    assert float((-loss).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_decoder_is_the_mass_of_a_bin():
    x = torch.tensor([-1.0, 50 / 127.5 - 1, 1.0], dtype=torch.float64)
    normal = Normal(torch.tensor(-0.5, dtype=torch.float64), 0.6)
    low, high = (normal.cdf(x + side / 255) for side in (-1, 1))
    low[0], high[2] = 0, 1
    found = decoder_loss(x, torch.full_like(x, -0.5), torch.tensor(0.6, dtype=torch.float64).log())
    torch.testing.assert_close(found, -(high - low).log())


def test_the_bound_of_the_exact_denoiser_comes_down_to_the_likelihood(monkeypatch):
    """Never below it, and nearer with more steps."""
    images, process = byte_images(256), processes.flow(t_min=0.01)
    gaps = []
    for count in (100, 300, 1000):
        monkeypatch.setattr(bound, "CONTINUOUS_LEVELS", count)
        gaps.append(variational_bound(ideal(process), images).total - true_bits(images))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    assert gaps[2] < 0.1


def test_the_bound_on_a_table_is_the_sum_of_its_closed_form():
    """With error sigma^2 v / (alpha^2 v + sigma^2) in x_0 at each entry; the prior by torch's divergence."""
    images, process = byte_images(1024), processes.vp_linear()
    t = torch.arange(1000, dtype=torch.float64)
    a, s = process.alpha(t), process.sigma(t)
    error = s**2 * STD**2 / (a**2 * STD**2 + s**2)
    steps = ((a / s).square()[:-1] - (a / s).square()[1:]) / 2 @ error[1:] / math.log(2)
    start = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    prior = kl_divergence(Normal(a[-1] * images.double(), s[-1]), Normal(*start)).mean()
    found = variational_bound(ideal(process), images, batch_size=1024)
    assert found.steps == pytest.approx(float(steps), rel=0.01)
    assert found.prior == pytest.approx(float(prior) / math.log(2), rel=1e-4)
    decoder = math.log2(255 / 2) + math.log2(2 * math.pi * math.e) / 2 + math.log2(s[0] / a[0])
    assert found.decoder == pytest.approx(decoder, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "edm", "sigma_min": 0.01},
        {"name": "flow", "t_min": 0.01},
        {"name": "vp_continuous"},
    ],
    ids=lambda settings: settings["name"],
)
def test_the_bound_in_continuous_time(settings):
    """To a level about as noisy as the bytes are wide; below, they are no longer Gaussian."""
    images = byte_images(128)
    bound = variational_bound(ideal(processes.from_dict(settings)), images)
    assert -0.01 < bound.total - true_bits(images) < 0.12


def test_a_wrong_denoiser_has_a_higher_bound():
    images, process = byte_images(64), processes.vp_cosine(steps=100)
    right = variational_bound(ideal(process), images).total
    wide = GaussianMixture(torch.zeros(1, 1, 4, 4), 1.5 * STD, process=process)
    assert variational_bound(wide, images).total > right + 0.02


def test_some_of_the_steps_estimate_all_of_them():
    images, process = byte_images(512), processes.vp_cosine(steps=100)
    every = variational_bound(ideal(process), images)
    some = variational_bound(ideal(process), images, levels=50, batch_size=4)
    assert some.steps == pytest.approx(every.steps, rel=0.1)
    with pytest.raises(InvalidInputError, match="1 to"):
        variational_bound(ideal(process), images, levels=100)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine"])
def test_variances_are_those_of_the_reverse_steps(name):
    process = processes.from_dict({"name": name, "steps": 50})
    t = torch.arange(50, dtype=torch.float64)
    small, large = log_variances(process, t)
    torch.testing.assert_close(large.exp(), torch.from_numpy(process.betas), rtol=1e-9, atol=0)
    stds = [posterior(process.level(k), process.level(k - 1)).std for k in range(1, 50)]
    expected = torch.tensor([stds[0], *stds], dtype=torch.float64).square()
    torch.testing.assert_close(small.exp(), expected, rtol=1e-9, atol=0)
    assert forward_kernel(process.clean, process.level(0)).std ** 2 == pytest.approx(
        float(large.exp()[0])
    )


def test_the_learnt_variance_lies_between_the_two():
    process, t = processes.vp_linear(), torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64)
    v = torch.tensor([0.0, 0.5, 1.0]).double().reshape(3, 1, 1, 1)
    found = learned_log_variance(process, v, t).flatten()
    small, large = (float(value[0]) for value in log_variances(process, t))
    assert found.tolist() == pytest.approx([small, (small + large) / 2, large])


def test_the_bound_term_is_the_divergence_of_the_two_steps():
    process, t = processes.vp_linear(), torch.tensor([7.0, 500.0], dtype=torch.float64)
    x0, x_t, estimate, v = torch.randn(4, 2, 1, 4, 4, generator=random(1), dtype=torch.float64)
    found = bound_term(process, x0, estimate, v, t)
    for k in range(2):
        q = posterior(process.level(float(t[k])), process.level(float(t[k]) - 1))
        mean, other = (q.on_x * x_t[k] + q.on_x0 * x[k] for x in (x0, estimate))
        std = (learned_log_variance(process, v, t)[k] / 2).exp()
        expected = kl_divergence(Normal(mean, q.std), Normal(other, std)).mean()
        torch.testing.assert_close(found[k], expected, rtol=1e-6, atol=1e-12)


def with_variance(process, share_of) -> Denoiser:
    """Normal data of width STD, with a learnt variance."""

    def network(x, t):
        level = process.level(float(t[0]))
        noise = level.sigma * x / ((level.alpha * STD) ** 2 + level.sigma**2)
        return torch.cat([noise, torch.full_like(x, 2 * share_of(level) - 1)], 1)

    return Denoiser(network, process)


def test_the_bound_is_tighter_with_the_variance_that_was_learnt():
    """By its closed form: with the posterior's variance nothing changes; the best one has the divergence of widths."""
    images, process = byte_images(64), processes.vp_cosine(steps=50)
    plain = variational_bound(ideal(process), images)
    same = variational_bound(with_variance(process, lambda level: 0.0), images)
    assert (same.prior, same.steps) == pytest.approx((plain.prior, plain.steps), rel=1e-5)

    def best(level) -> float:
        if level.t == 0:
            return 0.0
        before = process.level(level.t - 1)
        q, error = posterior(level, before), (level.sigma * STD) ** 2
        error /= (level.alpha * STD) ** 2 + level.sigma**2
        small, large = q.std**2, forward_kernel(before, level).std ** 2
        return math.log((small + q.on_x0**2 * error) / small) / math.log(large / small)

    learnt = variational_bound(with_variance(process, best), images, batch_size=64)
    levels = [process.level(t) for t in range(1, 50)]
    posteriors = [posterior(level, process.level(level.t - 1)) for level in levels]
    expected = sum(
        best(level) * (math.log(forward_kernel(process.level(level.t - 1), level).std / q.std))
        for level, q in zip(levels, posteriors, strict=True)
    )
    assert learnt.steps == pytest.approx(expected / math.log(2), rel=0.02)
    assert learnt.steps < plain.steps - 0.02


def test_the_decoder_has_the_width_that_was_learnt():
    images, process = byte_images(256), processes.vp_cosine(steps=20)
    level = process.level(0.0)
    error = (level.sigma * STD) ** 2 / ((level.alpha * STD) ** 2 + level.sigma**2)
    small, large = (float(v[0]) for v in log_variances(process, torch.zeros(1).double()))
    for share in (0.0, 0.3, 1.0):
        model = with_variance(process, lambda level, v=share: v)
        log_variance = (1 - share) * small + share * large
        nats = (math.log(2 * math.pi) + log_variance + error / math.exp(log_variance)) / 2
        expected = math.log2(255 / 2) + nats / math.log(2)
        assert variational_bound(model, images).decoder == pytest.approx(expected, rel=5e-3)


def test_the_hybrid_loss_teaches_the_variance_alone():
    """L_hybrid = L_simple + 0.001 L_vlb, and L_vlb sends no gradient into the first half of the channels."""
    process = processes.vp_linear()
    objective = Objective(process, learned_variance=True)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=random(2)).clamp(-1, 1)
    t = torch.tensor([0.0, 40.0, 700.0], dtype=torch.float64)
    output = 0.1 * torch.randn(3, 2, 4, 4, generator=random(3))

    def gradient(loss_of, learned):
        given = output.clone().requires_grad_()
        loss = loss_of(lambda x, t: given if learned else given[:, :1], x0, noise, t)
        loss.backward()
        return loss.detach(), given.grad

    hybrid, both = gradient(objective, True)
    simple, first = gradient(Objective(process), False)
    torch.testing.assert_close(both[:, :1], first[:, :1])
    assert both[:, 1:].abs().max() > 0 and both.isfinite().all()
    estimate = (
        x0 * process.alpha(t).reshape(3, 1, 1, 1)
        + process.sigma(t).reshape(3, 1, 1, 1) * (noise - output[:, :1])
    ) / process.alpha(t).reshape(3, 1, 1, 1)
    term = 1000 * bound_term(process, x0, estimate.float(), (output[:, 1:] + 1) / 2, t).mean()
    assert float(hybrid - simple) == pytest.approx(0.001 * float(term), rel=1e-3)


def test_a_network_of_the_wrong_channels_is_refused():
    x0 = torch.zeros(2, 1, 4, 4)
    with pytest.raises(InvalidInputError, match="2 channels"):
        Objective(processes.vp_linear(), learned_variance=True)(
            lambda x, t: x, x0, x0, torch.zeros(2, dtype=torch.float64)
        )
