"""Race edge scores and ACDC against auto-circuit, and ask both which edges of models made by hand are the true ones.

    python benchmarks/circuit_speed.py             all of it; written to results/benchmarks/ if the machine was quiet
    python benchmarks/circuit_speed.py --quick     without the large shape; nothing is written

auto-circuit (Miller et al. 2024) is not among our dependencies: `pip install --no-deps auto-circuit==1.0.1 ordered-set`. What else it asks for is not used here. Shapes A and B as in
patching_speed.py; random weights, one process, the contestants in turn, the smallest time of each counts, for the whole job on both sides: first runs, scores of all edges, all positions at once. EAP is
the same number in both. The paths of the integrals differ: auto-circuit mixes each edge's two values, EAP-IG the two embeddings; ten points each. ACDC: the same distance (KL
divergence from the whole model) and thresholds; each library goes through the edges of a layer in its own order.
"""
import argparse, itertools, os, sys, time, types, warnings

os.environ.setdefault("TQDM_DISABLE", "1")
import pandas as pd, torch, transformer_lens
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechinterp_lib.activation_patching import Scan, Task, copying_pairs, kl_divergence, logit_diff
from mechinterp_lib.circuits import acdc, edge_attribution, edge_auroc, model_graph
from mechinterp_lib.core import generator, provenance, save_results
from mechinterp_lib.models import as_bridge, fixed_offset_model, induction_model, two_branch_model
from patching_speed import ANSWER, SHAPES, WRONG, Others, gpt2, hooked, log, markdown, prompts, race, row

THRESHOLDS = (1e-4, 1e-3, 1e-2, 1e-1)
POINTS = 10


def auto_circuit():
    "auto-circuit's functions. It was written for a TransformerLens that called its cache by another name, and reads files of autoencoders through a package that is not needed here."
    old, blob = types.ModuleType("transformer_lens.past_key_value_caching"), types.ModuleType("blobfile")
    old.HookedTransformerKeyValueCache = transformer_lens.HookedTransformerKeyValueCache = transformer_lens.TransformerLensKeyValueCache
    blob.BlobFile = open
    sys.modules |= {old.__name__: old, blob.__name__: blob}
    try:
        from auto_circuit.data import PromptDataLoader, PromptDataset
        from auto_circuit.prune_algos.ACDC import acdc_prune_scores
        from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
        from auto_circuit.utils.graph_utils import patchable_model
    except ImportError as error: sys.exit(f"auto-circuit is not here ({error}): pip install --no-deps auto-circuit==1.0.1 ordered-set")
    return types.SimpleNamespace(dataset=PromptDataset, loader=PromptDataLoader, patchable=patchable_model, gradient=mask_gradient_prune_scores, acdc=acdc_prune_scores)


class Peer:
    "auto-circuit on a HookedTransformer and pairs of prompts."
    def __init__(self, model, clean, corrupted, answers, wrong):
        model.set_use_attn_result(True), model.set_use_split_qkv_input(True)
        if not model.cfg.attn_only: model.set_use_hook_mlp_in(True)
        for weight in model.parameters(): weight.requires_grad_(False)                         # as auto-circuit's own loader does: masks alone need gradients
        self.library, self.cfg = auto_circuit(), model.cfg
        self.model = self.library.patchable(model, factorized=True, slice_output="last_seq", separate_qkv=True)
        columns = [[torch.tensor([int(token)]) for token in tokens] for tokens in (answers, wrong)]
        self.loader = self.library.loader(self.library.dataset(clean, corrupted, *columns), seq_len=clean.shape[1], diverge_idx=0, batch_size=len(clean))

    def gradient(self, **options):
        "EAP's scores, or, with `integrated_grad_samples`, those of a path of masks: `[sender, receiver]`, mean over pairs."
        for wrapper in self.model.dest_wrappers: wrapper.patch_mask.grad = None
        return self.matrix(self.library.gradient(self.model, self.loader, None, "logit", "avg_diff", **options))

    def acdc(self, thresholds):
        "The smallest of the thresholds at which each edge goes, infinity if it stays."
        return self.matrix(self.library.acdc(self.model, self.loader, None, [0], list(thresholds)))

    def matrix(self, scores):
        "Scores in our order of senders and receivers, NaN where there is no edge."
        cfg, columns = self.cfg, []
        parts = [f"blocks.{layer}.hook_{part}" for layer in range(cfg.n_layers) for part in ("q_input", "k_input", "v_input", *([] if cfg.attn_only else ["mlp_in"]))]
        for name in [*parts, f"blocks.{cfg.n_layers - 1}.hook_resid_post"]: columns += list(scores[name].reshape(-1, scores[name].shape[-1]).detach())
        senders = 1 + cfg.n_layers * (cfg.n_heads + (not cfg.attn_only))
        return torch.stack([torch.nn.functional.pad(column, (0, senders - len(column)), value=float("nan")) for column in columns], 1)


