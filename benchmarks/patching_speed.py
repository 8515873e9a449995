"""Race patch scans: ours against TransformerLens's own functions and a plain loop over whole forward passes. `make bench` runs it whole.

    python benchmarks/patching_speed.py            the whole table and the curves; written to results/benchmarks/ if the machine was quiet
    python benchmarks/patching_speed.py --quick    shape A on one thread; nothing is written
    python benchmarks/patching_speed.py --only B-heads-1 curves    some pieces; nothing is written

A is a 4-layer, 4-head, 128-wide GPT-2 with 20 tokens, B GPT-2-small's shape with 16. Weights are random, one pair of prompts that differ from position 1 on, gradients are
off, one process, the contestants in turn; the smallest time of each counts. Each runs the whole job: its first runs of both prompts, the scan, the metric on the logits of
all tokens. Ours includes making the engine; that its twin equals the bridge is found out in the first scan of a model, which has a row of its own. No position is skipped but
in the rows that say so. Where a contestant ran only some cells of a scan, the time of these is scaled up to all of them, that of its clean run counted once, and the row says so.
"""
import argparse, ctypes, itertools, os, sys, time, warnings
from dataclasses import dataclass, replace

os.environ.setdefault("TQDM_DISABLE", "1")
import pandas as pd, torch, transformers

from mechinterp_lib import interventions
from mechinterp_lib.core import provenance, save_results, seeded
from mechinterp_lib.interventions import Replay, each_edit
from mechinterp_lib.models import as_bridge
from mechinterp_lib.plots import line_plot

SHAPES = {"A": (dict(n_layer=4, n_head=4, n_embd=128, n_positions=32, vocab_size=1000), 20), "B": (dict(n_layer=12, n_head=12, n_embd=768, n_positions=32, vocab_size=50257), 16)}


@dataclass(frozen=True)
class Job:
    "A scan: the component, its positions, and TransformerLens's function for it, with its setter and axes."
    title: str
    component: str
    positions: str
    function: str
    setter: str
    axes: tuple[str, ...]
    first: float = 0                                                                           # the share of the prompt that both have in common, and that ours skips



HEADS = ("z", "each", "get_act_patch_attn_head_out_by_pos", "layer_pos_head_vector_patch_setter", ("layer", "pos", "head"))
JOBS = {"heads": Job("head x position", *HEADS), "skip": Job("head x position, second half differs, first half skipped", *HEADS, first=0.5),
        "all": Job("heads, all positions", "z", "all", "get_act_patch_attn_head_out_all_pos", "layer_head_vector_patch_setter", ("layer", "head")),
        "resid": Job("resid_pre", "resid_pre", "each", "get_act_patch_resid_pre", "layer_pos_patch_setter", ("layer", "pos"))}
FLOORS = {("A", "heads", "HookedTransformer"): 20, ("A", "heads", "plain loop"): 4, ("B", "heads", "HookedTransformer"): 35, ("B", "heads", "bridge"): 20, ("B", "heads", "plain loop"): 15,
          ("A", "all", "HookedTransformer"): 6, ("B", "all", "HookedTransformer"): 12, ("A", "resid", "HookedTransformer"): 15, ("B", "resid", "HookedTransformer"): 15}
REPEATS = {("A", "heads"): 4, ("A", "skip"): 3, ("A", "all"): 25, ("A", "resid"): 8, ("B", "heads"): 2, ("B", "skip"): 1, ("B", "all"): 3, ("B", "resid"): 3}
PIECES = [f"{shape}-{job}-{threads}" for threads in (1, 2) for shape in SHAPES for job in JOBS] + ["first", "exactness", "limit", "curves"]
ANSWER, WRONG = 5, 7


def logit_diff(logits): return logits[..., -1, ANSWER] - logits[..., -1, WRONG]


def log(line): print(line, file=sys.stderr, flush=True)


