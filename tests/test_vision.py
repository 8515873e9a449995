"""Models that read pictures: LLaVA with either of its towers, as a checkpoint on disk; the decoder as a language model, put through every analysis; hooks that are live and hooks that are not; and the shipped models of shapes."""
import pytest, torch, transformers

from mechinterp_lib.activation_patching import logit_diff, patch_scan
from mechinterp_lib.attention_analysis import extract_attention
from mechinterp_lib.circuits import edge_attribution
from mechinterp_lib.core import InputError, generator, home, seeded
from mechinterp_lib.interventions import COMPONENTS, Replay, each_edit, naive_run
from mechinterp_lib.logit_lens import direct_logit_attribution, fit_tuned_lens, logit_lens
from mechinterp_lib.models import list_models, load_model, save_model
from mechinterp_lib.neuron_analysis import find_max_activating_examples
from mechinterp_lib.sae import activations_at, train_sae
from mechinterp_lib.shapes import COLOURS, PROCESSOR, QUESTIONS, SHAPES_RECIPE, TOKENIZER, ask, draw_pictures, draw_scenes, new_shapes_model, right_answers, shapes_tokenizer, train_shapes, triples
from mechinterp_lib.vision import check_inputs, is_live, load_processor, look, picture_positions, pictures_as_words, region_scan, tower_points, tower_scan
from test_deepseek_vl import KINDS, prompt, vl_prompt, write as write_vl2, write_vl

SHIPPED = [name for name in list_models() if name.startswith("shapes/")]
TOWERS = {
    "siglip": (lambda **size: transformers.SiglipVisionConfig(vision_use_head=False, **size), dict(vision_feature_layer=-1, vision_feature_select_strategy="full")),
    "clip": (lambda **size: transformers.CLIPVisionConfig(projection_dim=16, **size), dict(vision_feature_layer=-2, vision_feature_select_strategy="default")),      # as LLaVA 1.5: a class token, which is left out, and a last layer that nobody reads
}


def write(name, folder):
    "A LLaVA with random weights, large enough that every part matters."
    tower, fields = TOWERS[name]
    vision = tower(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    text = transformers.LlamaConfig(vocab_size=30, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    with seeded("llava", name):
        module = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, image_seq_length=16, **fields))
        for weight in module.parameters(): weight.data += 0.15 * torch.randn_like(weight)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TOWERS)
def folder(request, tmp_path_factory): return write(request.param, tmp_path_factory.mktemp("llava") / request.param)


@pytest.fixture(scope="module")
def model(folder): return load_model(folder, device="cpu")


def asked(n=4, seed=0):
    "One question about as many pictures."
    with seeded("asked", seed): return {"input_ids": torch.cat([torch.ones(n, 16, dtype=torch.long), torch.arange(2, 8).expand(n, -1)], 1), "pixel_values": torch.randn(n, 3, 32, 32)}


@pytest.fixture(scope="module")
def read(model): return pictures_as_words(model, asked())


def test_logits_are_those_of_transformers(folder, model):
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad(): theirs = plain(**asked()).logits
    assert (look(model, asked())[0] - theirs).abs().max() < 1e-5 * theirs.abs().max()
    changed = model.run_with_hooks(asked()["input_ids"], pixel_values=asked()["pixel_values"], fwd_hooks=[("vision_projector.hook_out", lambda value, hook: value * 0)])
    assert (changed - theirs).abs().max() > 1e-2 * theirs.abs().max()
    words = torch.arange(2, 12)[None]                                                            # a prompt without a picture
    with torch.no_grad(): assert torch.allclose(model(words), plain(input_ids=words).logits, atol=1e-4)


