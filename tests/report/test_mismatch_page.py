"""The page of a log-prob mismatch in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import dump, screenshot
from demo_run import demo_run
from PIL import Image

from miles.data.store.run_dir import RunDir

SCRIPT = Path(__file__).resolve().parents[2] / "tools/analyze/logprob_mismatch.py"


def page_of(*arguments: object, target: Path) -> Path:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments), "--html", target], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    assert f"page: {target}" in done.stdout
    return target


def figures_of(document: str) -> set[str]:
    return set(re.findall(r'<figure id="([^"]+)"', document))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return demo_run(tmp_path_factory.mktemp("other") / "run", rollouts=10, noise=3e-2)


def test_page_of_a_run_with_mismatch(noisy: RunDir, tmp_path: Path) -> None:
    page = page_of(noisy.path, target=tmp_path / "page.html")
    document = dump(page.as_uri())
    assert figures_of(document) >= {"ratios", "probabilities", "step-kl-k3", "step-abs-diff", "by-position", "by-rollout-probability", "divergence"}
    for title in ("All tokens", "Ratios", "Where and since when", "Corrections", "Worst tokens"):
        assert f"<h2>{title}</h2>" in document
    assert document.index('id="verdict"') < document.index("<h2>")
    assert "<mark>" in document, "worst tokens stand in their text"
    assert "IcePop" in document
    identifiers = re.findall(r'\bid="([^"]+)"', document)
    assert len(identifiers) == len(set(identifiers))
    for outside in ("<script", " src=", "@import", "url(", "http-equiv=\"refresh"):
        assert outside not in document
    for width in (1280, 400):
        picture = Image.open(screenshot(page.as_uri(), tmp_path / "page.png", width, 1500)).convert("RGB")
        colours = picture.getcolors(1 << 24) or []
        assert len(colours) > 200
        assert max(count for count, _ in colours) < 0.95 * width * 1500, "not blank"


def test_page_of_equal_bits(finished: RunDir, tmp_path: Path) -> None:
    document = dump(page_of(finished.path, target=tmp_path / "page.html").as_uri())
    assert '<span class="state good">bitwise</span>' in document
    assert "Nothing is recommended: every token has the same bits" in document
    assert "<h2>Worst tokens</h2>" not in document


def test_page_of_a_comparison(noisy: RunDir, other: RunDir, tmp_path: Path) -> None:
    document = dump(page_of(other.path, "--against", noisy.path, target=tmp_path / "page.html").as_uri())
    assert '<span class="state bad">further off</span>' in document
    assert figures_of(document) >= {"ratios-run", "ratios-against", "probabilities-run", "probabilities-against", "by-position", "step-kl-k3"}
    assert "beyond noise" in document


def test_other_files_are_not_replaced(noisy: RunDir, tmp_path: Path) -> None:
    target = tmp_path / "mine.html"
    target.write_text("mine")
    done = subprocess.run([sys.executable, SCRIPT, noisy.path, "--html", target], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (78, "")
    assert "no page that miles made" in done.stderr
    assert target.read_text() == "mine"
