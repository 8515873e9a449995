"""The package metadata, read from settings.ini so that nbdev and pip agree; and the few models that the wheel carries."""
import configparser, shlex
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
needs = {extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in ("sae", "ray", "book", "dev")}


class build_with_models(build_py):
    "Copies the checkpoints of `carried_models` into the package; as sources of the build they go into the source archive too."
    def carried(self) -> dict[str, str]:
        "Where each file lies, and where it goes."
        files = sorted(file for name in shlex.split(cfg["carried_models"]) for file in (root / "models" / name).iterdir())
        shipped = Path(self.build_lib, cfg["lib_path"], "shipped")
        return {file.relative_to(root).as_posix(): str(shipped / file.relative_to(root / "models")) for file in files}

    def run(self):
        super().run()
        if self.editable_mode: return                                      # in a checkout the models stay where they are
        for source, target in self.carried().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_source_files(self): return [*super().get_source_files(), *self.carried()]

    def get_outputs(self, include_bytecode=True): return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else self.carried().values())]


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="MIT",
    long_description=(root / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], url=cfg["git_url"], keywords=cfg["keywords"].split(), python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]), package_data={cfg["lib_path"]: ["py.typed"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={"sae": needs["sae"], "ray": needs["ray"], "book": needs["sae"] + needs["book"], "dev": needs["sae"] + needs["book"] + needs["dev"]},
    entry_points={"console_scripts": [f"mechinterp={cfg['lib_path']}.start:main"],
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    cmdclass={"build_py": build_with_models},
)
