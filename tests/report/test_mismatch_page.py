"""The page of a log-prob mismatch in a real browser."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import dump, screenshot
from demo_run import demo_run
from PIL import Image

from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir

SCRIPT = Path(__file__).resolve().parents[2] / "tools/analyze/logprob_mismatch.py"


@pytest.fixture
def page_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The script in this process, with --html: the page, or what it said against it."""

    def call(*arguments: object, target: Path) -> Path:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--html", str(target)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr()
        if left.value.code == 78:
            raise UserError(said.err)
        assert f"page: {target}" in said.out
        return target

    return call


def figures_of(document: str) -> set[str]:
    return set(re.findall(r'<figure id="([^"]+)"', document))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return demo_run(tmp_path_factory.mktemp("other") / "run", rollouts=10, noise=3e-2)


def test_page_of_a_run_with_mismatch(noisy: RunDir, page_of: Callable[..., Path], tmp_path: Path) -> None:
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


def test_page_of_equal_bits(finished: RunDir, page_of: Callable[..., Path], tmp_path: Path) -> None:
    document = dump(page_of(finished.path, target=tmp_path / "page.html").as_uri())
    assert '<span class="state good">bitwise</span>' in document
    assert "Nothing is recommended: every token has the same bits" in document
    assert [title for title in ("All tokens", "Ratios", "Corrections", "Worst tokens") if f"<h2>{title}</h2>" in document] == ["All tokens", "Corrections"]


def test_page_of_a_comparison(noisy: RunDir, other: RunDir, page_of: Callable[..., Path], tmp_path: Path) -> None:
    document = dump(page_of(other.path, "--against", noisy.path, target=tmp_path / "page.html").as_uri())
    assert '<span class="state bad">further off</span>' in document
    assert figures_of(document) >= {"ratios-run", "ratios-against", "probabilities-run", "probabilities-against", "by-position", "step-kl-k3"}
    assert "beyond noise" in document


def test_other_files_are_not_replaced(noisy: RunDir, page_of: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "mine.html"
    target.write_text("mine")
    with pytest.raises(UserError, match="no page that miles made"):
        page_of(noisy.path, target=target)
    assert target.read_text() == "mine"
