"""Print the built book to one PDF: `make book-pdf`. Chromium prints each page, with the rules for paper in `book.css`; pypdf joins them."""
from __future__ import annotations

import shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "book" / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-pdf-header-footer", "--virtual-time-budget=20000")


def print_page(browser: str, page: Path, pdf: Path) -> None:
    "Print one page, when its formulas and maps are drawn."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run([browser, *FLAGS, f"--user-data-dir={profile}", f"--print-to-pdf={pdf}", page.as_uri()], capture_output=True, text=True)
    if not pdf.exists(): sys.exit(f"{Path(browser).name} did not print {page.name}: {done.stderr.strip()[-300:]}")


def documents() -> list[str]:
    "The book's pages in order."
    import yaml
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [contents["root"], *(chapter["file"] for part in contents["parts"] for chapter in part["chapters"])]


def print_book(target: Path) -> None:
    from pypdf import PdfReader, PdfWriter
    browser, missing = next(filter(None, map(shutil.which, BROWSERS)), None), [name for name in documents() if not (SITE / f"{name}.html").exists()]
    if not browser: sys.exit(f"printing the book needs Chromium: none of {', '.join(BROWSERS)} is on the PATH")
    if missing: sys.exit(f"no page {missing[0]}.html yet: run make book")
    book = PdfWriter()
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(documents()):
            print_page(browser, SITE / f"{name}.html", pdf := Path(folder) / f"{number}.pdf")
            pages = PdfReader(pdf)
            book.append(pages, outline_item=(pages.metadata.title or name).partition(" \N{EM DASH} ")[0])
        book.compress_identical_objects()
        book.write(target)
    print(f"The book: {target} ({len(book.pages)} pages)")


if __name__ == "__main__": print_book(ROOT / "book" / "_build" / "book.pdf")
