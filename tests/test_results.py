"""What is in `results/` belongs to the models and the code that are here."""
import pytest

from project import ROOT

from mechinterp_lib import report
from mechinterp_lib.core import InputError, compare_results, load_results, load_stages, read_json, run_stage
from mechinterp_lib.experiments.open_questions import CARDS, CLAIMS, UNASKED
from mechinterp_lib.report import EXPERIMENTS, experiment, outdated

STAGES = [(name, stage) for name in EXPERIMENTS for stage in read_json(ROOT / "results" / name / "provenance.json")]


@pytest.mark.parametrize("name, stage", STAGES)
def test_results_are_not_older_than_what_made_them(name, stage):
    record, work = load_stages(name)[stage], experiment(name).STAGES[stage]
    assert bool(record["inputs"]) == (work.inputs is not list) and record["code"]                # by itself a stage reads nothing: planted dictionaries are drawn
    try: changed = outdated(name, stage)
    except InputError as error: changed = [str(error)]                                           # a text that it reads is not here
    if changed and (reason := work.missing()): pytest.skip(f"{', '.join(changed)}: {reason}")
    assert not changed, f"made from other models or by other code; run: mechinterp verify --all, or mechinterp run {name} --stage {stage}"


@pytest.mark.parametrize("made_by, what", [("code_hashes", "code of circuits"), ("file_hashes", "models/new is new")])
def test_other_code_or_another_model_makes_results_old(monkeypatch, made_by, what):
    real, name = getattr(report, made_by), what.removeprefix("code of ").removesuffix(" is new")
    assert not outdated("induction_heads", "circuits")
    monkeypatch.setattr(report, made_by, lambda of: real(of) | {name: "another"})
    assert what in outdated("induction_heads", "circuits")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_and_table_has_a_stage(name):
    record, folder = read_json(ROOT / "results" / name / "provenance.json"), ROOT / "results" / name
    assert sorted(number for stage in record.values() for number in stage["results"]) == sorted(load_results(name))
    files = {path.stem for path in folder.iterdir()} - {"provenance", "summary"}
    assert files == {table for stage in record.values() for table in stage["tables"]}
    stages = experiment(name).STAGES
    assert record.keys() == stages.keys() - {stage for stage, work in stages.items() if work.trains and stage not in record}     # what trains first may not have been made yet


def test_every_card_is_asked_of_all_seeds():
    cards = {card["says"]: name for name, chapter in report.chapters().items() if name not in ("open_questions", "method_validation") for card in report.verdicts(chapter)}
    assert cards.keys() == CARDS.keys() | UNASKED.keys() and not CARDS.keys() & UNASKED.keys()
    for says, claims in CARDS.items(): assert claims and {claim.experiment for claim in claims} == {cards[says]}, says
    assert len({claim.says for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("name, stage", [("induction_heads", "public")])
def test_a_quick_stage_comes_out_the_same(name, stage):
    work = experiment(name).STAGES[stage]
    if reason := work.missing(): pytest.skip(reason)
    stored = load_results(name)
    assert compare_results({key: stored[key] for key in read_json(ROOT / "results" / name / "provenance.json")[stage]["results"]}, run_stage(name, stage, work, write=False)) == []