def test_the_decoder_reads_patches_as_words(model, read):
    reader, tokens = read
    assert torch.allclose(reader(tokens), look(model, asked())[0], rtol=1e-5, atol=1e-5)
    assert reader.cfg.d_vocab == 30 and reader(tokens).shape[-1] == 30 and sorted(set(tokens[tokens >= 30].tolist())) == list(range(30, 94))
    assert picture_positions(reader, tokens).tolist() == [list(range(16))] * 4
    assert reader.blocks[0].mlp.gate.original_component.weight.data_ptr() == model.blocks[0].mlp.gate.original_component.weight.data_ptr(), "weights are shared"
    before = look(model, asked())[0]
    with torch.no_grad(): reader.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value * 0)])
    assert torch.equal(look(model, asked())[0], before), "hooks of one do not reach the other"
    with pytest.raises(InputError, match="ids 2 to 94.*0 to 93"): patch_scan(reader, tokens, tokens.clamp(max=40).fill_(94).index_fill(1, torch.tensor([21]), 2), metric=logit_diff(reader, 3, 7))
    mixed = {"input_ids": asked()["input_ids"].roll(3, 1), "pixel_values": asked()["pixel_values"]}   # words in front of the picture
    reader, tokens = pictures_as_words(model, mixed)
    assert torch.allclose(reader(tokens), look(model, mixed)[0], rtol=1e-5, atol=1e-5) and picture_positions(reader, tokens)[0].tolist() == list(range(3, 19))