def score_rows(shape, pairs, repeats):
    "EAP and integrated gradients on one shape."
    fields, length = SHAPES[shape]
    bridge, (clean, corrupted) = as_bridge(gpt2(**fields)), prompts(fields["vocab_size"], length, pairs=pairs)
    peer, metric = Peer(hooked(gpt2(**fields)), clean, corrupted, [ANSWER] * pairs, [WRONG] * pairs), logit_diff(bridge, ANSWER, WRONG)
    rows = []
    for title, method, theirs in (("EAP", "eap", {"mask_val": 0.0}), (f"integrated gradients, {POINTS} points", "eap-ig", {"integrated_grad_samples": POINTS - 1})):
        ours = lambda: edge_attribution(bridge, clean, corrupted, method=method, metric=metric, steps=POINTS)
        ours()                                                                                 # the first run of a model makes its twin
        times, answers = race({"ours": ours, "peer": lambda: peer.gradient(**theirs)}, repeats)
        difference = (answers["ours"].effects + answers["peer"]).abs().nan_to_num(0).max().item() if method == "eap" else None       # its loss is minus the logit difference
        rows.append(row(shape, f"edge scores, {title}, {pairs} pair{'s' * (pairs > 1)}", torch.get_num_threads(), "auto-circuit", times["ours"], times["peer"], difference, floor=2 if torch.get_num_threads() == 1 else None))
    return rows


def as_hooked(bridge):
    "A model made by hand as a HookedTransformer."
    module, cfg = bridge.original_model, bridge.cfg
    model = HookedTransformer(HookedTransformerConfig(n_layers=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.d_head, n_heads=cfg.n_heads, d_vocab=cfg.d_vocab, attn_only=True, normalization_type=None, device="cpu"))
    heads = lambda weight: weight.detach().view(cfg.n_heads, cfg.d_head, -1).transpose(1, 2)
    with torch.no_grad():
        model.embed.W_E[:], model.pos_embed.W_pos[:], model.unembed.W_U[:], model.unembed.b_U[:] = module.tok_embed.weight, module.pos.weight, module.head.weight.T, 0
        for block, layer in zip(model.blocks, module.layers):
            for name, part in (("Q", layer.attn.q), ("K", layer.attn.k), ("V", layer.attn.v)):
                getattr(block.attn, f"W_{name}")[:] = heads(part.weight)
                getattr(block.attn, f"b_{name}")[:] = part.bias.view(cfg.n_heads, cfg.d_head)
            block.attn.W_O[:], block.attn.b_O[:] = layer.attn.o.weight.detach().view(cfg.d_model, cfg.n_heads, cfg.d_head).permute(1, 2, 0), layer.attn.o.bias
    return model.eval()


def known_cases(pairs=24):
    "Models whose circuit is known, their heads in three arrangements, without and with a little noise on the weights: a name, the model, clean and corrupted prompts, answers, wrong answers, true edges."
    for seed, noise in itertools.product(range(3), (0, 0.01)):
        kind = "with noise" if noise else "exact"
        def noisy(model):
            for weight in model.parameters(): weight.data += noise * torch.randn(weight.shape, generator=generator("noise", *weight.shape))
            return model
        previous, decoy, induction, _ = torch.randperm(4, generator=generator("places", seed)).tolist()
        true = [("embed", f"L0H{previous}.v"), (f"L0H{previous}", f"L1H{induction}.k"), (f"L1H{induction}", "logits")]
        yield f"induction, {kind}", noisy(induction_model(previous, induction, decoy, n_heads=4)), *copying_pairs(pairs, 12, generator("copying", seed))[:4], true
        clean, corrupted = torch.randint(12, (2, pairs, 8), generator=generator("copier", seed))
        corrupted[:, :6], corrupted[:, 7] = clean[:, :6], clean[:, 7]
        corrupted[:, 6] = (clean[:, 6] + 1 + torch.randint(11, (pairs,), generator=generator("other", seed))) % 12
        yield f"copier, {kind}", noisy(fixed_offset_model(1, layer=seed % 2, head=previous, n_layers=2, n_heads=4)), clean, corrupted, clean[:, 6], corrupted[:, 6], [("embed", f"L{seed % 2}H{previous}.v"), (f"L{seed % 2}H{previous}", "logits")]
        clean, corrupted = clean.clone(), corrupted.clone()
        clean[:, 5], corrupted[:, 5], corrupted[:, 4] = clean[:, 6], corrupted[:, 6], (clean[:, 4] + 1) % 12                     # both branches find the answer, and the decoy another token
        yield f"two branches, {kind}", noisy(two_branch_model(previous, induction, decoy, n_heads=4)), clean, corrupted, clean[:, 6], corrupted[:, 6], [("embed", f"L0H{previous}.v"), (f"L0H{previous}", "logits"), ("embed", f"L1H{induction}.v"), (f"L1H{induction}", "logits")]


