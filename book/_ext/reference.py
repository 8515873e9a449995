"""Pages about every public name of the library, written from its modules before the book is built: signature, docstring, and a link to the cell that defines it.

Nothing is imported: signatures are read off the syntax tree, the cells off the lines that nbdev writes above them. `reference/MODULE.html#NAME`
is the place of a name; notebooks link to it by {py:func}`~mechinterp_lib.MODULE.NAME`.
"""
from __future__ import annotations

import ast, json, re
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = "reference"
_CELL = re.compile(r"^# %% (?:\.\./)+nbs/([\w.]+) #(\w+)$", re.M)
_PROPERTIES = {"property", "cached_property"}


@dataclass
class Entry:
    "A public name: what it is, its signature without the name, its text, the notebook and cell that define it, and what belongs to it."
    kind: str
    name: str
    signature: str = ""
    text: str = ""
    cell: tuple[str, str] | None = None
    options: dict[str, str] = field(default_factory=dict)
    members: list[Entry] = field(default_factory=list)


def _decorators(node) -> set[str]:
    "The last words of a definition's decorators."
    return {ast.unparse(each.func if isinstance(each, ast.Call) else each).rpartition(".")[2] for each in node.decorator_list}


def _function(node, kind: str = "function", name: str | None = None) -> Entry:
    "A function, method or property."
    decorators, arguments = _decorators(node), node.args
    if kind != "function" and "staticmethod" not in decorators: arguments.args = arguments.args[1:]
    returns = ast.unparse(node.returns) if node.returns else ""
    text = ("A context manager. " if "contextmanager" in decorators else "") + (ast.get_docstring(node) or "")
    if decorators & _PROPERTIES: return Entry("property", name or node.name, text=text, options={"type": returns} if returns else {})
    options = {"classmethod": ""} if "classmethod" in decorators else {}
    return Entry(kind, name or node.name, f"({ast.unparse(arguments)})" + (f" -> {returns}" if returns else ""), text, options=options)


def _attached(tree: ast.Module, cls: str) -> list[tuple[str, str, bool]]:
    "Methods that later cells give to a class, `Scan.plot, Scan.share = _plot, property(_share)`: name, function, and whether it is a property."
    found = []
    for node in tree.body:
        if not isinstance(node, ast.Assign): continue
        pair = node.targets[0], node.value
        for target, value in zip(*(each.elts for each in pair)) if all(isinstance(each, ast.Tuple) for each in pair) else [pair]:
            if not (isinstance(target, ast.Attribute) and ast.unparse(target.value) == cls): continue
            found.append((target.attr, ast.unparse(value.args[0] if isinstance(value, ast.Call) else value), isinstance(value, ast.Call)))
    return found


def _comment(node, lines: list[str]) -> str:
    "The comment behind a statement."
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip()
    return rest.removeprefix("#").strip() if rest.startswith("#") else ""


def _class(node: ast.ClassDef, tree: ast.Module, lines: list[str]) -> Entry:
    "A class with its fields, or the arguments of its `__init__`, and its public methods."
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and not ast.unparse(each.annotation).startswith("ClassVar")]
    text = [ast.get_docstring(node) or ""]
    if node.bases: text.append("A kind of " + ", ".join(f"`{ast.unparse(base)}`" for base in node.bases) + ".")
    if told := [f"- `{each.target.id}`: {said}" for each in fields if (said := _comment(each, lines))]: text.append("\n".join(told))
    signature = _function(methods["__init__"], "method").signature if "__init__" in methods else "(" + ", ".join(map(ast.unparse, fields)) + ")" if "dataclass" in _decorators(node) else ""
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    members = [_function(each, "method") for name, each in methods.items() if not name.startswith("_")]
    for name, function, is_property in _attached(tree, node.name):
        entry = _function(functions[function], "method", name)
        members.append(Entry("property", name, text=entry.text, options={"type": entry.signature.rpartition(" -> ")[2]}) if is_property else entry)
    return Entry("class", node.name, signature, "\n\n".join(text), members=members)


def _values(node, lines: list[str]) -> list[Entry]:
    "Constants, each with its value where it is short, and the comment behind them."
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else [node.targets[0]]
    values = node.value.elts if len(targets) > 1 and isinstance(node.value, ast.Tuple) else [node.value] * len(targets)
    shown = [value if len(value := ast.unparse(each)) <= 200 else "" for each in values]
    kind = {"type": ast.unparse(node.annotation)} if isinstance(node, ast.AnnAssign) else {}
    said = _comment(node, lines)
    if said and len(targets) > 1: said = ", ".join(f"`{ast.unparse(target)}`" for target in targets) + f": {said}"
    return [Entry("data", target.id, text=said, options=kind | ({"value": value} if value else {})) for target, value in zip(targets, shown) if isinstance(target, ast.Name)]


