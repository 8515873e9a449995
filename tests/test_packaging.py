"""The package: instant to import, whole when built, and free of what belongs to one machine."""
import re, subprocess, sys, tarfile, zipfile

import pytest
from project import ROOT, build, copy_source, settings, tracked

from mechinterp_lib.models import SHIPPED, list_models
from mechinterp_lib.sae import shipped_saes


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
    if not tracked(): pytest.skip("not a git checkout")
    return copy_source(tmp_path_factory.mktemp("source"))


def _files(wheel) -> dict[str, bytes]:
    "What a wheel holds, but for its record."
    with zipfile.ZipFile(wheel) as archive: return {name: archive.read(name) for name in archive.namelist() if not name.endswith("dist-info/RECORD")}


def test_wheel_holds_every_module_and_the_models_it_carries(source, tmp_path):
    wheel = build(source, "wheel", tmp_path)
    found = _files(wheel)
    package = {p.relative_to(source).as_posix(): p.read_bytes() for p in (source / "mechinterp_lib").rglob("*") if p.is_file()}
    models = {f"mechinterp_lib/shipped/{p.relative_to(source / 'models').as_posix()}": p.read_bytes() for p in (source / "models").rglob("*") if p.is_file()}
    assert {name: data for name, data in found.items() if not re.search(r"\.dist-info/", name)} == package | models
    assert "mechinterp_lib/py.typed" in package and {name.rsplit("/", 1)[0] for name in models} == {f"mechinterp_lib/shipped/{name}" for name in settings()["carried_models"].split()}
    assert {name.split("/")[2] for name in models} == {"addition-gpt2", "addition-qwen", "shakespeare-induction", "shakespeare-small"}
    assert any(n.endswith("licenses/LICENSE") for n in found) and any(n.endswith("entry_points.txt") for n in found)
    assert wheel.stat().st_size < 12e6


def test_sdist_builds_the_same_wheel(source, tmp_path):
    archive = build(source, "sdist", tmp_path)
    with tarfile.open(archive) as tar: tar.extractall(tmp_path, filter="data")
    again = build(next(p for p in tmp_path.iterdir() if p.is_dir()), "wheel", tmp_path)
    (tmp_path / "direct").mkdir()
    assert _files(again) == _files(build(source, "wheel", tmp_path / "direct"))


def test_versions_agree():
    version = settings()["version"]
    assert _python("import mechinterp_lib; print(mechinterp_lib.__version__)").stdout.strip() == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_an_installed_package_knows_the_names_of_all_models():
    numbers = [f"seed{i}{end}" for i in range(30) for end in ("", "-early")]
    named = {f"{family}/{below}" for family, pattern in SHIPPED.items() for below in [*numbers, *(f"layer{i}/{seed}" for i in range(30) for seed in numbers)] if re.fullmatch(pattern, below)}
    assert named == {*list_models(), *shipped_saes()}


def test_constraints_pin_what_is_required():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.!]+)(?= |;|$)", (ROOT / "constraints.txt").read_text(), re.M))
    wanted = {re.split(r"[<>=!~]", r)[0] for key in ("requirements", *(f"{extra}_requirements" for extra in ("sae", "book", "dev"))) for r in settings()[key].split()}
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
