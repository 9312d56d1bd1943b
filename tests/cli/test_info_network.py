"""`fewstep info --network`, and training a transformer from the command line."""

from __future__ import annotations

import json

import pytest

import fewstep as fs
from command_line import run
from fewstep.networks import DiTConfig, presets


def test_a_preset_part_by_part(monkeypatch, capsys):
    assert run(monkeypatch, "info", "--network", "small") == 0
    told = capsys.readouterr().out
    assert "3,085,633 parameters" in told and "down 28x28" in told and "conv_out" in told


def test_options_size_and_batch_are_counted(monkeypatch, capsys):
    words = ["info", "--network", "small", "--json", "--size"]
    assert run(monkeypatch, *words, "8") == 0
    small = json.loads(capsys.readouterr().out)
    options = ["--batch-size", "4", "--network-options", '{"attention": [2]}']
    assert run(monkeypatch, *words, "8", *options) == 0
    four = json.loads(capsys.readouterr().out)
    assert small["shape"] == [1, 8, 8] and (small["batch_size"], four["batch_size"]) == (1, 4)
    assert four["parameters"] < small["parameters"]
    assert 3 * small["flops"] < four["flops"] < 4 * small["flops"]


def test_all_presets_in_one_table(monkeypatch, capsys):
    two = {name: presets()[name] for name in ("small", "dit-tiny/4")}
    monkeypatch.setattr("fewstep.cli.network_cost.presets", lambda: two)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "info", "--network", "all") == 0
    told = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in told.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 7}
    assert table["small"][:3] == ["1x1x28x28", "3.1M", "0.81"]
    assert table["dit-tiny/4"][:3] == ["1x1x28x28", "4.2M", "0.27"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either a model, such as digits, or --network"),
        (["digits", "--network", "small"], "give either a model"),
        (["--network", "smal"], "unknown preset 'smal'; did you mean 'small'"),
        (["--network", "small", "--size", "27"], "27x27 pixels cannot be halved 2 times"),
        (["--network", "small", "--size", "0"], "give numbers of at least 1"),
        (["--network", "small", "--network-options", "{"], "--network-options '{' is not JSON"),
        (["--network", "small", "--network-options", '{"a": 1}'], "unknown U-Net option 'a'"),
        (["--network", "all", "--network-options", '{"width": 8}'], "go with one preset"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch, capsys, words, message):
    assert run(monkeypatch, "info", *words) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.strip().count("\n") == 0 and not told.out


@pytest.mark.global_rng
def test_a_transformer_trains_resumes_and_samples(tmp_path, monkeypatch, capsys):
    options = '{"width": 32, "depth": 2, "heads": 2}'
    words = ["train", "mnist-1000", "--network", "dit-tiny/4", "--network-options", options]
    words += ["--batch-size", "8", "--sample-every", "0", "--decay", "constant"]

    def trained(folder, *more):
        assert run(monkeypatch, *words, "--out", str(tmp_path / folder), *more) == 0
        return fs.load(tmp_path / folder)

    whole = trained("whole", "--steps", "4")
    trained("broken", "--steps", "2")
    broken = trained("broken", "--steps", "4", "--checkpoint-activations")
    assert isinstance(whole.config.network, DiTConfig)
    for one, other in zip(whole.network.parameters(), broken.network.parameters(), strict=True):
        assert one.equal(other)
    sheet = tmp_path / "x.png"
    source = str(tmp_path / "whole")
    assert run(monkeypatch, "sample", source, "--n", "2", "--steps", "2", "--out", str(sheet)) == 0
    assert sheet.exists()
