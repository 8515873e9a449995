"""Race patch scans: ours, TransformerLens's own loops, and for heads by position a plain loop over whole forward passes.

    python benchmarks/patching_speed.py [A|B] [--job heads|heads-all|resid] [--threads N] [--repeats N]

A is a 4-layer, 4-head, 128-wide GPT-2 with 20 tokens, B GPT-2-small's shape with 16. Weights are random, clean and corrupted prompt differ from position 1 on, gradients
are off, one process, the contestants in turn; the smallest time of each counts. Ours includes everything that a user waits for: the engine's making, both first runs,
its comparison with the bridge, and the metric. For B the slow contestants run a part of the scan, which is scaled up to the whole.
"""
import argparse, itertools, time, warnings

import torch, transformers

from mechinterp_lib.core import seeded
from mechinterp_lib.interventions import Replay, each_edit
from mechinterp_lib.models import as_bridge

SHAPES = {"A": (dict(n_layer=4, n_head=4, n_embd=128, n_positions=32, vocab_size=1000), 20), "B": (dict(n_layer=12, n_head=12, n_embd=768, n_positions=32, vocab_size=50257), 16)}
JOBS = {  # component, positions, TransformerLens's function, its setter and axes
    "heads": ("z", "each", "get_act_patch_attn_head_out_by_pos", "layer_pos_head_vector_patch_setter", ("layer", "pos", "head")),
    "heads-all": ("z", "all", "get_act_patch_attn_head_out_all_pos", "layer_head_vector_patch_setter", ("layer", "head")),
    "resid": ("resid_pre", "each", "get_act_patch_resid_pre", "layer_pos_patch_setter", ("layer", "pos"))}
ANSWER, WRONG = 5, 7


def logit_diff(logits): return logits[..., -1, ANSWER] - logits[..., -1, WRONG]


def setup(shape):
    "A plain module, the bridge around another of the same weights, a HookedTransformer, and the two prompts."
    fields, length = SHAPES[shape]
    config = transformers.GPT2Config(**fields, bos_token_id=None, eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    modules = []
    for _ in range(3):
        with seeded("speed"): modules.append(transformers.GPT2LMHeadModel(config).eval())
    for module in modules:
        with seeded("weights"):
            for weight in module.transformer.parameters(): weight.data += 0.02 * torch.randn_like(weight)
        module.set_attn_implementation("eager")
    clean = torch.randint(10, fields["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    corrupted = torch.randint(10, fields["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    corrupted[0, 0] = clean[0, 0]
    return modules[0], as_bridge(modules[1]), hooked(modules[2], fields), clean, corrupted


def hooked(module, fields):
    "A HookedTransformer with the module's weights as they are."
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    d = fields["n_embd"]
    config = HookedTransformerConfig(n_layers=fields["n_layer"], d_model=d, n_ctx=fields["n_positions"], d_head=d // fields["n_head"], n_heads=fields["n_head"], d_mlp=4 * d,
                                     d_vocab=fields["vocab_size"], act_fn="gelu_new", normalization_type="LN", device="cpu")
    model = HookedTransformer(config)
    model.load_and_process_state_dict(convert_gpt2_weights(module, model.cfg), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.eval()


def ours(bridge, clean, corrupted, job, vocab=None):
    "The whole scan; with `vocab`, the logits of those two tokens only."
    metric = logit_diff if vocab is None else lambda logits: logits[..., -1, 0] - logits[..., -1, 1]
    component, positions = job[:2]
    both = Replay(bridge, torch.cat([corrupted, clean]), keep=[component])
    edits, rows, _ = each_edit(component, {layer: value[1:] for layer, value in enumerate(both.kept[component])}, positions)
    return both.run(edits, rows, read=-1, vocab=vocab, reduce=lambda logits, _: metric(logits))


def plain(module, clean, corrupted, cells):
    "One whole forward pass for each cell: no hooks but the one that patches."
    heads, width = module.config.n_head, module.config.n_embd // module.config.n_head
    z, scores = {}, []
    def keep(layer): return lambda _, args: z.__setitem__(layer, args[0].clone())
    handles = [block.attn.c_proj.register_forward_pre_hook(keep(layer)) for layer, block in enumerate(module.transformer.h)]
    with torch.no_grad(): module(clean, use_cache=False)
    for handle in handles: handle.remove()
    for layer, pos, head in cells:
        part = slice(head * width, head * width + width)
        def patch(_, args): args[0][:, pos, part] = z[layer][:, pos, part]
        handle = module.transformer.h[layer].attn.c_proj.register_forward_pre_hook(patch)
        with torch.no_grad(): scores.append(logit_diff(module(corrupted, use_cache=False).logits)[0])
        handle.remove()
    return torch.stack(scores)


def lens(model, clean, corrupted, job, cells, whole):
    "TransformerLens's own function; on a part of the cells, its own loop over an index table of those."
    import pandas as pd
    from transformer_lens import patching
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        if whole: return getattr(patching, job[2])(model, corrupted, cache, lambda logits: logit_diff(logits)[0]).flatten()
        table = pd.DataFrame(cells, columns=list(job[4]))
        return patching.generic_activation_patch(model, corrupted, cache, lambda logits: logit_diff(logits)[0], getattr(patching, job[3]), job[0], index_df=table)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", default="A", choices=SHAPES)
    parser.add_argument("--job", default="heads", choices=JOBS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", type=int, default=None, help="cells that the slow contestants run (all for A, 24 for B)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    module, bridge, tl, clean, corrupted = setup(options.shape)
    fields, length = SHAPES[options.shape]
    job, sizes = JOBS[options.job], {"layer": fields["n_layer"], "pos": length, "head": fields["n_head"]}
    cells = list(itertools.product(*(range(sizes[axis]) for axis in job[4])))
    part = options.part or (len(cells) if options.shape == "A" else 24)
    some = list(range(0, len(cells), -(-len(cells) // part)))
    contestants = {"ours": lambda: ours(bridge, clean, corrupted, job), "ours, two logits": lambda: ours(bridge, clean, corrupted, job, torch.tensor([ANSWER, WRONG])),
                   "plain loop": lambda: plain(module, clean, corrupted, [cells[i] for i in some]),
                   "HookedTransformer": lambda: lens(tl, clean, corrupted, job, [cells[i] for i in some], len(some) == len(cells)),
                   "bridge": lambda: lens(bridge, clean, corrupted, job, [cells[i] for i in some], len(some) == len(cells))}
    if options.job != "heads": del contestants["plain loop"]
    times, answers = {name: [] for name in contestants}, {}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            began = time.perf_counter()
            answers[name] = run()
            times[name].append(time.perf_counter() - began)
    for name in contestants:
        scale = 1 if name.startswith("ours") else len(cells) / len(some)
        reference = answers["ours"] if name.startswith("ours") else answers["ours"][some]
        error = (answers[name].flatten() - reference).abs().max().item()
        best = min(times[name]) * scale
        print(f"{options.shape} {options.job:9s} {name:18s} {best:9.4f} s  {best / min(times['ours']):7.1f}x  largest difference {error:.1e}" + ("" if scale == 1 else f"  (from {len(some)} of {len(cells)} cells)"))
    print(f"largest effect {(answers['ours'] - answers['ours'].median()).abs().max().item():.3g}")


if __name__ == "__main__": main()
