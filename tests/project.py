"""What the tests of the project itself share: where things are, and what the notebooks hold."""
from __future__ import annotations

import configparser, re, subprocess, sys
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "book" / "_build" / "html"
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
FINDINGS = [path for path in NOTEBOOKS if path.name.startswith("2")]


@cache
def cells(path: Path) -> list:
    "The cells of a notebook."
    return nbformat.read(path, as_version=4).cells


def exported(path: Path) -> list[str]:
    "The sources of the cells that a notebook exports."
    return [c.source for c in cells(path) if c.cell_type == "code" and re.match(r"\s*#\s*\|\s*export", c.source)]


def module_of(path: Path) -> str | None:
    "The module that a notebook exports to, without the package's name."
    found = re.search(r"^#\s*\|\s*default_exp\s+([\w.]+)", "\n".join(c.source for c in cells(path)), re.M)
    return found and found[1]


def tracked() -> list[Path]:
    "The files that git would keep; empty outside a checkout."
    if not (ROOT / ".git").exists(): return []
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def settings() -> configparser.SectionProxy:
    "What `settings.ini` says."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def copy_source(folder: Path) -> Path:
    "A copy of what git would keep and a build reads, so that a build leaves nothing behind and takes nothing that is not tracked."
    carried = tuple(f"models/{name}/" for name in settings()["carried_models"].split())
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("models/", "results/", "nbs/")) and not name.startswith(carried): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return folder


def build(source: Path, what: str, folder: Path) -> Path:
    "The `wheel` or `sdist` of a copy of the source, built with setuptools as it is installed here, without the network."
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]
