"""The package metadata, read from settings.ini so that nbdev and pip agree."""
import configparser, shlex
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="MIT",
    long_description=(root / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], url=cfg["git_url"], keywords=cfg["keywords"].split(), python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    install_requires=shlex.split(cfg["requirements"]), extras_require={extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in ("dev", "sae", "ray")},
    entry_points={"console_scripts": [f"mechinterp={cfg['lib_path']}.cli:main"],
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
