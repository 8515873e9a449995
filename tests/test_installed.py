"""The wheel as a stranger has it: installed in an environment of its own, far from the checkout, with nothing set."""
import os, re, shlex, subprocess, sys, sysconfig
from pathlib import Path

import pytest
from project import ROOT, build, copy_source, settings, tracked

from mechinterp_lib import cli
from mechinterp_lib.data import fetch, has_corpus

CARRIED = settings()["carried_models"].split()
HEAVY = {"torch", "transformers", "transformer_lens", "pandas", "scipy", "matplotlib", "plotly"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
SHORTER = {"[-20_000:]": "[-4_000:]", "n_samples=400_000": "n_samples=4_096", "steps=250": "steps=4", "chunk=16": "chunk=2", "chunk=64": "chunk=24"}       # what takes minutes takes seconds


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A new environment with the wheel in it, built from a copy of the source; what it requires is lent by the environment that runs the tests."
    if not tracked(): pytest.skip("not a git checkout")
    place = tmp_path_factory.mktemp("installed")
    wheel = build(copy_source(place / "source"), "wheel", place)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", place / "venv", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    packages = next((place / "venv").rglob("site-packages"))
    (packages / "lent.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    (place / "elsewhere").mkdir()
    return place


@pytest.fixture
def run(installed):
    "Run something of the new environment in an empty folder: a command of its, or code."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MECHINTERP_", "PYTHON")) and name != "VIRTUAL_ENV"}
    environment = kept | {"HF_HUB_OFFLINE": "1", "MECHINTERP_CACHE": str(installed / "cache")}
    def run(*words, lines: str = "", **more) -> subprocess.CompletedProcess:
        "What comes of it."
        programs = installed / "venv" / ("Scripts" if os.name == "nt" else "bin")
        return subprocess.run([programs / words[0], *words[1:]], cwd=installed / "elsewhere", env=environment | more, input=lines, capture_output=True, text=True)
    return run


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_installed_one(run, installed):
    assert Path(said(run("python", "-c", "import mechinterp_lib; print(mechinterp_lib.__file__)")).strip()).is_relative_to(installed / "venv")


def test_nothing_heavy_is_loaded(run):
    code = ("import importlib, pkgutil, sys, mechinterp_lib\nfor m in pkgutil.walk_packages(mechinterp_lib.__path__, 'mechinterp_lib.'):\n"
            f"    if not m.name.endswith('_modidx'): importlib.import_module(m.name)\nprint(len([m for m in sys.modules if m.startswith('mechinterp_lib.')]), *{HEAVY!r} & set(sys.modules))")
    modules, *heavy = said(run("python", "-c", code)).split()
    assert int(modules) > 20 and not heavy


def test_it_lists_the_models_that_it_carries(run):
    lines = said(run("mechinterp", "models")).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == CARRIED and settings()["git_url"] in lines[-1]


def test_the_lens_reads_a_carried_model(run):
    layers = said(run("mechinterp", "lens", "shakespeare-small", "Give me the swor", "--mode", "tuned")).splitlines()
    assert len(layers) == 8 and re.search(r"KL +-?0\.000 +'d' 0\.9", layers[6])


def test_one_chats_with_a_carried_model(run):
    talk = said(run("mechinterp", "chat", "shakespeare-small", "--tokens", "12", "--temperature", "0", lines="ROMEO:\n/lens 2\n/quit\n"))
    asked, reply, *_ = talk.partition("> ROMEO:\n")[2].partition("> /lens 2\n")
    assert "no chat template" in talk and len(asked) == 13 and talk.count(" KL ") == 7


def test_of_other_models_it_says_where_they_are(run):
    names = ["shakespeare", "shakespeare-small/seed3", "shapes/seed0", "induction-2l", "sae-shakespeare/layer4/seed0"]
    code = f"from mechinterp_lib.core import InputError\nfrom mechinterp_lib.models import load_model\nfor name in {names!r}:\n    try: load_model(name)\n    except InputError as error: print(error)"
    messages = said(run("python", "-c", code)).splitlines()
    for name, message in zip(names, messages, strict=True):
        for part in (repr(name), "this installation does not carry it", *CARRIED, settings()["git_url"], "MECHINTERP_HOME"): assert part in message


def test_experiments_want_a_clone(run):
    done = run("mechinterp", "run", "induction_heads")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and settings()["git_url"] in done.stderr


def test_a_clone_gives_the_others(run):
    names = [line.split()[0] for line in said(run("mechinterp", "models", MECHINTERP_HOME=str(ROOT))).splitlines()]
    assert {"shakespeare/seed0", "shapes/seed0", *CARRIED} <= set(names) and len(names) == len(set(names))


def test_the_readme_runs(run, installed):
    pytest.importorskip("sae_lens")
    corpus = has_corpus("tinyshakespeare")
    chosen = [block for block in BLOCKS if corpus or "load_text(" not in block]
    code = "\n".join(chosen)
    for long, short in SHORTER.items():
        assert long in README, f"the README no longer says {long}"
        code = code.replace(long, short)
    said(run("python", "-c", code, **({"MECHINTERP_DATA": str(fetch("tinyshakespeare").parent)} if corpus else {})))
    assert {"heads.svg", "heads.html", "circuit.svg", "lens.html", "my-shapes"} <= {path.name for path in (installed / "elsewhere").iterdir()}
    if not corpus: pytest.skip(f"{len(chosen)} of {len(BLOCKS)} blocks ran; the others read tinyshakespeare, which is not here")


def test_the_commands_of_the_readme_are_commands():
    shell = "\n".join(re.findall(r"^```shell\n(.*?)^```", README, re.M | re.S))
    lines = [words for line in shell.splitlines() if (words := shlex.split(line, comments=True))[:1] == ["mechinterp"]]
    assert len(lines) > 8
    for words in lines: cli.parser().parse_args(words[1:])