def auroc(scores, graph, true):
    "The library's `edge_auroc` of a matrix of scores."
    patched = scores.masked_fill(~graph.allowed, float("nan"))[None]
    return edge_auroc(Scan("edge", "noise", "score", "", {"sender": list(graph.senders), "receiver": list(graph.receivers)}, patched, torch.zeros(1), torch.zeros(1)), true)


def our_acdc(model, task, graph):
    "The smallest threshold at which ACDC lets an edge go, infinity if it stays at all of them. Ours takes a share of the distance between the prompts."
    gap = task.metric(model(task.corrupted)).mean().item()
    goes = torch.full(graph.allowed.shape, float("inf"))
    for threshold in sorted(THRESHOLDS, reverse=True): goes[~graph.mask(acdc(model, task, threshold / gap))] = threshold
    return goes


def truth_rows():
    "On models made by hand: seconds and AUROC of each method of both libraries."
    rows = []
    for name, model, clean, corrupted, answers, wrong, true in known_cases():
        theirs, graph = as_hooked(model), model_graph(model)
        with torch.no_grad(): logits, other = model(clean), theirs(clean)
        assert (other - logits).abs().max() < 1e-3 * logits.abs().max()
        peer, metric = Peer(theirs, clean, corrupted, answers, wrong), logit_diff(model, answers, wrong)
        distance = Task("distance", clean, corrupted, kl_divergence(logits), [])
        ours = {method: lambda method=method: edge_attribution(model, clean, corrupted, method=method, metric=metric, steps=POINTS).effects for method in ("eap", "eap-ig", "exact")}
        both = {"EAP": (ours["eap"], lambda: peer.gradient(mask_val=0.0)), "integrated gradients": (ours["eap-ig"], lambda: peer.gradient(integrated_grad_samples=POINTS - 1)),
                "exact": (ours["exact"], None), "ACDC": (lambda: our_acdc(model, distance, graph), lambda: peer.acdc(THRESHOLDS))}
        for method, (mine, other) in both.items():
            times, found = race({"mechinterp_lib": mine} | ({"auto-circuit": other} if other else {}), 2)
            rows += [{"model": name, "method": method, "library": library, "auroc": auroc(found[library], graph, true), "seconds": times[library]} for library in found]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the large shape; nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    jobs = [("A", 1, 10), ("A", 8, 5), ("A", 64, 2)] + ([] if options.quick else [("B", 1, 2)])
    table, began = [], time.monotonic()
    with Others() as others:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for job in jobs:
                table += score_rows(*job)
                log(f"{job}, {threads} threads: {time.monotonic() - began:.0f} s")
        torch.set_num_threads(1)
        truth = pd.DataFrame(truth_rows())
    print(markdown(table), "\n")
    print(truth.groupby(["model", "method", "library"], sort=False)[["auroc", "seconds"]].mean().to_string(float_format="%.3g"))
    if options.quick: return
    if not others.share < 0.05: sys.exit(f"nothing was written: other processes took {others.share:.0%} of the processors meanwhile; run it on a quiet machine")
    record = provenance({"jobs": jobs, "thresholds": list(THRESHOLDS), "points": POINTS, "shapes": {name: {**fields, "tokens": length} for name, (fields, length) in SHAPES.items()}}, [0, 1, 2], [__file__], seconds=time.monotonic() - began)
    print(f"\nwritten to {save_results('benchmarks', 'circuit_speed', {}, {'circuit_speed': pd.DataFrame(table), 'circuit_truth': truth}, record)}")


if __name__ == "__main__": main()
