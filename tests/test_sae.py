"""Autoencoders beside sae-lens's own evaluators, trainings that are interrupted, and input that cannot be used."""
import itertools, json, warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mechinterp_lib.core import InputError
from mechinterp_lib.interventions import capture
from mechinterp_lib.models import as_bridge, load_model, new_model, written_by
from mechinterp_lib.sae import (ARCHITECTURES, ablate_feature, activation_batches, activations_at, check_sae, corpus_rows, encoded, evaluate_sae, feature_dashboard, fit_sae, load_sae, match_directions, nearest_directions, save_sae, steer_with_feature, train_sae)

sae_lens = pytest.importorskip("sae_lens")
HOOK, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
SMALL = {"d_sae": 48, "k": 4, "n_samples": 40 * 64, "batch_size": 64, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def model():
    made = as_bridge(new_model({"class": "GPT2LMHeadModel", "vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}, seed=0))
    for weight in made.parameters(): weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return made


@pytest.fixture(scope="module")
def rows(): return torch.randint(0, 40, (60, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sae(model, rows): return train_sae(model, HOOK, rows, **SMALL | {"k": np.int64(4), "seed": np.int64(0)})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hook", [HOOK, Z])
def test_what_is_written_opens_in_sae_lens(architecture, hook, model, rows, tmp_path):
    ours = train_sae(model, hook, rows, architecture, out=tmp_path / "sae", **SMALL)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    seen = capture(model, rows[:3], [hook])[1][hook]
    acts, decoded = encoded(ours, seen)
    assert torch.equal(theirs.encode(seen if hook == Z else seen.flatten(2)), acts) and torch.isfinite(decoded).all() and (acts != 0).any()
    assert theirs.cfg.metadata.hook_name == hook == check_sae(load_sae(tmp_path / "sae", model=model), model)


def test_an_autoencoder_of_sae_lens_is_written_and_read(tmp_path):
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=24, d_sae=30))
    with torch.no_grad():
        theirs.W_enc[0, 0] = 1e6                                                     # too large for 16 bits
        theirs.W_dec *= 1e-8                                                         # and too small
    ours = load_sae(save_sae(theirs, tmp_path / "sae"))
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in theirs.state_dict().items())


def test_measures_are_those_of_sae_lens():
    model = load_model("shakespeare-induction/seed0", device="cpu")
    rows = written_by(model, 24, 40)
    sae = train_sae(model, HOOK, rows, **SMALL | {"d_sae": 300, "k": 12})
    from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler
    found = evaluate_sae(sae, model, rows, chunk=8)
    def store(): return SimpleNamespace(get_batch_tokens=lambda size, parts=iter(rows.split(8)): next(parts))
    loss = get_downstream_reconstruction_metrics(sae, model, store(), ActivationScaler(), True, True, 3, 8)
    rest, features = get_sparsity_and_variance_metrics(sae, model, store(), n_batches=3, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True, eval_batch_size_prompts=8, model_kwargs={}, activation_scaler=ActivationScaler())
    pairs = {"ce_recovered_zero": loss["ce_loss_score"], "ce_model": loss["ce_loss_without_sae"], "ce_sae": loss["ce_loss_with_sae"], "ce_zero": loss["ce_loss_with_ablation"], "kl_sae": loss["kl_div_with_sae"], "kl_zero": loss["kl_div_with_ablation"], "kl_recovered_zero": loss["kl_div_score"],
             "explained_variance": rest["explained_variance"], "l0": rest["l0"], "norm_ratio": rest["l2_ratio"]}
    for name, theirs in pairs.items(): assert found.results[name].value == pytest.approx(theirs, rel=1e-4, abs=1e-5), name
    assert found.features.density.to_numpy() == pytest.approx(np.array(features["feature_density"]), abs=1e-6)
    bias = [get_sparsity_and_variance_metrics(sae, model, SimpleNamespace(get_batch_tokens=lambda size: rows), n_batches=1, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True, eval_batch_size_prompts=24, model_kwargs={}, activation_scaler=ActivationScaler())[0]["relative_reconstruction_bias"]]
    assert found.results["shrinkage"].value == pytest.approx(bias[0], rel=1e-4)


def test_stored_activations_serve_as_well(model, rows, sae):
    values = activations_at(model, HOOK, rows).bfloat16()
    stored = train_sae(model, HOOK, rows, stored=values, **SMALL)
    ours, theirs = (evaluate_sae(one, model, rows).results["explained_variance"].value for one in (stored, sae))
    assert check_sae(stored, model) == HOOK and ours == pytest.approx(theirs, abs=0.1) and ours > 0.2
    for wrong in (values[:-1], values[:, :-1], activations_at(model, "blocks.0.hook_resid_post", rows)):
        with pytest.raises(InputError, match="stored"): train_sae(model, HOOK, rows, stored=wrong, **SMALL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_interrupted_training_goes_on_to_the_same_weights(architecture, model, rows, tmp_path, monkeypatch):
    from sae_lens.training.sae_trainer import SAETrainer
    straight, step = train_sae(model, HOOK, rows, architecture, out=tmp_path / "straight", **SMALL), SAETrainer.step
    def dying(trainer, batch):
        if trainer.n_training_samples == after * 64: raise KeyboardInterrupt
        return step(trainer, batch)
    came_to = []
    for after in (15, 31):
        monkeypatch.setattr(SAETrainer, "step", dying)
        with pytest.raises(KeyboardInterrupt): train_sae(model, HOOK, rows, architecture, out=tmp_path / "killed", **SMALL)
        state = tmp_path / "killed" / "state"
        came_to += [int(path.name) for path in state.iterdir()]
        (state / "9999999").mkdir()                                                  # begun, and never whole
    monkeypatch.undo()
    assert len(came_to) == 2 and 0 < came_to[0] < came_to[1] < 40 * 64, "one whole state at a time"
    with pytest.raises(InputError, match="other settings.*n_samples 2560, not 1280"): train_sae(model, HOOK, rows, architecture, out=tmp_path / "killed", **SMALL | {"n_samples": 1280})
    killed = train_sae(model, HOOK, rows, architecture, out=tmp_path / "killed", **SMALL)
    assert all(torch.equal(weight, killed.state_dict()[name]) for name, weight in straight.state_dict().items())
    assert not (tmp_path / "killed" / "state").exists()
    with pytest.raises(InputError, match="already"): train_sae(model, HOOK, rows, architecture, out=tmp_path / "killed", **SMALL)


def test_a_training_on_other_data_is_not_gone_on_with(model, rows, tmp_path, monkeypatch):
    from sae_lens.training.sae_trainer import SAETrainer
    step = SAETrainer.step
    def dying(trainer, batch):
        if trainer.n_training_samples == 20 * 64: raise KeyboardInterrupt
        return step(trainer, batch)
    monkeypatch.setattr(SAETrainer, "step", dying)
    with pytest.raises(KeyboardInterrupt): train_sae(model, HOOK, rows, out=tmp_path, **SMALL)
    monkeypatch.undo()
    for other, options in ((rows.flip(0), {}), (rows[:50], {}), (rows, {"block": 7}), (rows, {"seed": 1})):
        with pytest.raises(InputError, match="other settings"): train_sae(model, HOOK, other, out=tmp_path, **SMALL | options)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_about_k_features_are_active_or_it_is_said(architecture):
    truth = torch.nn.functional.normalize(torch.randn(48, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    def batches(start):
        for number in itertools.count(start // 512):
            draw = torch.Generator().manual_seed(number)
            yield ((torch.rand(512, 48, generator=draw) < 1 / 12) * (0.5 + torch.rand(512, 48, generator=draw))) @ truth
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sae = fit_sae(batches, architecture, 48, 4, n_samples=150 * 512, lr=3e-3, device="cpu", progress=False)
    with torch.no_grad(): active = (sae.encode(next(batches(10**6))) != 0).sum(-1).float().mean().item()
    assert 2.8 < active < 5.2 or architecture == "jumprelu" and any("features are active on average, not 4" in str(warning.message) for warning in said), active


def test_a_log_is_kept_where_it_is_asked_for(model, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline"), monkeypatch.setenv("WANDB_SILENT", "true"), monkeypatch.chdir(tmp_path)
    train_sae(model, HOOK, rows, **SMALL)
    assert not (tmp_path / "wandb").exists()
    train_sae(model, HOOK, rows, wandb_project="mine", **SMALL)
    assert any((tmp_path / "wandb").rglob("*.wandb"))


def test_texts_become_rows(model, rows):
    assert torch.equal(corpus_rows(model, rows), rows)
    assert corpus_rows(model, [rows[0, :7], rows[1, :10]], 3).tolist() == [row.tolist() for row in (*rows[0, :6].split(3), *rows[1, :9].split(3))]
    with pytest.raises(InputError, match="too few tokens"): corpus_rows(model, [rows[0, :2]], 3)


def test_interventions_keep_the_error(model, rows, sae):
    tokens = rows[:4]
    plain, seen = capture(model, tokens, [HOOK])
    acts, decoded = encoded(sae, seen[HOOK])
    feature = int(acts.sum((0, 1)).argmax())
    with torch.no_grad():
        with ablate_feature(model, sae, feature): without = capture(model, tokens, ["blocks.1.hook_resid_post"])[1][HOOK]
        with steer_with_feature(model, sae, feature, 2.0, how="set", positions=[3, -1]): steered = model(tokens)
        with steer_with_feature(model, sae, feature, 0.0): assert torch.allclose(model(tokens), plain, atol=1e-5)
        assert torch.allclose(model(tokens), plain), "a hook stayed"
    taken = acts[..., [feature]] * sae.W_dec[feature]
    assert torch.allclose(seen[HOOK] - without, taken, atol=1e-4)
    assert torch.allclose(steered[:, :3], plain[:, :3], atol=1e-5) and not torch.allclose(steered[:, 3], plain[:, 3], atol=1e-3)


def test_interventions_can_be_nested(model, rows, sae):
    tokens = rows[:2]
    plain, seen = capture(model, tokens, [HOOK])
    one, two = encoded(sae, seen[HOOK])[0][0, 3].topk(2).indices.tolist()
    def at_hook(): return capture(model, tokens, [HOOK])[1][HOOK]
    with ablate_feature(model, sae, one, positions=[3]):
        first = at_hook()
        expected = first[0, 3] - encoded(sae, first)[0][0, 3, two] * sae.W_dec[two]
        with ablate_feature(model, sae, two, positions=[3]): nested = at_hook()
        assert torch.equal(at_hook(), first)
    assert not torch.allclose(nested[0, 3], first[0, 3], atol=1e-4) and torch.allclose(nested[0, 3], expected, atol=1e-4) and torch.equal(nested[:, :3], seen[HOOK][:, :3])


def test_activations_that_are_normed_on_the_way(model, rows):
    normed = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=24, d_sae=30, normalize_activations="layer_norm"))
    normed.cfg.metadata.hook_name = HOOK
    plain, seen = capture(model, rows[:2], [HOOK])
    feature = int(encoded(normed, seen[HOOK])[0].sum((0, 1)).argmax())
    with torch.no_grad():
        with steer_with_feature(model, normed, feature, 0.0): assert torch.allclose(model(rows[:2]), plain, atol=1e-4)
        with ablate_feature(model, normed, feature): assert not torch.allclose(model(rows[:2]), plain, atol=1e-4)


def test_pages_stay_small(tmp_path):
    from mechinterp_lib.sae import _write_pages
    example = [1.0, ["word\n</script>"] * 40, [50] * 40, 30]
    pages = ({"id": i, "about": "x" * 200, "density": 0.1, "most": 1.0, "bins": [1] * 24, "near": [0, 0.5], "rise": [0.1], "up": ["a"] * 8, "down": ["b"] * 8, "rows": [example] * 12} for i in range(4096))
    _write_pages(tmp_path, pages, "GROUP of POSITIONS <b>", 10)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert max(sizes.values()) < 200_000 and len([name for name in sizes if name.startswith("listed")]) > 1
    page = (tmp_path / "index.html").read_text()
    assert "GROUP of POSITIONS &lt;b&gt;" in page and "</script>" not in (tmp_path / "features-0.js").read_text()
    listed = [entry for path in tmp_path.glob("listed-*.js") for entry in json.loads(path.read_text().removeprefix("listed(").removesuffix(");"))[1]]
    assert sorted(entry[0] for entry in listed) == list(range(4096))
    for entry in listed[::500]: assert any(page["id"] == entry[0] for page in json.loads((tmp_path / f"features-{entry[4]}.js").read_text().removeprefix("features(").removesuffix(");"))[1])


def test_density_leaves_out_what_training_left_out(tmp_path):
    model = load_model("shakespeare-induction/seed0", device="cpu")
    rows = written_by(model, 20, 24)
    sae = train_sae(model, HOOK, rows, skip=12, **SMALL)
    feature_dashboard(sae, model, rows, tmp_path, k=3, before=4, after=2)
    pages = [page for path in tmp_path.glob("features-*.js") for page in json.loads(path.read_text().removeprefix("features(").removesuffix(");"))[1]]
    density = evaluate_sae(sae, model, rows).features.density
    assert len(pages) == 48 and [page["density"] for page in pages] == pytest.approx([density[page["id"]] for page in pages], rel=1e-2)


def test_directions():
    one = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found, of, cosines = match_directions(one, 3 * one[order])
    assert (order.numpy()[of] == found).all() and np.allclose(cosines, 1)
    nearest, cosine = nearest_directions(torch.cat([one, -one, 2 * one]))
    assert (nearest[:30] == np.arange(60, 90)).all() and np.allclose(cosine[:30], 1)


def test_what_cannot_be_used(model, rows, sae, tmp_path):
    other = as_bridge(new_model({"class": "GPT2LMHeadModel", "vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}, seed=0))
    broken = as_bridge(new_model({"class": "GPT2LMHeadModel", "vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}, seed=0))
    with torch.no_grad(): broken.original_model.transformer.h[1].mlp.c_proj.bias[0] = float("nan")
    training = as_bridge(new_model({"class": "GPT2LMHeadModel", "vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}, seed=0))
    training.train()
    free = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=24, d_sae=30))
    free.cfg.metadata.hook_name = HOOK
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    for match, wrong in {
        "no such hook": lambda: train_sae(model, "blocks.9.hook_resid_post", rows, **SMALL), "architecture": lambda: train_sae(model, HOOK, rows, "gated", **SMALL), "too few tokens": lambda: train_sae(model, HOOK, rows[:3], **SMALL),
        "NaN": lambda: train_sae(broken, HOOK, rows, **SMALL), "d_in 24": lambda: check_sae(free, other), "another model": lambda: check_sae(sae, broken), "no hook_name": lambda: check_sae(sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=24, d_sae=30)), model),
        "no cfg.json": lambda: load_sae(tmp_path / "nothing"), "not a JSON file": lambda: load_sae(tmp_path), "k:": lambda: train_sae(model, HOOK, rows, **SMALL | {"k": 99}), "n_samples": lambda: train_sae(model, HOOK, rows, **SMALL | {"n_samples": 3}),
        "at least 2": lambda: evaluate_sae(sae, model, rows[:1]), "skip": lambda: train_sae(model, HOOK, rows, skip=16, **SMALL), "sae_id": lambda: load_sae("no-such-release", "blocks.0"), "features": lambda: ablate_feature(model, sae, 48), "without positions|hooks that see": lambda: train_sae(model, "blocks.1.attn.hook_pattern", rows, **SMALL), "finite": lambda: fit_sae(lambda start: itertools.repeat(torch.full((64, 8), float("nan"))), n_samples=640, progress=False),
        "training mode": lambda: evaluate_sae(sae, training, rows[:4]), "strength": lambda: steer_with_feature(model, sae, 0, float("nan")),
    }.items():
        with pytest.raises(InputError, match=match): wrong()
    with pytest.raises(InputError, match="positions"):
        with ablate_feature(model, sae, 0, positions=[16]): model(rows[:1])
    with torch.no_grad(): assert torch.isfinite(model(rows[:1])).all()


@pytest.mark.parametrize("positions", [[2], [5], [-1], None])
def test_a_change_stays_where_it_is_while_the_model_writes(positions, model, rows, sae):
    "With keys and values kept, a step reads one token alone; its position is still that in the text."
    prompt, changed = rows[:1, :6], []
    for cached in (True, False):
        with steer_with_feature(model, sae, 3, 40.0, positions): changed.append(model.original_model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, min_new_tokens=6, use_cache=cached, pad_token_id=0))
    if positions != [-1]: assert torch.equal(*changed)                                                # the last position is another at each step
    assert not model.original_model._forward_pre_hooks


def test_no_share_is_given_where_there_is_nothing_to_win_back(model, rows, sae):
    "A model that says its text is unlikely is better off without its activation."
    unlikely = model(rows[:8]).argmin(-1).roll(1, 1)
    results = evaluate_sae(sae, model, unlikely).results
    for name in ("mean", "zero"): assert (f"ce_recovered_{name}" in results) == (results[f"ce_{name}"].value > results["ce_model"].value)
