"""On a GPU: the same noise, the same pictures as on the CPU up to rounding, and training that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fewstep as fs
from fewstep.data import load_images
from fewstep.models import load
from fewstep.samplers import SAMPLERS
from fewstep.training import Trainer, TrainingConfig, run
from fewstep.training.facts import Window

pytestmark = pytest.mark.gpu
SAMPLER_NAMES = [entry.name for entry in SAMPLERS if not entry.needs]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products in float32, not in the shorter type that convolutions use by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def test_noise_is_the_same_to_the_bit() -> None:
    here, there = (fs.Noise([3, 4], (2, 5), device) for device in ("cpu", "cuda"))
    levels = fs.schedulers.karras(fs.process.vp_linear(), 5).levels
    assert there.initial().is_cuda
    assert there.initial().cpu().equal(here.initial())
    assert there(levels[1], levels[2]).cpu().equal(here(levels[1], levels[2]))


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_gives_the_pictures_of_the_cpu(name: str) -> None:
    here, there = (
        fs.sample(
            load("digits", device=device),
            n=2,
            labels=[3, 7],
            sampler=name,
            scheduler="exponential",
            steps=6,
            batch_size=1 if SAMPLERS.find(name).eager else 2,
        ).images
        for device in ("cpu", "cuda")
    )
    assert there.isfinite().all()
    # Rounding differs, and a sampler may magnify it: half of the pixels must agree closely, all of them roughly.
    difference = (here - there).abs()
    chooses_by_the_data = SAMPLERS.find(name).eager
    assert difference.median() < (1e-2 if chooses_by_the_data else 1e-3)
    assert difference.max() < 0.2


def test_guided_sampling_in_bfloat16() -> None:
    model = load("digits", device="cuda")
    model.network.bfloat16()  # type: ignore[union-attr]
    samples = fs.sample(model, n=4, labels=[1, 2, 3, 4], guidance=2.0, steps=8)
    assert samples.images.isfinite().all()
    assert samples.images.dtype == torch.float32


def test_a_plan_runs_in_parallel_in_time() -> None:
    model = load("digits", device="cuda").with_conditions(
        labels=torch.tensor([5, 6], device="cuda")
    )
    plan = fs.plan("ddim", fs.schedulers.karras(model.process, 20))
    x = plan.levels[0].sigma * fs.Noise([0, 1], (1, 28, 28), "cuda").initial()
    outcome = plan.run_parallel(model, x, tolerance=1e-4)
    assert outcome.rounds < plan.calls
    assert (outcome.x - plan.run(model, x)).abs().max() < 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predicts": "velocity", "weight": {"name": "min_snr"}, "horizontal_flip": True},
        {"learned_variance": True},
        {"process": fs.process.edm().to_dict(), "predicts": "edm", "weight": {"name": "edm"}},
        {"process": fs.process.flow().to_dict(), "predicts": "flow", "ema_more": (0.99,)},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_no_step_waits_for_the_accelerator(settings: dict, tmp_path: Path) -> None:
    config = TrainingConfig(data="mnist-1000", steps=4, batch_size=16, **settings)
    trainer = Trainer(config, tmp_path, device="cuda")
    trainer._advance(trainer._batches[0], Window())  # the first one sets everything up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            trainer._advance(trainer._batches[step], Window())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(weight.isfinite().all() for weight in trainer.state.network.parameters())


def test_images_are_moved_once_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images("mnist-1000")
    device = torch.device("cuda")
    near = images.near(device)
    assert near.images.is_cuda and images.images.device.type == "cpu"
    for set_ in (images, near):
        x, labels = set_.batch([5, 2], device)
        assert x.is_cuda
        expected, classes = images.batch([5, 2])
        assert torch.equal(x.cpu(), expected) and torch.equal(labels.cpu(), classes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (images.images.nbytes * 3, 0))
    assert images.near(device) is images


def test_training_falls_and_resumes(tmp_path: Path) -> None:
    def losses(folder: str, steps: int) -> dict[int, float]:
        config = TrainingConfig(
            data="mnist-1000", steps=steps, batch_size=64, log_every=10, sample_every=0,
            checkpoint_every=20, decay="constant", warmup_steps=5,
        )  # fmt: skip
        return {s.step: s.loss for s in run(config, tmp_path / folder, device="cuda")}

    whole = losses("whole", 40)
    assert whole[40] < 0.7 * whole[10]
    assert losses("parts", 20) == pytest.approx({k: whole[k] for k in (10, 20)}, rel=1e-2)
    rest = losses("parts", 40)
    assert set(rest) == {30, 40}
    assert rest == pytest.approx({k: whole[k] for k in (30, 40)}, rel=2e-2)
