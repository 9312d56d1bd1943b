"""The project as a whole: its documents run, its files are fit to publish, its import is light."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fewstep"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Written in pieces, so that this file passes its own test.
FORBIDDEN_TEXT = [
    "../" + "shared",
    "/" + "work/",
    "/tmp/" + "brief",
    "file:" + "///",
    "/opt/" + "wheels",
    "pypi" + ".org",
    "python" + "hosted",
    "download.pytorch" + ".org",
    "npmjs" + ".org",
    "index" + "-url",
    "find" + "-links",
]
FORBIDDEN_PATTERN = re.compile(r"\bissues? #?\d", re.IGNORECASE)

HEAVY_MODULES = {
    "accelerate",
    "diffusers",
    "gradio",
    "matplotlib",
    "PIL",
    "rich",
    "safetensors",
    "scipy",
    "transformers",
    "typer",
}
UNSAFE_LOADERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: its info string, its text, and the line where it starts."""

    language: str
    text: str
    line: int


def fenced_blocks(document: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown document, those indented in lists too."""
    fence = re.compile(
        r"^(?P<indent> *)(?P<marks>`{3,})(?P<language>[^`\n]*)\n(?P<text>.*?)^ *(?P=marks) *$",
        re.MULTILINE | re.DOTALL,
    )
    for match in fence.finditer(document):
        line = document.count("\n", 0, match.start("text")) + 1
        yield Block(match["language"].strip(), textwrap.dedent(match["text"]), line)


def fewstep_commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each `fewstep ...` line; where there are `$` prompts, of those."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        if line.startswith("fewstep "):
            yield shlex.split(line, comments=True)[1:]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )


def project_files() -> list[Path]:
    """Every file that is, or is about to be, under version control."""
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = {ROOT / name for name in listing.stdout.split("\0") if name}
    return sorted(path for path in paths if path.is_file())


@pytest.mark.global_rng
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_run_as_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in fenced_blocks(path.read_text(encoding="utf-8")):
        if block.language == "python":
            # Leading newlines make a traceback point at the line of the document.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(path), "exec"), namespace)
        elif block.language in {"bash", "console"}:
            for arguments in fewstep_commands(block.text):
                done = run(sys.executable, "-m", "fewstep", *arguments, cwd=tmp_path)
                assert done.returncode == 0, (
                    f"{path.name}, block at line {block.line}: "
                    f"`fewstep {shlex.join(arguments)}` exited {done.returncode}\n"
                    f"{done.stdout}{done.stderr}"
                )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_example_escapes_by_its_tag(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    for block in fenced_blocks(path.read_text(encoding="utf-8")):
        tag = block.language.lower()
        if tag.startswith(("py", "bash", "sh", "console", "zsh")):
            assert tag in {"python", "bash", "console"}, (
                f"{path.name}, line {block.line}: a block tagged {block.language!r} would not "
                "be run; tag it python, bash or console"
            )


def test_fenced_blocks_and_commands_are_found() -> None:
    document = textwrap.dedent("""\
        # Title
        ```python
        x = 1
        ```
        1. in a list
           ```console
           $ make demo
           $ fewstep sample digits \\
               --out "a b.png"  # a comment
           fewstep wrote a b.png
           ```
        ````text
        ```python
        inner
        ```
        ````
    """)
    python, console, text = fenced_blocks(document)
    assert (python.language, python.text, python.line) == ("python", "x = 1\n", 3)
    assert (console.language, text.language) == ("console", "text")
    assert list(fewstep_commands(console.text)) == [["sample", "digits", "--out", "a b.png"]]
    assert list(fewstep_commands("make demo\nfewstep doctor\n")) == [["doctor"]]


def test_version_has_one_source() -> None:
    import fewstep

    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert fewstep.__version__ == metadata["project"]["version"]


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, torch\n"
        "before = set(sys.modules)\n"
        "import fewstep\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "fewstep" in imported
    assert not imported & HEAVY_MODULES


def test_no_file_mentions_the_workshop() -> None:
    found = []
    for path in project_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8").lower()
        words = [word for word in FORBIDDEN_TEXT if word in text]
        words += FORBIDDEN_PATTERN.findall(text)
        found += [f"{path.relative_to(ROOT)}: {word}" for word in words]
    assert not found, "\n".join(found)


def test_repository_stays_small() -> None:
    size = sum(path.stat().st_size for path in project_files())
    assert size < 60 * MEBIBYTE, f"{size / MEBIBYTE:.1f} MiB under version control"


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_source_never_loads_a_pickle(path: Path) -> None:
    assert not list(unsafe_loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, pickle as p",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_loads_are_recognised(code: str) -> None:
    assert list(unsafe_loads(code))


def test_safe_loads_are_accepted() -> None:
    code = "import numpy as np\nfrom safetensors.torch import load_file\nnp.load('x.npz')"
    assert not list(unsafe_loads(code))
    assert not list(unsafe_loads("import torch\ntorch.load('x', weights_only=True)"))


def unsafe_loads(code: str) -> Iterator[str]:
    """Yield a description of everything in the code that could execute a file's content."""
    restricted: set[ast.expr] = (
        set()
    )  # what is called with weights_only=True; calls are walked before their parts
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(func=func, keywords=keywords) if any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in keywords
            ):
                restricted.add(func)
            case ast.Import(names=names):
                modules = {alias.name.partition(".")[0] for alias in names}
                yield from (f"import {name}" for name in modules & UNSAFE_LOADERS)
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] in UNSAFE_LOADERS:
                    yield f"from {module}"
                if module == "torch" and any(alias.name == "load" for alias in names):
                    yield "from torch import load"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load") if node not in restricted:
                yield "torch.load"
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield "allow_pickle"
