"""Makes nbdev notebooks read as chapters, and the book whole without the network.

Reading: `#|` lines become MyST-NB tags and vanish. `hide`, `default_exp` and `include: false` remove a cell (it still runs), `export`
folds it, `echo: false`, `output: false` and `code-fold: true` do what they say, `eval: false`, `slow` and `gpu` are shown and not run.

    #| fig-cap: One sentence that states the finding, with {res}`roles` and $math$.
    #| label: fig-stripe

turn a cell's picture into a numbered figure for {numref}`fig-stripe`, its code folded. A second `fig-cap` line continues the first. An exported cell
gets an anchor, `defined-` and its id, at which the reference points.

Writing: plotly's script is copied from the installed package to the pages that use it, MathJax comes from sphinx-mathjax-offline, and what the themes would fetch from elsewhere is left out.
"""
from __future__ import annotations

import json, os, re, shutil
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

_DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
_EXPORTS = {"export", "exporti", "exports", "exporec", "export_and_show"}
_REMOVED = {"hide", "default_exp", "nbdev"}
_UNRUN = {"slow", "gpu"}
_PICTURES = ("image/svg+xml", "image/png", "image/jpeg", "application/vnd.plotly.v1+json", "text/html")


def split_directives(source: str) -> tuple[dict[str, str], str]:
    "The directives at the head of a cell, repeated ones joined, and the source below them."
    directives, lines = {}, source.splitlines()
    while lines and (match := _DIRECTIVE.match(lines[0])):
        directives[match[1]] = f"{directives.get(match[1], '')} {match[2]}".strip()
        lines.pop(0)
    return directives, "\n".join(lines).lstrip("\n") if directives else source


def _tags(directives: dict[str, str], source: str) -> set[str]:
    "The MyST-NB tags that say what the directives say."
    says = {key: value.lower() for key, value in directives.items()}
    tags = set()
    if says.keys() & _REMOVED or says.get("include") == "false": tags.add("remove-cell")
    if says.keys() & _EXPORTS or says.get("code-fold") in ("true", "show") or "fig-cap" in says: tags.add("hide-input")
    if says.get("echo") == "false" or "hide_input" in says or re.fullmatch(r"\s*show_doc\(.*\)\s*", source, re.S): tags.add("remove-input")
    if says.get("output") == "false" or "hide_output" in says: tags.add("remove-output")
    if says.get("eval") == "false" or says.keys() & _UNRUN or "nbdev_export(" in source: tags.add("skip-execution")
    return tags


def read(text: str) -> nbformat.NotebookNode:
    "An .ipynb with its nbdev directives turned into MyST-NB metadata."
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata.setdefault("language_info", {"name": "python", "pygments_lexer": "ipython3"})
    cells, notebook.cells = notebook.cells, []
    for cell in cells:
        directives, source = split_directives(cell.source) if cell.cell_type == "code" else ({}, cell.source)
        if directives.keys() & _EXPORTS: notebook.cells.append(new_markdown_cell(f"(defined-{cell.id})="))       # where the reference points
        notebook.cells.append(cell)
        if cell.cell_type != "code": continue
        cell.source = source
        cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), *_tags(directives, cell.source)})
        settings = cell.metadata.setdefault("mystnb", {})
        what = "exported code" if directives.keys() & _EXPORTS else "code"
        settings.setdefault("code_prompt_show", f"Show the {what}")
        settings.setdefault("code_prompt_hide", f"Hide the {what}")
        if "fig-cap" in directives:
            settings["figure"] = {"caption": directives["fig-cap"], **({"name": directives["label"]} if "label" in directives else {})}
    return notebook


def _single_picture(cell) -> None:
    "Keep one picture of a captioned cell: a figure that is both drawn and returned would come out twice, under one label."
    pictures = [o for o in cell.outputs if any(mime in o.get("data", {}) for mime in _PICTURES)]
    for extra in pictures[1:]: cell.outputs.remove(extra)


def _show_doc(output) -> None:
    "Make the Markdown of `show_doc` fit inside an output, which can hold neither a rule nor a section."
    markdown = output.get("data", {}).get("text/markdown")
    if markdown is None: return
    markdown = re.sub(r"\A---\s*\n", "", "".join(markdown))
    output["data"]["text/markdown"] = re.sub(r"^#{1,6} (.+)$", r"**`\1`**", markdown, count=1, flags=re.M)


