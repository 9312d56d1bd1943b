"""Averages of the weights: closed forms on a known path, on disk, and chosen by measurement."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fewstep.checkpoints import load_tensors
from fewstep.cli import main
from fewstep.errors import InvalidInputError, NonFiniteError, UnknownNameError
from fewstep.models import checkpoints_of, load
from fewstep.training import TrainingConfig, choose_average, held_out_loss, run
from fewstep.training.rates import average_decay, power_decay, power_exponent
from fewstep.training.state import TrainingState

MORE = {"ema_more": (0.3, 0.9), "ema_widths": (0.1, 0.2)}
NAMES = ["ema-0.3", "ema-0.9", "power-0.1", "power-0.2"]


def averages_of_a_line(steps: int, **settings) -> dict[str, float]:
    """The averages of weights that are 1, 2, 3... after each step."""
    network = nn.Linear(1, 1, bias=False)
    state = TrainingState(network, TrainingConfig(data="mnist-1000", **settings))
    state.optimiser.step = lambda: network.weight.data.add_(1.0)
    network.weight.data.zero_()
    for _ in range(steps):
        network.weight.grad = torch.zeros(1, 1)
        state.update(torch.tensor(0.0))
    more = {name: float(average.weight) for name, average in state.more.items()}
    return {"ema": float(state.average.weight), **more}


@pytest.mark.global_rng
def test_averages_of_a_linear_path():
    """EMA of k lags by d / (1 - d); the weights k^gamma give a mean near (gamma + 1) / (gamma + 2) of the path."""
    steps = 400
    found = averages_of_a_line(steps, ema_decay=0.8, **MORE)
    assert list(found) == ["ema", *NAMES]
    for name, decay in (("ema", 0.8), ("ema-0.3", 0.3), ("ema-0.9", 0.9)):
        assert found[name] == pytest.approx(steps - decay / (1 - decay), abs=1e-3)
    for width in (0.1, 0.2):
        gamma = power_exponent(width)
        assert found[f"power-{width}"] == pytest.approx(
            (gamma + 1) / (gamma + 2) * steps, rel=0.003
        )


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2, 0.28])
def test_the_power_function_has_its_width(width):
    """The weights of the steps, by unrolling the recursion: their standard deviation over the length of the run."""
    steps = 2000
    share = torch.zeros(steps, dtype=torch.float64)
    for k in range(steps):
        decay = power_decay(width, k)
        share *= decay
        share[k] = 1 - decay
    place = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean = float(share @ place)
    assert float(share.sum()) == pytest.approx(1)
    assert float(share @ (place - mean).square()) ** 0.5 == pytest.approx(width, rel=0.003)


@pytest.mark.global_rng
def test_the_first_average_does_not_know_of_the_others():
    alone = averages_of_a_line(30, ema_decay=0.9)
    assert averages_of_a_line(30, ema_decay=0.9, **MORE)["ema"] == alone["ema"]
    assert average_decay(0.9, 0) == 0.1


def test_averages_are_saved_loaded_and_resumed_bit_for_bit(images, make_config, tmp_path):
    config = make_config(**MORE)
    list(run(config, tmp_path / "straight", images=images, device="cpu"))
    count = iter(range(100))
    list(
        run(
            config,
            tmp_path / "resumed",
            images=images,
            device="cpu",
            stop=lambda: next(count) >= 3,
        )
    )
    list(run(config, tmp_path / "resumed", images=images, device="cpu"))
    one, two = (checkpoints_of(tmp_path / name)[-1] for name in ("straight", "resumed"))
    files = [f"{name}.safetensors" for name in (*NAMES, "model", "raw")]
    for file in files:
        first, second = load_tensors(one / file), load_tensors(two / file)
        assert all(torch.equal(first[name], second[name]) for name in first)
    weights = [load(tmp_path / "straight", weights=name).network.conv_in.weight for name in NAMES]
    assert not torch.equal(weights[0], weights[1])
    with pytest.raises(UnknownNameError, match=r"ema-0\.9"):
        load(tmp_path / "straight", weights="ema-0.99")


def test_the_best_average_is_the_one_with_the_lowest_figure(images, make_config, tmp_path):
    list(run(make_config(**MORE), tmp_path, images=images, device="cpu"))
    figures = iter([5.0, 4.0, 1.0, 3.0, 2.0, 6.0])
    choice = choose_average(tmp_path, lambda model: next(figures))
    assert choice.best == "ema-0.3"
    assert set(choice.measured) == {"ema", "raw", *NAMES}
    x0, labels = images.batch(range(20))
    choice = choose_average(tmp_path, lambda model: held_out_loss(model, x0, labels))
    expected = {
        name: held_out_loss(load(tmp_path, weights=name), x0, labels) for name in choice.measured
    }
    assert choice.measured == expected
    assert choice.measured[choice.best] == min(expected.values())
    with pytest.raises(NonFiniteError, match="ema"):
        choose_average(tmp_path, lambda model: float("nan"))
    with pytest.raises(InvalidInputError, match="0 images"):
        held_out_loss(load(tmp_path), x0[:0])


def test_average_command(images, make_config, tmp_path, capsys, monkeypatch):
    import sys

    import numpy as np

    list(run(make_config(**MORE), tmp_path / "run", images=images, device="cpu"))
    data = tmp_path / "held.npz"
    np.savez(data, images=images.images.numpy(), labels=images.labels.numpy())
    line = [
        "fewstep",
        "average",
        str(tmp_path / "run"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "best"),
    ]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    text = capsys.readouterr().out
    best = text.split("Best: ")[1].split(". Use")[0]
    assert all(name in text for name in NAMES)
    chosen = load(tmp_path / "run", weights=best).network.conv_in.weight
    assert torch.equal(load(tmp_path / "best").network.conv_in.weight, chosen)
    for taken in ("best", "run"):  # above all the run itself, which would be gone
        monkeypatch.setattr(sys, "argv", [*line[:-1], str(tmp_path / taken)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and "would be replaced" in capsys.readouterr().err
    assert torch.equal(load(tmp_path / "run", weights=best).network.conv_in.weight, chosen)


@pytest.mark.parametrize(
    "changes", [{"ema_more": (1.0,)}, {"ema_more": (0.9, 0.9)}, {"ema_widths": (0.3,)}], ids=str
)
def test_wrong_averages_are_refused(make_config, changes):
    with pytest.raises(InvalidInputError, match=next(iter(changes))):
        make_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "predicts": "edm",
            "process": {"name": "edm"},
            "times": {"name": "log_normal"},
            "weight": {"name": "edm"},
        },
        {"predicts": "edm", "times": {"name": "logit_normal"}, "stratified": True},
        {"predicts": "velocity", "weight": {"name": "sigmoid"}, "process": {"name": "vp_cosine"}},
        {"learned_variance": True, "weight": {"name": "min_snr"}},
        {"learned_variance": True, "predicts": "velocity", "times": {"name": "log_normal"}},
    ],
    ids=str,
)
def test_models_of_every_objective_learn_and_sample(images, make_config, tmp_path, changes):
    import fewstep as fs

    config = make_config(steps=60, batch_size=20, log_every=15, checkpoint_every=100, **changes)
    losses = [fact.loss for fact in run(config, tmp_path, images=images, device="cpu")]
    assert losses[-1] < 0.75 * losses[0]
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = fs.load(tmp_path)
    for sampler in ("ddim", "dpmpp_2m", "ddpm"):
        found = fs.sample(model, sampler=sampler, steps=4, seed=range(2), labels=[0, 1]).images
        assert found.isfinite().all() and found.shape == (2, 1, 8, 8)
