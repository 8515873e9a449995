"""The header of every notebook: opened in Colab it fetches the models and installs the library, elsewhere it does nothing.

    python book/_ext/colab.py        puts it into each notebook, below the title and the cell that names the module
"""
from __future__ import annotations

import configparser, json, re
from pathlib import Path

ID = "in-colab"
ROOT = Path(__file__).resolve().parents[2]


def header(root: Path = ROOT) -> str:
    "The source of the cell, with the repository that `settings.ini` names."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    return f'''#| hide
import sys
if "google.colab" in sys.modules:                         # in Colab: fetch the models, install the library
    import os, subprocess
    os.environ["MECHINTERP_HOME"] = checkout = "/content/mechinterp_lib"
    if not os.path.exists(checkout): subprocess.run(["git", "clone", "--depth", "1", "{settings["DEFAULT"]["git_url"]}", checkout], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", checkout + "[sae]"], check=True)'''


def place(cells: list[dict]) -> int:
    "Where the header stands: behind the title and, where there is one, the cell that names the module."
    return 2 if re.match(r"#\s*\|\s*default_exp", "".join(cells[1]["source"])) else 1


def put(notebook: dict, source: str) -> None:
    "Put the header into a notebook, in place of an earlier one."
    cells = [cell for cell in notebook["cells"] if cell["id"] != ID]
    cells.insert(place(cells), {"cell_type": "code", "execution_count": None, "id": ID, "metadata": {}, "outputs": [], "source": source.splitlines(True)})
    notebook["cells"] = cells


if __name__ == "__main__":
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        put(notebook, header())
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