def gpt2(**fields):
    "A GPT-2 with random weights, large enough that every component matters; the same ones each time."
    config = transformers.GPT2Config(**fields, bos_token_id=None, eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    with seeded("speed"): module = transformers.GPT2LMHeadModel(config).eval()
    with seeded("weights"):
        for weight in module.transformer.parameters(): weight.data += 0.02 * torch.randn_like(weight)
    module.set_attn_implementation("eager")
    return module


def prompts(vocabulary, length, common=1, pairs=1):
    "Clean and corrupted prompts that agree in the first `common` positions."
    clean, corrupted = (torch.randint(10, vocabulary, (pairs, length), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    corrupted[:, :common] = clean[:, :common]
    return clean, corrupted


def hooked(module):
    "A HookedTransformer with the module's weights as they are."
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    c = module.config
    config = HookedTransformerConfig(n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head, d_mlp=4 * c.n_embd,
                                     d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", device="cpu")
    model = HookedTransformer(config)
    model.load_and_process_state_dict(convert_gpt2_weights(module, model.cfg), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.eval()


def ours(bridge, clean, corrupted, job, vocab=None, first=0):
    "The scan from position `first` on; with `vocab`, the logits of those two tokens only."
    metric = logit_diff if vocab is None else lambda logits: logits[..., -1, 0] - logits[..., -1, 1]
    pairs = len(clean)
    both = Replay(bridge, torch.cat([corrupted, clean]), keep=[job.component])
    edits, rows, grid = each_edit(job.component, {layer: value[pairs:, first:] for layer, value in enumerate(both.kept[job.component])}, job.positions)
    if first: edits = [replace(edit, position=edit.position + first) for edit in edits]
    return both.run(edits, rows, read=-1, vocab=vocab, reduce=lambda logits, _: metric(logits)).view(grid)


def plain(module, clean, corrupted, cells):
    "One whole forward pass for each cell (layer, position, head), behind a clean run: no hooks but the one that patches."
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
    return torch.stack(scores) if scores else None


def lens(model, clean, corrupted, job, cells, whole):
    "TransformerLens's own function; on some of the cells, its own loop over an index table of those; for no cell the clean run alone."
    from transformer_lens import patching
    metric = lambda logits: logit_diff(logits)[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        if whole: return getattr(patching, job.function)(model, corrupted, cache, metric).flatten()
        if not cells: return None
        return patching.generic_activation_patch(model, corrupted, cache, metric, getattr(patching, job.setter), job.component, index_df=pd.DataFrame(cells, columns=list(job.axes)))


def race(contestants, repeats):
    "Run all in turn, `repeats` times: the smallest time and the answer of each."
    times, answers = {name: [] for name in contestants}, {}
    for _ in range(repeats):
        for name, run in contestants.items():
            began = time.perf_counter()
            answers[name] = run()
            times[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in times.items()}, answers


class Models:
    "The models of a shape, made when they are first asked for; one shape at a time, for they are large."
    def __init__(self): self.shape = None

    def of(self, shape):
        "A plain module, the bridge around another of the same weights, and a HookedTransformer."
        if shape != self.shape:
            self.shape, self.made = shape, None
            fields = SHAPES[shape][0]
            self.made = gpt2(**fields), as_bridge(gpt2(**fields)), hooked(gpt2(**fields))
        return self.made


def row(shape, job, threads, peer, ours_seconds, peer_seconds, difference, ran="all", floor=None, note=""):
    return {"shape": shape, "job": job, "threads": threads, "peer": peer, "ours_seconds": ours_seconds, "peer_seconds": peer_seconds, "ratio": peer_seconds / ours_seconds,
            "at_least": floor, "largest_difference": difference, "peer_ran": ran, "note": note}


def scan_rows(models, shape, name, threads):
    "Ours against each peer in one scan."
    torch.set_num_threads(threads)
    (module, bridge, tl), (fields, length), job = models.of(shape), SHAPES[shape], JOBS[name]
    first = int(job.first * length)
    clean, corrupted = prompts(fields["vocab_size"], length, max(1, first))
    sizes = {"layer": fields["n_layer"], "pos": length, "head": fields["n_head"]}
    cells = list(itertools.product(*(range(sizes[axis]) for axis in job.axes)))
    part = len(cells) if shape == "A" else 12
    some = list(range(len(cells) // part // 2, len(cells), -(-len(cells) // part)))
    chosen = [cells[i] for i in some]
    two = torch.tensor([ANSWER, WRONG])
    contestants = {"ours": lambda: ours(bridge, clean, corrupted, job, first=first), "plain loop": lambda: plain(module, clean, corrupted, chosen),
                   "HookedTransformer": lambda: lens(tl, clean, corrupted, job, chosen, part == len(cells)), "bridge": lambda: lens(bridge, clean, corrupted, job, chosen, part == len(cells))}
    if name == "heads": contestants["ours, two logits"] = lambda: ours(bridge, clean, corrupted, job, two)
    if job.component != "z" or job.positions == "all": del contestants["plain loop"]
    if part < len(cells):                                                                      # the clean run that goes before the cells, which is not to be counted once for each part of them
        before = {"plain loop": lambda: plain(module, clean, corrupted, []), "HookedTransformer": lambda: lens(tl, clean, corrupted, job, [], False), "bridge": lambda: lens(bridge, clean, corrupted, job, [], False)}
        contestants |= {f"{peer}, clean run": run for peer, run in before.items() if peer in contestants}
    ours(bridge, clean, corrupted, job) if shape == "A" else Replay(bridge, torch.cat([corrupted, clean]), keep=[job.component])   # the first scan of a model, which has a row of its own
    times, answers = race(contestants, REPEATS[shape, name])
    mine = answers["ours"]
    if first:                                                                                  # where the prompts agree, nothing changes
        unpatched = Replay(bridge, corrupted).logits[0, -1]
        mine = torch.cat([(unpatched[ANSWER] - unpatched[WRONG]).expand(sizes["layer"], 1, first, sizes["head"]), mine], 2)
    scale, ran = len(cells) / len(some), "all" if part == len(cells) else f"{len(some)} of {len(cells):,}"
    rows = []
    for peer in ("plain loop", "HookedTransformer", "bridge"):
        if peer not in times: continue
        once = times.get(f"{peer}, clean run", 0)
        seconds = once + (times[peer] - once) * scale
        difference = (answers[peer].flatten() - mine.flatten()[some]).abs().max().item()
        floor = FLOORS.get((shape, name, peer)) if threads == 1 else None
        rows.append(row(shape, job.title, threads, peer, times["ours"], seconds, difference, ran, floor))
        if name == "heads": rows.append(row(shape, job.title + ", ours reads two logits", threads, peer, times["ours, two logits"], seconds, (answers[peer].flatten() - answers["ours, two logits"].flatten()[some]).abs().max().item(), ran))
    return rows


def first_rows(models):
    "The first scan of a model, the twin's making and its comparison with the bridge included."
    torch.set_num_threads(1)
    (module, bridge, tl), (fields, length), rows = models.of("A"), SHAPES["A"], []
    clean, corrupted = prompts(fields["vocab_size"], length)
    def fresh(job):
        interventions._TWINS.pop(bridge, None)
        return ours(bridge, clean, corrupted, job)
    for job in (JOBS["heads"], JOBS["all"]):
        times, answers = race({"ours": lambda: fresh(job), "peer": lambda: lens(tl, clean, corrupted, job, None, True)}, 5)
        rows.append(row("A", job.title + ", first scan of a model", 1, "HookedTransformer", times["ours"], times["peer"], (answers["ours"].flatten() - answers["peer"].flatten()).abs().max().item()))
    return rows


def exactness_rows(models):
    "The largest error against double precision, ours and the plain loop's, over the largest effect."
    torch.set_num_threads(1)
    (module, bridge, _), (fields, length) = models.of("A"), SHAPES["A"]
    clean, corrupted = prompts(fields["vocab_size"], length)
    cells = list(itertools.product(range(fields["n_layer"]), range(length), range(fields["n_head"])))
    double = gpt2(**fields).double()
    truth = plain(double, clean, corrupted, cells)
    ours(bridge, clean, corrupted, JOBS["heads"])
    began = time.perf_counter()
    mine = ours(bridge, clean, corrupted, JOBS["heads"]).flatten()
    middle = time.perf_counter()
    single = plain(module, clean, corrupted, cells)
    after, effect = time.perf_counter(), (truth - truth.median()).abs().max()
    errors = [((answer - truth).abs().max() / effect).item() for answer in (mine, single)]
    note = f"error against float64, of the largest effect: ours {errors[0]:.1e}, plain loop {errors[1]:.1e}, ours / plain loop {errors[0] / errors[1]:.2f} (at most 2)"
    return [row("A", "head x position, exactness", 1, "plain loop", middle - began, after - middle, (mine - single).abs().max().item(), note=note)]


def least_operations(fields, length):
    """Floating-point operations that a head x position scan needs: in the patched layer one head's output and the MLP of one token; above it every position from the patched one on; in
    the last layer keys and values there, and the rest where the logits are read; the unembedding of that one position."""
    L, H, d, V = fields["n_layer"], fields["n_head"], fields["n_embd"], fields["vocab_size"]
    suffix = sum(range(1, length + 1))
    origin = L * H * length * (2 * d * d // H + 16 * d * d) - H * (length - 1) * (2 * d * d // H + 16 * d * d)      # of the last layer's, only the read position matters
    attention = 4 * d * sum((length - p) * (length + p + 1) // 2 for p in range(length))
    full = H * (L - 2) * (L - 1) // 2 * (24 * d * d * suffix + attention)
    last = H * (L - 1) * (4 * d * d * suffix + length * (20 * d * d + 4 * d * length))
    return origin + full + last + (H * (L - 1) * length + H) * 2 * d * V


def matmul_rate(threads):
    "The most floating-point operations a second that a large matrix product reaches here."
    torch.set_num_threads(threads)
    a, w, b = torch.randn(2048, 768), torch.randn(768, 3072), torch.randn(3072)
    best = min(race({"product": lambda: torch.addmm(b, a, w) is None}, 8)[0].values())
    return 2 * 2048 * 768 * 3072 / best


def limit_rows(table):
    "How near ours on B comes to the least operations at the measured rate of matrix products."
    rows = []
    for found in [r for r in table if r["shape"] == "B" and r["job"] == JOBS["heads"].title and r["peer"] == "plain loop"]:
        operations, rate = least_operations(*SHAPES["B"]), matmul_rate(found["threads"])
        share = operations / rate / found["ours_seconds"]
        rows.append(row("B", "head x position, share of the limit", found["threads"], "matrix products", found["ours_seconds"], operations / rate, None, floor=0.55 if found["threads"] == 1 else None,
                        note=f"{operations / 1e12:.2f} Tflop at {rate / 1e9:.0f} Gflop/s, {share:.0%} of the limit"))
    return rows


def memory(field):
    "A line of /proc/self/status in MB, or NaN where there is none."
    try: return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
    except (OSError, StopIteration): return float("nan")


def peak(run):
    "Seconds, and by how much the process grows in a run at most, in MB (Linux: its high-water mark, set back first, freed memory handed back)."
    seconds = race({"it": run}, 2)[0]["it"]
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file: file.write("5")
    except (OSError, AttributeError): return seconds, float("nan")
    before = memory("VmRSS")
    run()
    return seconds, memory("VmHWM") - before


BASE = {"layers": 4, "tokens": 20, "pairs": 1}
SWEEPS = {"tokens": (10, 20, 40, 80, 160), "layers": (2, 4, 8, 16), "pairs": (1, 2, 4, 8, 16)}


def curve_rows():
    "Time and memory of the head x position scan while one size grows, the others as in A."
    torch.set_num_threads(1)
    rows, ran = [], 24
    for axis, values in SWEEPS.items():
        for value in values:
            sizes = {**BASE, axis: value}
            fields = dict(n_layer=sizes["layers"], n_head=4, n_embd=128, n_positions=256, vocab_size=1000)
            module, bridge = gpt2(**fields), as_bridge(gpt2(**fields))
            clean, corrupted = prompts(1000, sizes["tokens"], pairs=sizes["pairs"])
            cells = list(itertools.product(range(sizes["layers"]), range(sizes["tokens"]), range(4)))
            some = cells[::-(-len(cells) // ran)]
            ours(bridge, clean[:, :2], corrupted[:, :2], JOBS["heads"])
            seconds, grown = peak(lambda: ours(bridge, clean, corrupted, JOBS["heads"]))
            rows.append({"axis": axis, "size": value, "who": "ours", "seconds": seconds, "peak_mb": grown})
            seconds, grown = peak(lambda: plain(module, clean[:1], corrupted[:1], some))
            once = race({"clean run": lambda: plain(module, clean[:1], corrupted[:1], [])}, 2)[0]["clean run"]
            rows.append({"axis": axis, "size": value, "who": "plain loop", "seconds": sizes["pairs"] * (once + (seconds - once) * len(cells) / len(some)), "peak_mb": grown})
    return rows


def curves(rows):
    "The figures: time and memory against each size."
    table, figures = pd.DataFrame(rows), {}
    for axis, part in table.groupby("axis", sort=False):
        for column, label in (("seconds", "seconds a scan"), ("peak_mb", "growth of the process at most (MB)")):
            if not part[column].isna().any():
                figures[f"patching_{'time' if column == 'seconds' else 'memory'}_{axis}"] = line_plot(part, "size", column, x_label=axis, y_label=label, colour="who", markers=True, log_x=True, log_y=column == "seconds",
                    title=f"Head x position scan; otherwise {', '.join(f'{v} {k}' for k, v in BASE.items() if k != axis)}")
    return table, figures


class Others:
    "The share of the processors that other processes took (Linux; NaN elsewhere)."
    def _read(self):
        try: ticks = [int(n) for n in open("/proc/stat").readline().split()[1:9]]
        except OSError: return float("nan"), float("nan")
        own, idle = os.times(), ticks[3] + ticks[4]
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - own.user - own.system, time.monotonic()

    def __enter__(self): self.before = self._read(); return self
    def __exit__(self, *_):
        busy, now = self._read()
        self.share = (busy - self.before[0]) / (now - self.before[1]) / (os.cpu_count() or 1)


def markdown(table):
    "The table as Markdown."
    lines = ["| shape | job | threads | peer | ours (s) | peer (s) | ratio | at least | largest difference | peer ran |", "|---|---|---|---|---|---|---|---|---|---|"]
    for r in table:
        floor, difference = "" if r["at_least"] is None else f"{r['at_least']:g}", "" if r["largest_difference"] is None else f"{r['largest_difference']:.1e}"
        lines.append(f"| {r['shape']} | {r['job']} | {r['threads']} | {r['peer']} | {r['ours_seconds']:.4g} | {r['peer_seconds']:.4g} | {r['ratio']:.3g} | {floor} | {difference} | {r['peer_ran']} |")
    notes = [f"- {r['shape']}, {r['job']}, {r['threads']} thread{'s' * (r['threads'] > 1)}: {r['note']}" for r in table if r["note"]]
    return "\n".join([*lines, "", "Ratio: how many times as long the peer takes; at least: the ratio that is asked for, on one thread. Times of peers that ran some of the cells are scaled up to all, their clean run counted once.", *notes])


def run(pieces):
    "The rows of the pieces, and those of the curves."
    table, curve, models = [], [], Models()
    for piece in pieces:
        began = time.monotonic()
        if piece == "first": table += first_rows(models)
        elif piece == "exactness": table += exactness_rows(models)
        elif piece == "limit": table += limit_rows(table)
        elif piece == "curves": curve = curve_rows()
        else: table += scan_rows(models, *piece.split("-")[:2], int(piece.split("-")[2]))
        log(f"{piece}: {time.monotonic() - began:.0f} s")
    return table, curve


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shape A on one thread; nothing is written")
    parser.add_argument("--only", nargs="+", choices=PIECES, metavar="PIECE", help=f"some of: {' '.join(PIECES)}; nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quick = [piece for piece in PIECES if piece.startswith("A-") and piece.endswith("-1")] + ["first", "exactness"]
    order = sorted(PIECES, key=lambda piece: (piece == "curves", piece == "limit", piece.startswith("B")))            # one shape after the other
    began = time.monotonic()
    with Others() as others: table, curve = run(options.only or (quick if options.quick else order))
    if table: print(markdown(table))
    if curve: print("\n" + pd.DataFrame(curve).to_string(index=False))
    if options.quick or options.only: return
    if not others.share < 0.05: sys.exit(f"nothing was written: other processes took {others.share:.0%} of the processors meanwhile; run it on a quiet machine")
    frame, figures = curves(curve)
    record = provenance({"pieces": order, "shapes": {name: {**fields, "tokens": length} for name, (fields, length) in SHAPES.items()}}, [0], [__file__], seconds=time.monotonic() - began)
    print(f"\nwritten to {save_results('benchmarks', 'patching_speed', {}, {'patching_speed': pd.DataFrame(table), 'patching_curves': frame, **figures}, record)}")


if __name__ == "__main__": main()
