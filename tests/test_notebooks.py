"""The notebooks: in step with the exported code, clean, in order, short, and without typed results."""
import ast, configparser, filecmp, os, re, shutil, subprocess, sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell
from project import FINDINGS, NOTEBOOKS, ROOT, cells, exported, module_of
from typed_numbers import ALLOWED_TAGS, in_cell, typed_numbers

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import colab, results as book_results

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_exported_code_is_in_step(tmp_path):
    for name in ("settings.ini", "nbs", "mechinterp_lib"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    for module in (tmp_path / "mechinterp_lib").rglob("*.py"):
        if module.name != "__init__.py": module.unlink()
    export = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    subprocess.run([sys.executable, "-c", export], cwd=tmp_path, check=True, capture_output=True)
    modules = lambda top: sorted(p.relative_to(top).as_posix() for p in (top / "mechinterp_lib").rglob("*.py"))
    assert modules(ROOT) == modules(tmp_path), "a module without a notebook, or a notebook that was not exported: run nbdev_export"
    differing = filecmp.cmpfiles(ROOT, tmp_path, modules(ROOT), shallow=False)[1:]
    assert differing == ([], []), "exported code differs from its notebook: edit the notebook, then run nbdev_export"


@each_notebook
def test_is_clean(path):
    for number, cell in enumerate(cells(path)):
        if cell.cell_type == "code": assert not cell.outputs and cell.execution_count is None, f"cell {number} has output: run nbdev_clean"
        extra = set(cell.metadata) - {"tags"}
        assert not extra, f"cell {number} has metadata {extra}: run nbdev_clean"


@each_notebook
def test_opens_as_a_chapter(path):
    first = re.sub(r"\A\(.*\)=\n", "", cells(path)[0].source).split("\n\n")
    assert cells(path)[0].cell_type == "markdown" and re.match(r"# \S", first[0]), "starts with an H1"
    assert len(first) > 1 and first[1].startswith("> "), "a one-sentence quote follows the H1"
    headings = [line for c in cells(path) if c.cell_type == "markdown" for line in c.source.splitlines() if re.match(r"# \S", line)]
    assert len(headings) == 1, f"one H1 a notebook: {headings}"
    assert module_of(path) or not exported(path), "the first code cell names the module: #| default_exp"


@each_notebook
def test_exported_cells_are_short(path):
    lengths = {source.splitlines()[1]: len(source.splitlines()) for source in exported(path) if len(source.splitlines()) > 40}
    assert not lengths, f"exported cells over 40 lines: {lengths}"


@each_notebook
def test_few_cells_are_hidden(path):
    code = [c.source for c in cells(path) if c.cell_type == "code"]
    hidden = sum(bool(re.search(r"^#\s*\|\s*hide\s*$", source, re.M)) for source in code)
    hidden -= sum(c.id == colab.ID for c in cells(path))
    assert hidden <= max(1, len(cells(path)) / 5), f"{hidden} of {len(cells(path))} cells are hidden"


@each_notebook
def test_header_is_the_same_everywhere(path):
    found = [(number, c.source) for number, c in enumerate(cells(path)) if "google.colab" in c.source]
    assert found == [(colab.place(cells(path)), colab.header())], "run python book/_ext/colab.py"


@pytest.fixture
def commands(monkeypatch):
    "What a cell would run, kept and not run."
    kept = []
    monkeypatch.setattr(subprocess, "run", lambda arguments, check: kept.append((arguments, check)))
    monkeypatch.setenv("MECHINTERP_HOME", "as it was")
    return kept


def test_header_does_nothing_outside_colab(commands):
    names = {}
    exec(colab.header(), names)
    assert not commands and os.environ["MECHINTERP_HOME"] == "as it was" and set(names) == {"__builtins__", "sys"}


def test_header_installs_in_colab(commands, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec(colab.header(), {})
    home, settings = os.environ["MECHINTERP_HOME"], configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert commands == [(["git", "clone", "--depth", "1", settings["DEFAULT"]["git_url"], home], True), ([sys.executable, "-m", "pip", "install", "-q", f"{home}[sae]"], True)]


@each_notebook
def test_opens_in_jupyterlab(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name in KernelSpecManager().find_kernel_specs() and len({c.id for c in notebook.cells}) == len(notebook.cells)
    kept_back = [c.source for c in notebook.cells if c.cell_type == "code" and re.search(r"^#\s*\|\s*eval:\s*false", c.source, re.M)]
    assert not kept_back, "Jupyter would run this: show code that cannot run here in a Markdown cell"


@pytest.mark.parametrize("folder", ["nbs", "."])
@pytest.mark.parametrize("name", ["00_core", "03_data"])
def test_runs_in_jupyter(name, folder, monkeypatch):
    monkeypatch.delenv("MECHINTERP_HOME", raising=False)
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / folder)}}).execute()
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")


