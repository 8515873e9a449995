"""Every family of models that the library names, as a tiny checkpoint of its own class: written as transformers writes it, opened from disk as a user's would be, and put through every analysis."""
import warnings

import pytest, torch, transformers
from transformer_lens.model_bridge.generalized_components import MLAAttentionBridge

from mechinterp_lib.activation_patching import has_component, logit_diff, patch_scan
from mechinterp_lib.attention_analysis import categorize_attention_heads, compute_attention_stats, extract_attention
from mechinterp_lib.circuits import edge_attribution
from mechinterp_lib.core import InputError, seeded
from mechinterp_lib.interventions import COMPONENTS, Replay, each_edit, naive_run
from mechinterp_lib.logit_lens import direct_logit_attribution, fit_tuned_lens, logit_lens
from mechinterp_lib import models
from mechinterp_lib.deepseek_vl import own_class
from mechinterp_lib.models import load_model
from mechinterp_lib.neuron_analysis import find_max_activating_examples
from mechinterp_lib.sae import activations_at, evaluate_sae, train_sae

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, max_position_embeddings=64)
LATENT = SIZE | dict(num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, n_group=1, topk_group=1)
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
TILES, PROJECTOR = dict(image_size=16, patch_size=4, width=24, layers=2, heads=2), dict(input_dim=24, n_embed=32)
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "qwen2.5": ("Qwen2ForCausalLM", SIZE | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", SIZE | dict(head_dim=16)),
    "llama3": ("LlamaForCausalLM", SIZE | dict(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})),
    "mistral": ("MistralForCausalLM", SIZE | dict(head_dim=8, sliding_window=5)),
    "gemma2": ("Gemma2ForCausalLM", SIZE | dict(head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, query_pre_attn_scalar=8)),
    "deepseek-v2-lite": ("DeepseekV2ForCausalLM", LATENT | dict(q_lora_rank=None, v_head_dim=8, topk_method="greedy")),
    "deepseek-v2": ("DeepseekV2ForCausalLM", LATENT | dict(q_lora_rank=16, v_head_dim=16, topk_method="group_limited_greedy", n_group=2, topk_group=1)),
    "deepseek-v3": ("DeepseekV3ForCausalLM", LATENT | dict(q_lora_rank=16, v_head_dim=16)),
    "llava": ("LlavaForConditionalGeneration", dict(text_config=dict(model_type="llama") | SIZE, image_token_index=49, vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VISION))),
    "deepseek-vl": ("DeepseekVLForConditionalGeneration", dict(text_config=dict(model_type="llama") | SIZE, image_token_id=50, vision_config=dict(model_type="siglip_vision_model") | VISION)),
    "deepseek-vl2": ("DeepseekVLV2ForCausalLM", dict(language_config=LATENT | dict(q_lora_rank=None, v_head_dim=8), vision_config=TILES, projector_config=PROJECTOR)),
    "deepseek-vl2-tiny": ("DeepseekVLV2ForCausalLM", dict(language_config=LATENT | dict(use_mla=False), vision_config=TILES, projector_config=PROJECTOR)),
}
T = 9


def class_of(kind):
    "The class itself: transformers', or the library's own."
    return own_class(kind) or getattr(transformers, kind)


