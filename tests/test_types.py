"""What signatures say is true, as far as a type checker can tell, and who uses the library hears of it."""
import ast, subprocess, sys

import pytest
from project import ROOT

USE = "from mechinterp_lib.attention_analysis import find_induction_heads\nfrom mechinterp_lib.core import generator\nfrom mechinterp_lib.data import repeated_random\nfrom mechinterp_lib.models import load_model\n\n"


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    "Runs the checker with the project's settings; all runs share one cache."
    cache = tmp_path_factory.mktemp("mypy")
    return lambda *files: subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", str(cache), *map(str, files)], cwd=ROOT, capture_output=True, text=True)


def test_every_module_passes(mypy):
    done = mypy()
    assert done.returncode == 0 and "no issues found" in done.stdout, done.stdout


@pytest.mark.parametrize("line, said", [("find_induction_heads(load_model('shakespeare-small'))", None), ("repeated_random(8, 32, 65, generator('mine'))", None), ("repeated_random('many', 32, 65, generator('mine'))", "arg-type"),
                                        ("load_model('shakespeare-small', devices='cpu')", "call-arg"), ("generator('mine').shuffle()", "attr-defined")])
def test_who_uses_the_library_is_told(mypy, tmp_path, line, said):
    (tmp_path / "use.py").write_text(USE + line + "\n")
    done = mypy(tmp_path / "use.py")
    assert done.returncode == (said is not None) and (said is None or f"[{said}]" in done.stdout), done.stdout


def test_public_functions_say_their_types():
    silent = []
    for path in (ROOT / "mechinterp_lib").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"): continue
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if node.returns is None or any(one.annotation is None for one in named): silent.append(f"{path.stem}.{node.name}")
    assert not silent
