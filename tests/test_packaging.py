"""The package: instant to import, whole when built, and free of what belongs to one machine."""
import configparser, re, subprocess, sys, tarfile, zipfile

import pytest
from project import ROOT, tracked


def _python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def test_import_loads_nothing_heavy():
    modules = sorted(p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in (ROOT / "mechinterp_lib").rglob("*.py"))
    modules = [m.removesuffix(".__init__") for m in modules if not m.endswith("_modidx")]
    code = (f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
            "print(*sorted({'torch', 'transformers', 'transformer_lens', 'pandas', 'scipy', 'matplotlib', 'plotly'} & set(sys.modules)))")
    assert _python(code).stdout.split() == []


def test_import_is_instant():
    code = "import time; t = time.perf_counter(); import mechinterp_lib; print(time.perf_counter() - t)"
    assert min(float(_python(code).stdout) for _ in range(5)) < 0.5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A copy of what git would keep, so that a build leaves nothing behind and takes nothing that is not tracked."
    files = tracked()
    if not files: pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("source")
    for path in files:
        if path.relative_to(ROOT).parts[0] in ("models", "results", "nbs"): continue
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def _build(source, what: str, folder) -> list[str]:
    "Build with setuptools as it is installed here, without the network; the names in the archive."
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archive = folder / done.stdout.split()[-1]
    return zipfile.ZipFile(archive).namelist() if what == "wheel" else tarfile.open(archive).getnames()


def test_wheel_holds_every_module(source, tmp_path):
    names = _build(source, "wheel", tmp_path)
    modules = {p.relative_to(source).as_posix() for p in (source / "mechinterp_lib").rglob("*.py")}
    assert {n for n in names if not re.search(r"\.dist-info/", n)} == modules
    assert any(n.endswith("licenses/LICENSE") for n in names) and any(n.endswith("entry_points.txt") for n in names)


def test_sdist_builds_a_wheel(source, tmp_path):
    _build(source, "sdist", tmp_path)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as tar: tar.extractall(tmp_path, filter="data")
    assert _build(next(p for p in tmp_path.iterdir() if p.is_dir()), "wheel", tmp_path)


def test_versions_agree():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    version = parser["DEFAULT"]["version"]
    assert _python("import mechinterp_lib; print(mechinterp_lib.__version__)").stdout.strip() == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_is_required():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.!]+)(?= |;|$)", (ROOT / "constraints.txt").read_text(), re.M))
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    wanted = {re.split(r"[<>=!~]", r)[0] for key in ("requirements", "dev_requirements") for r in parser["DEFAULT"][key].split()}
    assert wanted <= pins.keys() and pins["torch"] == "2.13.0"
    assert not re.search(r"\+cpu|://|^-", (ROOT / "constraints.txt").read_text(), re.M)


def test_files_are_small():
    big = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in tracked() if p.stat().st_size > 25e6}
    assert not big


_MACHINE = re.compile(rb"(?<![\w.:/<])/(?:work|root|home|Users|opt|mnt|srv|tmp/w)/[\w.]")


def test_no_file_names_a_machine():
    text = (".py", ".ipynb", ".md", ".ini", ".toml", ".txt", ".yml", ".json", ".csv", ".css", ".cfg", ".in", ".svg", "")
    found = {p.relative_to(ROOT).as_posix(): m[0] for p in tracked() if p.suffix in text and (m := _MACHINE.search(p.read_bytes()))}
    assert not found
