"""README.md and docs/*.md: every Python block runs, every command parses, every link leads somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import torch

from lalora_kernels.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
LINKING = ("CONTRIBUTING.md", "SECURITY.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line of its first statement, text) of the page's blocks in ``language``, top to bottom."""
    text = path.read_text()
    return [(text[: m.start(2)].count("\n") + 1, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def run_page(path: Path, namespace: dict) -> int:
    """Run the page's Python blocks in one namespace; an error's traceback names the page and its line."""
    found = blocks(path, "python")
    for line, text in found:
        exec(compile("\n" * (line - 1) + text, str(path), "exec"), namespace)
    return len(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_python_block_runs(path, tmp_path, monkeypatch):
    if not blocks(path, "python"):
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if str(path.relative_to(ROOT)) in pages.NEEDS_CUDA and not torch.cuda.is_available():
        pytest.skip("its blocks need a CUDA device")
    prepare = pages.NAMESPACES.get(str(path.relative_to(ROOT)), lambda monkeypatch: {})
    run_page(path, {"__name__": "__main__", **prepare(monkeypatch)})


def test_a_wrong_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\nand\n\n```python\nassert x == 2, 'wrong'\n```\n")
    with pytest.raises(AssertionError, match="wrong") as caught:
        run_page(page, {})
    assert caught.traceback[-1].lineno == 9  # from 0: the page's tenth line
    page.write_text("```python\nx = (\n```\n")
    with pytest.raises(SyntaxError):
        run_page(page, {})


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_lalora_command_parses(path):
    for _, text in [*blocks(path, "sh"), *blocks(path, "")]:
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("lalora "):
                build_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / n for n in LINKING)], ids=lambda p: p.stem)
def test_every_link_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_make_docs_builds_without_warnings(tmp_path):
    """The command that ``make docs`` would run, warnings being errors."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # a make within a make says more
    make = ["make", "-n", "docs"]
    plan = subprocess.run(make, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    _, *command = plan.splitlines()[-1].replace("docs/api", str(tmp_path)).split()
    assert command[:2] == ["-W", "error"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "Poisson" in (tmp_path / "lalora_kernels.html").read_text()