@pytest.mark.parametrize("component", COMPONENTS)
def test_patch_scans_are_those_of_the_slow_loop(read, component):
    reader, tokens = read
    clean, corrupted, metric = tokens[:2], tokens[2:], logit_diff(reader, 3, 7)
    replay = Replay(reader, clean, keep=[component])
    assert replay.exact
    edits, rows, grid = each_edit(component, {1: replay.kept[component][1]})
    few = torch.arange(0, len(rows), max(1, len(rows) // 40))
    fast = patch_scan(reader, clean, corrupted, component=component, layers=[1], metric=metric, skip_same=False).patched.movedim(1, 0).reshape(-1)
    for row in few.tolist():
        one = [type(edit)(edit.component, edit.layer, torch.zeros(1, dtype=torch.long), edit.value[row:row + 1], None if edit.position is None else edit.position[row:row + 1], None if edit.head is None else edit.head[row:row + 1]) for edit in edits]
        logits = next(naive_run(reader, corrupted, one, rows[row:row + 1]))[0]
        assert metric(logits[None]).item() == pytest.approx(fast[row].item(), abs=1e-4)


def test_every_other_analysis_takes_the_reader(read):
    reader, tokens = read
    attention = extract_attention(reader, tokens)
    assert attention.patterns.shape == (3, 4, 4, 22, 22) and attention.tokens is not None
    tuned = fit_tuned_lens(reader, tokens, steps=3, batch=4)
    with torch.no_grad(): wanted = reader(tokens)[:, -1].log_softmax(-1)
    for mode in ("norm", "raw", "tuned"): assert torch.allclose(logit_lens(reader, tokens, mode=mode, tuned=tuned if mode == "tuned" else None).log_probabilities(2)[:, 0], wanted, atol=1e-4)
    assert direct_logit_attribution(reader, tokens, 3, 7).contribution.notna().all()
    assert len(find_max_activating_examples(reader, tokens, 0, 5, k=3)) == 3
    scores = edge_attribution(reader, tokens[:2], tokens[2:], metric=logit_diff(reader, 3, 7))
    assert scores.effects[~scores.effects.isnan()].abs().max() > 0
    assert activations_at(reader, "blocks.1.hook_resid_post", tokens).shape[1] == 48
    train_sae(reader, "blocks.1.hook_resid_post", tokens.repeat(8, 1), d_sae=48, k=4, n_samples=640, batch_size=64, progress=False, device="cpu")


@pytest.mark.parametrize("kind", ["vl", "hybrid", *KINDS])
def test_deepseeks_pictures_are_words_too(kind, tmp_path):
    own = kind in KINDS
    model = load_model((write_vl2(kind, tmp_path / "model") if own else write_vl(tmp_path / "model", kind == "hybrid")), device="cpu")
    ids, given = (prompt([[(2, 1), (1, 1)]]) if own else vl_prompt(kind == "hybrid"))
    inputs = {"input_ids": ids, **{{"images": "pixel_values"}.get(name, name): value for name, value in given.items()}}
    reader, tokens = pictures_as_words(model, inputs)
    assert torch.allclose(reader(tokens), look(model, inputs)[0], rtol=1e-5, atol=1e-5) and (tokens >= model.cfg.d_vocab).sum() >= 16
    assert patch_scan(reader, tokens[:1], tokens[:1].flip(1), metric=logit_diff(reader, 3, 7), component="resid_pre").effects.isfinite().all()
    assert logit_lens(reader, tokens).summary().kl.iloc[-1] == pytest.approx(0, abs=1e-5)
    assert len(tower_points(model, inputs)) == 4 and len(tower_points(model, inputs, "z")) == 2
    with pytest.raises(InputError, match="one picture, in one piece, a prompt"): tower_scan(model, inputs, inputs, logit_diff(model, 3, 7))


def test_hooks_of_the_tower_are_live_or_known_not_to_be(folder, model):
    last = {"siglip": 2, "clip": 1}[folder.name]                                                 # the last layer that is read
    parts = folder.name == "siglip"                                                             # of CLIP's tower TransformerLens shows the stream alone
    dead = {f"encoder_layers.{layer}.attn.{name}" for layer in range(3) for name in ("hook_pattern", "hook_attn_scores") if parts} | {f"encoder_layers.{last}.hook_out", "hook_out"}
    assert not any(is_live(model, asked(), f"vision_encoder.{name}") for name in dead)
    assert all(is_live(model, asked(), f"vision_encoder.encoder_layers.{layer}.{name}") for layer in range(last + 1) for name in ("hook_in", *(("attn.hook_out", "mlp.hook_out", "attn.o.hook_in", "attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out") if parts else ())))
    points = tower_points(model, asked())
    assert points == [*(f"vision_encoder.encoder_layers.{layer}.hook_in" for layer in range(last + 1)), "vision_projector.hook_in", "vision_projector.hook_out"]
    assert all(len(tower_points(model, asked(), component)) == (last + 1) * parts for component in ("z", "attn_out", "mlp_out"))


def test_tower_and_decoder_meet_at_the_projector(model):
    clean, corrupted = asked(3, 1), asked(3, 2)
    metric = logit_diff(model, 3, 7)
    reader, tokens = pictures_as_words(model, {name: torch.cat([clean[name], corrupted[name]]) for name in clean})
    for direction in ("denoise", "noise"):
        words = patch_scan(reader, tokens[:3], tokens[3:], component="resid_pre", metric=logit_diff(reader, 3, 7), direction=direction)
        out = region_scan(model, clean, corrupted, metric, ["vision_projector.hook_out"], direction=direction)
        assert torch.allclose(out.patched[:, 0], words.patched[:, 0, :16], atol=1e-4)
    stream = region_scan(model, clean, corrupted, metric, ["blocks.1.hook_resid_pre"])
    assert torch.allclose(stream.patched[:, 0], patch_scan(reader, tokens[:3], tokens[3:], component="resid_pre", layers=[1], metric=logit_diff(reader, 3, 7)).patched[:, 0], atol=1e-4)
    stream = tower_scan(model, clean, corrupted, metric, direction="noise")                        # of CLIP's tower the class token stays where it is
    assert stream.patched.shape == (3, len(tower_points(model, clean)), 16) and torch.allclose(stream.patched[:, -1], out.patched[:, 0], atol=1e-4)
    for bad in (["vision_encoder.encoder_layers.0.hook_in", "vision_projector.hook_out"], ["vision_projector.hook_out"]):
        with pytest.raises(InputError, match="heads"): region_scan(model, clean, corrupted, metric, bad, heads=True)
    ends = region_scan(model, clean, corrupted, metric, ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"], {"all": torch.ones(3, 22, dtype=torch.bool)})
    assert ends.axes["layer"] == ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"] and torch.allclose(ends.patched[..., 0], ends.clean[:, None].expand(-1, 2), atol=1e-4)
    if tower_points(model, clean, "z"):
        every = tower_scan(model, clean, corrupted, metric, component="z")
        assert list(every.axes) == ["layer", "pos", "head"] and every.patched.isfinite().all()
    else:
        with pytest.raises(InputError, match="nothing of this tower but its stream"): tower_scan(model, clean, corrupted, metric, component="z")
    assert not any(point._forward_hooks for point in model.hook_dict.values()), "no hook stays"


@pytest.mark.filterwarnings("ignore:this model is in")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(folder, model, dtype):
    half = load_model(folder, device="cpu", dtype=dtype)
    exact = look(model, asked())[0]
    assert (look(half, asked())[0].float() - exact).abs().max() < 0.1 * exact.abs().max()
    reader, tokens = pictures_as_words(half, asked())
    assert patch_scan(reader, tokens[:2], tokens[2:], metric=logit_diff(reader, 3, 7)).effects.isfinite().all()


@pytest.mark.parametrize("bad, said", [
    (lambda ok: {"input_ids": ok["input_ids"]}, "input_ids and pixel_values"), (lambda ok: ok["input_ids"], "mapping"), (lambda ok: ok | {"pixel_values": ok["pixel_values"][:3]}, "cannot read these together"),
    (lambda ok: ok | {"input_ids": ok["input_ids"][:, 1:]}, "cannot read these together"), (lambda ok: ok | {"pixel_values": ok["pixel_values"] * float("nan")}, "finite"), (lambda ok: ok | {"pixel_values": ok["pixel_values"][..., :24]}, "cannot read these together"),
    (lambda ok: ok | {"attention_mask": torch.cat([torch.zeros(4, 1), torch.ones(4, 21)], 1).long()}, "padding"), (lambda ok: ok | {"input_ids": ok["input_ids"][:0], "pixel_values": ok["pixel_values"][:0]}, "at least one prompt"), (lambda ok: ok | {"input_ids": ok["input_ids"] + 30}, "ids 31 to 37")])
def test_inputs_that_do_not_fit(model, bad, said):
    for action in (look, pictures_as_words):
        with pytest.raises(InputError, match=said): action(model, bad(asked()))
    with pytest.raises(InputError, match=f"{said}|of the shapes of clean"): tower_scan(model, asked(), bad(asked()), logit_diff(model, 3, 7))


def test_other_things_that_do_not_fit(model, read, tmp_path):
    reader, tokens = read
    with pytest.raises(InputError, match="reads no pictures"): check_inputs(reader, asked())
    with pytest.raises(InputError, match="regions"): tower_scan(model, asked(), asked(seed=1), logit_diff(model, 3, 7), regions={"some": torch.ones(4, 3, dtype=torch.bool)})
    with pytest.raises(InputError, match="component"): tower_points(model, asked(), "neurons")
    with pytest.raises(InputError, match="no such hook"): region_scan(model, asked(), asked(seed=1), logit_diff(model, 3, 7), ["vision_encoder.hook_nowhere"])
    with pytest.raises(InputError, match="processor_config"): load_processor(tmp_path)
    with pytest.raises(InputError, match="cannot be opened"): load_processor("nobody/such-model")
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be opened"): load_processor(tmp_path)


def test_a_training_on_pictures_is_restarted_to_the_same_weights_and_refuses_what_is_wrong(tmp_path, monkeypatch, capsys):
    from dataclasses import replace
    from mechinterp_lib import cli, shapes
    from mechinterp_lib.training import run_dir
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    tiny = replace(SHAPES_RECIPE, steps=6, batch_size=2, eval_every=3, alone_steps=3, warmup_steps=1)
    monkeypatch.setattr(shapes, "SHAPES_RECIPE", tiny)
    monkeypatch.setattr(shapes.train_shapes, "__kwdefaults__", shapes.train_shapes.__kwdefaults__ | {"recipe": tiny})
    assert cli.main(["train", "shapes", "--seed", "3", "--until", "3", "--out", str(tmp_path / "model")]) == 0 and "stopped at step 3 of 6" in capsys.readouterr().out
    assert cli.main(["train", "shapes", "--seed", "3", "--out", str(tmp_path / "model")]) == 0 and "going on from step 3 of 6" in capsys.readouterr().out
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "other"))
    train_shapes(3, tmp_path / "whole", recipe=tiny, progress=False)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert cli.main(["train", "shapes", "--device", "cuda"]) == 2 and "trained on the processor" in capsys.readouterr().err
    assert cli.main(["train", "shape"]) == 2 and "did you mean 'shapes'" in capsys.readouterr().err
    (run_dir(tiny, 3) / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="truncated or not a checkpoint"): train_shapes(3, tmp_path / "whole", recipe=tiny, progress=False)


def test_a_checkpoint_with_its_processor_is_what_transformers_makes_of_it(tmp_path):
    module = new_shapes_model(0).eval()
    save_model(module, shapes_tokenizer(), tmp_path / "model", dtype="float32", more={"processor_config.json": PROCESSOR, "tokenizer_config.json": TOKENIZER})
    processor, plain = transformers.AutoProcessor.from_pretrained(tmp_path / "model"), transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    pictures = draw_pictures(draw_scenes(triples("seen")[:2], generator("two")), generator("two"))
    inputs = processor(text=["<image> what colour is the circle ?"] * 2, images=[(one * 255).round().byte() for one in pictures.pixels], return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], pictures.inputs, atol=1e-6)
    model = load_model(tmp_path / "model")
    with torch.no_grad(): assert (look(model, inputs)[0] - plain(**inputs).logits).abs().max() < 1e-5
    for name in ("run_me.py", "config.json"):
        with pytest.raises(InputError, match="more"): save_model(module, None, tmp_path / "model", more={name: {}})


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_right_about_new_pictures(name):
    model = load_model(name, device="cpu")
    table = right_answers(model.original_model, generator("shapes", "of the tests", name), 10)
    for (question, _), cells in table.groupby(["question", "held"]): assert cells.right.sum() / cells.n.sum() >= 0.97, (question, len(cells))
    by_chance = right_answers(new_shapes_model(0).eval(), generator("shapes", "of the tests", name), 2)
    assert by_chance.right.sum() / by_chance.n.sum() < 0.45
    processor = load_processor(name)
    scenes = draw_scenes(triples("seen")[:8], generator("shown"))
    inputs = processor(text=["<image> " + shapes_tokenizer().decode(row[16:]) for row in ask(scenes, "colour")[0]], images=[(one * 255).round().byte() for one in draw_pictures(scenes, generator("shown")).pixels], return_tensors="pt")
    assert (look(model, inputs)[0][:, -1].argmax(-1) == ask(scenes, "colour")[1]).float().mean() >= 0.75
    assert sum(file.stat().st_size for file in (home() / "models" / "shapes").rglob("*")) < 10e6


def test_a_word_that_the_tokenizer_does_not_know_is_refused():
    model, processor = load_model("shapes/seed0", device="cpu"), load_processor("shapes/seed0")
    def seen(text): return processor(text=text, images=torch.zeros(3, 32, 32, dtype=torch.uint8), return_tensors="pt")
    assert look(model, seen("<image> what colour is the circle ?"))[0].shape[1] == 22
    with pytest.raises(InputError, match="does not know, at position 20"): look(model, seen("<image> what colour is the hexagon ?"))
