"""Damaged files, code that must not run, full disks, signals, two processes at once, memory that must stay flat, and texts that would be tags."""
import contextlib, json, math, os, random, re, resource, signal, struct, subprocess, sys, time, zipfile
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechinterp_lib import cli
from mechinterp_lib.core import InputError, Result, atomic_path, load_results, load_stages, load_table, results_dir, save_results, write_files, write_json, write_text
from mechinterp_lib.data import char_tokenizer
from mechinterp_lib.models import as_bridge, describe_model, load_model, new_model, save_model
from mechinterp_lib.training import Recipe, load_recipe, run_dir, steps_done, train

sae_lens = pytest.importorskip("sae_lens")
from mechinterp_lib.sae import feature_dashboard, load_sae, save_sae, train_sae

ROOT, TESTS = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent
GPT2 = {"class": "GPT2LMHeadModel", "vocab_size": 6, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
TINY = {"name": "toy", "architecture": {"class": "attention_only", "d_vocab": 65, "n_ctx": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}, "corpus": None, "n_ctx": 32,
        "steps": 60, "batch_size": 4, "eval_every": 15, "warmup_steps": 5, "max_period": 16}
COMMAND = [sys.executable, "-c", "import sys; from mechinterp_lib.start import main; sys.exit(main())"]
NAME = "induction_heads"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A checkpoint folder, the folder of an autoencoder, and a nanoGPT file, all of them good."
    folder = tmp_path_factory.mktemp("whole")
    module = new_model(GPT2, 0)
    save_model(module, char_tokenizer("To be, o"), folder / "model")
    save_sae(sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=16, d_sae=30)), folder / "sae")
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {name: weight.t().contiguous() if name.endswith(transposed) else weight for name, weight in module.state_dict().items()}
    torch.save({"model": weights, "model_args": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 6, "bias": True, "dropout": 0.0}}, folder / "ckpt.pt")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A home and a cache of their own, and modules that a process started from here finds."
    for name, value in {"MECHINTERP_HOME": tmp_path / "home", "MECHINTERP_CACHE": tmp_path / "cache", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("MECHINTERP_DATA", raising=False)
    for folder in ("home", "cache", "in/between"): (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in/between")
    return tmp_path


def copied(source: Path, target: Path) -> Path:
    "A file or the files of a folder, written again in place of what is there."
    if source.is_file(): target.write_bytes(source.read_bytes())
    else:
        target.mkdir(exist_ok=True)
        for file in source.iterdir(): (target / file.name).write_bytes(file.read_bytes())
    return target


def tree(folder: Path) -> dict[str, bytes]:
    "All files below a folder."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unlocked(files: dict[str, bytes]) -> dict[str, bytes]:
    "The same without the files by which processes shut each other out."
    return {path: content for path, content in files.items() if not path.startswith("cache/locks/")}


def loaded(load, path):
    "What is opened, if its weights are finite; None where it is refused in one line. Anything else is an error."
    try: made = load(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
        return None
    assert all(weight.isfinite().all() for weight in made.parameters())
    return made


def opened(path): return load_model(path, device="cpu")


KINDS = {"model/model.safetensors": opened, "model/config.json": opened, "model/tokenizer.json": opened, "sae/sae_weights.safetensors": load_sae, "sae/cfg.json": load_sae, "ckpt.pt": opened}


# loaders

@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_off_is_refused(name, whole, tmp_path):
    top = name.split("/")[0]
    made, content = copied(whole / top, tmp_path / top), (whole / name).read_bytes()
    assert loaded(KINDS[name], made) is not None
    body = len(content.rstrip())
    for size in sorted({0, 1, 7, 8, 9, 40, body // 3, body // 2, body - 30, body - 1}):
        (tmp_path / name).write_bytes(content[:size])
        assert loaded(KINDS[name], made) is None, size


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bytes_are_refused_or_harmless(name, whole, tmp_path):
    top, draw, refused = name.split("/")[0], random.Random(name), 0
    made, content = copied(whole / top, tmp_path / top), (whole / name).read_bytes()
    header = min(len(content), 8 + int.from_bytes(content[:8], "little")) if name.endswith("safetensors") else len(content)
    for case in range(24):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 3, 20])): damaged[draw.randrange(header if case % 4 else len(content))] = draw.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        refused += loaded(KINDS[name], made) is None
    assert refused >= 4, "or nothing was damaged"


def with_header(content: bytes, change) -> bytes:
    "A safetensors file whose header, or the text of it, was changed."
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length:]


def hostile_headers(content: bytes) -> dict[str, bytes]:
    "Safetensors files that are none, by what is wrong with them."
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    first, second = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])[:2]
    size = header[first]["data_offsets"][1]
    def entry(**values): return with_header(content, lambda header: header[first].update(values))
    text = json.dumps(header)
    found = {f"claims {length:,} bytes": struct.pack("<Q", length) + content[8:] for length in (2**64 - 1, 2**63, 2**50, 2**32, 99_999_999, len(content))}
    found |= {f"dtype {dtype!r}": entry(dtype=dtype) for dtype in ("F32", "Q99", "", "f16", None, 3, ["F16"])}
    found |= {f"offsets {offsets}": entry(data_offsets=offsets) for offsets in ([0, size + 2], [-2, size], [size, 0], [len(content), len(content) + size], [2**62, 2**62 + size], [0], [], None, ["0", size], [0.0, size], [2**70, 2**70])}
    found |= {f"shape {shape}": entry(shape=shape) for shape in ([2**40, 2**40], [-1, 4], [2**70], "16", None, [[16, 6]], [True])}
    return found | {"overlap": with_header(content, lambda header: header[second].update(data_offsets=header[first]["data_offsets"], shape=header[first]["shape"])), "a hole": with_header(content, lambda header: header.pop(first) and None),
                    "a list": with_header(content, lambda header: "[]"), "a number": with_header(content, lambda header: "3"), "no JSON": with_header(content, lambda header: "\0" * 64), "half a JSON": with_header(content, lambda header: text[:-9]),
                    "deep": with_header(content, lambda header: "[" * 100_000), "a key twice": with_header(content, lambda header: text[:-1] + f', "{first}": {json.dumps(header[first])}}}'), "entry twice": with_header(content, lambda header: text.replace('"shape"', '"dtype": "F16", "shape"', 1))}


