"""The paper: built from the chapters' cells, eight to twelve pages, with nothing typed and nothing missing; and the book on paper."""
import re, shutil, sys

import pytest
from project import FINDINGS, ROOT, SITE
from typed_numbers import typed_numbers

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import paper, print_book

from mechinterp_lib.core import load_results

OWN_TEXT = sorted((ROOT / "book" / "paper").glob("*.md"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The paper's sources in a folder, what wrote them, and the paper in two columns."
    folder = tmp_path_factory.mktemp("paper")
    writer = paper.write(ROOT, folder)
    return folder, writer, paper.compile_pdf(folder)


def n_pages(pdf: bytes) -> int: return len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_two_columns_make_eight_to_twelve_pages_always_the_same(built):
    folder, _, pdf = built
    assert pdf.startswith(b"%PDF") and 8 <= n_pages(pdf) <= 12
    assert paper.compile_pdf(folder) == pdf


def test_one_column_builds(built):
    pdf = paper.compile_pdf(built[0], columns=1)
    assert pdf.startswith(b"%PDF") and n_pages(pdf) > n_pages(built[2])


def test_its_results_exist_and_are_of_every_finding(built):
    used, experiments = built[1].used, {path.stem[3:] for path in FINDINGS}
    assert len(used) > 300 and {key.partition(".")[0] for key in used} <= experiments
    missing = [key for key in used if key.partition(".")[2] not in load_results(key.partition(".")[0])]
    assert not missing


def test_every_section_of_findings_has_a_figure_and_is_in_the_tables(built):
    folder, writer, _ = built
    drawn, text = {figure.module for figure in writer.drawn.values()}, (folder / "main.typ").read_text(encoding="utf-8")
    assert len(writer.chapters()) >= 7
    for name in writer.chapters():
        assert f"mechinterp_lib.experiments.{name[3:]}" in drawn, f"{name} has no figure in the paper"
        assert text.count(f"strong[{writer.title(name)}]") == 2, f"{name} is missing in the tables of what failed and of what was claimed"
    assert all("<svg" in (folder / f"{label}.svg").read_text(encoding="utf-8") for label in writer.drawn)


def test_figures_are_cited_or_stand_alone(built):
    text = (built[0] / "main.typ").read_text(encoding="utf-8")
    assert {label for label in re.findall(r"@(fig-[\w-]+)", text)} <= set(built[1].drawn)
    assert "{res}" not in text and "{cite" not in text and "fig-cap" not in text


@pytest.mark.parametrize("path", OWN_TEXT, ids=lambda path: path.stem)
def test_its_own_text_types_no_number(path):
    own = re.sub(r"^```\{from\}.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)     # words by which a chapter's text is found
    assert typed_numbers(own) == []


@pytest.mark.parametrize("source, said", [
    ("{res}`induction_heads.nothing`", "no result 'induction_heads.nothing'"), ("{res}`nothing.at_all`", "no results for 'nothing'"),
    ("{cite:p}`nobody2000`", "references.bib has no"), ("{ref}`nowhere`", "cannot show"), ("![a picture](a.png)", "cannot show image"), (r"$\mathfrak{a}$", "does not know"),
    ("```{from} 20_induction_heads\nwords that are not there\n```", "no paragraphs"), ("```{from} 20_induction_heads\nthe\n```", "one is needed"),
    ("```{from} 20_induction_heads\nPrediction 12 said ... words that are not there\n```", "does not go on"),
    ("```{from} 20_induction_heads\nfig-none\n```", "no figure 'fig-none'"), ("```{from} 99_nothing\nwords\n```", "no chapter '99_nothing'"), ("```{models} none\n:caption: c\n```", "models/none")])
def test_what_is_missing_stops_the_build_with_one_line(source, said):
    with pytest.raises(paper.PaperError, match=re.escape(said)) as raised: paper.Writer(ROOT).text(source, "page.md")
    assert "\n" not in str(raised.value)


@pytest.fixture
def small(tmp_path):
    "A book of one chapter."
    from nbformat import v4, write
    cells = [v4.new_markdown_cell("One is said. Two is *said* at 0.5 too (but not\nso). Three?\n\n- an item\n  of a list\n\n| a | b |\n|---|---|\n| c | d |"), v4.new_code_cell("#| default_exp plots"),
             v4.new_code_cell("import numpy as np\ntable = {'a': 1}\nassert False, 'not run'"), v4.new_code_cell("table['a'] = 2\nunused = 1 / 0"),
             v4.new_code_cell("#| fig-cap: A map.\n#| label: fig-map\nheatmap(np.full((table['a'], 2), [x for x in [1.0]]), x_label='x', y_label='y', colour_label='c')")]
    (tmp_path / "nbs").mkdir()
    write(v4.new_notebook(cells=cells), tmp_path / "nbs" / "20_small.ipynb")
    return tmp_path


@pytest.mark.parametrize("words, taken", [("Two ...", "Two is *said* at 0.5 too (but not so)."), ("said at", None), ("is *said* at", "Two is *said* at 0.5 too (but not so). Three?"),
    ("One ... not so", "One is said. Two is *said* at 0.5 too (but not so)."), ("an item", "an item of a list"), ("| c |", "| a | b |\n|---|---|\n| c | d |")])
def test_whole_sentences_are_taken(small, words, taken):
    if taken: assert paper.take(small, "20_small", words) == taken
    else: pytest.raises(paper.PaperError, paper.take, small, "20_small", words)


def test_a_figure_runs_what_it_needs_and_no_more(small):
    figure = paper.find_figure(small, "20_small", "fig-map")
    figure.width, figure.flat = 3.0, 1.0
    assert figure.caption == "A map." and len(figure.code) == 4
    assert paper.draw(figure) == paper.draw(figure) and "<svg" in paper.draw(figure)


@pytest.mark.parametrize("tex, typst", [(r"\frac{a}{b_\text{c}}", 'frac(a, b _("c"))'), (r"x^{10} \le \hat y", "x ^(10) <= hat(y)"), (r"p_\ell / 0.5", r"p _(ell) \/ 0.5")])
def test_formulas(tex, typst): assert paper.math(tex) == typst


def test_printing_the_book_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="needs Chromium"): print_book.print_book(tmp_path / "book.pdf")


@pytest.mark.skipif(not any(map(shutil.which, print_book.BROWSERS)) or not (SITE / "nbs").exists(), reason="no Chromium on the PATH, or the book is not built")
def test_a_printed_page_is_text_and_figures(tmp_path):
    from pypdf import PdfReader
    browser = next(filter(None, map(shutil.which, print_book.BROWSERS)))
    print_book.print_page(browser, SITE / "nbs" / "25_across_models.html", tmp_path / "page.pdf")
    text = " ".join(" ".join(page.extract_text() for page in PdfReader(tmp_path / "page.pdf").pages).split())
    assert "What models have in common" in text and "Verdicts" in text
    assert "Show the" not in text, "folded code is printed"
