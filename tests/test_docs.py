"""The documents: the generated pages match the registries, and every link between documents leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")


def make_docs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "make_docs.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_generated_pages_are_up_to_date() -> None:
    done = make_docs("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_differs_is_reported(tmp_path: Path) -> None:
    assert make_docs("--docs", str(tmp_path)).returncode == 0
    page = tmp_path / "samplers.md"
    text = page.read_text(encoding="utf-8").replace("ODE of order 2", "ODE of order 3", 1)
    page.write_text(text, encoding="utf-8")
    done = make_docs("--check", "--docs", str(tmp_path))
    assert done.returncode == 1
    assert "samplers.md differs" in done.stdout and "schedulers.md" not in done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    broken = []
    for name, anchor in LINK.findall(prose(path)):
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{name}#{anchor}" if anchor else name)
    assert not broken, f"{path.name} links to {', '.join(broken)}"


def test_anchors_are_those_of_the_headings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A sampler of your *own*\n\n```text\n# code\n```\n## `euler_ancestral`\n")
    assert anchors(page) == {"a-sampler-of-your-own", "euler_ancestral"}


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The names by which a link reaches a document's headings."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