LIMITED = """
import json, resource, sys
from pathlib import Path
import test_hardening as t
folder, found = Path(sys.argv[1]), {}
load = {"model": t.opened, "sae": t.load_sae}
for kind, name in (("model", "model.safetensors"), ("sae", "sae_weights.safetensors")):
    assert t.loaded(load[kind], folder / kind) is not None
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 400_000_000, resource.RLIM_INFINITY))
    content = (folder / kind / name).read_bytes()
    for what, damaged in t.hostile_headers(content).items():
        (folder / kind / name).write_bytes(damaged)
        try: found[f"{kind}: {what}"] = t.loaded(load[kind], folder / kind) is None
        except BaseException as error: found[f"{kind}: {what}"] = repr(error)[:300]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(found))
"""


def test_hostile_headers_are_refused_in_little_memory(whole, place):
    for kind in ("model", "sae"): copied(whole / kind, place / kind)
    done = subprocess.run([sys.executable, "-c", LIMITED, place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 60 and {what: said for what, said in found.items() if said is not True} == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused(value, whole, tmp_path):
    for kind, name, load in (("model", "model.safetensors", opened), ("sae", "sae_weights.safetensors", load_sae)):
        weights = load_file(copied(whole / kind, tmp_path / kind) / name)
        for which in weights:
            spoilt = {key: weight.clone() for key, weight in weights.items()}
            spoilt[which].view(-1)[-1] = value
            save_file(spoilt, tmp_path / kind / name, metadata={"format": "pt"})
            assert loaded(load, tmp_path / kind) is None, which
    state = torch.load(whole / "ckpt.pt", weights_only=True)
    state["model"]["transformer.h.1.mlp.c_fc.weight"][0, 0] = value
    torch.save(state, tmp_path / "ckpt.pt")
    assert loaded(opened, tmp_path / "ckpt.pt") is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_an_autoencoder_of_other_numbers_is_refused(dtype, whole, tmp_path):
    weights = load_file(copied(whole / "sae", tmp_path / "sae") / "sae_weights.safetensors")
    for which in weights:
        save_file(weights | {which: weights[which].float().to(dtype)}, tmp_path / "sae" / "sae_weights.safetensors")
        with pytest.raises(InputError, match=f"{which} is stored as"): load_sae(tmp_path / "sae")


def test_a_key_that_stands_twice_is_refused(whole, tmp_path):
    for kind, name, key, load in (("model", "config.json", "n_embd", opened), ("sae", "cfg.json", "d_in", load_sae)):
        path = copied(whole / kind, tmp_path / kind) / name
        path.write_text(path.read_text().rstrip().removesuffix("}").rstrip() + f', "{key}": 16}}')
        with pytest.raises(InputError, match=f"{key}' stands twice"): load(tmp_path / kind)


# code in files

class Runs:
    "Unpickled, it does something."
    def __init__(self, what, *arguments): self.what = what, arguments
    def __reduce__(self): return self.what


def bombs(bang: Path) -> dict[str, Runs]:
    "What would leave a file at `bang`, in several ways."
    write = f"open({str(bang)!r}, 'w')"
    return {"open": Runs(open, str(bang), "w"), "system": Runs(os.system, f"touch {bang}"), "eval": Runs(eval, write), "exec": Runs(exec, write), "process": Runs(subprocess.call, ["touch", str(bang)])}


@pytest.mark.parametrize("kind", ["open", "system", "eval", "exec", "process"])
@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_checkpoint_is_run(kind, legacy, whole, place):
    bang = place / "bang"
    bomb = bombs(bang)[kind]
    bomb.what[0](*bomb.what[1])                                                          # it would
    for _ in range(100):
        if bang.exists(): break
        time.sleep(0.01)
    bang.unlink()
    good = torch.load(whole / "ckpt.pt", weights_only=True)
    for number, state in enumerate((bomb, good | {"iter_num": bomb}, good | {"model": good["model"] | {"transformer.wte.weight": bomb}})):
        torch.save(state, place / f"{number}.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match="could run code"): opened(place / f"{number}.pt")
    recipe = load_recipe(str(write_json(place / "toy.json", TINY)))
    torch.save({"model": bomb}, run_dir(recipe, 0) / "checkpoint.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="checkpoint.*delete it"): train(recipe, 0, place / "out", device="cpu", progress=False)
    assert not bang.exists() and not (place / "out").exists()


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "archive/../../escaped", "archive/data/../../../escaped"])
def test_what_an_archive_would_write_outside_is_not_written(name, whole, place):
    name = name.replace("/tmp", str(place))
    (place / "deep/er").mkdir(parents=True)
    with zipfile.ZipFile(whole / "ckpt.pt") as good, zipfile.ZipFile(place / "deep/er/ckpt.pt", "w") as bad:
        for part in good.infolist(): bad.writestr(part.filename, good.read(part))
        bad.writestr(name, b"out")
    before = tree(place)
    loaded(opened, place / "deep/er/ckpt.pt")
    assert tree(place) == before and not Path("/tmp/escaped").exists()


def test_an_archive_that_unpacks_to_much_is_refused(whole, place):
    with zipfile.ZipFile(whole / "ckpt.pt") as good, zipfile.ZipFile(place / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as bad:
        for part in good.infolist(): bad.writestr(part.filename, good.read(part) if "data/0" not in part.filename else bytes(200_000_000))
    assert (place / "ckpt.pt").stat().st_size < 1_000_000 and loaded(opened, place / "ckpt.pt") is None


# names that lead elsewhere

def refused(capsys, *words) -> str:
    "The one line of a command that ends with 2."
    capsys.readouterr()
    assert cli.main(list(map(str, words))) == 2, words
    said = capsys.readouterr().err
    assert said.startswith("mechinterp: ") and said.count("\n") == 1 and len(said) < 3000, said
    return said


@pytest.fixture
def odd(place):
    "Paths that lead nowhere."
    (place / "loop").symlink_to(place / "loop")
    (place / "file").write_text("x")
    return {"NUL": "a\0b", "long": "x" * 5000, "loop": str(place / "loop" / "x"), "below a file": str(place / "file" / "x")}


def test_names_that_lead_elsewhere_are_refused(place, odd, capsys):
    (place / "x").mkdir()
    (place / "x" / "summary.json").write_text("{}")
    before, names = tree(place), [*odd.values(), "../../x", str(place / "x"), "..", ".", "", "a/../../x", "-x"]
    for name in names:
        for words in (["run", "--", name], ["verify", "--", name], ["run", NAME, f"--stage={name}"], ["train", "--device", "cpu", "--", name]): refused(capsys, *words)
        if name not in (".", ".."): refused(capsys, "lens", "--", name, "a")
        for act in (lambda: load_results(name), lambda: load_table(NAME, name), lambda: results_dir(name), lambda: describe_model(name), lambda: save_results(NAME, "s", {}, {name: {}}, {}), lambda: load_sae(name)):
            with pytest.raises(InputError): act()
    assert unlocked(tree(place)) == before


def test_places_where_nothing_can_be_written_are_refused(whole, place, odd, capsys):
    "A path that the reader gives may lead anywhere; what cannot be written is refused before a model is opened."
    model, before = whole / "model", tree(place)
    (place / "folder.html").mkdir()
    for name in [*odd.values(), str(place), "../../x"]:
        html = name if name == "../../x" else f"{name}.html"
        bad = html if name != str(place) else str(place / "folder.html")
        for words in (["attention", model, "To", "--out", bad], ["lens", model, "To", "--save", bad], ["patch", model, "To", "be", "--save", bad]): refused(capsys, *words)
        refused(capsys, "data", "addition", "--out", name)
        if name != "../../x":
            refused(capsys, "lens", model, "--prompts", name)
            refused(capsys, "train", write_json(place / "toy.json", TINY), "--device", "cpu", "--out", name)
    assert set(unlocked(tree(place))) - set(before) == {"toy.json"}


# a full disk

@contextlib.contextmanager
def small_files(size: int = 4096):
    "Inside, no file can grow beyond `size` bytes; Python ignores the signal, so that a write fails as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_what_was_there(whole, place):
    copied(whole / "model", place / "m"), copied(whole / "sae", place / "s")
    big = new_model(GPT2 | {"n_embd": 32}, 1)
    other = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=16, d_sae=300))
    recipe = load_recipe(str(write_json(place / "toy.json", TINY)))
    train(recipe, 0, place / "out", until=15, device="cpu", progress=False)
    long = "x" * 100_000
    write_text(place / "text", "earlier")
    save_results(NAME, "first", {"a": Result(1.0, 0.0, 2.0, 3, 1, "", "")}, {}, {}, folder=place / "results")
    before = unlocked(tree(place))
    def atomically():
        with atomic_path(place / "text") as temporary: temporary.write_text(long)
    for act in (lambda: save_model(big, None, place / "m"), lambda: save_sae(other, place / "s"), lambda: write_text(place / "text", long), atomically, lambda: write_files({place / "new": "short", place / "text": long}),
                lambda: save_results(NAME, "second", {"b": Result(1.0, 0.0, 2.0, 3, 1, "", "")}, {"big": {"text": long}}, {}, folder=place / "results"), lambda: train(recipe, 0, place / "out", device="cpu", progress=False)):
        with small_files(), pytest.raises(InputError, match="could not be written: .*File too large"): act()
        assert unlocked(tree(place)) == before
    train(recipe, 0, place / "out", device="cpu", progress=False)                          # there is room again: it goes on
    assert (place / "out" / "model.safetensors").exists()


def test_an_autoencoder_in_training_meets_a_full_disk(place):
    model, rows = as_bridge(new_model(GPT2, 0)), torch.randint(0, 6, (60, 16), generator=torch.Generator().manual_seed(0))
    def trained(): return train_sae(model, "blocks.1.hook_resid_post", rows, d_sae=48, k=4, n_samples=40 * 64, batch_size=64, progress=False, device="cpu", out=place / "sae")
    for size in (4096, 12_000):                                                              # the weights do not fit, or only the trainer's state
        with small_files(size), pytest.raises(InputError, match="could not be written"): trained()
        assert not list((place / "sae").rglob("whole.json")) and not list((place / "sae").glob("*.*"))
    assert loaded(lambda path: trained(), None) is not None and sorted(tree(place / "sae")) == ["cfg.json", "sae_weights.safetensors"]


def test_a_command_on_a_full_disk_says_so_in_one_line(place):
    (place / "sums.csv").write_text("earlier")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    done = subprocess.run([*COMMAND, "data", "addition", "--out", place / "sums.csv"], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
    assert (place / "sums.csv").read_text() == "earlier" and not list(place.glob(".*"))
    with open("/dev/full", "w") as full: done = subprocess.run([*COMMAND, "models", "--families"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr


# two processes at once, and signals

STAGED = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from mechinterp_lib import cli, executor
from mechinterp_lib.core import Result, Stage
folder = Path(sys.argv[1])
def make():
    (folder / f"began.{os.getpid()}").touch()
    while not (folder / "go").exists(): time.sleep(0.01)
    return {"a": Result(float(os.getpid()), 0.0, 1e9, 3, 1, "", "")}, {"table": {"by": os.getpid()}}
def spread():
    import population
    executor.processors = lambda: 2
    executor.in_parallel(population.measured, [(folder, n, (0, 1)) for n in range(4)])
    return {"a": Result(1.0, 0.0, 2.0, 3, 1, "", "")}, {}
cli._experiment = lambda name: SimpleNamespace(STAGES={"only": Stage({"make": make, "spread": spread}[sys.argv[2]], {})})
sys.exit(cli.main(["run", "induction_heads"]))
"""


def started(*words, **options): return subprocess.Popen([*words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, **options)


def waited(what, process, seconds=200):
    "What `what()` returns as soon as it is something; an error where the process ends before."
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return found


def group(pgid: int) -> list[int]:
    "The processes of a group that are still there, from `/proc`; those that ended and wait to be noticed do not count."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its) == pgid and state != "Z": found.append(int(stat.parent.name))
    return found


def ends(process, number: int, code: int, last: str) -> str:
    "Send a signal to a group of processes; its exit code and last line, and that nothing of it is left."
    os.killpg(process.pid, number)
    out, said = process.communicate(timeout=200)
    assert (process.returncode, said.strip().splitlines()[-1]) == (code, f"mechinterp: {last}") and "Traceback" not in said and "terminate called" not in said, said
    deadline = time.monotonic() + 30
    while group(process.pid) and time.monotonic() < deadline: time.sleep(0.05)
    assert not group(process.pid)
    return said


SIGNALS = pytest.mark.parametrize("number, code, last", [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "ended")])


def test_of_two_runs_at_once_one_is_refused(place):
    run = [sys.executable, "-c", STAGED, place, "make"]
    both = [started(*run), started(*run)]
    deadline = time.monotonic() + 200
    while all(process.poll() is None for process in both) and time.monotonic() < deadline: time.sleep(0.02)
    loser = next(process for process in both if process.poll() is not None)
    winner = next(process for process in both if process is not loser)
    out, said = loser.communicate()
    assert loser.returncode == 2 and said.count("\n") == 1 and f"process {winner.pid} is at work" in said, said
    (place / "go").touch()
    assert winner.communicate(timeout=200)[1] == "" and winner.returncode == 0
    assert [path.name for path in place.glob("began.*")] == [f"began.{winner.pid}"]
    assert load_results(NAME)["a"].value == winner.pid and json.loads((results_dir(NAME) / "table.json").read_text()) == {"by": winner.pid} and load_stages(NAME)["only"]["results"] == ["a"]
    assert sorted(path.name for path in results_dir(NAME).iterdir()) == ["provenance.json", "summary.json", "table.json"]


def test_a_run_that_was_killed_does_not_lock_out_the_next(place):
    run = [sys.executable, "-c", STAGED, place, "make"]
    killed = started(*run)
    waited(lambda: (place / f"began.{killed.pid}").exists(), killed)
    killed.kill(), killed.communicate()
    (place / "go").touch()
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and load_results(NAME)["a"].value != killed.pid


@SIGNALS
def test_a_training_that_is_stopped_goes_on(number, code, last, place):
    path = str(write_json(place / "toy.json", TINY | {"steps": 100_000}))
    process = started(*COMMAND, "train", path, "--device", "cpu")
    checkpoint = run_dir(load_recipe(path), 0) / "checkpoint.pt"
    waited(checkpoint.exists, process)
    assert ends(process, number, code, last) == f"mechinterp: {last}\n"
    done = steps_done(load_recipe(path), 0)
    assert done >= 50 and not list(checkpoint.parent.glob(".*")) and not (place / "home" / "models").exists()
    assert cli.main(["train", path, "--device", "cpu", "--until", str(done + 3)]) == 0 and steps_done(load_recipe(path), 0) == done + 3


@SIGNALS
def test_workers_end_with_the_run(number, code, last, place):
    process = started(sys.executable, "-c", STAGED, place, "spread")
    waited(lambda: len(list(place.glob("*.0.pid"))) == 2, process)
    assert len(group(process.pid)) >= 3
    ends(process, number, code, last)
    assert not (place / "home" / "results").exists()


@SIGNALS
def test_a_signal_while_the_command_line_is_imported_is_one_line(number, code, last, place):
    "Just before a module is imported, and in the middle of torch, where an exception would end the process."
    press = """
import os, signal, sys
module, number = sys.argv.pop(1), int(sys.argv.pop(1))
class Pressing:
    "Asked for the module, it presses Ctrl-C, or ends the process."
    def find_spec(name, path=None, target=None):
        if name == module: os.kill(os.getpid(), number)
sys.meta_path.insert(0, Pressing)
from mechinterp_lib.start import main
sys.exit(main())
"""
    for module in ("mechinterp_lib.cli", "torch._C"):
        done = subprocess.run([sys.executable, "-c", press, module, str(int(number)), "train", str(write_json(place / "toy.json", TINY)), "--device", "cpu"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, f"mechinterp: {last}\n"), (module, done.stderr[-500:])


# damaged states of trainings

def damaged_states(state: dict):
    "States of a training that open and are not right, by what is wrong."
    log = json.loads(state["log"])
    for what, entries in {"no list": {}, "a number": [3], "no step": [{}], "a column less": [{"step": 15, "validation_loss": 4.0}], "text": [log[0] | {"seconds": "x"}], "twice": log + log, "none": [], "NaN": [log[0] | {"train_loss": math.nan}]}.items(): yield what, state | {"log": json.dumps(entries)}
    yield "half a log", state | {"log": state["log"][:-5]}
    for what, change in {"integers": lambda weight: weight.int(), "no numbers": lambda weight: weight * math.nan, "another shape": lambda weight: weight[..., :-1]}.items(): yield what, state | {"model": {name: change(weight) for name, weight in state["model"].items()}}
    for what, change in {"moments of another shape": lambda value: torch.zeros(3), "moments that are no numbers": lambda value: value * math.nan}.items():
        yield what, state | {"optimizer": state["optimizer"] | {"state": {i: {name: value if name == "step" else change(value) for name, value in kept.items()} for i, kept in state["optimizer"]["state"].items()}}}
    yield "other settings", state | {"optimizer": state["optimizer"] | {"param_groups": [one | {"betas": "x"} for one in state["optimizer"]["param_groups"]]}}


def test_a_damaged_state_of_a_training_is_named(place):
    recipe = load_recipe(str(write_json(place / "toy.json", TINY)))
    train(recipe, 0, place / "out", until=20, device="cpu", progress=False)
    path = run_dir(recipe, 0) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for what, damaged in damaged_states(state):
        torch.save(damaged, path)
        with pytest.raises(InputError, match=r"checkpoint.pt'; .*delete it to train from the start"): pytest.fail(f"{what}: {train(recipe, 0, place / 'out', device='cpu', progress=False)}")
        assert not (place / "out").exists()
    torch.save(state, path)
    assert train(recipe, 0, place / "out", device="cpu", progress=False)["best_step"]


def test_a_damaged_state_of_an_autoencoder_is_named(place, monkeypatch):
    from mechinterp_lib import sae as saes
    model, rows = as_bridge(new_model(GPT2, 0)), torch.randint(0, 6, (60, 16), generator=torch.Generator().manual_seed(0))
    options = {"d_sae": 48, "k": 4, "n_samples": 40 * 64, "batch_size": 64, "progress": False, "device": "cpu", "out": place / "sae"}
    class Stopped(Exception): pass
    def stopping(stream, bar, real=saes._counted):
        for number, batch in enumerate(real(stream, bar)):
            if number == 20: raise Stopped
            yield batch
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(saes, "_counted", stopping)
        train_sae(model, "blocks.1.hook_resid_post", rows, **options)
    state = next((place / "sae" / "state").iterdir())
    for name in ("whole.json", "trainer_state.pt", "activation_scaler.json", "sae_weights.safetensors"):
        content = (state / name).read_bytes()
        for damaged in (b"", content[:len(content) // 2], b"{}", b"[]"):
            (state / name).write_bytes(damaged)
            with pytest.raises(InputError, match="damaged .*remove it to train from the start"): train_sae(model, "blocks.1.hook_resid_post", rows, **options)
        (state / name).write_bytes(content)
    assert loaded(lambda path: train_sae(model, "blocks.1.hook_resid_post", rows, **options), None) is not None


# memory

FLAT = """
import ctypes, gc, json, resource, torch
from pathlib import Path
from mechinterp_lib.activation_patching import patch_scan
from mechinterp_lib.interventions import capture
from mechinterp_lib.models import as_bridge, new_model
from mechinterp_lib.neuron_analysis import top_activations
torch.set_num_threads(1)
model = as_bridge(new_model({"class": "GPT2LMHeadModel", "vocab_size": 50, "n_positions": 64, "n_embd": 128, "n_layer": 1, "n_head": 2}, 0))
draw, kept = torch.Generator().manual_seed(0), []
def rows(n): return torch.randint(0, 50, (n, 64), generator=draw)
def resident():
    "Megabytes that are in use, once what was freed has been given back."
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
def seen(): return capture(model, rows(16), ["blocks.0.hook_resid_post"])[1]["blocks.0.hook_resid_post"]       # half a megabyte
def captured(n):
    for _ in range(n): seen()
def keeping(n):
    for _ in range(n): kept.append(seen())                                    # what a leak would do
def strongest(n): top_activations(model, (row for _ in range(n) for row in rows(16)), 0, k=5)
def scanned(n):
    for _ in range(n // 2): patch_scan(model, rows(1), rows(1), component="z")
found = {}
for run in (captured, strongest, scanned, keeping):
    run(10)
    before = resident()
    run(100)
    found[run.__name__] = resident() - before
print(json.dumps(found))
"""


def test_memory_does_not_grow_with_the_work(place):
    done = subprocess.run([sys.executable, "-c", FLAT], capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown.pop("keeping") > 30, "the ruler sees activations that are kept"
    assert max(grown.values()) < 20, grown


# texts that would be tags

HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"onmouseover=\"alert(1)", "'><svg/onload=alert(1)>", "<!--<script>", "&lt;b&gt;&amp;", "</title><h6>x</h6>", "`${alert(1)}`", "]]><x>", "\u2028<b>"]
HARMLESS = [f"word{i}" for i in range(len(HOSTILE))]


class Kinds(HTMLParser):
    "Which elements a page has, with which attributes, and all that is text."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.kinds, self.text = {}, ""
        self.feed(page), self.close()

    def handle_starttag(self, tag, attributes):
        kind = tag, *sorted(name for name, _ in attributes)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def handle_data(self, data): self.text += data


def worded(words):
    "A model whose tokens are these words."
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    return as_bridge(new_model(GPT2 | {"vocab_size": len(words)}, 0), PreTrainedTokenizerFast(tokenizer_object=plain, clean_up_tokenization_spaces=False))


def pages(words, folder: Path) -> dict[str, str]:
    "What is written of a model with such tokens, by kind; names and descriptions are of the same words."
    from mechinterp_lib.activation_patching import patch_scan
    from mechinterp_lib.attention_analysis import extract_attention, plot_attention
    from mechinterp_lib.lens_report import Question, write_report
    from mechinterp_lib.logit_lens import analyze, plot_evolution
    from mechinterp_lib.neuron_analysis import visualize_neuron_activations
    model, tokens = worded(words), torch.arange(len(words))[None]
    attention = extract_attention(model, tokens)
    plot_attention(attention, folder / "heads.html"), plot_attention(attention, folder / "head.html", 1, 0), plot_attention(attention, folder / "head.svg", 1, 0)
    plot_evolution(analyze(model, tokens), folder / "lens.html"), plot_evolution(analyze(model, tokens), folder / "lens.svg")
    scan = patch_scan(model, tokens, tokens.flip(1), component="resid_pre")
    scan.save(folder / "scan.html"), scan.save(folder / "scan.svg")
    sae = train_sae(model, "blocks.1.hook_resid_post", torch.arange(64 * 16).view(64, 16) * 7 % len(words), d_sae=20, k=4, n_samples=64 * 16, batch_size=64, progress=False, device="cpu")
    feature_dashboard(sae, model, torch.arange(8 * 16).view(8, 16) * 3 % len(words), folder / "features", k=3, descriptions={0: words[0], 1: words[2]}, title=words[6])
    questions = [Question(words[1], words[2], words[3], words[0]), Question(words[4], words[3], words[2], words[0])]
    write_report({words[0]: model, words[1]: model}, questions, folder / "report")
    (folder / "neuron.html").write_text(visualize_neuron_activations(model, tokens, 0, 1))
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".html", ".svg", ".md", ".js")}


@pytest.fixture(scope="module")
def written(tmp_path_factory): return [pages(words, tmp_path_factory.mktemp("pages")) for words in (HOSTILE, HARMLESS)]


def test_the_ruler_sees_what_is_not_escaped():
    for word in HOSTILE[:2] + HOSTILE[3:4] + HOSTILE[6:7]: assert set(Kinds(f"<title></title><p>{word}</p>").kinds) - {("title",), ("p",)}
    assert Kinds(f'<p title="{HOSTILE[2]}">').kinds != Kinds('<p title="word">').kinds


def test_no_text_becomes_an_element_or_an_attribute(written):
    hostile, harmless = written
    assert set(hostile) == set(harmless) and {"heads.html", "head.html", "lens.html", "scan.html", "neuron.html", "features/index.html", "report/report.md"} <= set(hostile)
    for name, page in hostile.items():
        if not name.endswith((".html", ".md")): continue
        there, before = Kinds(page), Kinds(harmless[name])
        assert set(there.kinds) <= set(before.kinds), (name, set(there.kinds) - set(before.kinds))
        assert all(there.kinds.get(kind) == n for kind, n in before.kinds.items() if kind[0] in ("script", "img", "svg", "title", "b")), name


def test_the_text_is_shown(written):
    for name, page in written[0].items():
        if not name.endswith((".html", ".md")) or name == "features/index.html": continue
        text = Kinds(page).text.replace("<\\/", "</").replace("\\u003c", "<").replace("\\u003e", ">").replace("\\u002f", "/")
        assert "alert(1)" in text and ("<img src=x onerror=alert(1)>" in text or "&lt;img src=x onerror=alert(1)&gt;" in text), name
    assert "</title><h6>x</h6>" in Kinds(written[0]["features/index.html"]).text


def test_a_picture_holds_no_code(written):
    for name, page in written[0].items():
        if name.endswith(".svg"): assert not [one.tag for one in ElementTree.fromstring(page).iter() if one.tag.rpartition("}")[2] in ("script", "img", "foreignObject", "x", "b") or any(key.startswith("on") for key in one.attrib)], name


def test_the_data_of_a_page_hold_no_end_of_a_script(written):
    for name, page in written[0].items():
        if name.endswith(".js"): assert "</" not in page and json.loads(page.strip().rstrip(";").partition("(")[2].removesuffix(")")), name
    template = written[1]["features/index.html"]
    assert 'replace(/[&<>"]/g' in template and all(f"${{{field}}}" not in template for field in ("f.about", "f[2]", "f[3]", "t", "s")), "what is put into the page is escaped first"
