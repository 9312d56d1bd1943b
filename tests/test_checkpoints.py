from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewstep.checkpoints as checkpoints
from fewstep.checkpoints import (
    load_json,
    load_tensors,
    only_writer,
    remove_leftovers,
    require_replaceable,
    save_json,
    save_tensors,
    write_folder,
)
from fewstep.errors import CheckpointError, InvalidInputError


def fill(text: str):
    return lambda folder: (folder / "a.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_tensors_survive_bit_for_bit(tmp_path):
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "contiguous": image,
        "channels last": image.to(memory_format=torch.channels_last),
        "strided": image[:, ::2],
        "half": image.half(),
        "bfloat16": image.bfloat16(),
        "scalar": torch.tensor(7.0),
        "count": torch.tensor([1, 2]),
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    found = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: b"\x80\x04\x95 a pickle, which must never be loaded",
        lambda data: b"\xff" * len(data),
    ],
)
def test_unreadable_tensors_name_the_file(tmp_path, spoil):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"x\.safetensors.*(copy it again|earlier)"):
        load_tensors(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors does not exist"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.json"):
        load_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\udcff"])
def test_unreadable_json_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"x\.json"):
        load_json(tmp_path / "x.json")


def test_json_round_trip(tmp_path):
    save_json(tmp_path / "x.json", {"a": [1, 2.5], "ä": None})
    assert load_json(tmp_path / "x.json") == {"a": [1, 2.5], "ä": None}


def test_folder_is_made_with_its_parents_and_replaced(tmp_path):
    path = tmp_path / "deep" / "folder"
    write_folder(path, fill("one"))
    write_folder(path, fill("two"))
    assert content(path) == {"a.txt": "two"}
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("failing", ["write", "_flush", "_rename_over"])
@pytest.mark.parametrize("before", ["nothing", "something"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, failing, before):
    path = tmp_path / "folder"
    if before == "something":
        write_folder(path, fill("old"))

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    write = fill("new")
    if failing == "write":

        def write(folder):
            fill("new")(folder)
            fail()
    else:
        monkeypatch.setattr(checkpoints, failing, fail)
    with pytest.raises(CheckpointError, match="Permission denied.*permissions"):
        write_folder(path, write)
    assert [entry.name for entry in tmp_path.iterdir()] == (
        ["folder"] if before == "something" else []
    )
    if before == "something":
        assert content(path) == {"a.txt": "old"}


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    write_folder(path, fill("old"))
    rename, calls = Path.rename, []

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(CheckpointError, match="No space left"):
        write_folder(path, fill("new"))
    assert content(path) == {"a.txt": "old"}
    assert len(calls) == 3


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a Unix thing")
def test_a_disk_that_is_really_full(tmp_path):
    import resource

    path = tmp_path / "folder"
    write_folder(path, lambda folder: save_tensors(folder / "x", {"a": torch.zeros(10)}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"folder.*free some disk space"):
            write_folder(path, lambda f: save_tensors(f / "x", {"a": torch.ones(1_000_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert torch.equal(load_tensors(path / "x")["a"], torch.zeros(10))


KILLED = """
import os, signal, sys
from pathlib import Path
import fewstep.checkpoints as checkpoints

die_at, calls = int(sys.argv[2]), 0

def counted(function):
    def wrapper(*arguments, **options):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapper

os.fsync = counted(os.fsync)
Path.rename = counted(Path.rename)
Path.mkdir = counted(Path.mkdir)
checkpoints.write_folder(Path(sys.argv[1]), lambda f: (f / "a.txt").write_text("new"))
print("written")
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a Unix thing")
@pytest.mark.parametrize(("die_at", "left"), [(2, "old"), (4, "old"), (5, "old"), (6, "new")])
def test_kill_at_any_system_call_leaves_a_whole_folder(tmp_path, die_at, left):
    """Calls: 1 make, 2 flush the file, 3 the folder, 4 old away, 5 new in, 6 flush the parent."""
    path = tmp_path / "folder"
    write_folder(path, fill("old"))
    command = [sys.executable, "-c", KILLED, str(path), str(die_at)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == -9, result.stderr
    remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert content(path) == {"a.txt": left}


def test_leftovers_are_cleared_and_half_replaced_folders_put_back(tmp_path):
    for name in (".tmp-1f-one", ".old-2f-two", ".old-3f-thr-ee", "two", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    remove_leftovers(tmp_path)
    found = {path.name: content(path)["a.txt"] for path in tmp_path.iterdir()}
    assert found == {"two": "two", "other": "other", "thr-ee": ".old-3f-thr-ee"}
    remove_leftovers(tmp_path / "missing")


def test_one_writer_at_a_time(tmp_path):
    with only_writer(tmp_path / "run"):
        with pytest.raises(CheckpointError, match="another process"):
            with only_writer(tmp_path / "run"):
                pass
    with only_writer(tmp_path / "run"):
        pass


def test_a_file_on_a_full_disk_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    save_json(path, {"a": 1})

    def full(self, text, **_kwargs):
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_json(path, {"a": 2})
    assert load_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    require_replaceable(tmp_path / "new", "config.json", "a model")
    require_replaceable(tmp_path, "config.json", "a model")  # empty
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(InvalidInputError, match=r"is not a model \(there is no config\.json\)"):
        require_replaceable(tmp_path, "config.json", "a model")
    (tmp_path / "config.json").write_text("{}")
    require_replaceable(tmp_path, "config.json", "a model")


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below/it"):
        with (
            pytest.raises(CheckpointError, match="file is a file"),
            only_writer(tmp_path / place),
        ):
            pass
        with pytest.raises(CheckpointError, match="file is a file"):
            write_folder(tmp_path / place, fill("new"))
    assert content(tmp_path) == {"file": ""}
