"""Safe files: tensors without pickle, and folders that are replaced whole or not at all.

A folder is written under a hidden temporary name, flushed to the disk, and then renamed. So whenever a
process is killed, what lies under the proper name is complete: the old folder or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import CheckpointError, InvalidInputError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

_UNFINISHED, _REPLACED, _LOCK = ".tmp-", ".old-", ".lock"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to one safetensors file.

    Args:
        path: The file.
        tensors: Tensors of any device and memory format, by name.

    Raises:
        CheckpointError: The file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _writing(path):
        save_file(plain, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors that `save_tensors` wrote. No code is ever loaded from a file.

    Raises:
        CheckpointError: The file is missing, cut short, or not safetensors.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; give the folder of a complete checkpoint"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} ({_reason(error)}): it is cut short, damaged or not a safetensors file; "
            "copy it again from its source, or use an earlier checkpoint"
        ) from error


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as readable JSON; a number that is not finite is refused.

    Raises:
        CheckpointError: The file cannot be written; what it held before is unharmed.
    """
    replace_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file of text whole or not at all.

    Raises:
        CheckpointError: It cannot be written; what it held before is unharmed.
    """
    temporary = path.with_name(f"{_UNFINISHED}{path.name}")
    with _writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: The file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} ({_reason(error)}); copy it again from its source, "
            "or use an earlier checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(content).__name__}, not an object with named entries; "
            "copy it again from its source"
        )
    return content


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make a folder appear complete under its name, or not at all.

    A folder that already has the name is replaced; until the new one is complete it stays as it is.

    Args:
        path: The folder to write; its parents are created.
        write: Fills the folder that it is given, which is a temporary neighbour of ``path``.

    Raises:
        CheckpointError: No space, no permission; what ``path`` held before is unharmed.
    """
    temporary = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}-{path.name}")
    try:
        with _writing(path):
            require_folder(path)
            temporary.mkdir(parents=True)
            write(temporary)
            for entry in (*sorted(temporary.rglob("*")), temporary):
                _flush(entry)
            _rename_over(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_replaceable(folder: Path, mark: str, kind: str) -> None:
    """Refuse to replace a folder that holds something else than what is about to be written.

    Args:
        folder: Where somebody wants to write a folder as a whole.
        mark: A file that every folder of this kind has.
        kind: What to call it, such as ``"a model"``.

    Raises:
        InvalidInputError: All that the folder holds would be lost.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise InvalidInputError(
            f"{folder} exists and is not {kind} (there is no {mark}), so all that it holds would be lost; give "
            "another folder, or remove it first"
        )


def remove_leftovers(parent: Path) -> None:
    """Clear away what killed writers left in a folder; a folder caught halfway through its replacement is put back."""
    if not parent.is_dir():
        return
    with _writing(parent):
        for old in parent.glob(f"{_REPLACED}*"):
            original = parent / old.name.removeprefix(_REPLACED).partition("-")[2]
            if not original.exists():
                old.rename(original)
        for prefix in (_UNFINISHED, _REPLACED):
            for leftover in parent.glob(f"{prefix}*"):
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; the system lets go of it even if the process is killed.

    Raises:
        CheckpointError: Another process holds the folder, or it cannot be written to.
    """
    with _writing(folder):
        require_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"another process is writing to {folder}; wait for it, stop it, or give another folder"
                ) from error
        yield


def require_folder(folder: Path) -> None:
    """Refuse a place where no folder can be, for a file has the name already.

    Raises:
        CheckpointError: The message names the file.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise CheckpointError(
                    f"{place} is a file, but a folder is needed there; give another place than {folder}"
                )
            return


def has_writer(folder: Path) -> bool:
    """Say whether a living process holds a folder, see `only_writer`; False where that cannot be known."""
    if fcntl is None:
        return False
    try:
        with (folder / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _rename_over(temporary: Path, path: Path) -> None:
    """Rename a folder onto a name that may be taken: a full folder cannot be replaced in a single system call."""
    if not path.exists():
        temporary.rename(path)
        return
    old = path.with_name(f"{_REPLACED}{uuid.uuid4().hex}-{path.name}")
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that the rename cannot overtake its contents."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot write {path} ({_reason(error)}): free some disk space or check the permissions of the "
            "folder; what was there before is unharmed"
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