def _local_script(output, name: str) -> None:
    "Draw a plotly figure with the script that the book carries."
    data = output.get("data", {})
    figure = data.pop("application/vnd.plotly.v1+json", None)
    if figure is None: return
    height = (figure.get("layout") or {}).get("height", 420)
    data_, layout = (json.dumps(figure.get(part, empty)).replace("</", "<\\/") for part, empty in (("data", []), ("layout", {})))
    data["text/html"] = (f'<div id="plotly-{name}" class="plotly-figure" style="height:{height}px"></div>\n'
                         f'<script>Plotly.newPlot("plotly-{name}", {data_}, {layout}, {{responsive: true, displaylogo: false}})</script>')


def _repair_outputs() -> None:
    "Repair outputs where MyST-NB hands them to its renderer. This replaces a private method: myst-nb is pinned for it."
    from myst_nb.core.execute.base import NotebookClientBase as client
    original = client.code_cell_outputs
    if getattr(original, "repaired", False): return

    def code_cell_outputs(self, index):
        cell = self.notebook.cells[index]
        if cell.metadata.get("mystnb", {}).get("figure"): _single_picture(cell)
        count, outputs = original(self, index)
        for number, output in enumerate(outputs):
            if "show_doc(" in cell.source: _show_doc(output)
            _local_script(output, f"{cell.get('id', index)}-{number}")
        return count, outputs

    code_cell_outputs.repaired = True
    client.code_cell_outputs = code_cell_outputs


def _describe_pictures(app, doctree) -> None:
    "A picture in a captioned figure is described by its caption, citations left out."
    from docutils import nodes
    for figure in doctree.findall(nodes.figure):
        for caption in figure.findall(nodes.caption):
            spoken = caption.deepcopy()
            for node in list(spoken.findall()):
                if isinstance(node, nodes.Element) and node.get("refdomain") == "cite": node.parent.remove(node)
            text = re.sub(r"\s+([.,;])", r"\1", " ".join(spoken.astext().split()))
            for image in figure.findall(nodes.image): image.setdefault("alt", text)


def _plain_kernel(app) -> None:
    "Run the notebooks with IPython settings of the book's own: pictures as SVG, nothing from the reader's home."
    profile = Path(app.outdir).parent / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text('c.InlineBackend.figure_formats = {"svg"}\nc.HistoryManager.enabled = False\nc.IPKernelApp.log_level = 40\n')
    os.environ["IPYTHONDIR"] = str(profile.parent)


_PLOTLY, _MATHJAX = "vendor/plotly.min.js", ("tex-chtml.js", "output/chtml", "input/tex", "ui", "a11y", "sre")


def _page_script(app, pagename, templatename, context, doctree) -> None:
    "Load plotly on the pages that use it."
    if "Plotly.newPlot" in context.get("body", ""): app.add_js_file(_PLOTLY, priority=100)


def _without_thebe(app) -> None:
    "Take back what sphinx-thebe registered: jupyter-book loads it always, and its scripts would come from another host."
    for event, listeners in app.events.listeners.items():
        app.events.listeners[event] = [each for each in listeners if not each.handler.__module__.startswith("sphinx_thebe")]
    app.registry.css_files[:] = [each for each in app.registry.css_files if "thebe" not in each[0]]


def _vendor(app, error) -> None:
    "Copy the scripts from the installed packages."
    if error or app.builder.format != "html": return
    static = Path(app.outdir) / "_static"
    (static / _PLOTLY).parent.mkdir(exist_ok=True)
    shutil.copyfile(Path(find_spec("plotly").origin).parent / "package_data" / "plotly.min.js", static / _PLOTLY)
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for part in _MATHJAX:
        source, target = mathjax / part, static / "vendor" / "mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile(source, target)


def setup(app):
    app.setup_extension("results")
    app.setup_extension("reference")
    _repair_outputs()
    _without_thebe(app)
    app.connect("builder-inited", _plain_kernel)
    app.connect("doctree-read", _describe_pictures)
    app.connect("html-page-context", _page_script)
    app.connect("build-finished", _vendor)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
