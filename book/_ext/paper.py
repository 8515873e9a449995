"""Build the paper from the chapters' own cells: `make paper`, or `python book/_ext/paper.py --columns 1`.

The Markdown files in `book/paper/` are the manifest, in the order of their names. What they say themselves is connecting text, in the book's MyST
with its `{res}` and `{cite:p}` roles; everything else is taken from the chapters:

    ```{from} 20_induction_heads
    Every head of layer 1 draws              the paragraph (or table, or verdict card) with these words, from their sentence on
    Is it the two-head ... the stripe falls  from the sentence with these words to the one with those
    + The controls, keys or queries ...      the sentence with these words; the + joins it to the paragraph before
    fig-course                               the figure of that label, drawn anew; `fig-course wide` over both columns,
                                             `fig-course 6` as if 6 inches wide, for smaller letters
    ```

A table takes its caption from a first line `:caption: ...`. `{failed}` and `{claims}` make a table of the predictions that failed and of the verdict
cards, of all chapters that have a section (its target is the chapter's name); `{models}` makes one of trainings. Words that a chapter does not hold,
or holds twice, and a result, a citation or a figure that is not there stop the build with one line.
"""
from __future__ import annotations

import argparse, ast, configparser, functools, importlib, json, re, shutil, symtable, sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nbformat, pybtex.database
from nbdev_book import split_directives
from results import lookup, render

from mechinterp_lib.report import written_by

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 5.0                                                                # inches: a figure before it is fitted into a column
_TEX = {"ell": "ell", "mid": "|", "|": "||", ",": "", "ge": ">=", "le": "<=", "in": "in", "notin": "in.not", "sum": "sum", "cdot": "dot", "emptyset": "emptyset", "setminus": "without", "cup": "union",
        "dots": "dots", "to": "->", "mapsto": "|->"}                       # LaTeX's names and Typst's, of what the chapters' formulas use
_TEX_CALLS = {"frac": ("frac", 2), "bar": ("macron", 1), "hat": ("hat", 1), "sqrt": ("sqrt", 1), "overline": ("overline", 1)}


_FAILS = r"\b[Ff]ails?\b|\bin part\b"                                     # how a chapter says that a prediction did not hold, or not all of it


class PaperError(Exception): "What the paper asks for is not there."


@functools.cache
def _parser():
    from markdown_it.renderer import RendererHTML
    from myst_parser.config.main import MdParserConfig
    from myst_parser.parsers.mdit import create_md_parser
    return create_md_parser(MdParserConfig(enable_extensions={"attrs_inline", "colon_fence", "deflist", "dollarmath", "smartquotes"}), RendererHTML)


def tree(source: str):
    from markdown_it.tree import SyntaxTreeNode
    return SyntaxTreeNode(_parser().parse(source))


def blocks(source: str) -> list[str]:
    "The paragraphs, items, tables, formulas and directives of a Markdown text, as they are written; paragraphs and items on one line."
    lines = source.splitlines()
    parts = [part for node in tree(source).children if node.map for part in (node.children if node.type == "bullet_list" else [node])]
    texts = [(part.type, "\n".join(lines[slice(*part.map)]).strip()) for part in parts]
    return [" ".join(text.removeprefix("- ").split()) if kind in ("paragraph", "list_item") else text for kind, text in texts]


@functools.cache
def chapter(root: Path, name: str) -> list:
    "The cells of a chapter, or a page of `book/` as one cell."
    path, page = root / "nbs" / f"{name}.ipynb", root / "book" / f"{name}.md"
    if path.exists(): return nbformat.read(path, as_version=4).cells
    if page.exists(): return [nbformat.v4.new_markdown_cell(page.read_text(encoding="utf-8"))]
    raise PaperError(f"there is no chapter {name!r} in nbs/")


@functools.cache
def prose(root: Path, name: str) -> list[str]: return [block for cell in chapter(root, name) if cell.cell_type == "markdown" for block in blocks(cell.source)]


