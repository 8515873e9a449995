"""What the workers of `test_executor` do: they import it by name, so it is a module of its own."""
import os, signal, time
from pathlib import Path

from mechinterp_lib.core import InputError, generator
from mechinterp_lib.training import steps_done, train


def attempt(folder: Path, n: int) -> int:
    "Leave this process's id; how many attempts at item `n` there were before."
    before = len(list(folder.glob(f"{n}.*.pid")))
    (folder / f".{n}").write_text(str(os.getpid()))
    (folder / f".{n}").rename(folder / f"{n}.{before}.pid")
    return before


def measured(item: tuple[Path, int, tuple[int, ...]]) -> tuple[int, float, int]:
    "A number that depends on `n` alone, and how many threads computed it; the first attempt at one of `waiting` stops in the middle and does not go on."
    import torch
    folder, n, waiting = item
    x = torch.randn(200, 200, generator=generator("population", n))
    if attempt(folder, n) == 0 and n in waiting: time.sleep(600)
    return n, float((x @ x @ x).sum()), torch.get_num_threads()


def refusing(item: tuple[Path, int]) -> None:
    "An item with which something is wrong."
    folder, n = item
    attempt(folder, n)
    if n == 1: raise InputError("n", n, "allowed: another")
    if n == 2: raise KeyError("two")


def killed_training(item: tuple) -> tuple[int, dict]:
    "A training that kills itself at step 20, and goes on in another process; where that one began, and what it says."
    recipe, seed, out = item
    if steps_done(recipe, seed) == 0:
        train(recipe, seed, out, until=20, checkpoint_every=20, progress=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return steps_done(recipe, seed), train(recipe, seed, out, progress=False)
