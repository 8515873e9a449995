"""Replay, and the scans that stand on it, against the naive loop, over architectures and components: what would clutter the chapters."""
import gc, warnings, weakref
from dataclasses import replace

import pytest, torch, transformers

from mechinterp_lib import interventions

from mechinterp_lib.activation_patching import (Task, copying_task, has_component, ablate_component, attribution_patching, compute_patching_effect, kl_divergence, logit_diff, next_token_loss, patch_activation,
                                                patch_scan, path_patching, probability)
from mechinterp_lib.circuits import Runner, acdc, causal_scrub, edge_attribution, edge_auroc, evaluate_circuit
from mechinterp_lib.core import InputError, seeded
from mechinterp_lib.data import char_tokenizer
from mechinterp_lib.interventions import COMPONENTS, TOLERANCE, Edit, Replay, capture, check_read, differentiable_run, each_edit, hook_name, naive_run, position_first, replaced
from mechinterp_lib.models import as_bridge, load_model, new_model

GQA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, max_position_embeddings=32)
CONFIGS = {
    "GPT2LMHeadModel": dict(vocab_size=50, n_positions=32, n_embd=32, n_layer=3, n_head=4),
    "LlamaForCausalLM": GQA,
    "Qwen2ForCausalLM": GQA,
    "Qwen3ForCausalLM": GQA | dict(head_dim=16),
    "MistralForCausalLM": GQA | dict(head_dim=8, sliding_window=3),
    "Gemma2ForCausalLM": GQA | dict(head_dim=8, sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, query_pre_attn_scalar=8),
    "GPTNeoXForCausalLM": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, max_position_embeddings=32),
}
NATIVE = {"class": "attention_only", "d_vocab": 50, "n_ctx": 32, "d_model": 32, "n_layers": 3, "n_heads": 4, "d_head": 8}
T = 7


def build(name, tokenizer=None):
    "A bridge around random weights, large enough that every component matters."
    if name == "native": module = new_model(NATIVE, 0)
    else:
        model_class = getattr(transformers, name)
        with seeded("architecture", name):
            module = model_class(model_class.config_class(**CONFIGS[name], bos_token_id=None, eos_token_id=None, pad_token_id=None))
    with seeded("weights", name):
        for weight in module.parameters(): weight.data += 0.15 * torch.randn_like(weight)
    return as_bridge(module, tokenizer)


@pytest.fixture(scope="module", params=[*CONFIGS, "native"])
def model(request): return build(request.param)


@pytest.fixture(scope="module")
def gpt2(): return build("GPT2LMHeadModel")


def prompts_of(padded):
    with seeded("prompts"): tokens = torch.randint(0, 50, (4, T))
    mask = torch.ones(2, T, dtype=torch.long)
    if padded: mask[1, :3] = 0
    return tokens[:2], tokens[2:], mask if padded else None


def components_of(model): return [c for c, rest in COMPONENTS.items() if f"blocks.0.{rest}" in model.hook_dict]


def close(ours, theirs): assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), (ours - theirs).abs().max() / theirs.abs().max()


def naive_logits(*arguments): return torch.stack([logits for logits, _ in naive_run(*arguments)])


def some(edits, rows, grid_prompts, every):
    "A scan thinned out to every so many rows."
    kept = torch.arange(0, rows, every)
    new = torch.full((rows,), -1)
    new[kept] = torch.arange(len(kept))
    def cut(edit):
        inside = new[edit.rows] >= 0
        pick = lambda x: None if x is None else x[inside]
        return Edit(edit.component, edit.layer, new[edit.rows][inside], edit.value[inside], pick(edit.position), pick(edit.head))
    return [cut(edit) for edit in edits], grid_prompts[kept]


