"""Training that is killed, checkpoints that are broken, disks that are full."""
import json, os, signal, subprocess, sys, time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mechinterp_lib.core import InputError, atomic_path, generator
from mechinterp_lib.data import char_tokenizer, encode, periodic, repeated_random, training_repeats
from mechinterp_lib.training import Recipe, load_recipe, run_dir, train

TOY = Recipe("toy", {"class": "attention_only", "d_vocab": 65, "n_ctx": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}, corpus=None, n_ctx=32,
             steps=60, batch_size=4, eval_every=15, warmup_steps=5, max_period=16, snapshots=(0, 20, 60))
RUN = "from tests.test_training import TOY; from mechinterp_lib.training import train; import sys; train(TOY, 3, sys.argv[1], checkpoint_every=4, device='cpu', progress=False)"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spawn(out, cache):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen([sys.executable, "-c", RUN, str(out)], cwd=root, env={**os.environ, "MECHINTERP_CACHE": str(cache), "PYTHONPATH": root})


def without_time(record):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in record["log"]]


def test_a_killed_training_goes_on_to_the_same_numbers(tmp_path, cache):
    assert spawn(tmp_path / "straight", tmp_path / "other").wait(120) == 0
    checkpoint = run_dir(TOY, 3) / "checkpoint.pt"
    kills = 0
    while kills < 3:                                                   # kill it three times, each time a little later
        process = spawn(tmp_path / "killed", cache)
        seen, deadline = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen: break
            time.sleep(0.002)
        if process.poll() is not None: break
        process.send_signal(signal.SIGKILL); process.wait(); kills += 1
    assert kills, "the training ended before it could be killed"
    assert not (tmp_path / "killed" / "model.safetensors").exists() or kills < 3
    assert spawn(tmp_path / "killed", cache).wait(120) == 0
    straight, killed = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("straight", "killed"))
    assert without_time(straight) == without_time(killed) and straight["validation_loss"] == killed["validation_loss"]
    assert (tmp_path / "straight/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def test_a_truncated_checkpoint_is_named_and_left_alone(tmp_path, cache):
    train(TOY, 0, tmp_path / "model", until=8, checkpoint_every=4, device="cpu", progress=False)
    checkpoint = run_dir(TOY, 0) / "checkpoint.pt"
    half = checkpoint.read_bytes()[:1000]
    checkpoint.write_bytes(half)
    with pytest.raises(InputError, match="truncated"): train(TOY, 0, tmp_path / "model", device="cpu", progress=False)
    assert checkpoint.read_bytes() == half and not (tmp_path / "model").exists()


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"earlier")
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        with atomic_path(path) as temporary: temporary.write_bytes(b"later")
    assert path.read_bytes() == b"earlier" and [p.name for p in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("change, message", [({"steps": 0}, "steps"), ({"repeat_kind": "both"}, "repeat_kind"), ({"repeat_fraction": 2.0}, "repeat_fraction")])
def test_a_wrong_recipe_is_refused(change, message):
    with pytest.raises(InputError, match=message): Recipe("x", {}, **change)


@pytest.mark.parametrize("content, message", [("{", "JSON"), ('{"name": "x"}', "architecture"), ('{"name": "x", "architecture": {}, "stepz": 3}', "did you mean")])
def test_a_wrong_recipe_file_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message): load_recipe(str(path))


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
