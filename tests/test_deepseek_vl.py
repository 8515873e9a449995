"""DeepSeek-VL and DeepSeek-VL2 as tiny checkpoints on disk, opened as a user's would be: against transformers' forward pass, and against one written out here from the weights' names alone."""
import json, math, warnings

import pytest, torch, torch.nn.functional as F, transformers
from safetensors.torch import load_file, save_file

from mechinterp_lib import models
from mechinterp_lib.core import InputError, seeded
from mechinterp_lib.deepseek_vl import model_class, n_picture_tokens, register_adapter
from mechinterp_lib.models import as_bridge, load_model

D, HEADS, LAYERS, VOCAB, WIDTH, TOWER_HEADS, SIZE, PATCH, GRID, SIDE = 32, 4, 3, 50, 24, 2, 21, 4, 5, 3          # 21 pixels: 5 patches a side, which pad to 3 squares
EXPERTS = dict(moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1)
LATENT = dict(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)
PLAIN = dict(use_mla=False, kv_lora_rank=None, q_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0)
KINDS = {                                                                   # the first three route as the three published models do
    "tiny": dict(PLAIN, n_group=1, topk_group=1, topk_method="greedy"),
    "small": dict(LATENT, n_group=1, topk_group=1, topk_method="greedy"),
    "large": dict(LATENT, n_group=1, topk_group=1, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.0),
    "groups": dict(LATENT, q_lora_rank=20, n_group=2, topk_group=1, topk_method="group_limited_greedy", routed_scaling_factor=1.5, moe_layer_freq=2, rms_norm_eps=1e-4),
    "corrected groups": dict(PLAIN, num_key_value_heads=2, n_group=2, topk_group=1, topk_method="noaux_tc", scoring_func="sigmoid", rope_theta=500.0, attention_bias=True),
}


def config_of(kind):
    "A `config.json` as the published ones are: what equals the original code's default is left out."
    language = dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", bos_token_id=0, eos_token_id=1, hidden_size=D, intermediate_size=48, max_position_embeddings=256, num_attention_heads=HEADS,
                    num_hidden_layers=LAYERS, num_key_value_heads=HEADS, vocab_size=VOCAB, lm_head=True, rm_head=False, torch_dtype="bfloat16", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"})
    return dict(architectures=["DeepseekVLV2ForCausalLM"], model_type="deepseek_vl_v2", candidate_resolutions=[[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE]], global_view_pos="tail" if kind == "groups" else "head",
                tile_tag="2D", torch_dtype="bfloat16", language_config={**language, **EXPERTS, **KINDS[kind]}, projector_config=dict(model_type="mlp_projector", input_dim=WIDTH, n_embed=D, depth=3 if kind == "groups" else 2),
                vision_config=dict(model_type="vision", model_name="siglip_so400m_patch14_384", image_size=SIZE, patch_size=PATCH, width=WIDTH, layers=2, heads=TOWER_HEADS, mlp_ratio=3.7362))