def public_entries(source: str) -> tuple[str, list[Entry]]:
    "The docstring of a module, and its public names in the order of its cells."
    tree, lines, public, found = ast.parse(source), source.splitlines(), [], []
    cells = [(source.count("\n", 0, match.start()), (match[1], match[2])) for match in _CELL.finditer(source)]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__": public, made = ast.literal_eval(node.value), []
        elif isinstance(node, (ast.Assign, ast.AnnAssign)): made = _values(node, lines)
        elif isinstance(node, ast.FunctionDef): made = [_function(node)]
        elif isinstance(node, ast.ClassDef): made = [_class(node, tree, lines)]
        else: continue
        for entry in made: entry.cell = next((cell for line, cell in reversed(cells) if line < node.lineno), None)
        found += made
    entries = [entry for entry in found if entry.name in public]
    if missing := set(public) - {entry.name for entry in entries}: raise ValueError(f"no definition of {missing}")
    return ast.get_docstring(tree) or "", entries


def headings(notebook: Path) -> dict[str, str]:
    "The chapter and section in which each cell of a notebook stands, by the cell's id."
    chapter, section, found = "", "", {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for level, title in re.findall(r"^(#+) (.+)$", "".join(cell["source"]), re.M) if cell["cell_type"] == "markdown" else []:
            chapter, section = (title, "") if level == "#" else (chapter, title)
        found[cell["id"]] = ": ".join(filter(None, (chapter, section)))
    return found


def _block(entry: Entry, module: str, places: dict[str, str], fence: str = "`````") -> str:
    "An entry as a directive of Sphinx's Python domain."
    options = "".join(f":{name}: {json.dumps(value)}\n" for name, value in entry.options.items())
    parts = [entry.text, *(_block(member, module, places, fence[1:]) for member in entry.members)]
    if entry.cell: parts.append(f"Defined in {{ref}}`{places[entry.cell[1]]} <defined-{entry.cell[1]}>`")
    return f"{fence}{{py:{entry.kind}}} {entry.name}{entry.signature}\n{options}\n" + "\n\n".join(filter(None, parts)) + f"\n{fence}"


def module_page(path: Path, root: Path) -> tuple[str, str, list[Entry]]:
    "The name of a module, the text of its page, and its entries."
    module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
    subtitle, entries = public_entries(path.read_text(encoding="utf-8"))
    notebook = f"nbs/{entries[0].cell[0]}"
    head = f"# {module.rpartition('.')[2]}\n\n> {subtitle}\n\n`{module}` is exported from the chapter [](/{notebook}); each name links to the cell that defines it.\n\n```{{py:module}} {module}\n```\n"
    places = headings(root / notebook)
    return module, "\n\n".join([head, *(_block(entry, module, places) for entry in entries)]) + "\n", entries


def index_page(modules: list[tuple[str, str, list[Entry]]]) -> str:
    "Every public name on one page."
    lines = ["# Every public name", "> The library, module by module: what each function takes and returns, and the chapter that explains and tests it.",
             "Shapes are jaxtyping's: `Float[Tensor, \"batch pos d_model\"]` is a tensor of floats with three axes. What is not usable is refused with an {py:class}`~mechinterp_lib.core.InputError` that names the argument, what it was, and what is allowed. All names in the order of the alphabet: {ref}`genindex`."]
    for module, text, entries in modules:
        short = module.removeprefix("mechinterp_lib.")
        lines.append(f"## [{short}](/{FOLDER}/{short.replace('.', '/')}.md)\n\n{text.split('> ', 1)[1].split(chr(10))[0]}\n\n" + " · ".join(f"{{py:obj}}`~{module}.{entry.name}`" for entry in entries))
    return "\n\n".join(lines) + "\n"


def write_pages(root: Path) -> list[Path]:
    "Write a page for each module and an index below `root/reference`; a page that is as it was is left alone, one without a module vanishes."
    paths = [path for folder in ("mechinterp_lib", "mechinterp_lib/experiments") for path in sorted((root / folder).glob("[a-z]*.py"))]
    modules = [module_page(path, root) for path in paths]
    pages = {root / FOLDER / f"{module.removeprefix('mechinterp_lib.').replace('.', '/')}.md": text for module, text, _ in modules} | {root / FOLDER / "index.md": index_page(modules)}
    for page, text in pages.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text: page.write_text(text, encoding="utf-8")
    for page in set((root / FOLDER).rglob("*.md")) - pages.keys(): page.unlink()
    return list(pages)


def _short_anchors(app, doctree) -> None:
    "On a page of the reference the place of `mechinterp_lib.models.load_model` is `#load_model`."
    from sphinx.addnodes import desc_signature
    if not app.env.docname.startswith(f"{FOLDER}/"): return
    for signature in doctree.findall(desc_signature): signature["ids"].insert(0, signature["fullname"])


def _known_type(app, env, node, contnode):
    "A type in a signature is a link if the library defines it, in whatever module; any other is plain text."
    from sphinx.util.nodes import make_refnode
    if node.get("refdomain") != "py" or not node.get("refdoc", "").startswith(f"{FOLDER}/"): return None
    known = [(name, entry) for name, entry in env.domaindata["py"]["objects"].items() if name.rpartition(".")[2] == node["reftarget"] and entry.objtype == "class"]
    if len(known) != 1: return contnode
    name, entry = known[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app):
    write_pages(Path(app.srcdir))
    app.connect("doctree-read", _short_anchors)
    app.connect("missing-reference", _known_type)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
