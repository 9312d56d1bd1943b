"""Tar shards, label files, captions and the cache of decoded images."""

from __future__ import annotations

import errno
import io
import os
import signal
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep.data.cache
import fewstep.data.reading as reading
from fewstep.data import ImageSet, check_images, load_images, write_npz
from fewstep.data.cache import ABANDONED_SECONDS, PIXELS
from fewstep.errors import DataError


def png(value: int, size: int = 4, mode: str = "L") -> bytes:
    """A flat picture as a PNG file."""
    file = io.BytesIO()
    Image.new("L", (size, size), value).convert(mode).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(path: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def values(images: ImageSet) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()


def labels(images: ImageSet) -> list[str]:
    assert images.labels is not None
    return [images.class_names[k] for k in images.labels.tolist()]


def test_webdataset_samples(tmp_path: Path) -> None:
    shard = {
        "0001.png": png(10),
        "0001.cls": "2",
        "0001.txt": "a caption\n",
        "0002.cls": "0",  # side files may come first
        "0002.png": png(20),
        "0003.json": '{"label": 1, "caption": "from json"}',
        "0003.png": png(30),
    }
    images = load_images(tar(tmp_path / "a.tar", shard))
    assert values(images) == [10, 20, 30]
    assert images.class_names == ("0", "1", "2") and labels(images) == ["2", "0", "1"]
    assert list(images.captions) == ["a caption", None, "from json"]


@pytest.mark.parametrize(
    ("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")]
)
def test_an_archive_of_class_folders_reads_like_the_folder(
    tmp_path: Path, ending: str, mode: str
) -> None:
    files: dict[str, bytes | str] = {
        "top/train/cat/1.png": png(1),
        "top/train/dog/x/2.png": png(2),
        "top/train/.hidden.png": png(99),
        "top/test/cat/3.png": png(3),
    }
    archive = tar(tmp_path / f"a.{ending}", files, mode)
    folder = put(tmp_path / "plain", files) / "top"
    for split in ("train", "test"):
        one, two = (load_images(source, split=split) for source in (archive, folder))
        assert torch.equal(one.images, two.images)
        assert one.class_names == two.class_names and labels(one) == labels(two)
    assert labels(load_images(archive)) == ["cat", "dog"]


def test_a_shared_folder_is_no_class(tmp_path: Path) -> None:
    plain = tar(tmp_path / "a.tar", {"photos/1.png": png(1), "photos/2.png": png(2)})
    assert load_images(plain).labels is None
    mixed = tar(tmp_path / "b.tar", {"x/cat/1.png": png(1), "x/2.png": png(2)})
    with pytest.raises(DataError, match="mixes class folders"):
        load_images(mixed)
    half = tar(tmp_path / "c.tar", {"1.png": png(1), "1.cls": "a", "2.png": png(2)})
    with pytest.raises(DataError, match=r"\.cls"):
        load_images(half)
    with pytest.raises(DataError, match="no 'test' split; it holds train"):
        load_images(plain, split="test")


def test_shards_by_folder_and_by_pattern(tmp_path: Path) -> None:
    for k in range(3):
        tar(tmp_path / f"train-{k:02d}.tar", {f"{k}.png": png(k), f"{k}.cls": "cat"})
    assert values(load_images(tmp_path)) == [0, 1, 2]
    assert values(load_images(f"{tmp_path}/train-{{01..02}}.tar")) == [1, 2]
    assert values(load_images(f"{tmp_path}/train-*.tar")) == [0, 1, 2]
    assert values(load_images(f"{tmp_path}/train-{{02,00}}.tar")) == [2, 0]
    put(tmp_path, {"beside.png": png(9)})
    assert values(load_images(tmp_path)) == [9]  # pictures go before archives
    with pytest.raises(DataError, match=r"train-03\.tar"):
        load_images(f"{tmp_path}/train-{{01..03}}.tar")


def test_broken_members_are_skipped_and_broken_archives_refused(tmp_path: Path) -> None:
    files = {"a.png": png(1), "b.png": b"no picture", "c.png": png(3, size=64)}
    images = load_images(tar(tmp_path / "a.tar", files), size=4)
    assert values(images) == [1, 3] and [name for name, _ in images.skipped] == ["b.png"]
    whole = (tmp_path / "a.tar").read_bytes()
    header = whole.index(b"c.png")
    cuts = {"data": header + 520, "header": header + 100, "between": header, "empty": 0}
    for name, cut in cuts.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=f"{name}.tar is cut short or damaged"):
            load_images(tmp_path / f"{name}.tar", size=4)
    spoilt = bytearray(whole)
    spoilt[header + 150] ^= 0xFF  # the header's checksum
    (tmp_path / "spoilt.tar").write_bytes(spoilt)
    with pytest.raises(DataError, match="after 2 files"):
        load_images(tmp_path / "spoilt.tar", size=4)