def shapes_of(config):
    "The names and shapes of a checkpoint's weights, SigLIP's pooling head among them."
    c, hidden = config["language_config"], int(WIDTH * 3.7362)
    both = lambda name, out, fan_in: {f"{name}.weight": (out, fan_in), f"{name}.bias": (out,)}
    norm = lambda name, width: {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    shapes = {"image_newline": (D,), "view_seperator": (D,), "vision.pos_embed": (1, GRID**2, WIDTH), "vision.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "vision.patch_embed.proj.bias": (WIDTH,), **norm("vision.norm", WIDTH)}
    for block in (f"vision.blocks.{i}" for i in range(2)):
        shapes |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH) | both(f"{block}.attn.qkv", 3 * WIDTH, WIDTH) | both(f"{block}.attn.proj", WIDTH, WIDTH) | both(f"{block}.mlp.fc1", hidden, WIDTH) | both(f"{block}.mlp.fc2", WIDTH, hidden)
    pool = "vision.attn_pool"
    shapes |= {f"{pool}.latent": (1, 1, WIDTH)} | both(f"{pool}.q", WIDTH, WIDTH) | both(f"{pool}.kv", 2 * WIDTH, WIDTH) | both(f"{pool}.proj", WIDTH, WIDTH) | norm(f"{pool}.norm", WIDTH) | both(f"{pool}.mlp.fc1", hidden, WIDTH) | both(f"{pool}.mlp.fc2", WIDTH, hidden)
    for number in range(config["projector_config"]["depth"]): shapes |= both(f"projector.layers.{2 * number}", D, D if number else 4 * WIDTH)
    shapes |= {"language.model.embed_tokens.weight": (VOCAB, D), "language.model.norm.weight": (D,), "language.lm_head.weight": (VOCAB, D)}
    mlp = lambda name, width: {f"{name}.gate_proj.weight": (width, D), f"{name}.up_proj.weight": (width, D), f"{name}.down_proj.weight": (D, width)}
    for layer in range(LAYERS):
        at = f"language.model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,)}
        if c.get("use_mla", True):
            qk, rank = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["q_lora_rank"]
            names = {"kv_a_proj_with_mqa": (c["kv_lora_rank"] + c["qk_rope_head_dim"], D), "kv_a_layernorm": (c["kv_lora_rank"],), "kv_b_proj": (HEADS * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]), "o_proj": (D, HEADS * c["v_head_dim"])}
            names |= {"q_a_proj": (rank, D), "q_a_layernorm": (rank,), "q_b_proj": (HEADS * qk, rank)} if rank else {"q_proj": (HEADS * qk, D)}
        else: names = {f"{name}_proj": (c["num_key_value_heads"] * D // HEADS if name in "kv" else D, D) for name in "qkvo"}
        shapes |= {f"{at}.self_attn.{name}.weight": shape for name, shape in names.items()}
        if c.get("attention_bias"): shapes |= {f"{at}.self_attn.{name}.bias": shape[:1] for name, shape in names.items()}
        if layer < 1 or layer % c.get("moe_layer_freq", 1): shapes |= mlp(f"{at}.mlp", 48); continue
        shapes |= {f"{at}.mlp.gate.weight": (4, D)} | mlp(f"{at}.mlp.shared_experts", 32)
        if c["topk_method"] == "noaux_tc": shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (4,)
        for expert in range(4): shapes |= mlp(f"{at}.mlp.experts.{expert}", 16)
    return shapes


def write(kind, folder, change=lambda config, weights: None):
    "A checkpoint of random weights, in two files with an index as the hub has them."
    folder.mkdir(parents=True)
    config = config_of(kind)
    with seeded("vl2", kind): weights = {name: (1 + 0.2 * torch.randn(shape) if "norm" in name and name.endswith("weight") else (0.3 if len(shape) == 1 else shape[-1]**-0.5) * torch.randn(shape)) for name, shape in shapes_of(config).items()}
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    parts = {f"model-0000{part + 1}-of-000002.safetensors": names[part::2] for part in range(2)}
    for file, part in parts.items(): save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}))
    return folder


# ---- a forward pass from the weights alone, token by token where that is plainest

def linear(w, name, x): return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def rms(w, name, x, eps): return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def see(w, tile):
    "The tower's features of a tile: `[patch, width]`."
    patches = torch.stack([(w["vision.patch_embed.proj.weight"] * tile[:, PATCH * i:PATCH * (i + 1), PATCH * j:PATCH * (j + 1)]).sum((1, 2, 3)) for i in range(GRID) for j in range(GRID)])
    x = patches + w["vision.patch_embed.proj.bias"] + w["vision.pos_embed"][0]
    norm = lambda name, x: F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    for block in ("vision.blocks.0", "vision.blocks.1"):
        q, k, v = linear(w, f"{block}.attn.qkv", norm(f"{block}.norm1", x)).view(GRID**2, 3, TOWER_HEADS, -1).unbind(1)
        heads = [(q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])).softmax(-1) @ v[:, h] for h in range(TOWER_HEADS)]
        x = x + linear(w, f"{block}.attn.proj", torch.cat(heads, -1))
        hidden = linear(w, f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
        x = x + linear(w, f"{block}.mlp.fc2", hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))))
    return norm("vision.norm", x)


def project(w, features, depth):
    "A tile's places in the decoder: `[row][column] -> [d_model]`."
    at = lambda i, j: features[GRID * i + j] if i < GRID and j < GRID else torch.zeros(WIDTH)
    grid = [[torch.stack([at(2 * i, 2 * j), at(2 * i, 2 * j + 1), at(2 * i + 1, 2 * j), at(2 * i + 1, 2 * j + 1)], 1).flatten() for j in range(SIDE)] for i in range(SIDE)]
    def mlp(x):
        for number in range(depth): x = linear(w, f"projector.layers.{2 * number}", x / 2 * (1 + torch.erf(x / math.sqrt(2))) if number else x)
        return x
    return [[mlp(x) for x in row] for row in grid]