def write(name, folder):
    "A checkpoint with random weights, large enough that every component matters, and a tokenizer with a begin token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    kind, fields = FAMILIES[name]
    model_class = class_of(kind)
    with seeded("family", name):
        module = model_class(model_class.config_class(**fields, bos_token_id=0, eos_token_id=0, pad_token_id=None))
        for weight in module.parameters(): weight.data += 0.15 * torch.randn_like(weight)
    module.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({"<s>": 0, **{chr(65 + i): 1 + i for i in range(49)}}, unk_token="<s>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="<s>", unk_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory): return write(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="module")
def model(folder): return load_model(folder, device="cpu")


def prompts(n=4, length=T):
    with seeded("family prompts"): return torch.randint(1, 50, (n, length))


def listed(model):
    "What the library says of a model's family."
    return next(one for one in models.MODEL_FAMILIES if one.architecture == model.cfg.architecture)


def test_every_family_is_here():
    "nanoGPT's and llama2.c's files have tests of their own, and are of classes that are here."
    assert {one.architecture for one in models.MODEL_FAMILIES} == {kind for kind, _ in FAMILIES.values()}


def test_logits_and_patterns_are_those_of_transformers(folder, model):
    plain = class_of(model.cfg.architecture).from_pretrained(folder, attn_implementation="eager").eval()
    tokens = prompts()
    with torch.no_grad(): theirs = plain(tokens, output_attentions=True)
    assert (model(tokens) - theirs.logits).abs().max() < 1e-4
    attention = extract_attention(model, tokens)
    assert torch.allclose(attention.patterns.movedim(2, 1), torch.stack(theirs.attentions), atol=1e-5)
    assert len(compute_attention_stats(attention)) == 12 and not compute_attention_stats(attention).isna().all().any()
    assert model.to_tokens("AB").tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.filterwarnings("ignore:the blocks of this model")
def test_patch_scans_are_those_of_the_slow_loop(model, component):
    layers = [layer for layer in range(3) if has_component(model, component, layer)]
    if len(layers) < 3: assert component == "post" and layers == [0] and listed(model).neurons == "in dense layers"          # experts have no neurons in common
    clean, corrupted = prompts()[:2], prompts()[2:]
    metric = logit_diff(model, 3, 7)
    if len(layers) < 3:
        assert patch_scan(model, clean, corrupted, component=component, metric=metric, positions="all").axes["layer"] == layers
        with pytest.raises(InputError, match="layers.*has no post"): patch_scan(model, clean, corrupted, component=component, layers=[1])
    for layer in {layers[0], layers[-1]}:
        edits, rows, grid = each_edit(component, {layer: Replay(model, clean, keep=[component]).kept[component][layer]})
        slow = metric(torch.stack([logits for logits, _ in naive_run(model, corrupted, edits, rows)]), rows).view(grid).movedim(1, 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.allclose(patch_scan(model, clean, corrupted, component=component, layers=[layer], metric=metric).patched, slow, atol=1e-5)
        slowly = any("whole forward pass" in str(warning.message) for warning in caught)
        latent = isinstance(model.blocks[0].attn, MLAAttentionBridge)
        assert slowly == (latent and component in ("q", "k", "v") or listed(model).neurons != "" and component == "post")


def test_the_lens_ends_at_the_logits_in_every_mode(model):
    tokens, tuned = prompts(), fit_tuned_lens(model, prompts(8), steps=3, batch=4)
    with torch.no_grad(): wanted = model(tokens)[:, -1].log_softmax(-1)
    for mode in ("norm", "raw", "tuned"):
        lens = logit_lens(model, tokens, mode=mode, tuned=tuned if mode == "tuned" else None)
        assert lens.layers == ["embed", 0, 1, 2] and torch.allclose(lens.log_probabilities(2)[:, 0], wanted, atol=1e-4)
        assert lens.summary().kl.iloc[-1] == pytest.approx(0, abs=1e-5) and (lens.summary().kl >= -1e-6).all()


def test_neurons(model):
    found = find_max_activating_examples(model, prompts(8), 0, 5, k=3)
    post = model.run_with_cache(prompts(8), names_filter="blocks.0.mlp.hook_post")[1]["blocks.0.mlp.hook_post"][..., 5]
    assert found.activation.max() == pytest.approx(post.max().item(), abs=1e-5)
    if not has_component(model, "post", 1):
        with pytest.raises(InputError, match="experts.*with neurons: 0"): find_max_activating_examples(model, prompts(8), 1, 5)


@pytest.mark.filterwarnings("ignore:the blocks of this model")
def test_edges(model):
    clean, corrupted = prompts()[:2], prompts()[2:]
    metric = logit_diff(model, 3, 7)
    seen = {}
    def fork(value, hook):
        "A copy for this reader alone."
        seen[hook.name] = copy = value.clone()
        copy.retain_grad()
        return copy
    names = [f"blocks.{layer}.{norm}.hook_in" for layer in range(3) for norm in ("ln1", "ln2")]
    metric(model.run_with_hooks(clean, fwd_hooks=[(name, fork) for name in names])).sum().backward()
    moved = (model.embed(corrupted) - model.embed(clean)).detach()                                   # positions are embedded alike
    scores = edge_attribution(model, clean, corrupted, metric=metric, method="eap").to_frame().query("sender == 'embed'")
    for layer in range(3):
        for norm, readers in (("ln1", f"L{layer}H"), ("ln2", f"layer_{layer}_mlp")):
            ours = 2 * scores[scores.receiver.str.startswith(readers)].effect.sum()                     # of two pairs the mean
            assert ours == pytest.approx((moved * seen[f"blocks.{layer}.{norm}.hook_in"].grad).sum().item(), rel=1e-3, abs=1e-4)


def test_autoencoders_read_the_same_stream(model):
    rows = prompts(40, 16)
    hook = "blocks.1.hook_resid_post"
    stream = model.run_with_cache(rows[:2], names_filter=hook)[1][hook]
    assert torch.allclose(activations_at(model, hook, rows[:2]), stream.flatten(0, 1), atol=1e-5)
    sae = train_sae(model, hook, rows, d_sae=48, k=4, n_samples=10 * 64, batch_size=64, progress=False, device="cpu")
    assert evaluate_sae(sae, model, rows[:8]).results["l0"].value == pytest.approx(4)


def test_heads_are_sorted(model):
    assert len(categorize_attention_heads(model, prompts(8, 16))) > 0


@pytest.mark.filterwarnings("ignore:the blocks of this model", "ignore:this model is in")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(folder, model, dtype):
    half, tokens = load_model(folder, device="cpu", dtype=dtype), prompts()
    assert {weight.dtype for weight in half.parameters()} <= {getattr(torch, dtype), torch.float32}
    plain = class_of(model.cfg.architecture).from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    with torch.no_grad(): ours, theirs, exact = half(tokens).float(), plain(tokens).logits.float(), model(tokens)
    scale = exact.abs().max()
    assert (ours - theirs).abs().max() <= 8 * torch.finfo(getattr(torch, dtype)).eps * scale
    clean, corrupted, metric = tokens[:2], tokens[2:], logit_diff(half, 3, 7)
    assert extract_attention(half, tokens).patterns.isfinite().all()
    assert all(logit_lens(half, tokens, mode=mode).summary().kl.notna().all() for mode in ("norm", "raw"))
    rough, fine = (patch_scan(of, clean, corrupted, component="resid_post", metric=logit_diff(of, 3, 7)).effects.float() for of in (half, model))
    assert torch.corrcoef(torch.stack([rough.flatten(), fine.flatten()]))[0, 1] > 0.98
    assert patch_scan(half, clean, corrupted, component="z", metric=metric).effects.isfinite().all()
    if "gemma2" not in str(folder): assert direct_logit_attribution(half, tokens, 3, 7).contribution.notna().all()    # its logits are soft-capped: no sum of parts
    assert find_max_activating_examples(half, tokens, 0, 5, k=3).activation.notna().all()
    try: rough, fine = (edge_attribution(of, clean, corrupted, metric=logit_diff(of, 3, 7), method="eap").effects.float() for of in (half, model))
    except InputError as error: assert "cannot be split" in str(error) and "16 bits" in listed(half).edges
    else: assert torch.corrcoef(torch.stack([rough[~fine.isnan()], fine[~fine.isnan()]]))[0, 1] > 0.95
    assert activations_at(half, "blocks.1.hook_resid_post", tokens).dtype == torch.float32


def test_a_device_map(folder, model):
    spread, tokens = load_model(folder, device_map="auto"), prompts()
    assert (spread(tokens) - model(tokens)).abs().max() < 1e-5
    assert patch_scan(spread, tokens[:2], tokens[2:], component="resid_post", metric=logit_diff(spread, 3, 7)).effects.isfinite().all()
    with pytest.raises(InputError, match="device_map"): load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(InputError, match="device_map.*disk"): load_model(folder, device_map={"": "disk"})
