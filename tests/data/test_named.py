"""Sets known by name: mirrors, checksums, cache, parsers, and the bundled one."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data import cache_dir, check_images, load_images, named
from fewstep.data.named import NAMED_SETS, RemoteFile, parse_cifar_binary, parse_idx
from fewstep.errors import DataError

RNG = np.random.default_rng(0)
DIGITS = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
DIGIT_LABELS = np.array([3, 1, 4, 1, 5], np.uint8)
CIFAR_TRAIN = ("data_batch_1.bin", "data_batch_2.bin")


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def cifar_archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Web:
    """Stands in for the network: serves files by address and keeps what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def open(self, request: urllib.request.Request, timeout: float) -> io.BytesIO:
        assert timeout > 0
        self.asked.append(request.full_url)
        if request.full_url not in self.files:
            raise urllib.error.URLError("no network")
        return io.BytesIO(self.files[request.full_url])


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Web:
    web = Web()
    monkeypatch.setattr(urllib.request, "urlopen", web.open)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return web


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """MNIST's entry with the checksums of a tiny set in place of the real ones."""
    contents = [gzip.compress(idx(DIGITS)), gzip.compress(idx(DIGIT_LABELS))]
    files = tuple(
        RemoteFile(file.name, hashlib.md5(content).hexdigest())
        for file, content in zip(NAMED_SETS["mnist"].splits["train"], contents, strict=True)
    )
    monkeypatch.setitem(NAMED_SETS["mnist"].splits, "train", files)
    return contents


def serve(web: Web, contents: list[bytes], mirror: int = 0) -> None:
    entry = NAMED_SETS["mnist"]
    for file, content in zip(entry.splits["train"], contents, strict=True):
        web.files[entry.mirrors[mirror] + file.name] = content


def test_fetched_once_then_from_the_cache(web: Web, small_mnist: list[bytes]) -> None:
    serve(web, small_mnist)
    images = load_images("mnist")
    np.testing.assert_array_equal(images.images[:, 0], DIGITS)
    assert images.labels is not None and images.labels.tolist() == DIGIT_LABELS.tolist()
    assert images.labels.dtype == torch.int64
    assert images.class_names == tuple("0123456789") and images.source == "mnist"
    assert len(web.asked) == 2
    web.files.clear()
    assert torch.equal(load_images("mnist").images, images.images)
    assert len(web.asked) == 2
    names = {path.name for path in (cache_dir() / "data" / "mnist").iterdir()}
    assert names == {file.name for file in NAMED_SETS["mnist"].splits["train"]}


def test_next_mirror_is_tried(web: Web, small_mnist: list[bytes]) -> None:
    serve(web, [content[:-1] for content in small_mnist], mirror=0)
    serve(web, small_mnist, mirror=1)
    assert len(load_images("mnist")) == 5
    assert len(web.asked) == 4


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_offline_names_the_file_to_supply(web: Web, name: str, split: str) -> None:
    file = NAMED_SETS[name].splits[split][0]
    with pytest.raises(DataError) as caught:
        load_images(name, split=split)
    message = str(caught.value)
    assert file.name in message and file.md5 in message and "no network" in message
    assert str(cache_dir() / "data" / name / file.name) in message
    assert ".npz" in message and "mnist-1000" in message


def test_wrong_download_never_reaches_the_cache(web: Web, small_mnist: list[bytes]) -> None:
    serve(web, [content[:-1] for content in small_mnist])
    with pytest.raises(DataError, match="the download has MD5"):
        load_images("mnist")
    assert list((cache_dir() / "data" / "mnist").iterdir()) == []


def test_wrong_file_in_the_cache_is_named(web: Web) -> None:
    path = cache_dir() / "data" / "cifar10" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=f"{path} has MD5 .* delete it"):
        load_images("cifar10")
    assert path.read_bytes() == b"something else" and web.asked == []