def page(w, config, tiles, wide, high):
    "A picture's vectors in the order of the decoder's positions."
    views = [project(w, see(w, tile), config["projector_config"]["depth"]) for tile in tiles]
    mosaic = [[views[1 + wide * up + across][i][j] for across in range(wide) for j in range(SIDE)] for up in range(high) for i in range(SIDE)]
    whole, local = ([x for row in view for x in (*row, w["image_newline"])] for view in (views[0], mosaic))
    return torch.stack([*whole, w["view_seperator"], *local] if config["global_view_pos"] == "head" else [*local, w["view_seperator"], *whole])


def turned(x, positions, theta, pairs):
    "Rotary positions on `[pos, width]`: neighbours are sorted apart first where they are pairs, then halves are turned."
    if pairs: x = torch.cat([x[:, 0::2], x[:, 1::2]], -1)
    half = x.shape[-1] // 2
    angles = torch.outer(positions.float(), theta ** (-torch.arange(half) / half))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([x[:, :half] * cos - x[:, half:] * sin, x[:, half:] * cos + x[:, :half] * sin], -1)


def attend(w, at, c, x, positions, allowed):
    "What a layer's heads write: `[pos, d_model]`."
    theta, out = c.get("rope_theta", 10_000.0), []
    if c.get("use_mla", True):
        q = linear(w, f"{at}.q_b_proj", rms(w, f"{at}.q_a_layernorm", linear(w, f"{at}.q_a_proj", x), 1e-6)) if c["q_lora_rank"] else linear(w, f"{at}.q_proj", x)
        latent, shared = linear(w, f"{at}.kv_a_proj_with_mqa", x).split([c["kv_lora_rank"], c["qk_rope_head_dim"]], -1)
        kv, nope = linear(w, f"{at}.kv_b_proj", rms(w, f"{at}.kv_a_layernorm", latent, 1e-6)), c["qk_nope_head_dim"]
        shared = turned(shared, positions, theta, pairs=True)
        for q, kv in zip(q.chunk(HEADS, -1), kv.chunk(HEADS, -1)):
            scores = q[:, :nope] @ kv[:, :nope].T + turned(q[:, nope:], positions, theta, pairs=True) @ shared.T
            out.append((scores / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf).softmax(-1) @ kv[:, nope:])
    else:
        q, k, v = (linear(w, f"{at}.{name}_proj", x).split(D // HEADS, -1) for name in "qkv")
        for h in range(HEADS):
            kv = h * len(k) // HEADS
            scores = turned(q[h], positions, theta, pairs=False) @ turned(k[kv], positions, theta, pairs=False).T
            out.append((scores / math.sqrt(D // HEADS)).masked_fill(~allowed, -math.inf).softmax(-1) @ v[kv])
    return linear(w, f"{at}.o_proj", torch.cat(out, -1))


def gated(w, at, x): return linear(w, f"{at}.down_proj", F.silu(linear(w, f"{at}.gate_proj", x)) * linear(w, f"{at}.up_proj", x))


def experts(w, at, c, token):
    "What a token's experts write, chosen one by one: `[d_model]`."
    logits = linear(w, f"{at}.gate", token)
    scores = logits.sigmoid() if c.get("scoring_func") == "sigmoid" else logits.exp() / logits.exp().sum()
    wish = scores + w[f"{at}.gate.e_score_correction_bias"] if c["topk_method"] == "noaux_tc" else scores
    groups = [wish[:2], wish[2:]] if c["n_group"] == 2 else [wish]
    if c["topk_method"] != "greedy":
        worth = [group.max() if c["topk_method"] == "group_limited_greedy" else group.topk(2).values.sum() for group in groups]
        groups = [group if value == max(worth) else torch.zeros_like(group) for group, value in zip(groups, worth)]
    chosen = torch.cat(groups).sort(descending=True).indices[:2].tolist()
    weights = [scores[i] for i in chosen]
    if c.get("norm_topk_prob"): weights = [weight / (sum(weights) + 1e-20) for weight in weights]
    return gated(w, f"{at}.shared_experts", token) + sum(c.get("routed_scaling_factor", 1.0) * weight * gated(w, f"{at}.experts.{i}", token) for weight, i in zip(weights, chosen))


def reference(folder, ids, attention_mask=None, images=None, images_seq_mask=None, images_spatial_crop=None):
    "The logits, row by row."
    w = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    c, rows = config["language_config"], []
    for row, tokens in enumerate(ids):
        x = w["language.model.embed_tokens.weight"][tokens].clone()
        pictures = [(wide, high) for wide, high in images_spatial_crop[row].tolist() if wide] if images is not None else []
        starts = [sum(1 + a * b for a, b in pictures[:i]) for i in range(len(pictures))]
        if pictures: x[images_seq_mask[row]] = torch.cat([page(w, config, images[row, start:start + 1 + wide * high], wide, high) for start, (wide, high) in zip(starts, pictures)])
        real = torch.ones(len(tokens), dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        positions = torch.arange(len(tokens))
        allowed = (positions[None] <= positions[:, None]) & real[None] | torch.eye(len(tokens), dtype=torch.bool)
        for layer in range(LAYERS):
            at, eps = f"language.model.layers.{layer}", c.get("rms_norm_eps", 1e-6)
            x = x + attend(w, f"{at}.self_attn", c, rms(w, f"{at}.input_layernorm", x, eps), positions, allowed)
            normed = rms(w, f"{at}.post_attention_layernorm", x, eps)
            sparse = layer >= 1 and layer % c.get("moe_layer_freq", 1) == 0
            x = x + (torch.stack([experts(w, f"{at}.mlp", c, token) for token in normed]) if sparse else gated(w, f"{at}.mlp", normed))
        rows.append(linear(w, "language.lm_head", rms(w, "language.model.norm", x, eps)))
    return torch.stack(rows)


def prompt(rows, pad=0, seed=0):
    "Tokens with pictures in them, (wide, high) tiles each, a list for a row; short rows are padded on the left."
    need = lambda picture: SIDE * (SIDE + 1) + 1 + picture[1] * SIDE * (picture[0] * SIDE + 1)
    with seeded("prompt", seed):
        texts = [sum(([2 + int(i) for i in torch.randint(VOCAB - 2, (3,))] + [-1] * need(picture) for picture in row), []) + [2 + int(i) for i in torch.randint(VOCAB - 2, (4,))] for row in rows]
        length, tiles = max(map(len, texts)) + pad, max(1, *(sum(1 + a * b for a, b in row) for row in rows))
        images = torch.randn(len(rows), tiles, 3, SIZE, SIZE)
    ids, crop = torch.tensor([[0] * (length - len(text)) + text for text in texts]), torch.zeros(len(rows), max(1, *map(len, rows)), 2, dtype=torch.long)
    for row, pictures in enumerate(rows):
        for number, picture in enumerate(pictures): crop[row, number] = torch.tensor(picture)
    real = torch.arange(length) >= torch.tensor([length - len(text) for text in texts])[:, None]
    return ids.clamp(min=0), dict(attention_mask=real.long(), images=images, images_seq_mask=ids == -1, images_spatial_crop=crop)


PICTURES = {"one tile": [[(1, 1)]], "beside": [[(2, 1)]], "above": [[(1, 2)]], "wide": [[(3, 2)]], "high": [[(2, 3)]], "several": [[(2, 1), (1, 1)], [(1, 2)], []]}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory): return write(request.param, tmp_path_factory.mktemp("vl2") / request.param)


@pytest.fixture(scope="module")
def model(folder): return load_model(folder, device="cpu")


def logits(model, ids, **given):
    with torch.no_grad(): return model(ids, **given)


@pytest.mark.parametrize("pictures", PICTURES)
def test_logits_are_those_of_the_reference(folder, model, pictures):
    ids, given = prompt(PICTURES[pictures])
    ours, theirs = logits(model, ids, **given), reference(folder, ids, **given)
    difference = (ours - theirs)[given["attention_mask"].bool()].abs().max()
    assert difference < 1e-5 and theirs.std() > 0.3, f"{difference:.1e}"
    if len(ids) == 1:
        no_pictures = logits(model, ids)
        assert (no_pictures - ours).abs().max() > 0.1
    print(f"{folder.name}, {pictures}: {difference:.1e}")


def test_norms_of_a_dim_picture(tmp_path):
    "Where the tower's stream is so small that the epsilon of its norms matters."
    folder = write("small", tmp_path / "dim", lambda config, weights: weights.update({name: 1e-3 * weights[name] for name in ("vision.pos_embed", "vision.patch_embed.proj.weight", "vision.patch_embed.proj.bias")}))
    ids, given = prompt(PICTURES["beside"])
    assert (logits(load_model(folder, device="cpu"), ids, **given) - reference(folder, ids, **given)).abs().max() < 1e-5


def test_text_alone(folder, model):
    ids, _ = prompt([[], []])
    assert (logits(model, ids) - reference(folder, ids)).abs().max() < 1e-5
    none = dict(images=torch.zeros(2, 1, 3, SIZE, SIZE), images_seq_mask=torch.zeros_like(ids).bool(), images_spatial_crop=torch.zeros(2, 1, 2, dtype=torch.long))     # what the original's processor makes of text
    assert torch.equal(logits(model, ids, **none), logits(model, ids))


def test_every_weight_is_used(folder, model):
    "The bridge has the checkpoint's weights, and no other: what is left out is SigLIP's pooling head."
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    plain = model_class().from_pretrained(folder)
    assert stored - set(plain.state_dict()) == {name for name in stored if name.startswith("vision.attn_pool.")} and set(plain.state_dict()) <= stored
    assert plain.get_decoder() is plain.language.model and plain.get_input_embeddings() is plain.language.model.embed_tokens and plain.get_output_embeddings() is plain.language.lm_head


def test_the_module_alone_and_what_it_writes(folder, tmp_path):
    "Without a bridge the same logits; saved by transformers and opened again, too; and written token by token, the pictures read once."
    module, (ids, given) = model_class().from_pretrained(folder, dtype=torch.float32).eval(), prompt([[(2, 1)], [(1, 2)]])
    real = given["attention_mask"].bool()
    with torch.no_grad(): plain = module(ids, **given).logits
    assert (plain - reference(folder, ids, **given))[real].abs().max() < 1e-5
    renamed = {**given, "pixel_values": given["images"]}; del renamed["images"]
    assert torch.equal(plain, module(ids, **renamed).logits)
    module.save_pretrained(tmp_path / "again")
    assert (logits(load_model(tmp_path / "again", device="cpu"), ids, **given) - plain)[real].abs().max() < 1e-5
    written, rows = module.generate(input_ids=ids, **given, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0), ids
    assert (module.generation_config.bos_token_id, module.generation_config.eos_token_id) == (0, 1)                 # the decoder's
    for _ in range(4):
        longer = {**given, "attention_mask": F.pad(given["attention_mask"], (0, rows.shape[1] - ids.shape[1]), value=1), "images_seq_mask": F.pad(given["images_seq_mask"], (0, rows.shape[1] - ids.shape[1]))}
        scores = module(rows, **longer).logits[:, -1].index_fill(1, torch.tensor([1]), -math.inf)                   # before its time the end token is forbidden
        rows = torch.cat([rows, scores.argmax(-1)[:, None]], 1)
    assert torch.equal(written, rows)


# ---- DeepSeek-VL, of which transformers has the class

VL = dict(text_config=dict(model_type="llama", hidden_size=D, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=128, rms_norm_eps=1e-5),
          vision_config=dict(model_type="siglip_vision_model", hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, layer_norm_eps=1e-3), image_token_id=VOCAB - 1, tie_word_embeddings=False)
SAM = dict(model_type="sam_vision_model", hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, window_size=2, global_attn_indexes=[0], mlp_dim=24, num_pos_feats=8)


def write_vl(folder, hybrid=False):
    kind = getattr(transformers, f"DeepseekVL{'Hybrid' if hybrid else ''}ForConditionalGeneration")
    with seeded("vl"):
        module = kind(kind.config_class(**VL, **(dict(high_res_vision_config=SAM) if hybrid else {})))
        for weight in module.parameters(): weight.data += 0.15 * torch.randn_like(weight)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vl(tmp_path_factory): return write_vl(tmp_path_factory.mktemp("vl") / "vl")


def vl_prompt(hybrid=False):
    with seeded("vl prompt"): ids, pixels, large = torch.randint(2, VOCAB - 1, (2, 40)), torch.randn(3, 3, 16, 16), torch.randn(3, 3, 64, 64)
    ids[0, 2:18], ids[0, 20:36], ids[1, 5:21] = VOCAB - 1, VOCAB - 1, VOCAB - 1                    # two pictures in the first row, one in the second
    return ids, dict(pixel_values=pixels, **(dict(high_res_pixel_values=large) if hybrid else {}))


@pytest.mark.parametrize("hybrid", [False, True])
def test_vl_logits_are_those_of_transformers(hybrid, tmp_path):
    model, (ids, given) = load_model(write_vl(tmp_path / "vl", hybrid), device="cpu"), vl_prompt(hybrid)
    plain = getattr(transformers, model.cfg.architecture).from_pretrained(tmp_path / "vl", attn_implementation="eager").eval()
    with torch.no_grad(): theirs, text = plain(ids, **given).logits, plain(ids[:, 36:]).logits
    assert (logits(model, ids, **given) - theirs).abs().max() < 1e-5 and (logits(model, ids[:, 36:]) - text).abs().max() < 1e-5
    assert (theirs[1, 21:] - plain(ids, **{**given, "pixel_values": given["pixel_values"].flip(0)}).logits[1, 21:]).abs().max() > 0.01


# ---- hooks

def effects(model, names, ids, **given):
    "How much noise at each hook moves the logits; None where the hook never fires or needs a switch of TransformerLens's."
    plain, found = logits(model, ids, **given), {}
    for name in names:
        fired = []
        def stir(value, hook):
            if not value.is_floating_point(): return fired.append(False)
            fired.append(True)
            return value + 0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"): moved = model.run_with_hooks(ids, fwd_hooks=[(name, stir)], **given)
        except ValueError as error:
            assert "Cannot add hook" in str(error)
            continue
        found[name] = (moved - plain).abs().max().item() if any(fired) else None
    return found


ANALYSED = ["vision_encoder.hook_in", "vision_encoder.hook_out", "vision_encoder.embeddings.hook_out", "vision_encoder.post_layernorm.hook_out", "vision_projector.hook_in", "vision_projector.hook_out", "embed.hook_out", "ln_final.hook_out", "unembed.hook_out",
            *(f"vision_encoder.encoder_layers.{layer}.{name}" for layer in range(2) for name in ("hook_in", "hook_out", "attn.hook_out", "mlp.hook_out", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.o.hook_in", "mlp.in.hook_out", "mlp.out.hook_in")),
            *(f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z"))]
SILENT = {"vision_encoder.hook_patch_embed", "vision_encoder.hook_pos_embed", "vision_projector.hook_projected", "high_res_projector.hook_projected", "high_res_encoder.hook_in", "hook_pos_embed", "embed.hook_in", "rotary_emb.hook_out",
          "attn.hook_hidden_states", "attn.hook_q_normed", "attn.hook_k_normed", "mlp.hook_router_scores"}      # what the page lists; `embed.hook_in` are the token ids themselves
SILENT_LATENT = {"rotary_emb.hook_cos", "rotary_emb.hook_sin", "attn.hook_cos", "attn.hook_sin", "attn.hook_q_latent"}


def check_hooks(model, ids, latent=False, **given):
    "All that an analysis reads is live, and all that fires is; what never fires is what the page lists."
    assert not {name: effect for name, effect in effects(model, ANALYSED, ids, **given).items() if not effect or effect < 1e-4}
    found = effects(model, model.hook_dict, ids, **given)
    bare = lambda name: name.split(".", 2)[-1] if name.startswith("blocks.") else name
    assert {bare(name) for name, effect in found.items() if effect is None} <= SILENT | (SILENT_LATENT if latent else set())
    assert {bare(name) for name, effect in found.items() if effect is not None and effect < 1e-6} <= {"rotary_emb.hook_in"}      # only its type and device are read


@pytest.mark.parametrize("hybrid", [False, True])
def test_vl_hooks(hybrid, tmp_path):
    model, (ids, given) = load_model(write_vl(tmp_path / "vl", hybrid), device="cpu"), vl_prompt(hybrid)
    check_hooks(model, ids, **given)
    if hybrid: assert min(effects(model, ["high_res_encoder.hook_out", "high_res_projector.hook_out"], ids, **given).values()) > 1e-4


@pytest.mark.parametrize("kind", ["tiny", "small"])
def test_vl2_hooks(kind, tmp_path):
    model, (ids, given) = load_model(write(kind, tmp_path / kind), device="cpu"), prompt([[(2, 1)]])
    check_hooks(model, ids, latent=kind == "small", **given)
    assert min(effects(model, [f"blocks.{layer}.mlp.{name}" for layer in (1, 2) for name in ("gate.hook_out", "shared_experts.hook_out")], ids, **given).values()) > 1e-4
    _, cache = model.run_with_cache(ids, **given)
    tower = "vision_encoder.encoder_layers.1.attn"
    assert cache[f"{tower}.hook_pattern"].shape == (3, TOWER_HEADS, GRID**2, GRID**2) and torch.allclose(cache[f"{tower}.hook_pattern"].sum(-1), torch.ones(()))
    assert cache[f"{tower}.hook_q"].shape == cache[f"{tower}.o.hook_in"].shape == (3, GRID**2, TOWER_HEADS, WIDTH // TOWER_HEADS)
    assert cache["vision_projector.hook_out"].shape == (3, SIDE**2, D) and cache["blocks.1.attn.hook_z"].shape[:3] == (1, ids.shape[1], HEADS)
    layer = model.vision_encoder.encoder_layers[1]
    assert layer.hook_resid_post is layer.hook_out and layer.hook_mlp_out is layer.mlp.hook_out and layer.attn.hook_z is layer.attn.o.hook_in
    page_of, start = cache["blocks.0.hook_resid_pre"][0], int(given["images_seq_mask"][0].nonzero()[0])
    assert torch.equal(page_of[start:start + SIDE], cache["vision_projector.hook_out"][0, :SIDE]) and torch.equal(page_of[start + SIDE], model.original_model.image_newline)


def test_embeddings_under_a_picture_are_not_read(tmp_path):
    model, (ids, given) = load_model(write("tiny", tmp_path / "tiny"), device="cpu"), prompt([[(1, 1)]])
    mask = given["images_seq_mask"][..., None]
    changed = model.run_with_hooks(ids, fwd_hooks=[("embed.hook_out", lambda value, hook: torch.where(mask, 0.0, value))], **given)
    assert torch.equal(changed, model(ids, **given))


# ---- what is refused

def said(error): return str(error.value)


def test_vl2_refuses_what_does_not_fit(tmp_path):
    model, (ids, given) = load_model(write("tiny", tmp_path / "tiny"), device="cpu"), prompt([[(2, 1)]])
    places = n_picture_tokens(model.original_model.config, 2, 1)
    fewer = given["images_seq_mask"].clone(); fewer[0, fewer[0].nonzero()[0]] = False
    for changed, words in ((dict(images_seq_mask=fewer), f"images_seq_mask: got '{places - 1} places in row 0'; allowed: {places}"), (dict(images=None), f"images: got None.*{places} places"), (dict(images_seq_mask=None), "images_seq_mask: got None; needed"),
                           (dict(images_spatial_crop=None), "images_spatial_crop: got None; needed"), (dict(images=given["images"][:, :2]), r"images: got \(1, 2, 3, 21, 21\).*needs 3 tiles in row 0"), (dict(images=given["images"][..., :20]), r"images: got \(1, 3, 3, 21, 20\).*\[1, tiles, 3, 21, 21\]"),
                           (dict(images=given["images"][0]), "images: got.*a row for each row of tokens"), (dict(images_seq_mask=fewer[:, 1:]), r"images_seq_mask: got \(1, \d+\); allowed: \(1, \d+\)"), (dict(images_spatial_crop=given["images_spatial_crop"][0]), "images_spatial_crop: got.*integers"),
                           (dict(images_spatial_crop=given["images_spatial_crop"].flip(2)), f"images_seq_mask: got '{places} places in row 0'; allowed: {places + SIDE}"), (dict(images_spatial_crop=-given["images_spatial_crop"]), "integers from 0"),
                           (dict(images_spatial_crop=0 * given["images_spatial_crop"]), "images: got 'no tiles in images_spatial_crop'")):
        with pytest.raises(InputError, match=words): model(ids, **{**given, **changed})
    with pytest.raises(InputError, match="two names of the same"): model(ids, pixel_values=given["images"], **given)


@pytest.mark.parametrize("hybrid", [False, True])
def test_vl_refuses_what_does_not_fit(hybrid, tmp_path):
    model, (ids, given) = load_model(write_vl(tmp_path / "vl", hybrid), device="cpu"), vl_prompt(hybrid)
    with pytest.raises(InputError, match=r"input_ids: got '48 tokens 49'; allowed: 32, 16 for each of the 2 pictures"): model(ids, **{**given, "pixel_values": given["pixel_values"][:2]})
    with pytest.raises(InputError, match=r"pixel_values: got None; the tokens keep 48 places.*\[pictures, 3, 16, 16\]"): model(ids)
    with pytest.raises(InputError, match=r"pixel_values: got \(3, 3, 16, 15\); allowed: \[pictures, 3, 16, 16\]"): model(ids, **{**given, "pixel_values": given["pixel_values"][..., 1:]})
    if hybrid:
        with pytest.raises(InputError, match=r"high_res_pixel_values: got None; allowed: \[3, 3, 64, 64\]"): model(ids, pixel_values=given["pixel_values"])


def test_folders_are_checked_as_any_other(tmp_path, monkeypatch):
    def broken(name, change): return write("small", tmp_path / name, change)
    lacking, misshapen = "language.model.layers.1.mlp.experts.2.up_proj.weight", "vision.blocks.1.attn.qkv.weight"
    with pytest.raises(InputError, match=f"lacks the weight {lacking}"): load_model(broken("lacking", lambda config, weights: weights.pop(lacking)), device="cpu")
    with pytest.raises(InputError, match=rf"{misshapen} has shape \(70, 24\), but config.json asks for \(72, 24\)"): load_model(broken("misshapen", lambda config, weights: weights.update({misshapen: torch.zeros(70, WIDTH)})), device="cpu")
    pickled = write("small", tmp_path / "pickled")
    for file in pickled.glob("*.safetensors"): file.rename(file.with_suffix(".bin"))
    with pytest.raises(InputError, match="pickled weights.*never opened"): load_model(pickled, device="cpu")
    for key, value, words in (("tile_tag", "1D", "tile_tag: got '1D'; allowed: 2D"), ("projector_config", {"input_dim": WIDTH, "n_embed": 16}, "projector_config.n_embed: got 16; allowed: the decoder's width, 32"), ("projector_config", {"n_embed": D}, "input_dim: got 1152; allowed: the tower's width, 24"),
                              ("language_config", dict(config_of("small")["language_config"], rope_scaling={"type": "yarn", "factor": 4}), "language_config.*no rope_scaling"), ("language_config", dict(config_of("small")["language_config"], kv_lora_rank=None), "kv_lora_rank: got None.*use_mla"),
                              ("language_config", dict(config_of("small")["language_config"], topk_method="best"), "topk_method: got 'best'; allowed: greedy")):
        with pytest.raises(InputError, match=words): load_model(broken(f"{key} {len(words)}", lambda config, weights: config.update({key: value})), device="cpu")
    monkeypatch.setattr(models, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match="weights need .* GB as float32"): load_model(write("small", tmp_path / "large"), device="cpu")


# ---- half precision, and what is made twice

@pytest.mark.parametrize("kind", [*KINDS, "vl"])
def test_bfloat16(kind, tmp_path):
    folder = write_vl(tmp_path / kind) if kind == "vl" else write(kind, tmp_path / kind)
    half, exact, (ids, given) = load_model(folder, device="cpu", dtype="bfloat16"), load_model(folder, device="cpu"), vl_prompt() if kind == "vl" else prompt([[(2, 1)], [(1, 1)]])
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    small = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    ours, theirs = logits(half, ids, **small).float(), logits(exact, ids, **given)
    real = given.get("attention_mask", torch.ones_like(ids)).bool()
    assert torch.corrcoef(torch.stack([ours[real].flatten(), theirs[real].flatten()]))[0, 1] > 0.98
    plain = getattr(transformers, half.cfg.architecture, None) or model_class()
    plain = plain.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad(): alike = ((plain(ids, **small).logits.float() - ours).abs() <= 8 * torch.finfo(torch.bfloat16).eps * theirs.abs().max()).float().mean()
    assert alike > 0.9                                                      # rounding may send a token to other experts


def test_registering_twice_changes_nothing(tmp_path):
    for _ in range(2): register_adapter("DeepseekVLForConditionalGeneration"), register_adapter("DeepseekVLV2ForCausalLM"), register_adapter("GPT2LMHeadModel")
    plain = transformers.DeepseekVLForConditionalGeneration.from_pretrained(write_vl(tmp_path / "vl")).eval()
    ids, given = vl_prompt()
    with torch.no_grad(): theirs = plain(ids, **given).logits
    assert (logits(as_bridge(plain), ids, **given) - theirs).abs().max() < 1e-5
    assert type(as_bridge(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))).adapter).__name__ == "GPT2ArchitectureAdapter"
