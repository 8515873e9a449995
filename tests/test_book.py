"""The built book: every chapter there, its numbers printed, its pictures described, and nothing fetched from another host."""
import os, re, sys
from html.parser import HTMLParser

import pytest
import yaml
from project import ROOT, SITE, cells

if not (SITE / "index.html").exists() and not os.environ.get("MECHINTERP_NEEDS_BOOK"):
    pytest.skip("the book is not built: run make book", allow_module_level=True)

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import reference

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
DOCUMENTS = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
PAGES = [SITE / f"{document}.html" for document in DOCUMENTS]
CHAPTERS = [ROOT / f"{document}.ipynb" for document in DOCUMENTS if document.startswith("nbs/")]

# Attributes by which a browser fetches without being asked; <a href> is not among them.
FETCHES = {"script": ["src"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"], "video": ["src", "poster"], "audio": ["src"],
           "embed": ["src"], "object": ["data"], "image": ["href", "xlink:href"], "use": ["href", "xlink:href"], "input": ["src"]}
LINKS_THAT_FETCH = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest", "apple-touch-icon"}
OUTSIDE = re.compile(r"^\s*(?:https?:)?//", re.I)
OUTSIDE_IN_CSS = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.I)
OUTSIDE_IN_SCRIPT = re.compile(r"(?:\bimport\s*\(?|\bfrom|\bfetch\(|importScripts\(|\.src\s*=)\s*[\"'`]((?:https?:)?//[^\"'`]+)")


class Fetched(HTMLParser):
    "Collects what a page makes a browser fetch, its scripts and styles, and its pictures."
    def __init__(self):
        super().__init__()
        self.urls, self.inline, self.pictures, self.inside = [], [], [], None

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.urls += [attributes[name] for name in FETCHES.get(tag, []) if name in attributes]
        if tag == "link" and LINKS_THAT_FETCH & set(attributes.get("rel", "").split()): self.urls.append(attributes.get("href", ""))
        if tag == "img": self.pictures.append(attributes)
        if "style" in attributes: self.inline.append(attributes["style"])
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag): self.inside = None

    def handle_data(self, data):
        if self.inside: self.inline.append(data)


def fetched(html: str) -> Fetched:
    page = Fetched()
    page.feed(html)
    return page


def outside(html: str) -> list[str]:
    "What the page would fetch from another host."
    page = fetched(html)
    return [url for url in page.urls if OUTSIDE.match(url)] + [u for text in page.inline for pattern in (OUTSIDE_IN_CSS, OUTSIDE_IN_SCRIPT) for u in pattern.findall(text)]


def test_every_chapter_is_a_page():
    assert [page.relative_to(SITE).as_posix() for page in PAGES if not page.exists()] == []
    unlisted = {p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")} - {p.stem for p in CHAPTERS}
    assert not unlisted, f"_toc.yml lists no {unlisted}"


@pytest.mark.parametrize("page", sorted(p for p in SITE.rglob("*.html") if "_static" not in p.parts), ids=lambda page: page.relative_to(SITE).as_posix())
def test_page_stands_alone(page):
    html = page.read_text(encoding="utf-8")
    assert outside(html) == []
    missing = [url for url in fetched(html).urls if url and not re.match(r"data:|#", url) and not (page.parent / re.split(r"[?#]", url)[0]).exists()]
    assert missing == [], "what the page asks for is not there"


def test_styles_and_scripts_stand_alone():
    found = {}
    for path in [*SITE.rglob("*.css"), *(p for p in SITE.rglob("*.js") if "vendor" not in p.parts)]:
        pattern = OUTSIDE_IN_CSS if path.suffix == ".css" else OUTSIDE_IN_SCRIPT
        if hits := pattern.findall(path.read_text(encoding="utf-8")): found[path.relative_to(SITE).as_posix()] = hits
    assert not found


@pytest.mark.parametrize("html", ['<script src="https://a.org/x.js"></script>', '<link rel="stylesheet" href="//a.org/x.css">', '<img src="http://a.org/x.png">',
    '<style>@import "https://a.org/x.css";</style>', '<p style="background: url(https://a.org/x.png)">', '<script type="module">import "https://a.org/x.js"</script>'])
def test_a_planted_request_is_found(html): assert outside(html)


def test_a_plain_link_is_no_request(): assert not outside('<a href="https://a.org">a</a>')


def test_mathjax_and_search_are_here():
    for name in ("_static/vendor/mathjax/tex-chtml.js", "searchindex.js", "book/glossary.html", "book/bibliography.html"): assert (SITE / name).exists()
    assert any((SITE / "_static/vendor/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_reads_as_a_chapter(chapter):
    html = (SITE / "nbs" / f"{chapter.stem}.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", html)
    assert "#|" not in text, "a directive is shown to the reader"
    assert "Traceback (most recent call last)" not in text
    if any("#| export" in c.source for c in cells(chapter)): assert "Show the exported code" in html
    assert f"colab.research.google.com/github/mechinterp-lib/mechinterp_lib/blob/main/nbs/{chapter.name}" in html and "mybinder.org" in html


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_have_captions(page):
    pictures = [p for p in fetched(page.read_text(encoding="utf-8")).pictures if "_images/" in p["src"]]
    bare = [p["src"] for p in pictures if not p.get("alt") or p["alt"].endswith((".svg", ".png"))]
    assert bare == [], "a caption states what each figure found: #| fig-cap"


MODULES = [reference.module_page(path, ROOT) for folder in ("mechinterp_lib", "mechinterp_lib/experiments") for path in sorted((ROOT / folder).glob("[a-z]*.py"))]


def page_of(module: str) -> str:
    "The built page of a module's names."
    return (SITE / "reference" / f"{module.removeprefix('mechinterp_lib.').replace('.', '/')}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("module, text, entries", MODULES, ids=[module for module, *_ in MODULES])
def test_every_public_name_has_its_place(module, text, entries):
    html, index = page_of(module), (SITE / "reference" / "index.html").read_text(encoding="utf-8")
    missing = [name for entry in entries for name in (entry.name, *(f"{entry.name}.{member.name}" for member in entry.members)) if f'id="{name}"' not in html]
    assert not missing
    assert not [entry.name for entry in entries if f"#{module}.{entry.name}" not in index]


@pytest.mark.parametrize("module, text, entries", MODULES, ids=[module for module, *_ in MODULES])
def test_every_name_links_to_its_definition(module, text, entries):
    links = re.findall(r'href="([^"#]*)#(defined-\w+)"', page_of(module))
    assert len(links) == len(entries)
    folder = (SITE / "reference" / module.removeprefix("mechinterp_lib.").replace(".", "/")).parent
    assert not [(page, anchor) for page, anchor in links if f'id="{anchor}"' not in (folder / page).read_text(encoding="utf-8")]


def test_search_finds_names():
    index = (SITE / "searchindex.js").read_text(encoding="utf-8")
    assert not [name for _, _, entries in MODULES for name in (entry.name for entry in entries) if name not in index]


def test_no_page_shows_what_installs_in_colab(): assert not [page.name for page in (SITE / "nbs").glob("*.html") if "google.colab" in page.read_text(encoding="utf-8")]