def test_label_file(tmp_path: Path) -> None:
    put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    put(tmp_path / "data", {"labels.csv": "2.png,cat\n0.png,dog\n1.png,cat\n"})
    images = load_images(tmp_path / "data")
    assert images.class_names == ("cat", "dog") and labels(images) == ["dog", "cat", "cat"]
    table = 'text,file_name,class\n"one, two",0.png,10\n,1.png,2\nx,2.png,0\n'
    put(tmp_path, {"other.csv": table})
    images = load_images(tmp_path / "data", labels=tmp_path / "other.csv")
    assert labels(images) == ["10", "2", "0"] and images.num_classes == 11
    assert list(images.captions) == ["one, two", None, "x"]


def test_captions_alone_leave_the_class_folders(tmp_path: Path) -> None:
    put(tmp_path, {"a/1.png": png(1), "b/2.png": png(2), "b/2.txt": "beside"})
    put(tmp_path, {"metadata.csv": "file_name,text\na/1.png,listed\nb/2.png,\n"})
    images = load_images(tmp_path)
    assert labels(images) == ["a", "b"] and list(images.captions) == ["listed", "beside"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "file_name,label\n0.png,a\nx.png,b\n",
            r"2 of 3 images.*not in it, such as 1\.png, 2\.png; 1 of its 2 rows.*x\.png",
        ),
        ("0.png,a\n1.png,a\n2.png,a\n0.png,b\n", r"names 0\.png twice, again in row 4"),
        ("file_name,label\n0.png\n", "row 2 .*1 columns"),
        ("file_name,label\n0.png,\n", "row 2 .*lacks its label"),
        ("id,species,year\n0,cat,1999\n", "needed are the columns file_name"),
        ("0.png,200000\n1.png,1\n2.png,2\n", "whole numbers up to 200000"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path: Path, table: str, message: str) -> None:
    put(tmp_path, {f"{k}.png": png(k) for k in range(3)})
    put(tmp_path, {"labels.csv": table})
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


def test_cache_is_made_once_and_anew_when_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "data", {f"{c}/{k}.png": png(k) for c in "ab" for k in range(4)})
    put(data, {"a/1.txt": "one", "b/broken.png": "nothing"})
    plain = load_images(data, cache="off")
    made = load_images(data, cache=tmp_path / "cache")
    for name in ("class_names", "skipped", "source", "digest"):
        assert getattr(made, name) == getattr(plain, name), name
    assert list(made.captions) == list(plain.captions) == [None, "one", *[None] * 6]
    assert torch.equal(made.images, plain.images) and labels(made) == labels(plain)
    (place,) = (tmp_path / "cache").iterdir()
    np.testing.assert_array_equal(np.load(place / PIXELS), plain.images.numpy())

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.decoding.to_pixels", fail)
        again = load_images(data, cache=tmp_path / "cache")
        assert torch.equal(again.images, plain.images) and again.digest == plain.digest
    put(data, {"a/9.png": png(77)})
    assert 77 in values(load_images(data, cache=tmp_path / "cache"))
    os.utime(data / "a/9.png", ns=(1, 1))
    put(data, {"a/9.png": png(78)})
    assert 78 in values(load_images(data, cache=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_widens_grey_to_colour(tmp_path: Path) -> None:
    data = put(tmp_path / "data", {"a.png": png(5), "b.png": png(6), "c.png": png(7)})
    Image.new("RGBA", (4, 4), (250, 0, 0, 255)).save(data / "d.png")
    plain = load_images(data, cache="off")
    assert plain.shape == (3, 4, 4) and plain.images[3, :, 0, 0].tolist() == [250, 0, 0]
    assert plain.images[:3, :, 0, 0].tolist() == [[5] * 3, [6] * 3, [7] * 3]
    assert torch.equal(load_images(data, cache=tmp_path / "cache").images, plain.images)


def test_a_killed_build_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    others = put(tmp_path / "others", {"1.png": png(1)})
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.cache._rename_over", lambda *_: os._exit(0))
        for source in (data, others):
            if (child := os.fork()) == 0:
                load_images(source, cache=cache)
            os.waitpid(child, 0)
    left, of_others = sorted(cache.glob(".*.tmp"), key=lambda p: (p / PIXELS).stat().st_size)[::-1]
    assert values(load_images(data, cache=cache)) == [0, 1, 2]
    assert not left.exists()  # nobody but this process can have been at it
    assert of_others.exists()  # its maker may still be alive
    for path in (*of_others.iterdir(), of_others):
        os.utime(path, (time.time() - 2 * ABANDONED_SECONDS,) * 2)
    put(data, {"3.png": png(3)})
    assert values(load_images(data, cache=cache)) == [0, 1, 2, 3]
    assert not of_others.exists()


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.data.cache._rename_over", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_images(data, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_process_makes_a_cache_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    cache, seen = tmp_path / "cache", tmp_path / "seen"
    monkeypatch.setattr("fewstep.data.cache.WAITING_SECONDS", 0.02)
    decode = fewstep.data.cache.decode

    def slow(*arguments: Any) -> Any:
        with seen.open("a") as file:
            file.write("decoding\n")
        time.sleep(0.3)
        return decode(*arguments)

    monkeypatch.setattr("fewstep.data.cache.decode", slow)
    children, waited = [], list[str]()
    for _ in range(4):
        if (child := os.fork()) == 0:
            waited.clear()
            images = load_images(
                data, cache=cache, on_progress=lambda what, *_: waited.append(what)
            )
            os._exit(
                10 * (values(images) == [0, 1, 2]) + any("waiting" in what for what in waited)
            )
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(ends) == [10, 11, 11, 11]
    assert seen.read_text() == "decoding\n"
    assert len(list(cache.iterdir())) == 1


def test_a_waiting_process_takes_over_from_one_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    monkeypatch.setattr("fewstep.data.cache.WAITING_SECONDS", 0.02)
    read, write = os.pipe()
    if (child := os.fork()) == 0:

        def hang(*_: object) -> None:
            os.write(write, b"!")
            time.sleep(60)
            os._exit(1)

        fewstep.data.cache.decode = hang  # pyright: ignore[reportAttributeAccessIssue]
        load_images(data, cache=tmp_path / "cache")
    assert os.read(read, 1) == b"!"
    told: list[str] = []

    def kill_once_it_waits(what: str, *_: object) -> None:
        if what.startswith("waiting") and what not in told:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        told.append(what)

    images = load_images(data, cache=tmp_path / "cache", on_progress=kill_once_it_waits)
    assert values(images) == [0, 1, 2] and any(what.startswith("waiting") for what in told)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("kind", ["system", "folder"])
def test_without_locks_caches_are_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    without = {"system": None, "folder": SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4)}
    monkeypatch.setattr("fewstep.data.cache.fcntl", without[kind])
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    assert values(load_images(data, cache=tmp_path / "cache")) == [0, 1, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_for_which_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 8 * 8 * 3 - 1))
    with pytest.raises(DataError, match="3 decoded images.*room"):
        load_images(data, size=8, channels=3, cache=tmp_path / "cache")
    assert len(load_images(data, size=8, channels=1, cache=tmp_path / "cache")) == 3


