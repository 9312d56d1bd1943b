from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.process import flow
from fewstep.training import TrainingConfig


def test_round_trip_through_json(make_config):
    config = make_config(process={"name": "flow"}, predicts="flow", betas=(0.8, 0.95), size=8)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_process_is_written_out_in_full(make_config):
    assert make_config(process={"name": "flow"}, predicts="flow").process == flow().to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"batch_size": 0},
        {"parts": 0},
        {"seed": -1},
        {"warmup_steps": -1},
        {"checkpoint_every": 0},
        {"sample_every": -1},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"weight_decay": -0.1},
        {"gradient_clip": -1.0},
        {"ema_decay": 1.0},
        {"label_dropout": 1.1},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"precision": "float8"},
        {"decay": "linera"},
        {"cooldown_share": 0.0},
        {"decay_after": -1},
        {"measure_every": -1},
        {"measure_images": 1},
        {"predicts": "nose"},
        {"network": "smal"},
        {"network_options": {"chanels": [8]}},
        {"network_options": {"group_width": 3}},
        {"process": {"name": "vp_liner"}},
        {"process": {"name": "flow", "t_mim": 0.1}},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_name(make_config, changes):
    with pytest.raises(InvalidInputError) as error:
        make_config(**changes)
    (name, value), message = next(iter(changes.items())), str(error.value)
    if isinstance(value, dict):
        words = [str(word) for pair in value.items() for word in pair]
        assert any(word in message for word in words)
    else:
        assert name in message


def test_unknown_setting_names_the_nearest():
    with pytest.raises(UnknownNameError, match="learning_rate"):
        TrainingConfig.from_dict({"data": "mnist-1000", "learning_rat": 1e-3})


def test_settings_without_data_are_refused():
    with pytest.raises(InvalidInputError, match="data"):
        TrainingConfig.from_dict({"steps": 3})


def test_differences_name_what_decides_the_weights_only(make_config):
    one, two = make_config(seed=1, steps=5, data="a"), make_config(seed=2, steps=9, data="b")
    assert one.differences(two) == ["seed: 2 before, 1 now"]
    assert one.differences(make_config(seed=1)) == []


@pytest.mark.parametrize(
    ("process", "scale"), [("vp_linear", 1), ("flow", 1000), ("edm", 1), ("vp_continuous", 1000)]
)
def test_network_sees_times_in_steps(make_config, process, scale):
    config = make_config(process={"name": process}, predicts="velocity")
    network = config.network_config(channels=3, num_classes=4)
    assert (network.time_scale, network.in_channels, network.num_classes) == (scale, 3, 4)


def test_network_options_win_over_what_is_fitted(make_config):
    config = make_config(
        process={"name": "flow"}, predicts="flow", network_options={"time_scale": 10.0}
    )
    assert config.network_config(channels=1, num_classes=0).time_scale == 10


def test_settings_from_before_these_objectives_mean_what_they_meant(make_config):
    old = make_config().to_dict()
    for name in ("times", "stratified", "weight", "learned_variance", "ema_more", "ema_widths"):
        del old[name]
    assert TrainingConfig.from_dict(old).differences(make_config()) == []
    objective = TrainingConfig.from_dict(old).objective()
    assert objective.weight.is_simple and objective.times.settings == {"name": "uniform"}
    assert not (objective.times.stratified or objective.learned_variance)


@pytest.mark.parametrize("predicts", ["noise", "edm"])
@pytest.mark.parametrize(
    "process", [{"name": "flow"}, {"name": "vp_linear", "zero_terminal_snr": True}]
)
def test_what_could_never_be_sampled_is_refused(make_config, process, predicts):
    with pytest.raises(InvalidInputError, match=r"no sample could begin; give predicts = 'flow'"):
        make_config(process=process, predicts=predicts)
    for other in ("flow", "velocity", "data"):
        make_config(process=process, predicts=other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process": "vp_cosine"}, "give names and values, such as {'name': 'vp_cosine'}"),
        ({"process": flow()}, "give names and values, such as {'name': 'vp_cosine'}"),
        ({"process": {"steps": 5}}, "give names and values, such as {'name': 'vp_cosine'}"),
        ({"times": "log_normal"}, "such as {'name': 'log_normal'}"),
        ({"weight": {"gamma": 5}}, "such as {'name': 'min_snr'}"),
        ({"data": None}, "give text or a path"),
        ({"labels": 5}, "give text or a path"),
        ({"horizontal_flip": "no"}, "give True or False"),
        ({"compile": None}, "give True or False"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused_by_name(make_config, changes, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)) as caught:
        make_config(**changes)
    assert str(caught.value).startswith(f"{next(iter(changes))} = ")
    with pytest.raises(InvalidInputError, match="network_options = None is not allowed"):
        TrainingConfig(data="x", network_options=None)


def test_paths_are_settings_like_text(make_config):
    paths = {name: Path("a") / "b" for name in ("data", "labels", "cache", "start_from")}
    config = make_config(**paths)
    assert json.loads(json.dumps(config.to_dict()))["data"] == str(Path("a") / "b")
    assert config == make_config(**{name: str(path) for name, path in paths.items()})
