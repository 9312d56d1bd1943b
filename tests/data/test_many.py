"""What holds the names, label rows and captions of a million images: the same as lists and dictionaries would."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fewstep.data import ImageSet, check_images
from fewstep.data.captions import CaptionList, Captions
from fewstep.data.label_file import LabelFile
from fewstep.data.sources import Names
from fewstep.errors import DataError


@pytest.mark.parametrize("count", [0, 1, 3, 4, 10])
def test_names_are_a_list(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(Names, "BLOCK", 3)
    expected = [f"class {k}/ü{k}.png" for k in range(count)]
    names = Names()
    for name in expected:
        names.append(name)
    assert len(names) == count and list(names) == list(names) == expected


def test_captions_are_a_list() -> None:
    half = json.loads('"\\ud800"')  # half a character
    expected = ["a cat", None, "Käse\n🧀", None, half, "a cat"]
    gathered = CaptionList()
    for caption in expected:
        gathered.append(caption)
    captions = gathered.captions()
    assert isinstance(captions, Captions)
    assert (
        list(captions) == expected and captions[-1] == "a cat" and captions[1:3] == expected[1:3]
    )
    with pytest.raises(IndexError):
        captions[6]


def test_no_captions_are_none() -> None:
    gathered = CaptionList()
    gathered.append(None)
    assert gathered.captions() == ()


def test_a_label_file_is_a_dictionary(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = {f"{k % 7}/{k}.png": (f"kind {draw.randrange(50)}", None) for k in range(5000)}
    rows["0/0.png"] = ("kind 1", "the only caption")
    order = list(rows)
    draw.shuffle(order)
    path = tmp_path / "labels.csv"
    lines = [f"{name},{rows[name][0]},{rows[name][1] or ''}\n" for name in order]
    path.write_text("file_name,label,caption\n" + "".join(lines))
    told: list[int] = []
    table = LabelFile(path, lambda what, done, total: told.append(done))
    assert len(table) == 5000 and told
    assert {name: table.row(name) for name in rows} == rows
    assert table.row("7/7.png") is None
    names = Names()
    for name in rows:
        names.append(name)
    table.require_match(names, "there")
    names.append("9/9.png")
    with pytest.raises(
        DataError, match="1 of 5001 images in there are not in it, such as 9/9.png"
    ):
        table.require_match(names, "there")
    path.write_text(path.read_text() + lines[17])
    with pytest.raises(DataError, match=f"names {order[17]} twice, again in row 5002"):
        LabelFile(path)


def test_checks_tell_how_far_they_are() -> None:
    told: list[tuple[str, int, int | None]] = []
    images = ImageSet(torch.zeros(40, 3, 512, 512, dtype=torch.uint8))
    check_images(images, lambda *progress: told.append(progress))
    assert told == [("checking images", start, 40) for start in (0, 21)]