def test_only_large_sets_are_cached_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    data = put(tmp_path / "data", {f"{k}.png": png(k) for k in range(3)})
    load_images(data)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("fewstep.data.cache.LARGE_FILES", 2)
    assert values(load_images(data)) == [0, 1, 2]
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    data = put(tmp_path / "data", {"1.png": png(1)})
    put(tmp_path, {"file": "in the way"})
    with pytest.raises(DataError, match=r"cannot write the cache.*--cache off"):
        load_images(data, cache=tmp_path / "file" / "cache")


def test_images_that_were_enlarged_are_counted(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(1, 16), "b.png": png(2, 6), "c.png": png(3, 5)})
    images = load_images(tmp_path, size=8)
    assert (images.enlarged, images.smallest) == (2, (5, 5))
    assert any("2 of 3 images are smaller" in f.message for f in check_images(images))
    digits = load_images("mnist-1000", size=32)
    assert (digits.enlarged, digits.smallest) == (1000, (28, 28))
    assert load_images("mnist-1000", size=14).enlarged == 0


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.data.folder.PROGRESS_EVERY", 100)
    put(tmp_path, {f"{k:03d}.png": png(1) for k in range(300)})
    told: list[tuple[str, int, int | None]] = []
    load_images(tmp_path, on_progress=lambda *facts: told.append(facts))
    assert told[:3] == [("finding images", k, None) for k in (100, 200, 300)]
    assert told[3:] == [("decoding", 256, 300)]


def test_npz_round_trip(tmp_path: Path) -> None:
    images = ImageSet(
        torch.arange(48, dtype=torch.uint8).reshape(3, 1, 4, 4),
        torch.tensor([1, 0, 1]),
        ("ä", "b"),
        captions=("x", None, "zß"),
    )
    write_npz(tmp_path / "a.npz", images)
    again = load_images(tmp_path / "a.npz")
    assert again.digest == images.digest and again.class_names == images.class_names
    assert list(again.captions) == list(images.captions)


def test_digest_is_that_of_all_bytes_whatever_the_chunks() -> None:
    pixels = torch.randint(
        0, 256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0)
    ).byte()
    images = ImageSet(pixels)
    assert [len(chunk) for _, chunk in images.chunks(48 * 20)] == [20, 20, 10]
    assert torch.equal(torch.cat([chunk for _, chunk in images.chunks(100)]), pixels)
    assert ImageSet(pixels, torch.zeros(50).long()).digest != images.digest
    changed = pixels.clone()
    changed[49, 2, 3, 3] += 1
    assert ImageSet(changed).digest != images.digest


def test_a_named_set_takes_no_label_file(tmp_path: Path) -> None:
    put(tmp_path, {"l.csv": "a,b\n"})
    with pytest.raises(DataError, match="brings its own"):
        reading.load_images("mnist-1000", labels=tmp_path / "l.csv")
    with pytest.raises(DataError, match="no label file"):
        load_images(tmp_path, labels=tmp_path / "missing.csv")
