"""Race the logit lens over a corpus: ours against the bare forward pass that it needs, and against the same measures from TransformerLens's cache.

    python benchmarks/lens_speed.py            both shapes; written to results/benchmarks/ if the machine was quiet
    python benchmarks/lens_speed.py --quick    shape A; nothing is written

A is a 4-layer, 4-head, 128-wide GPT-2 with a vocabulary of 1,000, B GPT-2-small's shape; rows of 128 and 32 tokens. Weights are random, one thread, one process, the contestants in turn; the smallest time
of each counts. Measured are entropy, KL divergence from the end, cross-entropy and agreement of every layer at every position. A lens cannot be faster than the forward pass and its own decoding: the *bound*
is the time of the bare forward pass over the same rows plus that of decoding and measuring every layer's stream, given the streams. Memory: how far the process grows at most, for the corpus and for one four times as long.
"""
import argparse, sys, time, warnings

import pandas as pd, torch

from mechinterp_lib.core import provenance, save_results
from mechinterp_lib.interventions import capture
from mechinterp_lib.logit_lens import check_layers, lens_measures, lens_statistics, stream_decoder, stream_name
from mechinterp_lib.models import as_bridge
from patching_speed import SHAPES, Others, gpt2, hooked, markdown, peak, race, row

ROWS, LENGTHS, CHUNK = {"A": 128, "B": 32}, {"A": 128, "B": 32}, 16


def forward(model, tokens):
    "The model on every row, the logits thrown away."
    with torch.no_grad():
        for rows in tokens.split(CHUNK): model(rows)


def decoding(model, tokens):
    "A function that decodes and measures every layer of one chunk, given its streams; and how many chunks there are."
    rows, decode, layers = tokens[:CHUNK], stream_decoder(model), check_layers(model)
    logits, seen = capture(model, rows, {stream_name(model, layer) for layer in layers})
    final = logits[:, :-1].log_softmax(-1)
    def run():
        with torch.no_grad():
            end, best = final.exp(), final.argmax(-1)
            for layer in layers: lens_measures(decode(seen[stream_name(model, layer)][:, :-1], layer).log_softmax(-1), final, rows[:, 1:], end, best)
    return run, len(tokens) / len(rows)


def cached(model, tokens):
    "KL divergence from the end by layer, with the same measures beside it, from TransformerLens's cache, accumulated streams and unembedding."
    found = []
    for rows in tokens.split(CHUNK):
        with torch.no_grad():
            logits, cache = model.run_with_cache(rows, names_filter=lambda name: name.endswith(("resid_pre", "resid_post", "ln_final.hook_scale")))
            streams = [cache["resid_pre", 0]] + [cache["resid_post", layer] for layer in range(model.cfg.n_layers)]
            final = logits[:, :-1].log_softmax(-1)
            end, best = final.exp(), final.argmax(-1)
            found.append(torch.stack([lens_measures(model.unembed(model.ln_final(stream[:, :-1])).log_softmax(-1), final, rows[:, 1:], end, best)["kl"].mean(1) for stream in streams]))
    return torch.cat(found, 1)


def lens_rows(shape, rounds):
    "Ours against the bound, the bare forward pass, and TransformerLens, on one shape; and the memory of ours."
    fields, length = SHAPES[shape][0] | {"n_positions": LENGTHS[shape]}, LENGTHS[shape]
    model, other = as_bridge(gpt2(**fields)), hooked(gpt2(**fields))
    tokens = torch.randint(fields["vocab_size"], (ROWS[shape], length), generator=torch.Generator().manual_seed(0))
    decode, chunks = decoding(model, tokens)
    times, answers = race({"ours": lambda: lens_statistics(model, tokens, chunk=CHUNK)["kl"], "forward": lambda: forward(model, tokens), "decode": decode, "HookedTransformer": lambda: cached(other, tokens)}, rounds)
    bound, difference = times["forward"] + chunks * times["decode"], (torch.from_numpy(answers["ours"]) - answers["HookedTransformer"]).abs().max().item()
    small, large = (peak(lambda: lens_statistics(model, rows, chunk=CHUNK))[1] for rows in (tokens, tokens.repeat(4, 1)))
    job = f"lens over {len(tokens)} rows of {length}"
    return [row(shape, job, 1, "the bound: forward pass and decoding", times["ours"], bound, None, floor=0.8, note=f"grows by {small:.0f} MB, with four times as many rows by {large:.0f} MB"),
            row(shape, job, 1, "bare forward pass", times["ours"], times["forward"], None), row(shape, job, 1, "HookedTransformer", times["ours"], times["HookedTransformer"], difference)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shape A; nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.monotonic()
    with Others() as others: table = lens_rows("A", 4) + ([] if options.quick else lens_rows("B", 3))
    print(markdown(table))
    if options.quick: return
    if not others.share < 0.05: sys.exit(f"nothing was written: other processes took {others.share:.0%} of the processors meanwhile; run it on a quiet machine")
    record = provenance({"rows": ROWS, "lengths": LENGTHS, "chunk": CHUNK}, [0], [__file__], seconds=time.monotonic() - began)
    print(f"\nwritten to {save_results('benchmarks', 'lens_speed', {}, {'lens_speed': pd.DataFrame(table)}, record)}")


if __name__ == "__main__": main()
