"""What runs on GitHub: files that parse, steps that are whole, and `make` targets that exist."""
import os, re, subprocess

import pytest, yaml
from project import ROOT, settings

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path) -> dict:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)           # all values as text: `on` is a key, not true


def steps(path) -> list[dict]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_the_workflows_are_there(): assert [path.stem for path in FILES] == ["book", "release", "test"]


@each_workflow
def test_parses_and_is_whole(path):
    workflow = read(path)
    assert {"name", "on", "permissions", "jobs"} <= workflow.keys() and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps"} <= job.keys() and set([job.get("needs")]) <= {None, *workflow["jobs"]}
        for step in job["steps"]: assert ("uses" in step) != ("run" in step) and re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step.get("uses", "any/step@all"))


@each_workflow
def test_its_make_targets_exist(path):
    targets = {name for line in re.findall(r"^([\w./ -]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M) for name in line.split()}
    called = {word for step in steps(path) for line in re.findall(r"\bmake ([^\n;&|]+)", step.get("run", "")) for word in line.split() if "=" not in word}
    assert called and called <= targets


def test_every_python_is_tested():
    versions = re.search(r"\((\d), (\d+)\) <= sys.version_info\[:2\] < \((\d), (\d+)\)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    tested = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"{versions[1]}.{minor}" for minor in range(int(versions[2]), int(versions[4]))] and tested[0] == settings()["min_python"]


@pytest.mark.parametrize("tag, fits", [(f"v{settings()['version']}", True), (f"v{settings()['version']}0", False), (settings()["version"], False)])
def test_only_the_versions_tag_is_released(tag, fits):
    check = next(step["run"] for step in steps(ROOT / ".github" / "workflows" / "release.yml") if step.get("name") == "The tag is the version")
    assert (subprocess.run(["bash", "-c", check], cwd=ROOT, env=os.environ | {"GITHUB_REF_NAME": tag}).returncode == 0) == fits
