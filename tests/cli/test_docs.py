"""Cited sections of docs/ exist, relative links resolve, the worked example is the model's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from model import ModelArgs, Transformer
from tiers import FULL, FULL_INTERPRETED

ROOT = Path(__file__).resolve().parent.parent.parent
SECTIONS = """
    dimensions whole-model hyper-connections rope attention compressor indexer quantised-points
    experts mtp checkpoint tokenizer prompt-format training disagreements later-variants pitfalls
    tokenizer-ids
"""


def tracked(*patterns: str) -> list[Path]:
    """Files of the project: git's in a repository, else all but those in hidden folders."""
    run = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode == 0 and run.stdout:
        return [path for name in run.stdout.splitlines() if (path := ROOT / name).exists()]
    found = (path for pattern in patterns for path in ROOT.rglob(pattern))
    return [
        path for path in found if not any(p.startswith(".") for p in path.parts[len(ROOT.parts) :])
    ]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def citations(text: str) -> list[tuple[str, str]]:
    """Citations of sections, `#one, #two` after a page counting as two -> (page, anchor)."""
    found = []
    for page, rest in re.findall(r"docs/([\w-]+\.md)((?:(?:,\s*)?#[\w-]+)+)", text):
        found += [(page, anchor) for anchor in re.findall(r"#([\w-]+)", rest)]
    return found


def test_the_specification_has_the_sections_that_docstrings_cite():
    assert anchors(ROOT / "docs/v4.md") >= set(SECTIONS.split())


def test_every_cited_section_exists():
    wrong, cited = [], 0
    for path in tracked("*.py", "*.md", "*.cpp", "*.h", "*.patch", "*.toml"):
        for page, anchor in citations(path.read_text(encoding="utf-8")):
            cited += 1
            if not (ROOT / "docs" / page).exists() or anchor not in anchors(ROOT / "docs" / page):
                wrong.append(f"{path.relative_to(ROOT)}: docs/{page}#{anchor}")
    assert cited > 50 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or anchor and anchor not in anchors(file):
            wrong.append(target)
    assert not wrong


@torch.no_grad()
def test_the_worked_example_is_what_the_model_computes():
    """docs/v4.md#attention: the keys of a token that is decoded at position 1000."""
    model = Transformer(ModelArgs.debug())
    model.setup_caches(1, 2048, max_rewind=8)
    attention, compressor = model.layers[1].attn, model.layers[1].attn.compressor
    assert attention.ring.rows.shape[1] - 1 == 136 and compressor.ring.rows.shape[1] - 1 == 16
    assert (873 % 136, 999 % 136, 1000 % 136, 1000 % 16) == (57, 47, 48, 8)
    _, plan, _ = model.embed_inputs(torch.tensor([[5]]), torch.tensor([1000]))
    assert plan.window_len.item() == 128
    for ratio, entries in ((4, 250), (128, 7)):
        windows = plan.windows[ratio]
        assert (windows.lo.item(), windows.hi.item()) == (0, entries)
        assert windows.slot.item() == -(-2048 // ratio)  # unfinished: the spare slot


def test_what_a_default_run_leaves_out_is_named():
    """By file."""
    page = (ROOT / "docs" / "compile.md").read_text(encoding="utf-8")
    section = page.split("### Not covered by a default run")[1]
    files = set()
    named = [re.split(r"\\\.py", pattern)[0] for pattern in {**FULL, **FULL_INTERPRETED}]
    for path in (ROOT / "tests").rglob("test_*.py"):
        if any(re.fullmatch(name, path.stem) for name in named):
            files.add(path.name)
        if re.search(r"^@pytest\.mark\.full", path.read_text(encoding="utf-8"), re.M):
            files.add(path.name)
    assert len(files) > 10 and {name for name in files if f"`{name}`" not in section} == set()