def take(root: Path, name: str, words: str) -> str:
    "The sentences of a chapter's paragraph from the one with some words on, as the module says; a table, a formula or a card is taken whole."
    start, dots, end = (part.strip() for part in words.partition("..."))
    found = [block for block in prose(root, name) if start in block]
    if len(found) != 1: raise PaperError(f"{name} has {len(found) or 'no'} paragraphs with the words {start!r}; one is needed")
    text = found[0]
    if re.match(r"[`:]{3,}\{|\||\$\$", text): return text
    edges = [0, *(match.end() for match in re.finditer(r"[.?!][)*\"]*(?=\s)", text)), len(text)]
    first = text.index(start)
    last = len(text) if not dots else text.find(end, first) + len(end) if end in text[first:] else -1
    if last < 0: raise PaperError(f"{name}: the paragraph with {start!r} does not go on to {end!r}")
    return text[max(edge for edge in edges if edge <= first):min(edge for edge in edges if edge >= max(last, first + len(start)))].strip()


# Figures: of a chapter's code only what its figure needs is run

def _names(statement: ast.stmt) -> tuple[set[str], set[str]]:
    "The names that a statement binds or changes, and those that it reads."
    top = symtable.symtable(ast.unparse(statement), "<cell>", "exec")
    below, tables = set(), list(top.get_children())
    for scope in tables:
        tables += scope.get_children()
        below |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
    changed = {node.value.id for node in ast.walk(statement) if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)}
    bound = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()}
    return bound | changed, below | {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}


def find_figure(root: Path, name: str, label: str) -> SimpleNamespace:
    "A chapter's figure: its caption, the module that the chapter exports, and the statements that draw it."
    before, module = [], ""
    for cell in chapter(root, name):
        if cell.cell_type != "code": continue
        directives, source = split_directives(cell.source)
        module = directives.get("default_exp", module)
        if directives.get("label") == label: break
        if not directives.keys() & {"export", "exporti", "default_exp"}: before += ast.parse(source).body
    else: raise PaperError(f"{name} has no figure {label!r}")
    kept = ast.parse(source).body
    needed = set().union(*(_names(statement)[1] for statement in kept))
    for statement in reversed(before):
        bound, read = _names(statement)
        if bound & needed: kept, needed = [statement, *kept], needed | read
    return SimpleNamespace(caption=directives["fig-cap"], module=f"mechinterp_lib.{module}", code=kept)


def draw(figure: SimpleNamespace) -> str:
    "Its SVG, with darker letters than on a page that may be dark; a map that answers to the pointer is drawn still."
    from mechinterp_lib import plots
    def still(values, height=None, **options): return plots.heatmap(values, first_row="bottom", **options)
    def lower(height, *rest, **options): return new_figure(height * figure.flat, *rest, **options)
    names, new_figure = dict(vars(importlib.import_module(figure.module))), plots._new_figure
    with patch.object(plots, "WIDTH", figure.width), patch.object(plots, "_new_figure", lower), patch.object(plots, "interactive_heatmap", still):
        exec(compile(ast.Module(figure.code[:-1], []), "<figure>", "exec"), names)
        drawn = eval(compile(ast.Expression(figure.code[-1].value), "<figure>", "eval"), names)
    for axes in getattr(drawn, "axes", []):                               # a label longer than its axis is set smaller
        room, long = axes.get_window_extent().height, axes.yaxis.label.get_window_extent().height
        if long > room: axes.yaxis.label.set_size(axes.yaxis.label.get_size() * room / long)
    if not hasattr(drawn, "savefig"): raise PaperError(f"{figure.module} draws a {type(drawn).__name__}, which cannot be printed")
    return drawn._repr_svg_().replace(plots.GREY, "#333333")


# From MyST to Typst

def _escape(text: str) -> str: return re.sub(r"([\\#$*_`<>@\[\]~/=+\-\"';])", r"\\\1", text)


def math(tex: str) -> str:
    "The LaTeX of a formula as Typst; what is not in the two lists above is an error."
    tokens = re.findall(r'\\[A-Za-z]+|\\.|"[^"]*"|[\d.]+|\S', re.sub(r"\\(?:text|mathrm)\{([^}]*)\}", r'"\1"', tex))[::-1]
    def atom() -> str:
        token = tokens.pop()
        if token == "{":
            inside = []
            while tokens[-1] != "}": inside.append(atom())
            return tokens.pop() and " ".join(inside)
        if token in "^_": return f"{token}({atom()})"
        if token[0] != "\\": return "\\/" if token == "/" else token
        if token[1:] in _TEX_CALLS:
            name, count = _TEX_CALLS[token[1:]]
            return f"{name}({', '.join(atom() for _ in range(count))})"
        if token[1:] not in _TEX: raise PaperError(f"the paper does not know {token} in a formula")
        return _TEX[token[1:]]
    parts = []
    while tokens: parts.append(atom())
    return " ".join(parts)


