"""The command line: what is used wrongly, or damaged, ends with one line and exit code 2; what does not hold, with 1."""
import errno, json, os, pickle, subprocess, sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from mechinterp_lib import attention_analysis, cli, report
from mechinterp_lib.core import InputError, Result, Stage, run_stage, write_json
from mechinterp_lib.data import char_tokenizer, check_splits, read_problems
from mechinterp_lib.models import new_model, save_model
from mechinterp_lib.training import load_recipe, run_dir

NAME = "induction_heads"
NATIVE = {"class": "attention_only", "d_vocab": 65, "n_ctx": 16, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_head": 4}
RECIPE = {"name": "toy", "architecture": NATIVE, "corpus": None, "n_ctx": 16, "steps": 6, "batch_size": 2, "eval_every": 3, "warmup_steps": 1, "max_period": 8}


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A home and a cache of their own."
    for name, folder in (("MECHINTERP_HOME", "home"), ("MECHINTERP_CACHE", "cache")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("MECHINTERP_DATA", raising=False)
    return tmp_path


def recipe_file(place, **changes):
    return str(write_json(place / "recipe.json", RECIPE | changes))


def one_line(capsys, *words, code=2):
    "The one line that a wrong use prints."
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    said = capsys.readouterr().err
    assert said.startswith("mechinterp: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return said


@pytest.mark.parametrize("command", [[], ["models"], ["train"], ["data"], ["data", "addition"], ["patch"], ["lens"], ["attention"], ["run"], ["verify"], ["report"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as left: cli.main([*command, "--help"])
    assert left.value.code == 0 and "usage: mechinterp" in capsys.readouterr().out


def test_the_exit_code_reaches_the_shell(place):
    done = subprocess.run([sys.executable, "-c", "import sys; from mechinterp_lib.cli import main; sys.exit(main())", "train", "no-such-recipe"],
                          capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["train", "shakespeare", "--seed", "x"], ["train", "shakespeare", "--depth", "3"], ["train", "shakespear"],
                                   ["train", "no/such.json"], ["train", "shakespeare", "--device", "abacus"], ["train", "shakespeare", "--until", "0"],
                                   ["train", "shakespeare", "--until", "5001"], ["run", "induction_head"], ["verify", "induction_head"], ["verify", "--again"], ["verify", "--all", "--train"], ["verify", "--train"], ["verify"], ["verify", NAME],
                                   ["run", NAME, "--stage", "nothing"],
                                   ["data"], ["data", "additoin"], *(["data", "addition", *more] for more in (
                                       ["--digits", "4"], ["--operation", "times"], ["--wording", "qestion"], ["--wording", "minus"], ["--train", "0"], ["--test", "x"], ["--confirmation", "1601"],
                                       ["--operation", "increment"], ["--seed", "-1"], ["--format", "xml"], ["--out", "sums.txt"], ["--out", "sums.csv", "--format", "jsonl"]))])
def test_wrong_words(words, place, capsys): one_line(capsys, *words)


@pytest.mark.parametrize("changes", [{"architecture": "GPT2"}, {"architecture": {}}, {"architecture": {**NATIVE, "class": "GPT3"}}, {"steps": "6"}, {"steps": 6.5}, {"lr": 0},
                                     {"lr": -1e-3}, {"n_ctx": 17}, {"name": "a/b"}, {"name": ".."}, {"betas": 1}, {"min_period": 9}, {"corpus": "nowhere.txt"}, {"corpus": 7}])
def test_wrong_recipes(changes, place, capsys):
    one_line(capsys, "train", recipe_file(place, **changes), "--device", "cpu")
    assert not (place / "home" / "models").exists()


def test_files_that_are_something_else(place, capsys):
    (place / "latin.txt").write_bytes("Élan ".encode("latin-1") * 100)
    assert "UTF-8" in one_line(capsys, "train", recipe_file(place, corpus=str(place / "latin.txt")), "--device", "cpu")
    (place / "folder.json").mkdir()
    one_line(capsys, "train", place / "folder.json")
    (place / "odd.json").write_text("[" * 100_000)
    one_line(capsys, "train", place / "odd.json")


def test_out_that_cannot_be_written(place, capsys):
    (place / "file").write_text("x")
    for out in (place / "file", place / "file" / "below"): one_line(capsys, "train", recipe_file(place), "--out", out, "--device", "cpu")
    assert not (place / "cache" / "training").exists(), "found before anything was trained"


def test_a_cache_that_cannot_be_made(place, capsys, monkeypatch):
    (place / "file").write_text("x")
    monkeypatch.setenv("MECHINTERP_CACHE", str(place / "file" / "cache"))
    assert "MECHINTERP_CACHE" in one_line(capsys, "train", recipe_file(place), "--device", "cpu")


def test_an_error_of_the_system_is_one_line(place, capsys, monkeypatch):
    def broken(args): raise PermissionError(13, "Permission denied", "/some/where")
    monkeypatch.setattr(cli, "cmd_models", broken)
    assert "/some/where: Permission denied" in one_line(capsys, "models")


def test_training_stops_goes_on_and_ends(place, capsys):
    path = recipe_file(place)
    assert cli.main(["train", path, "--device", "cpu", "--until", "4"]) == 0 and "step 4 of 6" in capsys.readouterr().out
    assert cli.main(["train", path, "--device", "cpu", "--until", "2"]) == 0 and "step 4 of 6" in capsys.readouterr().out
    checkpoint = run_dir(load_recipe(path), 0) / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for content in (whole[:500], b"", b"not a checkpoint"):
        checkpoint.write_bytes(content)
        one_line(capsys, "train", path, "--device", "cpu")
    checkpoint.write_bytes(whole)
    assert cli.main(["train", path, "--device", "cpu"]) == 0
    assert "models/toy/seed0: validation loss" in capsys.readouterr().out and (place / "home/models/toy/seed0/model.safetensors").exists()
    (checkpoint.parent / "best.safetensors").write_bytes(b"damaged")
    assert "damaged" in one_line(capsys, "train", path, "--device", "cpu")


def test_data_are_written_as_they_are_asked_for(place, capsys):
    assert cli.main(["data", "addition", "--out", str(place / "sums.csv"), "--wording", "question", "--wording", "bare"]) == 0
    assert "8,100 problems (train 5,000, validation 500, test 1,000, confirmation 1,600) in question, bare: written to" in capsys.readouterr().out
    table = read_problems(place / "sums.csv")
    assert len(check_splits(table)) == 16200 and set(table[table["split"] == "test"].groupby(["wording", "carry"]).size()) == {250}
    assert table[(table["a"] == 23) & (table["b"] == 54)][["prompt", "completion"]].values.tolist() == [["What is 23 + 54? Answer:", " 77\n"], ["23+54=", "77\n"]]


def test_data_of_other_kinds(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    few = ["--train", "40", "--validation", "8", "--test", "12", "--confirmation", "20"]
    assert cli.main(["data", "addition", "--operation", "subtract", "--wording", "minus", "--reversed", "--format", "jsonl", *few]) == 0
    lines = [json.loads(line) for line in (place / "addition.jsonl").read_text().splitlines()]
    assert len(lines) == 80 and all(line["completion"] == f" {'-' * (line['answer'] < 0)}{str(abs(line['answer']))[::-1]}\n" and line["answer"] == line["a"] - line["b"] for line in lines)
    assert cli.main(["data", "addition", "--operation", "increment", *few]) == 0 and cli.main(["data", "addition", "--digits", "1", *few, "--seed", "3"]) == 0
    assert set(read_problems(place / "addition.csv")["a"]) <= set(range(1, 10))


def test_one_damaged_model_does_not_hide_the_others(place, capsys):
    for name in ("a", "b", "c"): save_model(new_model(NATIVE, 0), char_tokenizer("ab"), place / "home" / "models" / name, {"validation_loss": 1.5})
    assert cli.main(["models"]) == 0 and capsys.readouterr().out.count("validation loss 1.500") == 3
    (place / "home/models/b/model.safetensors").write_bytes(b"damaged")
    assert cli.main(["models"]) == 2
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["a", "c"] and said.err.startswith("mechinterp: b is damaged: ") and said.err.count("\n") == 1


# verify

def number(value): return Result(value, value - 0.1, value + 0.1, n=10, seeds=1, unit="", how="")


@pytest.fixture
def experiment(place, monkeypatch):
    "An experiment of two stages with stored results, and its stages to change."
    (place / "home" / "input.txt").write_text("as it was")
    inputs = lambda: [place / "home" / "input.txt"]
    stages = {"first": Stage(lambda: ({"a": number(1.0), "b": number(2.0)}, {}), {}, inputs=inputs), "second": Stage(lambda: ({"c": number(3.0)}, {}), {})}
    for module, name in ((cli, "_experiment"), (report, "experiment")): monkeypatch.setattr(module, name, lambda name: SimpleNamespace(STAGES=stages, findings=lambda results: [f"a is {results['a'].value}"]))
    for name, stage in stages.items(): run_stage(NAME, name, stage)
    return stages


def edit(place, file, change):
    path = place / "home" / "results" / NAME / file
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def verify(capsys, code):
    capsys.readouterr()
    assert cli.main(["verify"]) == code
    return capsys.readouterr().out


def test_what_holds(experiment, capsys):
    assert verify(capsys, 0).splitlines()[-1] == "3 of 3 numbers recomputed, 0 differences"


def test_a_number_that_changed(experiment, place, capsys):
    experiment["second"] = Stage(lambda: ({"c": number(3.2)}, {}), {})
    said = verify(capsys, 1)
    assert "c: value was 3, now 3.2" in said and "3 of 3 numbers recomputed" in said


def test_numbers_that_come_and_go(experiment, place, capsys):
    experiment["second"] = Stage(lambda: ({"d": number(3.0)}, {}), {})
    said = verify(capsys, 1)
    assert "c: only in the stored" in said and "d: only in the new" in said and "2 of 3 numbers recomputed" in said


def test_a_summary_that_lost_a_number(experiment, place, capsys):
    edit(place, "summary.json", lambda summary: summary.pop("a"))
    assert "a: only in the new" in verify(capsys, 1)


def test_a_number_of_no_stage(experiment, place, capsys):
    edit(place, "summary.json", lambda summary: summary.update(x=asdict(number(1.0))))
    said = verify(capsys, 1)
    assert "no stage made: x" in said and "3 of 4 numbers recomputed" in said


def test_a_stage_that_is_gone(experiment, capsys):
    del experiment["second"]
    said = verify(capsys, 0)
    assert "second: 1 numbers of a stage that the experiment no longer has" in said and "2 of 3 numbers recomputed" in said


def test_a_stage_that_cannot_be_made_here(experiment, capsys):
    experiment["second"] = Stage(experiment["second"].make, {}, missing=lambda: "its text is not here")
    said = verify(capsys, 0)
    assert "its text is not here" in said and "2 of 3 numbers recomputed" in said


def test_a_stage_that_cannot_be_made_here_is_refused_by_name(experiment, place, capsys):
    before = (place / "home" / "results" / NAME / "summary.json").read_bytes()
    experiment["second"] = Stage(lambda: 1 / 0, {}, missing=lambda: "its text is not here")
    assert "its text is not here" in one_line(capsys, "run", NAME, "--stage", "second")
    assert cli.main(["run", NAME]) == 0 and "left as it is: its text is not here" in capsys.readouterr().out
    assert (place / "home" / "results" / NAME / "summary.json").read_bytes() == before
    experiment["second"] = Stage(lambda: ({"c": number(4.0)}, {}), {}, missing=lambda: "takes long", trains=True)
    assert cli.main(["run", NAME, "--stage", "second"]) == 0 and (place / "home" / "results" / NAME / "summary.json").read_bytes() != before


def test_nothing_recomputed_is_no_success(experiment, capsys):
    for name, stage in experiment.items(): experiment[name] = Stage(stage.make, {}, missing=lambda: "its text is not here")
    said = one_line(capsys, "verify")
    assert "none of 3 numbers" in said and "its text is not here" in said


def test_an_input_that_changed_is_named(experiment, place, capsys):
    (place / "home" / "input.txt").write_text("as it is")
    assert "first: 1 of its inputs are no longer what they were: input.txt" in verify(capsys, 0)


@pytest.mark.parametrize("file, content", [("summary.json", "{"), ("summary.json", "[]"), ("summary.json", '{"a": 3}'), ("summary.json", '{"a": {"value": 1.0}}'),
                                           ("summary.json", '{"a": {"value": 1, "ci_low": 0, "ci_high": 2, "n": "x", "seeds": 1, "unit": "", "how": ""}}'),
                                           ("provenance.json", "{"), ("provenance.json", "[]"), ("provenance.json", '{"first": 3}'), ("provenance.json", '{"first": {}}')])
def test_damaged_records(experiment, place, capsys, file, content):
    (place / "home" / "results" / NAME / file).write_text(content)
    one_line(capsys, "verify")


def test_a_record_that_is_missing(experiment, place, capsys):
    (place / "home" / "results" / NAME / "provenance.json").unlink()
    one_line(capsys, "verify")


def test_everything_is_made_again_once(experiment, place, capsys, monkeypatch):
    made = []
    for name, stage in dict(experiment).items(): experiment[name] = replace(stage, make=lambda name=name, make=stage.make: made.append(name) or make())
    def all_of_it(code=0, *options):
        made.clear()
        assert cli.main(["verify", "--all", *options]) == code
        return capsys.readouterr().out
    def stopped(): raise KeyboardInterrupt
    whole, experiment["second"] = experiment["second"], replace(experiment["second"], make=stopped)
    assert cli.main(["verify", "--all"]) != 0 and made == ["first"]                           # stopped in the middle: what is done is kept
    experiment["second"] = whole
    said = all_of_it()
    assert made == ["second"] and f"{NAME}/first: 2 numbers, 0 differences" in said and "3 of 3 numbers (2 of 2 stages)" in (place / "home/results/VERIFIED.md").read_text()
    assert "before, with the code, files and numbers that are here: 2" in all_of_it() and not made
    assert "made again now: 2 stages, 0 differences" in all_of_it(0, "--again") and made == ["first", "second"]
    experiment["second"] = replace(experiment["second"], missing=lambda: "it is not trained here", trains=True)
    assert f"{NAME}/second: left: it is not trained here" in all_of_it(0, "--again") and made == ["first"]
    assert cli.main(["verify", NAME, "--stage", "second", "--train"]) == 0 and made.pop() == "second"
    experiment["second"] = replace(experiment["second"], missing=lambda: None, trains=False)
    (place / "home" / "input.txt").write_text("another")
    assert report.outdated(NAME, "first") == ["input.txt"] and not report.outdated(NAME, "second")
    all_of_it()
    assert made == ["first"] and not report.outdated(NAME, "first")                               # the same numbers from what is here now
    edit(place, "summary.json", lambda summary: summary["c"].update(value=3.05))
    assert "c: value was 3.05, now 3" in all_of_it(1) and made == ["second"] and all_of_it(1) and made == ["second"]
    edit(place, "provenance.json", lambda stages: stages["second"].update(seconds=120.0))
    assert "takes about 2 minutes, more than is left" in all_of_it(0, "--minutes", "1") and not made


STOPPED = {"models": [], "train": ["shakespeare"], "data": ["addition"], "patch": ["model", "a", "b"], "lens": ["model", "a"], "attention": ["model", "a"], "chat": ["model"], "run": [NAME], "verify": ["--all"], "report": [], "bench": ["lens"]}


def test_every_command_is_stopped_with_one_line(monkeypatch, capsys):
    def stopped(args):
        "It stops."
        raise KeyboardInterrupt
    for command, words in STOPPED.items():
        monkeypatch.setattr(cli, f"cmd_{command}", stopped)
        assert cli.main([command, *words]) == 130 and capsys.readouterr() == ("", "mechinterp: stopped\n"), command
    assert {name.removeprefix("cmd_") for name in vars(cli) if name.startswith("cmd_")} == STOPPED.keys()


def test_a_stage_that_cannot_be_made_does_not_hide_the_others(experiment, capsys):
    def broken(): raise InputError("corpus", "letters", "it is not here")
    experiment["first"] = replace(experiment["first"], make=broken)
    said = verify(capsys, 1)
    assert f"{NAME}/first: 2 numbers could not be made: corpus" in said and f"{NAME}/second: 1 numbers recomputed, 0 differences" in said


def test_report(experiment, place, capsys):
    assert cli.main(["report"]) == 0 and "a is 1.0" in (place / "home/results/FINDINGS.md").read_text()
    edit(place, "summary.json", lambda summary: summary.pop("a"))
    assert "the summary lacks 'a'" in one_line(capsys, "report")


@pytest.fixture
def lettered(place):
    "The folder of a small model with a tokenizer."
    save_model(new_model({"class": "GPT2LMHeadModel", "vocab_size": 27, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}, 0), char_tokenizer("abcdefghijklmnopqrstuvwxyz "), place / "lettered")
    return place / "lettered"


def test_patch_prints_the_largest_effects_and_saves_all(lettered, place, capsys):
    words = ["patch", str(lettered), "the cat", "the rat", "--answer", "s", "--wrong", "y", "--top", "3", "--save", str(place / "scan.csv")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and "logit difference (nats)" in said[0] and said[-1].endswith("scan.csv")
    assert len((place / "scan.csv").read_text().splitlines()) == 1 + 2 * 7 * 2


@pytest.mark.parametrize("more", [["a cat", "a ca"], ["a cat", "a r\u00e4t"], ["a cat", "a rat", "--answer", "s"], ["a cat", "a rat", "--answer", "ab", "--wrong", "c"], ["a cat", "a rat", "--component", "heads"],
                                  ["a cat", "a cat", "--answer", "s", "--wrong", "y"], ["a cat", "a rat", "--answer", "s", "--wrong", "y", "--save", "scan.pdf"], ["a cat"], ["a cat", "a rat", "--answer", "s", "--wrong", "y", "--top", "0"]])
def test_patch_refuses_what_it_cannot_use(lettered, capsys, more): one_line(capsys, "patch", lettered, *more)


def test_lens_prints_every_layer(lettered, place, capsys):
    assert cli.main(["lens", str(lettered), "the cat", "--position", "2", "--top", "3", "--save", str(place / "lens.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:3]] == ["embed", "0", "1"] and said[2].startswith("    1  KL  0.000") and all(line.count("'") == 6 for line in said[:3])
    best = [line.split("'")[1] for line in said[:3]]
    assert said[3:] == [f"best token settled from layer {next(said[i].split()[0] for i in range(3) if set(best[i:]) == {best[2]})} on", f"written to {place / 'lens.html'}"]
    assert "http://" not in (place / "lens.html").read_text()[:2000]


def test_lens_puts_questions_to_models(lettered, place, capsys):
    (place / "q.csv").write_text("prompt,answer,wrong,group\nthe c,a,b,x\nthe d,b,a,x\n")
    out = place / "report"
    assert cli.main(["lens", str(lettered), "--prompts", str(place / "q.csv"), "--out", str(out), "--device", "cpu"]) == 0
    assert "2 questions, 1 models" in capsys.readouterr().out and (out / "report.md").read_text().startswith("# Where") and "," in (out / "bias.csv").read_text().splitlines()[1]
    (place / "bad.csv").write_text("question,answer\nwho,me\n")
    for words, said in (([lettered, "--prompts", place / "bad.csv"], "question"), ([lettered, "--prompts", place / "none.csv"], "no such file"), ([lettered, "--prompts", place / "q.csv", "--save", "x.svg"], "--out"), ([lettered, "--prompts", place / "q.csv", "--position", "2"], "position"), ([lettered], "a model and a text"), ([lettered, "the c", "--out", out], "--prompts")):
        assert said in one_line(capsys, "lens", *words)


def test_attention_writes_a_page_that_needs_nothing(lettered, place, capsys, monkeypatch):
    runs, extract = [], attention_analysis.extract_attention
    monkeypatch.setattr(attention_analysis, "extract_attention", lambda *args: runs.append(args) or extract(*args))
    assert cli.main(["attention", str(lettered), "the cat", "--out", str(place / "a.html"), "--layer", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1 and len(runs) == 1
    page = (place / "a.html").read_text()
    assert "http" not in page and "src=" not in page and '["t", "h", "e", " ", "c", "a", "t"]' in page
    assert cli.main(["attention", str(lettered), "the cat", "--out", str(place / "a.svg")]) == 0 and (place / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("words", [["lens", "MODEL", ""], ["lens", "MODEL", "a", "--position", "1"], ["lens", "MODEL", "a", "--save", "a.pdf"], ["lens", "MODEL", "a", "--top", "28"], ["lens", "MODEL", "a", "--mode", "tooned"], ["lens", "MODEL", "a", "--mode", "tuned"],
                                   ["attention", "MODEL", "a", "--out", "a.pdf"], ["attention", "MODEL", "a", "--layer", "2"], ["attention", "MODEL", "a\u00e4"], ["attention", "no-model", "a"],
                                   ["lens", "MODEL", "a" * 17], ["attention", "MODEL", "a" * 17], ["patch", "MODEL", "a" * 17, "b" * 17]])
def test_lens_and_attention_refuse(words, lettered, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    one_line(capsys, *[lettered if word == "MODEL" else word for word in words])
    assert not list(place.glob("a.*"))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_in_the_place_of_weights_is_never_opened(file, lettered, place, capsys):
    (lettered / "model.safetensors").unlink()
    (lettered / file).write_bytes(pickle.dumps(Opened(place / "opened")))
    one_line(capsys, "lens", lettered, "a")
    assert not (place / "opened").exists()


class Opened:
    "What leaves a file behind when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), "w"))


def test_a_full_disk_leaves_the_earlier_page(lettered, place, capsys, monkeypatch):
    page = place / "a.html"
    page.write_text("earlier")
    def full(*unused): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in one_line(capsys, "attention", lettered, "the cat", "--out", page)
    assert page.read_text() == "earlier" and [file.name for file in place.iterdir() if file.is_file()] == ["a.html"]


def test_a_corpus_that_is_another_text(place, capsys, monkeypatch):
    (place / "data").mkdir()
    (place / "data" / "tinyshakespeare.txt").write_text("To be, or not")
    monkeypatch.setenv("MECHINTERP_DATA", str(place / "data"))
    assert "wrong SHA-256" in one_line(capsys, "train", "shakespeare-small", "--until", "1")
    assert (place / "data" / "tinyshakespeare.txt").read_text() == "To be, or not"
