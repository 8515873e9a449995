"""Race our training loop against transformers.Trainer: same model, data, batch, precision, optimiser and processor, in turn, in one process.

    python benchmarks/training_speed.py [--recipe shakespeare-small] [--steps 12] [--rounds 3]      written to results/benchmarks/ if the machine was quiet
    python benchmarks/training_speed.py --quick                                                     2 steps, one round; nothing is written

Trainer runs in the same precision (bfloat16 autocast where our loop does) on the same architecture, with each of transformers' attention functions that it offers for this model; what
it is slower in (attention's backward pass, dropout's random numbers) is what `mechinterp_lib.training` changes. Needs `accelerate`.
"""
import argparse, statistics, sys, tempfile, time

import pandas as pd, torch
from transformers import Trainer, TrainingArguments

from mechinterp_lib.core import provenance, save_results, seeded
from mechinterp_lib.models import new_model
from mechinterp_lib.training import (Recipe, _optimizer, learning_rate, load_recipe, mixed_precision, training_batch, training_step, use_byte_dropout,
                                     use_float32_attention)
from patching_speed import Others


class Rows(torch.utils.data.Dataset):
    "The rows of the first `steps` batches, in order, as Trainer wants them."
    def __init__(self, recipe: Recipe, tokens: torch.Tensor, steps: int):
        self.rows = torch.cat([training_batch(recipe, tokens, 0, step) for step in range(steps)])[:, :-1]
    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return {"input_ids": self.rows[i], "labels": self.rows[i]}


def ours(recipe: Recipe, tokens: torch.Tensor, steps: int) -> float:
    "Seconds a step of our loop."
    module = new_model(recipe.architecture, 0).train()
    use_byte_dropout(module)
    if mixed_precision("cpu"): use_float32_attention(module)
    optimizer = _optimizer(module, recipe)
    training_step(module, optimizer, training_batch(recipe, tokens, 0, 0), 1e-4, recipe.grad_clip, mixed_precision("cpu"))
    began = time.perf_counter()
    for step in range(steps):
        with seeded("step", 0, step):
            training_step(module, optimizer, training_batch(recipe, tokens, 0, step), learning_rate(recipe, step), recipe.grad_clip, mixed_precision("cpu"))
    return (time.perf_counter() - began) / steps


def trainer(recipe: Recipe, tokens: torch.Tensor, steps: int, attention: str) -> float:
    "Seconds a step of transformers.Trainer, its first step left out."
    module = new_model(recipe.architecture, 0)
    module.set_attn_implementation(attention)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=steps + 1, per_device_train_batch_size=recipe.batch_size, learning_rate=recipe.lr, use_cpu=True,
                                      adam_beta1=recipe.betas[0], adam_beta2=recipe.betas[1], weight_decay=recipe.weight_decay, max_grad_norm=recipe.grad_clip,
                                      lr_scheduler_type="cosine", warmup_steps=recipe.warmup_steps, bf16=mixed_precision("cpu"), optim="adamw_torch_fused",
                                      logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True)
        race = Trainer(module, arguments, train_dataset=Rows(recipe, tokens, steps + 1))
        times = []
        step = race.training_step
        def timed(*args, **kwargs): times.append(time.perf_counter()); return step(*args, **kwargs)
        race.training_step = timed
        race.train()
        return (time.perf_counter() - times[1]) / steps


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--recipe", default="shakespeare-small")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    steps, rounds = (2, 1) if args.quick else (args.steps, args.rounds)
    recipe, began = load_recipe(args.recipe), time.monotonic()
    tokens = torch.randint(65, (100_000,), generator=torch.Generator().manual_seed(0))      # speed does not depend on the text
    runs = {"ours": lambda: ours(recipe, tokens, steps), "Trainer, sdpa attention": lambda: trainer(recipe, tokens, steps, "sdpa"),
            "Trainer, eager attention": lambda: trainer(recipe, tokens, steps, "eager")}
    times = {name: [] for name in runs}
    with Others() as others:
        for _ in range(rounds):
            for name, run in runs.items(): times[name].append(run())
    rows = [{"recipe": args.recipe, "loop": name, "threads": torch.get_num_threads(), "seconds_a_step": (seconds := statistics.median(values)), "tokens_a_second": recipe.batch_size * recipe.n_ctx / seconds,
             "times_ours": statistics.median(value / own for value, own in zip(values, times["ours"])), "least": min(value / own for value, own in zip(values, times["ours"])), "rounds": rounds, "steps": steps} for name, values in times.items()]
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    print("times_ours: how many times as long as ours; least: in the round in which that was least")
    if args.quick: return
    if not others.share < 0.05: sys.exit(f"nothing was written: other processes took {others.share:.0%} of the processors meanwhile; run it on a quiet machine")
    record = provenance({"recipe": args.recipe, "steps": steps, "rounds": rounds}, [0], [__file__], seconds=time.monotonic() - began)
    print(f"\nwritten to {save_results('benchmarks', 'training_speed', {}, {'training_speed': table}, record)}")


if __name__ == "__main__": main()