def test_supplied_file_is_used_without_network(web: Web, small_mnist: list[bytes]) -> None:
    folder = cache_dir() / "data" / "mnist"
    folder.mkdir(parents=True)
    for file, content in zip(NAMED_SETS["mnist"].splits["train"], small_mnist, strict=True):
        (folder / file.name).write_bytes(content)
    assert len(load_images("mnist", size=8, channels=3)) == 5
    assert web.asked == []


def test_cifar_by_name(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    records = [bytes([k]) + image.tobytes() for k, image in enumerate(images)]
    members = {f"data_batch_{k + 1}.bin": records[k] for k in range(5)}
    content = cifar_archive({**members, "test_batch.bin": records[5]})
    file = RemoteFile("cifar-10-binary.tar.gz", hashlib.md5(content).hexdigest())
    for split in ("train", "test"):
        monkeypatch.setitem(NAMED_SETS["cifar10"].splits, split, (file,))
    web.files[NAMED_SETS["cifar10"].mirrors[0] + file.name] = content
    train, test = load_images("cifar10"), load_images("cifar10", split="test")
    np.testing.assert_array_equal(train.images, images[:5])
    np.testing.assert_array_equal(test.images, images[5:])
    assert train.labels is not None and train.labels.tolist() == [0, 1, 2, 3, 4]
    assert test.labels is not None and test.labels.tolist() == [5]
    assert train.class_names[3] == "cat" and len(web.asked) == 1


@pytest.mark.parametrize("array", [DIGITS, DIGIT_LABELS])
@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_idx(array: np.ndarray, wrap: Callable[[bytes], bytes]) -> None:
    np.testing.assert_array_equal(parse_idx(wrap(idx(array))), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        idx(DIGITS)[:-1],
        idx(DIGITS) + b"\x00",
        idx(DIGITS)[:10],
        b"\x00\x00\x0d" + idx(DIGITS)[3:],
        b"<html>not here</html>",
        gzip.compress(idx(DIGITS), mtime=0)[:-12],
    ],
)
def test_broken_idx(content: bytes) -> None:
    with pytest.raises(DataError):
        parse_idx(content)


def test_cifar_binary() -> None:
    images = RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    labels = [7, 0, 9]
    records = [
        bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True)
    ]
    archive = cifar_archive({CIFAR_TRAIN[1]: records[2], CIFAR_TRAIN[0]: records[0] + records[1]})
    read_images, read_labels = parse_cifar_binary(archive, CIFAR_TRAIN)
    np.testing.assert_array_equal(read_images, images)
    assert read_labels.tolist() == labels


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        cifar_archive({"data_batch_1": b"a pickle"}),
        cifar_archive(dict.fromkeys(CIFAR_TRAIN, bytes(3072))),
        cifar_archive(dict.fromkeys(CIFAR_TRAIN, b"")),
        cifar_archive(dict.fromkeys(CIFAR_TRAIN, RNG.bytes(3073)))[:-2000],
    ],
)
def test_broken_cifar(content: bytes) -> None:
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz"):
        parse_cifar_binary(content, CIFAR_TRAIN)


def test_bundled_subset(web: Web) -> None:
    digits = load_images("mnist-1000")
    assert digits.shape == (1, 28, 28) and digits.labels is not None
    assert torch.bincount(digits.labels).tolist() == [100] * 10
    assert check_images(digits) == [] and web.asked == []
    # MNIST's published mean is 0.1307; 1,000 images come within a few of their standard errors.
    assert abs(digits.images.float().mean().item() / 255 - 0.1307) < 0.005
    with pytest.raises(DataError, match="no 'test' split"):
        load_images("mnist-1000", split="test")
    packaged = Path(named.__file__).parent / "mnist-1000.npz"
    assert packaged.stat().st_size < 400_000


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FEWSTEP_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "fewstep"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fewstep"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_dir() == tmp_path / "Library" / "Caches" / "fewstep"