def _scope(wide: bool) -> str: return '"parent"' if wide else '"column"'


def table(rows: list[list[str]], columns: str, caption: str, label: str = "", *, wide: bool = False, long: bool = False) -> str:
    "A table in Typst, its first row a header; a row of one cell is a heading within it. A long one stays where it is and may be broken."
    cells = [f"table.header(level: 2, table.cell(colspan: {len(rows[0])}, strong[{row[0]}]))" if len(row) == 1 else ", ".join(f"[{cell}]" for cell in row) for row in rows[1:]]
    place = "placement: none" if long else f"placement: auto, scope: {_scope(wide)}"
    head = ", ".join(f"[{cell}]" for cell in rows[0])
    return f"#figure(kind: table, {place}, caption: [{caption}], table(columns: {columns}, table.header({head}), {', '.join(cells)})){label and f' <{label}>'}\n\n"


class Writer:
    "Writes the manifest as Typst; `used` holds the results that it printed, `drawn` the chapters' figures by label."
    def __init__(self, root: Path):
        self.root, self.used, self.drawn, self.where = root, set(), {}, ""
        self.files = {path.name: path.read_text(encoding="utf-8") for path in sorted((root / "book" / "paper").glob("*.md"))}
        text = "\n".join(self.files.values())
        self.sections, self.figures = set(re.findall(r"^(?:\(|:label: )(\w+)(?:\)=)?$", text, re.M)), set(re.findall(r"^(fig-[\w-]+)", text, re.M))
        self.papers = pybtex.database.parse_file(root / "book" / "references.bib").entries

    def text(self, source: str, where: str) -> str:
        "Markdown as Typst; references to figures that the paper leaves out go with their brackets."
        kept = lambda match: re.sub(r"\{numref\}`([^`]*)`(?:, )?", lambda one: one[0] if one[1] in self.figures else "", match[0])
        source = re.sub(r" \((?:\{numref\}`[^`]*`(?:, )?)+\)", lambda match: kept(match).replace(" ()", ""), source)
        self.where, outer = where, self.where
        written = self.render(tree(source))
        self.where = outer
        return written

    def line(self, source: str, where: str) -> str: return self.text(source, where).strip()

    def render(self, node) -> str:
        handler = getattr(self, f"on_{node.type}", None)
        if not handler: raise PaperError(f"{self.where}: the paper cannot show {node.type} ({node.content[:40]!r})")
        return handler(node)

    def inside(self, node) -> str: return "".join(map(self.render, node.children))

    on_root = on_inline = on_list_item = on_thead = on_tbody = inside

    def on_paragraph(self, node): return self.inside(node) + "\n\n"
    def on_text(self, node): return _escape(node.content)
    def on_softbreak(self, node): return " "
    def on_em(self, node): return f"#emph[{self.inside(node)}]"
    def on_strong(self, node): return f"#strong[{self.inside(node)}]"
    def on_code_inline(self, node): return f"#raw({json.dumps(node.content, ensure_ascii=False)})"
    def on_math_inline(self, node): return f"${math(node.content)}$"
    def on_math_block(self, node): return f"$ {math(node.content)} $\n\n"
    def on_bullet_list(self, node): return "".join(f"- {self.inside(item).strip()}\n" for item in node.children) + "\n"
    def on_ordered_list(self, node): return "".join(f"+ {self.inside(item).strip()}\n" for item in node.children) + "\n"
    def on_myst_target(self, node): self.target = f" <{node.content}>"; return ""

    def on_heading(self, node):
        label, self.target = getattr(self, "target", ""), ""
        return f"{'=' * int(node.tag[1])} {self.inside(node)}{label}\n" + "\n" * (node.tag < "h3")

    def on_link(self, node):
        page = re.fullmatch(r"([\w-]+)\.ipynb", node.attrs["href"])
        if page and not node.children: return f"@{page[1]}" if page[1] in self.sections else f"the book's chapter #emph[{_escape(self.title(page[1]))}]"
        return self.inside(node) if page or ":" not in node.attrs["href"] else f"#link({json.dumps(node.attrs['href'])})[{self.inside(node)}]"

    def title(self, name: str) -> str: return re.search(r"^# (.*)", chapter(self.root, name)[0].source, re.M)[1]

    def on_myst_role(self, node):
        role, content = node.meta["name"], node.content
        if role == "res":
            key, _, spec = content.partition(":")
            try: shown = render(lookup(self.root, key), spec)
            except (LookupError, ValueError) as error: raise PaperError(f"{self.where}: no result {content!r}: {error.args[0]}") from None
            self.used.add(key)
            return _escape(re.sub(r"(?<=,) ", "\N{NO-BREAK SPACE}", shown))
        if role in ("cite", "cite:p", "cite:t"):
            if unknown := set(keys := content.replace(" ", "").split(",")) - set(self.papers): raise PaperError(f"{self.where}: references.bib has no {sorted(unknown)}")
            return " and ".join(self.authors(key) + f" #cite(<{key}>)" for key in keys) if role == "cite:t" else " ".join(f"#cite(<{key}>)" for key in keys)
        if role == "numref": return f"@{content}" if content in self.figures else "a figure of the book"
        if role == "ref" and content in self.sections: return f"@{content}"
        if role in ("term", "doc"): return _escape(re.sub(r"\s*<.*>", "", content))
        raise PaperError(f"{self.where}: the paper cannot show {{{role}}}`{content}`")

    def authors(self, key: str) -> str: return _escape(written_by(self.papers[key]))

    def rows(self, node) -> list[list]: return [row.children for part in node.children for row in part.children]

    def named(self, options): return self.line(options["caption"], self.where), options.get("label", "")

    def on_table(self, node, *names):
        rows = [[self.inside(cell).strip() for cell in row] for row in self.rows(node)]
        return table(rows, f"{len(rows[0])}", *names, wide=len(rows[0]) > 3)

    def on_fence(self, node):
        kind = re.fullmatch(r"\{(\w+)\} ?(.*)", node.info.strip())
        if not kind or not hasattr(self, f"do_{kind[1]}"): raise PaperError(f"{self.where}: the paper cannot show a block {node.info!r}")
        options = dict(re.findall(r"^:(\w+): (.*)\n?", node.content, re.M))
        return getattr(self, f"do_{kind[1]}")(kind[2], options, re.sub(r"\A(?::\w+: .*\n)+", "", node.content))

    on_colon_fence = on_fence

    def do_admonition(self, title, options, content):
        "A verdict card."
        parts = iter([self.inside(part).strip() for part in tree(content).children[0].children])
        entries = ", ".join(f"([{name}], [{said}])" for name, said in zip(parts, parts))
        return f'#card("{options["class"].split()[-1]}", [{self.line(title, self.where)}], {entries})\n\n'

    def do_from(self, name, options, content):
        written, figures = [], []
        for line in content.strip().splitlines():
            if line.startswith("fig-"): figures.append(self.figure(name, *line.split())); continue
            join = line.startswith("+ ")
            source = take(self.root, name, line.removeprefix("+ "))
            if figures and written and not join: written, figures = written + figures, []         # between paragraphs
            written += ["\0" * join, self.on_table(tree(source).children[0], *self.named(options)) if source.startswith("|") else self.text(source, name)]
        return "".join(written + figures)

    def figure(self, name, label, *options):
        wide, widths = "wide" in options, [float(option) for option in options if option != "wide"]
        self.drawn[label] = find_figure(self.root, name, label)
        self.drawn[label].width, self.drawn[label].flat = (widths or [9.0 if wide else WIDTH])[0], 1 if wide else 0.8
        return f'#figure(placement: auto, scope: {_scope(wide)}, picture("{label}.svg", wide: {json.dumps(wide)}), caption: [{self.line(self.drawn[label].caption, name)}]) <{label}>\n\n'

    def do_failed(self, names, options, content):
        "The lines of the chapters' accounts of their predictions that say that something failed, or holds in part; `%failed` and `%all` in the caption count lines."
        rows, lines = [["", "predicted", "found"]], []
        for self.where in self.chapters():
            rows.append([_escape(self.title(self.where))])
            said = [item for cell in chapter(self.root, self.where) if "prediction" in cell.metadata.get("tags", []) for block in tree(cell.source).children if block.type == "ordered_list" for item in block.children]
            for node in (tree(block).children[0] for block in prose(self.root, self.where) if re.match(r"\| *\| predicted \||1\. \*\w", block)):     # a table, or a list whose items begin with a name
                if node.type == "table": found = [self.row(row) for row in self.rows(node)[1:]]
                else: found = [[str(i), self.inside(item).strip(), self.inside(account).strip().partition(": ")[2]] for i, (item, account) in enumerate(zip(said, node.children), 1)]
                lines += found
                rows += [row for row in found if re.search(_FAILS, row[-1])]
        failed = sum(len(row) > 1 for row in rows[1:])
        caption, label = self.named(options | {"caption": options["caption"].replace("%failed", str(failed)).replace("%all", str(len(lines)))})
        return table(rows, "(auto, 1fr, 1.15fr)", caption, label, long=True)

    def row(self, cells) -> list[str]:
        "Number, prediction, and what was found, behind it how many models were as predicted."
        number, said, *counts, found = (self.inside(cell).strip() for cell in cells)
        counts = re.sub(r" of (\d+)(?=, .* of \1$)", "", ", ".join(filter(None, counts)).replace("\N{NO-BREAK SPACE}", " "))
        return [number, said, found + (f" ({counts})" if counts else "")]

    def chapters(self): return sorted(name for name in self.sections if (self.root / "nbs" / f"{name}.ipynb").exists())

    def do_claims(self, names, options, content):
        rows = [["claim", "verdict"]]
        for name in self.chapters():
            rows.append([_escape(self.title(name))])
            cards = [re.match(r"`+\{admonition\} (.*)\n:class: verdict (\w+)", block) for block in prose(self.root, name)]
            rows += [[self.line(card[1], name), f'#verdict("{card[2]}")'] for card in cards if card]
        return table(rows, "(1fr, auto)", *self.named(options), long=True)

    def do_models(self, names, options, content):
        "How models were trained, from what is kept beside them."
        rows = [["model", "class", "layers", "width", "parameters", "context", "steps", "rows a step", "seeds"]]
        for name in names.split():
            kept = [json.loads(path.read_text()) for path in sorted((self.root / "models" / name).glob("seed*[0-9]/training.json"))]
            if not kept: raise PaperError(f"models/{name} holds no training.json")
            recipe, shape = kept[0]["recipe"], kept[0]["recipe"]["architecture"]
            layers, width = (next(shape[key] for key in keys if key in shape) for keys in (("n_layers", "n_layer", "num_hidden_layers", "layers"), ("d_model", "n_embd", "hidden_size", "width")))
            numbers = (layers, width, kept[0]["parameters"], recipe["n_ctx"], recipe["steps"], recipe["batch_size"], len(kept))
            rows.append([f"#raw({json.dumps(name)})", _escape(shape["class"]), *(f"{number:,}" for number in numbers)])
        return table(rows, f"{len(rows[0])}", *self.named(options), wide=True)


