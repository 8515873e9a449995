"""Race `train_sae` against sae-lens's own runner: same model, text, hook, autoencoder, batch and schedule, in turn, in one process; and how good what comes out is.

    python benchmarks/sae_speed.py [--samples 400000] [--rounds 3]      written to results/benchmarks/ if the machine was quiet
    python benchmarks/sae_speed.py --quick                              20,000 activations, one round; nothing is written

The runner streams the same rows of text from memory through the same opened model, in single precision (its default) and with autocast for model and autoencoder. Times are of whole trainings, activations and all.
"""
import argparse, contextlib, io, statistics, sys, time, warnings

import pandas as pd, torch

from mechinterp_lib.core import provenance, save_results
from mechinterp_lib.data import load_text
from mechinterp_lib.models import load_model
from mechinterp_lib.sae import corpus_rows, evaluate_sae, train_sae
from patching_speed import Others

HOOK, D_SAE, K, BATCH = "blocks.3.hook_resid_post", 1024, 24, 4096


def ours(model, rows: torch.Tensor, samples: int):
    "What `train_sae` makes of it."
    return train_sae(model, HOOK, rows, d_sae=D_SAE, k=K, n_samples=samples, batch_size=BATCH, device="cpu", progress=False)


def runner(model, rows: torch.Tensor, samples: int, autocast: bool):
    "What sae-lens's runner makes of it, learning rate and schedule as ours."
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig
    steps = samples // BATCH
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=D_SAE, k=K, normalize_activations="expected_average_only_in"), hook_name=HOOK, is_dataset_tokenized=True, streaming=False, context_size=rows.shape[1], prepend_bos=False, sequence_separator_token=None,
        store_batch_size_prompts=16, n_batches_in_buffer=64, training_tokens=steps * BATCH, train_batch_size_tokens=BATCH, lr=2e-4 * (2**14 / D_SAE) ** 0.5, lr_warm_up_steps=min(1000, steps // 20), lr_decay_steps=steps // 5, dead_feature_window=max(10, min(1000, steps // 20)),
        n_batches_for_norm_estimate=8, autocast=autocast, autocast_lm=autocast, checkpoint_path=None, output_path=None, logger=LoggingConfig(log_to_wandb=False), verbose=False, seed=0)
    sae = LanguageModelSAETrainingRunner(config, override_dataset=Dataset.from_dict({"tokens": rows.tolist()}), override_model=model).run()
    sae.cfg.metadata.hook_name, sae.hook_z_reshaping_mode = HOOK, False
    return sae.eval()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=400_000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    samples, rounds, began = 20_000 if args.quick else args.samples, 1 if args.quick else args.rounds, time.monotonic()
    model = load_model("shakespeare-small/seed0", device="cpu")
    rows = corpus_rows(model, load_text("tinyshakespeare"))
    train, held_out = rows[:-100], rows[-100:][:20 if args.quick else 100]
    runs = {"ours": lambda: ours(model, train, samples), "sae-lens's runner": lambda: runner(model, train, samples, False), "sae-lens's runner, autocast": lambda: runner(model, train, samples, True)}
    times, quality = {name: [] for name in runs}, {}
    with Others() as others, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                with contextlib.redirect_stderr(io.StringIO()): sae = run()
                times[name].append(time.perf_counter() - start)
                if name not in quality: quality[name] = evaluate_sae(sae, model, held_out).results
    table = pd.DataFrame([{"loop": name, "threads": torch.get_num_threads(), "seconds": (seconds := statistics.median(values)), "activations_a_second": samples // BATCH * BATCH / seconds, "times_ours": statistics.median(value / own for value, own in zip(values, times["ours"])),
                           "least": min(value / own for value, own in zip(values, times["ours"])), "explained_variance": quality[name]["explained_variance"].value, "ce_recovered": quality[name]["ce_recovered_mean"].value, "dead": quality[name]["dead"].value, "samples": samples, "rounds": rounds} for name, values in times.items()])
    print(table.round(3).to_string(index=False))
    print("times_ours: how many times as long as ours; least: in the round in which that was least")
    if args.quick: return
    if not others.share < 0.05: sys.exit(f"nothing was written: other processes took {others.share:.0%} of the processors meanwhile; run it on a quiet machine")
    record = provenance({"samples": samples, "rounds": rounds, "d_sae": D_SAE, "k": K, "batch": BATCH}, [0], [__file__], seconds=time.monotonic() - began)
    print(f"\nwritten to {save_results('benchmarks', 'sae_speed', {}, {'sae_speed': table}, record)}")


if __name__ == "__main__": main()