def _imports(source: str) -> set[str]:
    "The modules of this package that a cell imports, at the top or inside a function."
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module: found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
    return {name.removeprefix("mechinterp_lib.") for name in found if name.startswith("mechinterp_lib.")}


@each_notebook
def test_imports_only_earlier_notebooks(path):
    order = {module_of(p): p for p in NOTEBOOKS}
    used = {order[name] for c in cells(path) if c.cell_type == "code" for name in _imports(c.source) if name in order}
    later = sorted(p.name for p in used if p.name > path.name)
    assert not later, f"imports later notebooks: {later}"
    if path in FINDINGS: assert not [p.name for p in used & set(FINDINGS) - {path}], "findings never import each other"


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_findings_print_their_numbers(path):
    found = {f"cell {number}": seen for number, cell in enumerate(cells(path)) if (seen := in_cell(cell))}
    assert not found, f"typed numbers (print them with the res role, or tag the cell {' or '.join(sorted(ALLOWED_TAGS))}): {found}"


@pytest.mark.parametrize("name", ["book/intro.md", "book/lab_notebook.md", "book/safety.md", "README.md"])
def test_pages_print_their_numbers(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "README.md": text = "".join(re.findall(r"^## [^\n]*(?:[Ff]ound|[Ff]inding)[^\n]*\n.*?(?=^## |\Z)", text, re.M | re.S))
    assert not typed_numbers(re.sub(r"Python \d+\.\d+", "", text))


def test_written_findings_are_current():
    written = ROOT / "results" / "FINDINGS.md"
    if not written.exists(): pytest.skip("no findings yet: mechinterp report")
    from mechinterp_lib.report import findings_page
    assert findings_page() == written.read_text(encoding="utf-8"), "run mechinterp report"


def test_a_share_is_told_as_a_count(): assert book_results.render({"value": 0.8, "ci_low": 0.4, "ci_high": 1.0, "n": 5}, "of") == "4\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}5"


def test_readme_numbers_are_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert book_results.refresh(text, ROOT) == text, "run python book/_ext/results.py"


PLANTED = ["the loss is 1.48 nats", "copies 97% of them", "97 % of heads", "fell by .02 ", "p = 3e-4", "after 2,000 steps", "1-2 heads per model",
           "a 3-fold gain", "**0.75** [0.73, 0.77]", "> quoted 0.5", "| L5H1 | 0.92 |", "took 40 minutes", "```{admonition} Claim\n:class: verdict\nEffect\n: 0.3\n```"]
HARMLESS = ["{res}`induction_heads.loss:.2f` nats", "`lr=1e-3` and $p < 0.05$", "$$\n0.5 x\n$$", "```python\nx = 0.75\n```", "L5H1 in GPT-2 and BabyLlama-105",
            "in 2022 {cite:p}`olsson2022`", "1. first\n2. second", "[a page](https://a.org/1.5)", "Figure 3 of Part 2", "<!--res a.b-->0.75<!--/res-->", "<!--findings-->\n0.75\n<!--/findings-->",
            "(fig-0.5)=\n# A title"]


@pytest.mark.parametrize("prose", PLANTED)
def test_a_planted_number_is_found(prose): assert in_cell(new_markdown_cell(prose))


@pytest.mark.parametrize("prose", HARMLESS)
def test_what_is_no_result_passes(prose): assert not in_cell(new_markdown_cell(prose))


def test_captions_count_and_tags_excuse():
    assert in_cell(new_code_cell("#| fig-cap: The stripe reaches 0.75.\nplot()"))
    assert not in_cell(new_code_cell("x = 0.75"))
    for tag in ALLOWED_TAGS: assert not in_cell(new_markdown_cell("about 40%", metadata={"tags": [tag]}))
    assert in_cell(new_markdown_cell("about 40%", metadata={"tags": ["other"]}))