def write(root: Path, folder: Path) -> Writer:
    "Write the paper's Typst, figures and bibliography into a folder."
    writer, about = Writer(root), configparser.ConfigParser(delimiters=["="])
    about.read(root / "settings.ini")
    (first, opening), *others = writer.files.items()
    title, _, abstract = opening.removeprefix("# ").partition("\n")
    body = re.sub(r"\s*\0", " ", "\n".join(writer.text(text, name) for name, text in others))
    head = f'#import "paper.typ": *\n#show: paper.with([{writer.line(title, first)}], [{_escape(about["DEFAULT"]["author"])}], [{writer.line(abstract, first)}])\n\n'
    folder.mkdir(parents=True, exist_ok=True)
    for label, figure in writer.drawn.items(): (folder / f"{label}.svg").write_text(draw(figure), encoding="utf-8")
    shutil.copyfile(root / "book" / "paper" / "paper.typ", folder / "paper.typ")
    papers = (root / "book" / "references.bib").read_text(encoding="utf-8")
    (folder / "references.bib").write_text(re.sub(r"\n *url *= *\{https://arxiv\.org/[^}]*\}", "", papers), encoding="utf-8")          # the number of the preprint says it
    (folder / "main.typ").write_text(head + body + '\n#bibliography("references.bib", title: "References", style: "nature")\n', encoding="utf-8")
    return writer


def compile_pdf(folder: Path, columns: int = 2) -> bytes:
    import typst
    return typst.Compiler(folder / "main.typ", root=folder, ignore_system_fonts=True, sys_inputs={"columns": str(columns)}).compile(format="pdf")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the paper from the chapters' own cells.")
    parser.add_argument("--columns", type=int, choices=(1, 2), default=2)
    folder = ROOT / "book" / "_build" / "paper"
    try:
        write(ROOT, folder)
        (folder / "paper.pdf").write_bytes(compile_pdf(folder, parser.parse_args().columns))
    except PaperError as error: sys.exit(f"the paper was not built: {error}")
    print(f"The paper: {folder / 'paper.pdf'}")
