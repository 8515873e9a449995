"""The shipped models: the weights have the losses that their records claim, and transformers opens them without us."""
import json, re

import pytest
import torch

from mechinterp_lib.core import generator, home, read_json, sha256
from mechinterp_lib.data import encode, has_corpus, load_text, repeated_random, split
from mechinterp_lib.experiments.sae_features import SHIPPED, shown_descriptions
from mechinterp_lib.logit_lens import lens_statistics, load_tuned_lens
from mechinterp_lib.models import describe_model, list_models, load_model, written_by
from mechinterp_lib.sae import evaluate_sae, load_sae, shipped_saes
from mechinterp_lib.subjects import shipped_subjects, untrained_twin
from mechinterp_lib.training import load_recipe, validation_loss, validation_rows

NAMES = [name for name in list_models() if not re.match(r"addition-\w+/seed[1-9]|shapes/", name)]       # of the addition models the first; test_addition.py looks at all, test_vision.py at those that read pictures
MOST = {"shakespeare": 1.50, "shakespeare-small": 1.56}                                        # nats a character, over the last tenth of the text


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_the_loss_of_their_record(name):
    family, record = name.partition("/")[0], read_json(home() / "models" / name / "training.json")
    recipe, model = load_recipe(family), load_model(name, device="cpu")
    if recipe.corpus and not has_corpus(recipe.corpus): pytest.skip(f"{recipe.corpus} is not here")
    tokens = split(encode(model.tokenizer, load_text(recipe.corpus)))[1] if recipe.corpus else None
    loss = validation_loss(model.original_model, validation_rows(recipe, tokens))
    assert abs(loss - record["validation_loss"]) < 2e-3 and loss <= MOST.get(family, float("inf"))


def unrounded(norm, stream):
    "An RMSNorm at the precision of its input."
    return norm.weight * stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.mark.parametrize("name", [name for name in NAMES if describe_model(name)["class"].endswith(("LMHeadModel", "ForCausalLM"))])
def test_transformers_opens_them(name, monkeypatch):
    from transformers import AutoModelForCausalLM
    plain, model = AutoModelForCausalLM.from_pretrained(home() / "models" / name, dtype=torch.float64).eval(), load_model(name, device="cpu", dtype=torch.float64)
    tokens = torch.randint(model.cfg.d_vocab, (4, model.cfg.n_ctx), generator=generator("opened"))
    with monkeypatch.context() as exact:                                                       # transformers' RMSNorm rounds to 32 bits, whatever the weights are
        for norm in {type(module) for module in plain.modules() if hasattr(module, "variance_epsilon")}: exact.setattr(norm, "forward", unrounded)
        with torch.no_grad(): assert (plain(tokens).logits - model(tokens)).abs().max() < 1e-5
    single, model = AutoModelForCausalLM.from_pretrained(home() / "models" / name).eval(), load_model(name, device="cpu")     # as it opens by itself: apart by rounding alone
    with torch.no_grad(): ours, theirs = model(tokens), single(tokens).logits
    assert single.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("induction-2l/")])
def test_fed_on_repeats_a_model_knows_the_second_copy(name):
    model = load_model(name, device="cpu")
    length = model.cfg.n_ctx // 2
    tokens = repeated_random(64, length, model.cfg.d_vocab, generator("fresh repeats"))
    with torch.no_grad(): said = model(tokens).argmax(-1)
    assert (said[:, length:-1] == tokens[:, length + 1:]).float().mean() > 0.95


@pytest.mark.parametrize("name", [name for name in list_models() if name.partition("/")[0] in MOST])
def test_the_lens_beside_a_model_of_text_is_its_own_and_nearer_to_the_end(name):
    model = load_model(name, device="cpu")
    rows, lens = written_by(model, 4, 64), load_tuned_lens(name, model)
    plain, translated = (lens_statistics(model, rows, **options)["kl"].mean(1) for options in ({}, {"mode": "tuned", "tuned": lens}))
    assert lens.weight.dtype == torch.float16 and (translated[:-1] < plain[:-1]).all() and abs(translated[-1]) < 1e-5


@pytest.mark.parametrize("name", shipped_saes())
def test_an_autoencoder_keeps_what_its_model_does(name):
    pytest.importorskip("sae_lens")
    subject, path = shipped_subjects(["shakespeare"])[0], home() / "models" / name
    model = untrained_twin(subject) if "untrained" in name else subject.open()
    quality = evaluate_sae(load_sae(name, model=model), model, written_by(subject.open(), 8, 128)).results
    assert quality["l0"].value <= 32 and quality["explained_variance"].value > 0.7 and (path / "sae_weights.safetensors").stat().st_size < 10e6
    if "untrained" not in name: assert quality["ce_recovered_mean"].value > 0.95 and quality["dead"].value < 0.05


@pytest.mark.parametrize("name", shipped_saes())
def test_its_features_have_pages_in_the_book(name):
    pages = home() / "book" / "pages" / "features" / name
    assert read_json(pages / "made_from.json")["weights"] == sha256(home() / "models" / name / "sae_weights.safetensors"), "made for other weights: python book/_ext/features.py"
    assert max(path.stat().st_size for path in pages.iterdir()) < 200_000
    shown = {page["id"]: page["about"] for path in pages.glob("features-*.js") for page in json.loads(path.read_text(encoding="utf-8").removeprefix("features(").removesuffix(");"))[1]}
    one = next(one for one in SHIPPED if one.folder == home() / "models" / name)
    assert sorted(shown) == list(range(load_sae(name).cfg.d_sae)) and {feature: about for feature, about in shown.items() if about} == shown_descriptions(one)
    assert f"../features/{name}/index.html" in (home() / "nbs" / "24_sae_features.ipynb").read_text(encoding="utf-8")
