"""Training that is killed, checkpoints that are broken, disks that are full."""
import json, os, random, signal, subprocess, sys, time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mechinterp_lib.core import InputError, atomic_path, generator
from mechinterp_lib.data import char_tokenizer, encode, mixed_batch, periodic, repeated_natural, repeated_random, training_repeats
from mechinterp_lib.training import Recipe, load_recipe, load_weights, model_dir, recipes, run_dir, snapshots, steps_done, train

TOY = Recipe("toy", {"class": "attention_only", "d_vocab": 65, "n_ctx": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}, corpus=None, n_ctx=32,
             steps=60, batch_size=4, eval_every=15, warmup_steps=5, max_period=16, snapshots=(0, 20, 60))
DROPPING = replace(TOY, name="dropping", architecture={"class": "GPT2LMHeadModel", "vocab_size": 65, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, steps=16, snapshots=())
ADDING = replace(load_recipe("addition-gpt2"), name="adding", architecture=load_recipe("addition-gpt2").architecture | {"n_embd": 16}, steps=12, batch_size=8, eval_every=4, warmup_steps=2)
RUN = """
import os, signal, sys
out, call, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def dying(*arguments, real=getattr(os, call, None)):                    # a kill between a file's writing and its renaming
    global count
    count -= 1
    if count == 0: os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
if count: setattr(os, call, dying)
from tests import test_training
from mechinterp_lib.training import train
train(getattr(test_training, sys.argv[4]), 3, out, checkpoint_every=4, device="cpu", progress=False)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spawn(out, cache, call="none", count=0, recipe="TOY"):
    "A training in another process, which kills itself at the `count`-th call of `os.CALL`."
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen([sys.executable, "-c", RUN, str(out), call, str(count), recipe], cwd=root,
                            env={**os.environ, "MECHINTERP_CACHE": str(cache), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})


def without_time(record):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in record["log"]]


def test_a_killed_training_goes_on_to_the_same_numbers(tmp_path, cache):
    assert spawn(tmp_path / "straight", tmp_path / "other").wait(120) == 0
    checkpoint, came_to = run_dir(TOY, 3) / "checkpoint.pt", []
    for count in (3, 5):                                               # in the middle of a write
        assert spawn(tmp_path / "killed", cache, "replace", count).wait(120) == -signal.SIGKILL
        came_to.append(steps_done(TOY, 3))
    assert 0 < came_to[0] < came_to[1] < TOY.steps, "no kill fell into the middle of the run"
    process = spawn(tmp_path / "killed", cache)                        # at any moment after its first checkpoint
    seen, deadline = checkpoint.stat().st_mtime_ns, time.monotonic() + 60
    while process.poll() is None and checkpoint.stat().st_mtime_ns == seen and time.monotonic() < deadline: time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))
    process.kill(); process.wait()
    assert spawn(tmp_path / "killed", cache, "rename", 1).wait(120) == -signal.SIGKILL          # while the finished model is put into place
    assert spawn(tmp_path / "killed", cache).wait(120) == 0
    straight, killed = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("straight", "killed"))
    assert without_time(straight) == without_time(killed) and straight["validation_loss"] == killed["validation_loss"]
    assert (tmp_path / "straight/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def test_a_killed_training_with_dropout_goes_on_to_the_same_numbers(tmp_path, cache):
    assert spawn(tmp_path / "straight", tmp_path / "other", recipe="DROPPING").wait(120) == 0
    assert spawn(tmp_path / "killed", cache, "replace", 3, "DROPPING").wait(120) == -signal.SIGKILL and 0 < steps_done(DROPPING, 3) < DROPPING.steps
    assert spawn(tmp_path / "killed", cache, recipe="DROPPING").wait(120) == 0
    assert (tmp_path / "straight/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def test_a_killed_training_on_sums_goes_on_to_the_same_numbers(tmp_path, cache):
    assert spawn(tmp_path / "straight", tmp_path / "other", recipe="ADDING").wait(120) == 0
    assert spawn(tmp_path / "killed", cache, "replace", 5, "ADDING").wait(120) == -signal.SIGKILL and 0 < steps_done(ADDING, 3) < ADDING.steps
    assert spawn(tmp_path / "killed", cache, "rename", 2, "ADDING").wait(120) == -signal.SIGKILL          # between the early model and the finished one
    assert spawn(tmp_path / "killed", cache, recipe="ADDING").wait(120) == 0
    for name in ("straight", "straight-early"):
        ours, theirs = tmp_path / name, tmp_path / name.replace("straight", "killed")
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        assert without_time(json.loads((ours / "training.json").read_text())) == without_time(json.loads((theirs / "training.json").read_text()))


def test_a_truncated_checkpoint_is_named_and_left_alone(tmp_path, cache):
    train(TOY, 0, tmp_path / "model", until=8, checkpoint_every=4, device="cpu", progress=False)
    checkpoint = run_dir(TOY, 0) / "checkpoint.pt"
    half = checkpoint.read_bytes()[:1000]
    checkpoint.write_bytes(half)
    with pytest.raises(InputError, match="truncated"): train(TOY, 0, tmp_path / "model", device="cpu", progress=False)
    assert checkpoint.read_bytes() == half and not (tmp_path / "model").exists()


def damage(path, **changes):
    state = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in state.items() if value is not ...}, path)


@pytest.mark.parametrize("changes, message", [({"optimizer": ...}, "lacks optimizer"), ({"model": {}}, "does not fit"), ({"log": "{"}, "does not fit"),
                                              ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit"), ({"step": "x"}, "does not fit")])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, cache, changes, message):
    train(TOY, 0, tmp_path / "model", until=4, device="cpu", progress=False)
    damage(run_dir(TOY, 0) / "checkpoint.pt", **changes)
    with pytest.raises(InputError, match=message): train(TOY, 0, tmp_path / "model", device="cpu", progress=False)


def test_damaged_weights_are_refused(tmp_path, cache):
    train(TOY, 0, tmp_path / "model", until=4, device="cpu", progress=False)
    path = run_dir(TOY, 0) / "step00000.safetensors"
    assert [step for step, _ in snapshots(TOY, 0)] == [0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"): list(snapshots(TOY, 0))
    with pytest.raises(InputError, match="missing"): load_weights(tmp_path / "no", torch.nn.Linear(1, 1))


def test_until_stops_and_is_checked(tmp_path, cache):
    assert steps_done(TOY, 0) == 0
    for until in (5, 3): assert train(TOY, 0, tmp_path / "model", until=until, device="cpu", progress=False) is None and steps_done(TOY, 0) == 5
    for until in (0, -1, TOY.steps + 1):
        with pytest.raises(InputError, match="until"): train(TOY, 0, tmp_path / "model", until=until, device="cpu", progress=False)


def test_a_folder_that_cannot_take_the_model_is_found_before_the_training(tmp_path, cache):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(InputError): train(TOY, 0, out, device="cpu", progress=False)
    assert not (cache / "training").exists()


def test_names_of_runs(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("MECHINTERP_HOME", str(tmp_path))
    assert {name: run_dir(recipe, 0).relative_to(cache / "training").as_posix() for name, recipe in recipes().items()} == {
        "shakespeare": "shakespeare-a4bc911a/seed0", "shakespeare-small": "shakespeare-small-f9b54ba6/seed0",
        "shakespeare-induction": "shakespeare-induction-213de7d5/seed0", "induction-2l": "induction-2l-72b62e2e/seed0",
        "addition-gpt2": "addition-gpt2-d3869d49/seed0", "addition-qwen": "addition-qwen-0c4009e0/seed0"}
    assert model_dir(TOY, 3) == tmp_path / "models" / "toy" / "seed3"
    own = replace(TOY, corpus=str(tmp_path / "own.txt"))
    with pytest.raises(InputError, match="corpus"): run_dir(own, 0)
    names = set()
    for text in ("one text", "another text"):
        (tmp_path / "own.txt").write_text(text)
        names |= {run_dir(own, 0), run_dir(own, 0)}
    assert len(names) == 2, "another text at the same path is another run"


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"earlier")
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        with atomic_path(path) as temporary: temporary.write_bytes(b"later")
    assert path.read_bytes() == b"earlier" and [p.name for p in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("change, message", [({"steps": 0}, "steps"), ({"repeat_kind": "both"}, "repeat_kind"), ({"repeat_fraction": 2.0}, "repeat_fraction"),
    ({"name": "../x"}, "name"), ({"name": ".."}, "name"), ({"name": ""}, "name"), ({"name": 3}, "name"), ({"steps": "9"}, "steps"), ({"steps": 9.0}, "steps"), ({"steps": True}, "steps"),
    ({"lr": 0}, "lr"), ({"lr": "1e-3"}, "lr"), ({"lr": float("nan")}, "lr"), ({"betas": 0.9}, "betas"), ({"betas": (0.9, 1)}, "betas"), ({"snapshots": 3}, "snapshots"),
    ({"snapshots": ("a",)}, "snapshots"), ({"corpus": 3}, "corpus"), ({"architecture": "GPT2LMHeadModel"}, "architecture"), ({"warmup_steps": -1}, "warmup_steps"),
    ({"wordings": ("question",)}, "corpus"), ({"wordings": ("qestion",), "corpus": None}, "wordings"), ({"wordings": "question", "corpus": None}, "wordings")])
def test_a_wrong_recipe_is_refused(change, message):
    with pytest.raises(InputError, match=message): Recipe(**{"name": "x", "architecture": {}, **change})


@pytest.mark.parametrize("content, message", [("{", "JSON"), ("[]", "keys"), ("3", "keys"), ('{"name": "x"}', "architecture"), ('{"name": "x", "architecture": {}, "stepz": 3}', "did you mean")])
def test_a_wrong_recipe_file_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message): load_recipe(str(path))


@pytest.mark.parametrize("change, message", [({"n_ctx": 33}, "32 positions"), ({"architecture": {}}, "vocab_size"), ({"architecture": {"class": "GPT3", "vocab_size": 65}}, "class")])
def test_an_architecture_that_does_not_fit_is_refused(tmp_path, cache, change, message):
    with pytest.raises(InputError, match=message): train(replace(TOY, **change), 0, tmp_path / "model", device="cpu", progress=False)


def test_sums_that_do_not_fit_are_refused(tmp_path, cache):
    for change, message in (({"n_ctx": 27}, "at least 28"), ({"architecture": ADDING.architecture | {"vocab_size": 65}}, "41 characters")):
        with pytest.raises(InputError, match=message): train(replace(ADDING, **change), 0, tmp_path / "model", device="cpu", progress=False)
    (tmp_path / "model-early").mkdir()
    (tmp_path / "model-early" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="notes.txt"): train(ADDING, 0, tmp_path / "model", device="cpu", progress=False)
    assert steps_done(ADDING, 0) == 0 and (tmp_path / "model-early" / "notes.txt").exists()


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, cache):
    with pytest.raises(InputError, match="65 characters"):
        train(Recipe("x", {**TOY.architecture, "d_vocab": 64}, corpus=None, n_ctx=32), 0, tmp_path / "model", device="cpu", progress=False)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=200))
def test_the_character_tokenizer_round_trips(text):
    tokenizer = char_tokenizer(text)
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text and ids.tolist() == tokenizer(text)["input_ids"] and len(tokenizer) == len(set(text))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 65), st.integers(0, 10**6), st.booleans())
def test_repeated_random_repeats(batch, length, d_vocab, seed, with_bos):
    tokens = repeated_random(batch, length, d_vocab, generator(seed), bos=d_vocab if with_bos else None)
    copies = tokens[:, int(with_bos):]
    assert tokens.shape == (batch, 2 * length + with_bos) and torch.equal(copies[:, :length], copies[:, length:]) and int(copies.max()) < d_vocab


TEXT = torch.arange(200)                                                  # every passage of it is known by its first token


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(0, 10**6), st.booleans())
def test_repeated_natural_repeats_a_passage(batch, length, seed, with_bos):
    tokens = repeated_natural(TEXT, batch, length, generator(seed), bos=500 if with_bos else None)
    copies = tokens[:, int(with_bos):]
    assert tokens.shape == (batch, 2 * length + with_bos) and (tokens[:, :int(with_bos)] == 500).all()
    assert torch.equal(copies[:, :length], copies[:, length:]) and torch.equal(copies[:, :length], copies[:, :1] + torch.arange(length))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(8, 60), st.integers(1, 9), st.integers(0, 9), st.integers(0, 10**6))
def test_natural_repeats_are_of_passages(batch, length, low, more, seed):
    for row in training_repeats(batch, length, generator(seed), tokens=TEXT, min_period=low, max_period=low + more):
        assert any(torch.equal(row[p:], row[:-p]) for p in range(low, low + more + 1) if p < length) or length <= low + more
        assert ((row.diff() == 1) | (row[1:] == row.min())).all() and row.max() - row.min() < low + more


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(24, 60), st.sampled_from([0.0, 1.0]), st.sampled_from(["random", "natural"]), st.integers(0, 10**6))
def test_mixed_batches_are_all_text_or_all_repeats(batch, length, fraction, kind, seed):
    rows = mixed_batch(TEXT, batch, length, generator(seed), fraction=fraction, kind=kind, d_vocab=200, min_period=2, max_period=20)
    assert rows.shape == (batch, length)
    for row in rows:
        repeats = any(torch.equal(row[p:], row[:-p]) for p in range(2, 21))
        assert repeats == bool(fraction) and (repeats or torch.equal(row, row[0] + torch.arange(length)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 80), st.integers(1, 20), st.integers(0, 20), st.integers(0, 10**6))
def test_training_repeats_have_a_period_in_range(batch, length, low, more, seed):
    rows = training_repeats(batch, length, generator(seed), d_vocab=9, min_period=low, max_period=low + more)
    assert rows.shape == (batch, length)
    assert all(any(torch.equal(row[p:], row[:-p]) for p in range(low, low + more + 1) if p < length) or length <= low + more for row in rows)


def test_periodic_is_the_plain_definition():
    blocks = torch.arange(12).view(2, 6)
    rows = periodic(blocks, 7, torch.tensor([3, 5]), torch.tensor([0, 2]))
    assert rows.tolist() == [[0, 1, 2, 0, 1, 2, 0], [8, 9, 10, 6, 7, 8, 9]]
