"""What is in `results/` belongs to the models and the code that are here."""
import pytest

from project import ROOT

from mechinterp_lib.cli import EXPERIMENTS, _experiment
from mechinterp_lib.core import compare_results, load_results, read_json, run_stage, sha256

STAGES = [(name, stage) for name in EXPERIMENTS for stage in read_json(ROOT / "results" / name / "provenance.json")]


@pytest.mark.parametrize("name, stage", STAGES)
def test_results_were_made_from_the_shipped_models(name, stage):
    record = read_json(ROOT / "results" / name / "provenance.json")[stage]
    made_from = {path: digest for path, digest in record["inputs"].items() if path.startswith(("models/", f"results/{name}/"))}    # tables: of other stages, which are asked the same
    stale = [path for path, digest in made_from.items() if not (ROOT / path).exists() or sha256(ROOT / path) != digest]
    reads = _experiment(name).STAGES[stage].inputs is not list                                # by itself a stage reads nothing: planted dictionaries are drawn
    assert bool(made_from) == reads and not stale, f"made from other models; run: mechinterp run {name} --stage {stage}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_and_table_has_a_stage(name):
    record, folder = read_json(ROOT / "results" / name / "provenance.json"), ROOT / "results" / name
    assert sorted(number for stage in record.values() for number in stage["results"]) == sorted(load_results(name))
    files = {path.stem for path in folder.iterdir()} - {"provenance", "summary"}
    assert files == {table for stage in record.values() for table in stage["tables"]}
    assert record.keys() == _experiment(name).STAGES.keys()


@pytest.mark.parametrize("name, stage", [("induction_heads", "public")])
def test_a_quick_stage_comes_out_the_same(name, stage):
    work = _experiment(name).STAGES[stage]
    if reason := work.missing(): pytest.skip(reason)
    stored = load_results(name)
    assert compare_results({key: stored[key] for key in read_json(ROOT / "results" / name / "provenance.json")[stage]["results"]}, run_stage(name, stage, work, write=False)) == []