@pytest.mark.parametrize("positions, padded", [("each", False), ("each", True), ("all", True)])
def test_every_component_equals_the_naive_loop(model, positions, padded):
    clean, corrupted, mask = prompts_of(padded)
    components = components_of(model)
    source, replay = Replay(model, clean, mask, keep=components), Replay(model, corrupted, mask, keep=components)
    assert replay.exact and source.exact
    for component in components:
        scan, prompts, grid = each_edit(component, dict(enumerate(source.kept[component])), positions=positions)
        edits, prompts = some(scan, len(prompts), prompts, max(1, len(prompts) // 8 | 1))
        naive = naive_logits(model, corrupted, edits, prompts, mask)
        if padded: keep = torch.stack([mask[p] for p in prompts]) == 1
        else: keep = torch.ones(len(prompts), T, dtype=torch.bool)
        close(replay.run(edits, prompts)[keep], naive[keep])
        close(replay.run(edits, prompts, read=-1)[:, 0], naive[:, -1])
        chosen = torch.tensor([7, 3])
        close(replay.run(edits, prompts, read=-1, vocab=chosen)[:, 0], naive[:, -1, chosen])
        close(replay.run(edits, prompts, read=[[4, 6], [3, 5]])[:, 1], torch.stack([n[[6, 5][p]] for n, p in zip(naive, prompts)]))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_scan_equals_the_naive_loop_in_every_metric(model, direction):
    clean, corrupted, _ = prompts_of(False)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    value, answer = capture(model, source, [name := hook_name(model, "z", 1)])[1][name], torch.tensor([3, 9])
    edits, prompts, grid = each_edit("z", {1: value})
    naive, reference, own = naive_logits(model, base, edits, prompts), capture(model, clean, [])[0], answer[prompts]
    logs, wanted, every = naive.log_softmax(-1), reference[prompts, -1].softmax(-1), range(len(prompts))
    expected = {
        lambda logits: logits[range(2), -1, answer] - logits[:, -2, 7].tanh(): naive[every, -1, own] - naive[:, -2, 7].tanh(),
        logit_diff(model, [3, 9], 7): naive[every, -1, own] - naive[:, -1, 7],
        probability(model, [3, 9]): naive[:, -1].softmax(-1)[every, own],
        kl_divergence(reference): torch.nn.functional.kl_div(logs[:, -1], wanted, reduction="none").sum(-1),
        next_token_loss(base): torch.nn.functional.cross_entropy(naive[:, :-1].mT, base[prompts, 1:], reduction="none").mean(1),
    }
    for metric, slow in expected.items():
        fast = patch_scan(model, clean, corrupted, layers=[1], metric=metric, direction=direction)
        assert (fast.patched - slow.view(grid).movedim(1, 0)).abs().max() <= TOLERANCE * naive.abs().max()
        assert fast.changes.abs().max() > 10 * TOLERANCE * naive.abs().max()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_texts_padded_left_are_patched_as_if_alone(name):
    model = build(name, char_tokenizer("abcdefghijklmnopqrstuvwxyz "))
    texts, metric = (["the cat", "a dog", "my rat"], ["the hat", "a fog", "no rat"]), logit_diff(model, "s", "x")
    def answers(clean, corrupted):
        runner = Runner(model, Task("texts", clean, corrupted, metric, []))
        some = torch.stack([runner.graph.allowed & (torch.rand(runner.graph.allowed.shape, generator=torch.Generator().manual_seed(seed)) < 0.7) for seed in range(3)])
        yield path_patching(model, clean, corrupted, ["embed", "L0H1", "layer_1_mlp"], ["L1H2.q", "L2H0.k", "layer_2_mlp", "logits"], metric=metric).patched
        for method in ("eap", "eap-ig"): yield edge_attribution(model, clean, corrupted, method=method, metric=metric).patched
        yield attribution_patching(model, clean, corrupted, positions="all", metric=metric).patched
        yield runner(some).T
    alone = [list(answers([clean], [corrupted])) for clean, corrupted in zip(*texts)]
    for together, *ones in zip(answers(*texts), *alone): assert torch.allclose(together, torch.cat(ones), atol=1e-5, equal_nan=True)


def test_several_edits_of_one_row(model):
    clean, corrupted, _ = prompts_of(False)
    components = components_of(model)
    source, replay = Replay(model, clean, keep=components), Replay(model, corrupted)
    rows = torch.arange(len(components))
    edits, prompts = [], rows % 2
    for i, component in enumerate(components):
        for layer, j, position in ((2, i, 3), (0, (i + 3) % len(components), 5), (1, (i + 5) % len(components), 2)):
            edits.append(Edit(component, layer, rows[j:j + 1], source.kept[component][layer][j % 2, position][None], torch.tensor([position])))
    naive = naive_logits(model, corrupted, edits, prompts)
    close(replay.run(edits, prompts), naive)
    close(replay.run(edits, prompts, read=5)[:, 0], naive[:, 5])


def test_activations_further_up(model):
    clean, corrupted, _ = prompts_of(False)
    source, replay = Replay(model, clean, keep=["z", "k"]), Replay(model, corrupted)
    edits = [Edit("z", 0, torch.tensor([0, 1]), source.kept["z"][0][[0, 1], [2, 4], [1, 1]], torch.tensor([2, 4]), torch.tensor([1, 1])),
             Edit("k", 2, torch.tensor([1, 2]), source.kept["k"][2][0, :2], torch.tensor([3, 5]))]
    prompts = torch.tensor([0, 1, 0])
    for component in ("resid_pre", "attn_out", "q", "k", "v", "z", "post"):
        if component not in components_of(model): continue
        for layer in (0, 1, 2):
            name = hook_name(model, component, layer)
            close(replay.activation(edits, component, layer, prompts), torch.stack([seen[name] for _, seen in naive_run(model, corrupted, edits, prompts, None, [name])]))


def test_identities(model):
    clean, corrupted, _ = prompts_of(False)
    source, replay = Replay(model, clean, keep=["resid_pre"]), Replay(model, corrupted, keep=components_of(model))
    for component in components_of(model):
        scan, prompts, _ = each_edit(component, dict(enumerate(replay.kept[component])), positions="all")
        close(replay.run(scan, prompts), replay.logits[prompts])                                # itself: nothing changes
    scan, prompts, _ = each_edit("resid_pre", dict(enumerate(source.kept["resid_pre"])), positions="all")
    close(replay.run(scan, prompts), source.logits[prompts])                                    # the whole stream: the clean run


def test_rows_in_several_groups(model, monkeypatch):
    "As in long prompts, where rows that start far apart attend apart."
    monkeypatch.setattr(interventions, "_bucket_width", lambda n_pos: 2)
    clean, corrupted, mask = prompts_of(True)
    components = components_of(model)
    source, replay = Replay(model, clean, mask, keep=components), Replay(model, corrupted, mask)
    real = torch.ones(2, T, dtype=torch.bool) & (mask == 1)
    for component in components:
        scan, prompts, _ = each_edit(component, dict(enumerate(source.kept[component])))
        edits, prompts = some(scan, len(prompts), prompts, max(1, len(prompts) // 12 | 1))
        naive = naive_logits(model, corrupted, edits, prompts, mask)
        close(replay.run(edits, prompts)[real[prompts]], naive[real[prompts]])
        close(replay.run(edits, prompts, read=[5, 6]), naive[:, [5, 6]])


def test_nested_replacements_hold_in_the_order_of_the_forward_pass(model):
    if "resid_mid" not in components_of(model): pytest.skip("parallel blocks have no resid_mid")
    _, tokens, _ = prompts_of(False)
    mid = {"blocks.1.hook_resid_mid": lambda x: x + x.cumsum(-1) / 9}
    for others in ({"blocks.1.hook_resid_pre": lambda x: 3 * x}, {"blocks.1.hook_attn_out": lambda x: x - 2}, {"blocks.0.hook_resid_post": lambda x: 3 * x, "blocks.1.attn.hook_z": lambda z: 2 * z}):
        with torch.no_grad(), replaced(model, {**mid, **others}): once, seen = capture(model, tokens, ["blocks.1.hook_attn_out"])
        for outer, inner in ((mid, others), (others, mid)):
            with replaced(model, outer), replaced(model, inner): twice, again = capture(model, tokens, ["blocks.1.hook_attn_out"])
            close(twice, once)
            close(again["blocks.1.hook_attn_out"], seen["blocks.1.hook_attn_out"])


def test_as_exact_as_the_naive_loop(gpt2):
    clean, corrupted, _ = prompts_of(False)
    scan, prompts, _ = each_edit("z", dict(enumerate(Replay(gpt2, clean, keep="z").kept["z"])))
    edits, prompts = some(scan, len(prompts), prompts, 5)
    single, replayed = naive_logits(gpt2, corrupted, edits, prompts), Replay(gpt2, corrupted).run(edits, prompts)
    double = build("GPT2LMHeadModel").to(torch.float64)
    truth = naive_logits(double, corrupted, edits, prompts)
    assert (replayed - truth).abs().max() <= 2 * (single - truth).abs().max()
    close(Replay(double, corrupted).run(edits, prompts), truth)


def test_memory_only_cuts_the_scan_into_pieces(gpt2):
    clean, corrupted, _ = prompts_of(False)
    values = dict(enumerate(Replay(gpt2, clean, keep=["z"]).kept["z"]))
    scan, prompts, _ = each_edit("z", values)
    sizes = []
    def count(logits, rows): sizes.append(len(rows)); return logits[:, -1]
    whole = Replay(gpt2, corrupted).run(scan, prompts, read=-1, reduce=count)
    small = Replay(gpt2, corrupted, memory=2**20).run(scan, prompts, read=-1, reduce=count)
    assert len(sizes) > 2 and sizes[0] == len(prompts)
    close(small, whole)


def test_two_edits_of_one_stream_hold_in_the_order_of_the_forward_pass(gpt2):
    _, tokens, _ = prompts_of(False)
    row, position, value = torch.tensor([0]), torch.tensor([4]), torch.ones(1, 32)
    def edit(component, layer, scale): return Edit(component, layer, row, scale * value, position)
    replay = Replay(gpt2, tokens)
    for late, early in ((("resid_pre", 1), ("resid_post", 0)), (("resid_mid", 1), ("attn_out", 1)), (("resid_mid", 1), ("resid_pre", 1)), (("resid_mid", 1), ("resid_post", 0))):
        first, second = edit(*early, 3.0), edit(*late, -2.0) if late[0] == "resid_pre" else Edit(*late, row, value.cumsum(1), position)
        naive = [naive_logits(gpt2, tokens, order, row) for order in ([first, second], [second, first])]
        assert torch.equal(*naive)
        for order in ([first, second], [second, first]): close(replay.run(order, row), naive[0])


def test_read_positions_come_in_the_order_given(model):
    _, tokens, _ = prompts_of(False)
    replay = Replay(model, tokens, keep=["q"])
    edit = Edit("q", 0, torch.tensor([0]), replay.kept["q"][0][1, 2][None], torch.tensor([2]))
    whole = replay.run([edit])
    for read in ([5, 2], [-1, 0, 3]): close(replay.run([edit], read=read), whole[:, read])
    assert check_read([[5, 2], [1, 6]], 2, T).tolist() == [[5, 2], [1, 6]]


def test_two_engines_and_a_caller_with_gradients(model):
    clean, corrupted, _ = prompts_of(False)
    with torch.enable_grad():
        one, two = Replay(model, clean, keep=["z"]), Replay(model, corrupted, keep=["v"])
        edits = [Edit("z", 1, torch.tensor([0]), one.kept["z"][1][:1, 3].requires_grad_(), torch.tensor([3]))]
        for tokens, replay in ((corrupted, two), (clean, one)):
            answer = replay.run(edits)
            assert not answer.requires_grad
            close(answer, naive_logits(model, tokens, edits, torch.tensor([0])))


def test_memory_counts_the_keys_and_values_of_long_prompts(gpt2):
    prompt = torch.arange(32)[None]
    replay, sizes = Replay(gpt2, prompt), []
    late = Edit("z", 0, torch.arange(1000), torch.randn(1000, 8), torch.full((1000,), 31), torch.arange(1000) % 4)
    replay.memory = 2**20
    whole = replay.run([late], read=-1, reduce=lambda logits, rows: (sizes.append(len(rows)), logits)[1])
    assert max(sizes) * 2 * replay.layers[0].keys[0].numel() * 4 <= replay.memory and whole.shape[0] == 1000
    replay.memory = 1                                                                          # a row a chunk
    few = replace(late, rows=torch.arange(9), **{name: getattr(late, name)[:9] for name in ("value", "position", "head")})
    close(replay.run([few], read=-1), whole[:9])


def test_the_block_written_out_equals_hugging_faces():
    model, (clean, tokens, mask) = build("GPT2LMHeadModel"), prompts_of(True)
    values = dict(enumerate(Replay(model, clean, mask, keep=["z"]).kept["z"]))
    scan, prompts, _ = each_edit("z", values)
    written = Replay(model, tokens, mask, keep=["q", "mlp_out"])
    def answers(replay): return [replay.run(scan, prompts, read=-1), replay.run(scan, prompts)[mask[prompts] == 1]]
    ours = answers(written)
    for layer in written.layers: assert vars(layer.block).pop("forward").func is interventions._gpt2_block
    generic = Replay(model, tokens, mask, keep=["q", "mlp_out"])
    assert generic.twin is written.twin
    for one, other in zip(ours, answers(generic)): close(one, other)
    for component in ("q", "mlp_out"): close(torch.stack(written.kept[component])[:, mask == 1], torch.stack(generic.kept[component])[:, mask == 1])


def test_nothing_stays_behind(gpt2):
    _, tokens, _ = prompts_of(False)
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gpt2.modules()]
    with torch.no_grad(): gpt2(tokens)                              # the bridge wires hooks of its own in its first run
    before, state, grads = hooks(), {k: v.clone() for k, v in gpt2.state_dict().items()}, [p.requires_grad for p in gpt2.parameters()]
    def broken(logits, rows): raise KeyboardInterrupt
    scan, prompts, _ = each_edit("z", dict(enumerate(Replay(gpt2, tokens, keep="z").kept["z"])))
    replay = Replay(gpt2, tokens)
    with pytest.raises(KeyboardInterrupt): replay.run(scan, prompts, reduce=broken)
    for error in (KeyboardInterrupt, ZeroDivisionError):
        def fails(value): raise error
        with pytest.raises(error), replaced(gpt2, {"blocks.1.attn.hook_z": fails, "blocks.0.hook_resid_mid": lambda x: x}): gpt2(tokens)
        with pytest.raises(error), replaced(gpt2, {"blocks.1.attn.hook_z": lambda z: z}): raise error
    assert hooks() == before and not gpt2.training and [p.requires_grad for p in gpt2.parameters()] == grads
    assert all(torch.equal(v, state[k]) for k, v in gpt2.state_dict().items()) and all(p.grad is None for p in gpt2.parameters())


def _what_is_set(model):
    "All that a run must leave as it was."
    modules = list(model.modules())
    hooks = [len(getattr(module, kind)) for module in modules for kind in (*interventions._HOOK_LISTS, "fwd_hooks") if hasattr(module, kind)]
    flags = [(module.training, "forward" in vars(module)) for module in modules], [(weight.requires_grad, weight.grad) for weight in model.parameters()]
    return hooks, flags, torch.is_grad_enabled(), ["replay_layer" in vars(layer.attn) for layer in interventions._TWINS[model].layers]


@pytest.mark.parametrize("action", [
    lambda model, task: patch_scan(model, task.clean, task.corrupted, metric=task.metric),
    lambda model, task: edge_attribution(model, task.clean, task.corrupted, metric=task.metric),
    lambda model, task: acdc(model, task, 0.1),
    lambda model, task: evaluate_circuit(model, task, [("embed", "logits")], n_random=3),
    lambda model, task: causal_scrub(model, task, {("L0H0", "L1H1.q"): [0, 0, 1, 1]}, n_draws=3),
], ids=["patch_scan", "edge_attribution", "acdc", "evaluate_circuit", "causal_scrub"])
def test_an_interrupted_metric_leaves_nothing_behind(gpt2, action):
    with seeded("interrupted"): one, two = torch.randint(0, 50, (2, 4, T))
    plain, calls = logit_diff(gpt2, 3, 7), []
    higher = (plain(capture(gpt2, one, [])[0]) > plain(capture(gpt2, two, [])[0]))[:, None]
    clean, corrupted = torch.where(higher, one, two), torch.where(higher, two, one)               # told apart in every pair
    def metric(logits):
        calls.append(None)
        if len(calls) == stop: raise KeyboardInterrupt
        return logits[:, -1, 3] - logits[:, -1, 7]
    task, state = Task("interrupted", clean, corrupted, metric, []), {name: value.clone() for name, value in gpt2.state_dict().items()}
    Replay(gpt2, clean)
    before, logits = _what_is_set(gpt2), capture(gpt2, clean, [])[0]
    for stop in (3, 4, 5, 8):
        calls.clear()
        with pytest.raises(KeyboardInterrupt): action(gpt2, task)
        assert len(calls) == stop and _what_is_set(gpt2) == before
    assert all(torch.equal(value, state[name]) for name, value in gpt2.state_dict().items()) and torch.equal(capture(gpt2, clean, [])[0], logits)


def test_a_second_engine_of_a_model_shares_the_twin_and_does_not_run_the_bridge(model, monkeypatch):
    clean, corrupted, _ = prompts_of(False)
    first = Replay(model, clean, keep=["z"])
    monkeypatch.setattr(interventions, "_run_bridge", None)
    state = interventions._state(model, interventions._modules(model))
    second = Replay(model, corrupted, keep=["z"])
    assert second.twin is first.twin and interventions._state(model, interventions._modules(model)) == state
    logits, seen = capture(model, corrupted, [name := hook_name(model, "z", 1)])
    close(second.logits, logits)
    close(second.kept["z"][1], seen[name])
    inner = []
    def reduce(logits, rows):
        inner.append(second.run([Edit("z", 1, torch.tensor([0]), second.kept["z"][1][:1, 3] * 2, torch.tensor([3]))]))
        return logits[:, -1]
    edits, prompts, _ = each_edit("z", {0: second.kept["z"][0]})
    small = Replay(model, clean, keep=["z"], memory=2**20)
    close(small.run(edits, prompts, read=-1, reduce=reduce), naive_logits(model, clean, edits, prompts)[:, -1])
    assert all(torch.equal(one, inner[0]) for one in inner)
    assert all("replay_layer" not in vars(layer.attn) for layer in first.layers)


@pytest.mark.parametrize("name", [*CONFIGS, "native"])
def test_nothing_keeps_a_model_alive(name):
    model = build(name)
    replay = Replay(model, prompts_of(False)[0], keep=["z"])
    assert replay.exact and model in interventions._TWINS
    gone = weakref.ref(model)
    del model, replay
    gc.collect()
    assert gone() is None


def test_an_old_twin_is_noticed():
    model = build("GPT2LMHeadModel")
    clean, tokens, _ = prompts_of(False)
    edit = Edit("z", 1, torch.tensor([0]), torch.ones(1, 8), torch.tensor([3]), torch.tensor([1]))
    def agree():
        replay = Replay(model, tokens, keep=["z"])
        assert replay.exact
        close(replay.logits, capture(model, tokens, [])[0])
        close(replay.run([edit]), naive_logits(model, tokens, [edit], torch.tensor([0])))
        return replay.twin
    first = agree()
    with torch.no_grad(): model(tokens)
    assert agree() is first
    def scale_by_data():
        for weight in model.parameters(): weight.data *= 0.9
    def other_weight(): model.blocks[1].mlp.original_component.c_fc.original_component.weight = torch.nn.Parameter(torch.randn(32, 128) / 9)
    for change in (scale_by_data, other_weight):
        change()
        assert agree() is not first
    model.blocks[1].original_component.ln_1.original_component.eps = 0.5                       # the bridge does not look there, the twin does
    with pytest.warns(UserWarning, match="cannot be replayed exactly"): replay = Replay(model, tokens)
    close(replay.logits, capture(model, tokens, [])[0])
    model.blocks[1].original_component.ln_1.original_component.eps = 1e-5
    agree()
    model.blocks[0].hook_mlp_out.add_hook(lambda value, hook: 2 * value)
    with pytest.warns(UserWarning, match="cannot be replayed exactly"): replay = Replay(model, tokens)
    close(replay.logits, capture(model, tokens, [])[0])


def test_changed_weights_need_a_new_engine():
    model = build("GPT2LMHeadModel")
    _, tokens, _ = prompts_of(False)
    edit = Edit("z", 1, torch.tensor([0]), torch.ones(1, 8), torch.tensor([3]), torch.tensor([1]))
    def add_in_place():
        with torch.no_grad(): next(model.parameters()).add_(0.5)
    def load(): model.original_model.load_state_dict(model.original_model.state_dict())
    def exchange():
        norm = model.ln_final.original_component
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    for change in (add_in_place, load, exchange):
        replay = Replay(model, tokens)
        replay.run([edit])
        change()
        refuse(lambda: replay.run([edit]), "model", "new Replay")
        refuse(lambda: replay.activation([edit], "z", 2), "model", "new Replay")
        close(Replay(model, tokens).run([edit]), naive_logits(model, tokens, [edit], torch.tensor([0])))


def test_native_patterns_leave_the_model_as_it_was():
    model = build("native")
    _, tokens, _ = prompts_of(False)
    def fails(pattern): raise KeyboardInterrupt
    with torch.no_grad(): before = model(tokens)
    with pytest.raises(KeyboardInterrupt), replaced(model, {"blocks.1.attn.hook_pattern": fails}): model(tokens)
    with torch.no_grad(): assert torch.equal(model(tokens), before)
    assert all("forward" not in block.attn.original_component.__dict__ for block in model.blocks)


def test_native_patterns_written_twice():
    model = build("native")
    _, tokens, _ = prompts_of(False)
    half, name = lambda pattern: 0.5 * pattern, "blocks.1.attn.hook_pattern"
    def logits(new):
        with torch.no_grad(), replaced(model, {name: new}): return model(tokens)
    plain, once, twice = logits(lambda pattern: pattern), logits(half), logits(lambda pattern: 0.25 * pattern)
    with torch.no_grad(), replaced(model, {name: half}):
        with replaced(model, {name: half}): close(model(tokens), twice)
        close(model(tokens), once)
    with torch.no_grad(): close(model(tokens), plain)


def test_a_model_that_cannot_be_replayed_takes_the_naive_way(gpt2):
    clean, corrupted, _ = prompts_of(False)
    values = dict(enumerate(Replay(gpt2, clean, keep=["z"]).kept["z"]))
    scan, prompts, _ = each_edit("z", values)
    edits, prompts = some(scan, len(prompts), prompts, 29)
    with replaced(gpt2, {"blocks.0.mlp.hook_post": lambda post: 0.5 * post}):                 # a hook that the twin does not have
        with pytest.warns(UserWarning, match="cannot be replayed exactly") as caught: replay = Replay(gpt2, corrupted)
        assert not replay.exact and caught[0].filename == __file__                             # it points at the line above
        slow = replay.run(edits, prompts, read=-1)
        assert torch.equal(replay.run(edits, prompts, read=-1, vocab=torch.tensor([4, 9])), slow[..., [4, 9]])
        close(slow[:, 0], naive_logits(gpt2, corrupted, edits, prompts)[:, -1])


@pytest.mark.parametrize("name, config, reason", [
    ("GPTNeoForCausalLM", dict(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=32, attention_types=[[["global", "local"], 1]], window_size=3), "shared attention"),
    ("GptOssForCausalLM", GQA | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1), "sinks"),
])
def test_other_kinds_of_attention_are_not_replayed(name, config, reason, monkeypatch):
    monkeypatch.setitem(CONFIGS, name, config)
    model = build(name)
    _, tokens, _ = prompts_of(False)
    with pytest.warns(UserWarning, match=reason): replay = Replay(model, tokens, keep=["z"])
    edit = Edit("z", 0, torch.tensor([0]), replay.kept["z"][1][1, 3][None], torch.tensor([3]))
    prompts = torch.tensor([0])
    close(replay.run([edit], prompts), naive_logits(model, tokens, [edit], prompts))
    if name == "GPTNeoForCausalLM":                                                            # it shows its patterns, and goes on with others
        refuse(lambda: replay.run([Edit("pattern", 0, torch.tensor([0]), torch.eye(T)[:1], torch.tensor([3]), torch.tensor([1]))]), "pattern", "does not use")


def refuse(action, *words):
    with pytest.raises(InputError) as caught: action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    for word in words: assert word in message, message


def test_bad_input_names_the_argument(gpt2):
    _, tokens, _ = prompts_of(False)
    replay, row, head = Replay(gpt2, tokens), torch.tensor([0]), torch.tensor([1])
    z = torch.zeros(1, 8)
    good = Edit("z", 1, row, z, row, head)
    assert replay.run([good], read=-1).shape == (1, 1, 50)
    refuse(lambda: replay.run([Edit("zz", 1, row, z, row, head)]), "component")
    refuse(lambda: replay.run([Edit("z", 3, row, z, row, head)]), "layer")
    refuse(lambda: replay.run([Edit("z", 1, row, z, row, head + 3)]), "head", "0 to 3")
    refuse(lambda: replay.run([Edit("z", 1, row, z, row + T, head)]), "position", "0 to 6")
    refuse(lambda: replay.run([Edit("z", 1, row, z[:, :5], row, head)]), "value", "(1, 8)")
    refuse(lambda: replay.run([Edit("z", 1, row, z / 0, row, head)]), "value", "NaN")
    ahead = torch.full((1, T), 1 / T)
    refuse(lambda: replay.run([Edit("pattern", 1, row, ahead, row + 2, head)]), "value", "ahead")
    refuse(lambda: replay.run([Edit("pattern", 1, row, ahead.expand(1, 4, T), row + 2)]), "value", "ahead")
    padded = Replay(gpt2, tokens, torch.tensor([[0, 0] + [1] * (T - 2)] * 2))
    refuse(lambda: padded.run([Edit("pattern", 1, row, ahead.cumsum(1) * (torch.arange(T) == 1), row + 4, head)]), "value", "padding")
    refuse(lambda: replay.run([Edit("z", 1, row.repeat(2), z.repeat(2, 1), row.repeat(2), head.repeat(2))]), "rows", "two values")
    refuse(lambda: each_edit("z", {}), "values")
    refuse(lambda: replay.run([Edit("z", 1, row.int(), z, row, head)]), "rows", "int64")
    refuse(lambda: replay.run([Edit("resid_pre", 1, row, z, row, head)]), "head", "no heads")
    refuse(lambda: replay.run([good], prompts=torch.tensor([2])), "prompts", "0 to 1")
    refuse(lambda: replay.run([good], read=T), "read")
    refuse(lambda: replay.run([good], read=[1, 1]), "read")
    refuse(lambda: replay.run([good], vocab=torch.tensor([50])), "vocab", "0 to 49")
    refuse(lambda: replay.run([good], reduce=lambda logits, rows: logits.sum()), "reduce")
    for bad in (float("nan"), 1j * float("nan")): refuse(lambda: replay.run([good], reduce=lambda logits, rows: logits[:, 0, 0] * bad), "reduce", "NaN")
    assert good == good and good != replace(good) and len({good, replace(good)}) == 2
    refuse(lambda: Replay(gpt2, tokens[:, :0]), "tokens")
    refuse(lambda: Replay(gpt2, tokens.float()), "tokens")
    refuse(lambda: Replay(gpt2, tokens + 50), "tokens", "0 to 49")
    refuse(lambda: Replay(gpt2, tokens, attention_mask=torch.tensor([[1] * 6 + [0]] * 2)), "attention_mask", "left")
    refuse(lambda: Replay(gpt2, tokens, attention_mask=torch.ones(2, T).numpy()), "attention_mask", "ndarray")
    refuse(lambda: Replay(gpt2, tokens, keep=["zz"]), "component")
    refuse(lambda: capture(gpt2, tokens, ["blocks.0.attn.hook_zz"]), "names", "hook_z")
    refuse(lambda: replaced(gpt2, {"blocks.9.attn.hook_z": z}).__enter__(), "replacements")
    refuse(lambda: hook_name(build("GPTNeoXForCausalLM"), "resid_mid", 0), "component")
    gpt2.train()
    try: refuse(lambda: Replay(gpt2, tokens), "model", "training")
    finally: gpt2.eval()
    half = build("GPT2LMHeadModel").to(torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16.*rounded away"): assert Replay(half, tokens).exact


LATENT = dict(vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1,
              num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, v_head_dim=8, max_position_embeddings=32)


@pytest.mark.filterwarnings("ignore:the blocks of this model")
@pytest.mark.parametrize("rope", [8, 4])
def test_latent_attention_is_refused_where_the_bridge_shows_it_otherwise(rope, monkeypatch):
    "In a bridge that is not ours queries, keys and values have heads first, and `z` is cut at a width that need not be its heads'."
    monkeypatch.setitem(CONFIGS, "DeepseekV3ForCausalLM", LATENT | dict(qk_rope_head_dim=rope))
    model, (clean, corrupted, _) = build("DeepseekV3ForCausalLM"), prompts_of(False)
    for block in model.blocks:
        for point in (block.attn.hook_q, block.attn.hook_k, block.attn.hook_v, block.attn.o.hook_in): point.hook_conversion = None
    metric, shown = logit_diff(model, 3, 7), ["q", "k", "v", "z"]
    for component in shown:
        head = f"L1H2.{component}".removesuffix(".z")
        refuse(lambda: hook_name(model, component, 1), "component", component)
        refuse(lambda: patch_scan(model, clean, corrupted, component=component, metric=metric), "component", component)
        refuse(lambda: path_patching(model, clean, corrupted, ["embed"], [head], metric=metric), "component", component)
        refuse(lambda: ablate_component(model, clean, head), "component", component)
        refuse(lambda: patch_activation(model, clean, f"blocks.1.attn.hook_{component}", torch.tensor(0.0), positions=1), "component", component)
    refuse(lambda: Runner(model, Task("latent", clean, corrupted, metric, [])), "component")
    refuse(lambda: edge_attribution(model, clean, corrupted, metric=metric), "component")
    for component in ("resid_mid", "attn_out", "pattern"):
        values = Replay(model, clean, keep=[component]).kept[component]
        edits, prompts, grid = each_edit(component, {1: values[1]})
        slow = metric(naive_logits(model, corrupted, edits, prompts), prompts).view(grid).movedim(1, 0)
        assert torch.allclose(patch_scan(model, clean, corrupted, component=component, layers=[1], metric=metric).patched, slow, atol=1e-5)


def test_a_part_in_training_mode_is_refused(monkeypatch):
    monkeypatch.setitem(CONFIGS, "GPT2LMHeadModel", CONFIGS["GPT2LMHeadModel"] | dict(resid_pdrop=0.3))
    model, (clean, corrupted, _) = build("GPT2LMHeadModel"), prompts_of(False)
    for part in (model.original_model, model.blocks[1].original_component, model):
        part.train()
        refuse(lambda: patch_scan(model, clean, corrupted), "model", "eval()")
        model.eval()
    patch_scan(model, clean, corrupted, metric=logit_diff(model, 3, 7))


def test_gradients_and_effects_have_to_be_numbers(gpt2):
    clean, corrupted, _ = prompts_of(False)
    root = lambda logits: (logits[:, -1, 3] - logits[:, -1, 3]).abs().sqrt() + logits[:, -1, 7]
    assert patch_scan(gpt2, clean, corrupted, metric=root).patched.isfinite().all()
    refuse(lambda: attribution_patching(gpt2, clean, corrupted, metric=root), "metric", "slope")
    patched, unpatched = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.5, 0.0])
    assert compute_patching_effect(patched[:, None], patched, unpatched) == compute_patching_effect(patched, patched, unpatched) == 1
    for bad in ((patched[:2], patched, unpatched), (patched, patched, unpatched[:1]), (patched[:, None], patched[:, None], unpatched[:, None]), (patched[:0],) * 3): refuse(lambda: compute_patching_effect(*bad), "pair")
    for bad in (float("nan"), float("inf")): refuse(lambda: compute_patching_effect(patched, patched * bad, unpatched), "clean", "NaN")


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "Qwen3ForCausalLM"])
def test_a_model_that_was_wrapped_twice_is_replayed(kind):
    first = build(kind)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    logits = first(tokens).detach()
    again = as_bridge(first.original_model)
    replay = Replay(again, tokens, keep=["z", "q"])
    assert replay.exact and torch.allclose(replay.logits, logits, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_hooks(model, padded):
    tokens, _, mask = prompts_of(padded)
    replay, rows = Replay(model, tokens, mask, keep=["resid_pre"]), torch.arange(2)
    places = [(component, layer) for layer in range(model.cfg.n_layers) for component in COMPONENTS if component != "pattern" and has_component(model, component, layer)]
    logits, seen = differentiable_run(replay, replay.kept["resid_pre"][0], rows, places, read=-1)
    slopes = torch.autograd.grad((logits[:, 0, 3] - logits[:, 0, 4]).sum(), [zero for zero, _ in seen.values()])
    for (component, layer), slope in zip(places, slopes):
        name = hook_name(model, component, layer)
        if component == "resid_mid": continue                                  # where the bridge only shows it, a gradient cannot be asked for there
        zero = torch.zeros_like(capture(model, tokens, [name], mask)[1][name]).requires_grad_()
        with torch.enable_grad(), replaced(model, {name: lambda old: old + zero}): end = model(tokens, attention_mask=mask)[:, -1]
        wanted, = torch.autograd.grad((end[:, 3] - end[:, 4]).sum(), zero)
        real = slice(None) if mask is None else mask == 1
        assert torch.allclose(slope[real], wanted[real], rtol=1e-4, atol=1e-5 * wanted.abs().max().item()), (component, layer)


def test_scores_of_a_loaded_model_hold_no_graph():
    model = load_model("induction-2l/seed0", device="cpu")
    task = copying_task(model, 8)
    for method in ("eap", "eap-ig", "exact"):
        scores = edge_attribution(model, task.clean, task.corrupted, method=method, metric=task.metric, steps=2)
        assert not scores.patched.requires_grad and len(scores.to_frame()) and 0 <= edge_auroc(scores, [("embed", "logits")]) <= 1
    assert not Runner(model, task)._moved.requires_grad
