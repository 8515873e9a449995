"""A population on several workers, some of which die: nothing is lost, and the numbers are those of one machine."""
import _thread, os, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mechinterp_lib import cli, report
from mechinterp_lib import executor as executors
from mechinterp_lib.core import InputError, Result, Stage, write_json
from mechinterp_lib.executor import executor, in_parallel, in_turn
from mechinterp_lib.training import Recipe, load_recipe, run_dir, steps_done

import population

ROOT, TESTS = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent
TINY = {"name": "toy", "architecture": {"class": "attention_only", "d_vocab": 65, "n_ctx": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}, "corpus": None, "n_ctx": 32,
        "steps": 60, "batch_size": 4, "eval_every": 15, "warmup_steps": 5, "max_period": 16, "snapshots": [0, 20, 60]}
COMMAND = [sys.executable, "-c", "import sys; from mechinterp_lib.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A home and a cache of their own, one thread, and modules that a worker finds."
    for name, value in {"MECHINTERP_HOME": tmp_path / "home", "MECHINTERP_CACHE": tmp_path / "cache", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("RAY_ADDRESS", "MECHINTERP_DATA"): monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster():
    "Three workers on three machines (three raylets of this one), which were there before."
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    patient = {"agent_register_timeout_ms": 300_000, "worker_register_timeout_seconds": 300, "health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": patient})
    for _ in range(2): machines.add_node(num_cpus=1)
    yield machines
    machines.shutdown()


@pytest.fixture
def recipe(place):
    "A recipe of a few seconds, as a file."
    def written(**changes): return str(write_json(place / "toy.json", TINY | changes))
    return written


def wait_for(what, seconds=400):
    "What `what()` returns as soon as it is something."
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


@contextmanager
def meanwhile(act):
    "`act` in a thread beside the block; what it raises is raised."
    raised = []
    def run():
        try: act()
        except BaseException as error:
            raised.append(error)
            _thread.interrupt_main()
    thread = threading.Thread(target=run)
    thread.start()
    try: yield
    except KeyboardInterrupt: raise raised[0] if raised else KeyboardInterrupt
    thread.join()


def model_files(out): return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "training.json"}


def left_over(mark):
    "The processes that carry a mark in their environment."
    found = []
    for process in psutil.process_iter():
        try: found += [process] if process.environ().get("POPULATION") == mark else []
        except psutil.Error: pass
    return found


def at_work(): return [one.pid for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0].startswith("ray::work")]


def test_a_killed_worker_and_a_killed_machine_lose_nothing(cluster, place):
    folder, first = place / "pids", (0, 1, 2)
    folder.mkdir()
    items = [(folder, n, first) for n in range(7)]
    def kill():
        import ray
        pids = {n: int(wait_for(lambda: list(folder.glob(f"{n}.0.pid")))[0].read_text()) for n in first}
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: (folder / "0.1.pid").exists())
        machine = next(one for one in cluster.worker_nodes if one.raylet_socket_name != ray._private.worker._global_node.raylet_socket_name)       # not the one to which this process is connected
        on_it = psutil.Process(machine.all_processes["raylet"][0].process.pid).children(recursive=True)
        cluster.remove_node(machine, allow_graceful=False)
        for pid in filter(psutil.pid_exists, [*(one.pid for one in on_it), *pids.values()]): os.kill(pid, signal.SIGKILL)
    with meanwhile(kill), executor("ray", cluster.address): found = in_parallel(population.measured, items)
    assert all((folder / f"{n}.1.pid").exists() for n in first) and not list(folder.glob(f"*.{executors.RETRIES}.pid"))
    assert found == in_parallel(population.measured, items) and [n for n, _, threads in found if threads == 1] == list(range(7))
    cluster.add_node(num_cpus=1)


def test_a_killed_training_goes_on_to_the_same_weights(cluster, place, monkeypatch):
    recipe = Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in TINY.items()})
    with executor("ray", cluster.address): went_on = list(in_turn(population.killed_training, [(recipe, seed, place / f"ray{seed}") for seed in (3, 4)]))
    assert [step for step, _ in went_on] == [20, 20] and [record["seed"] for _, record in went_on] == [3, 4]
    monkeypatch.setenv("MECHINTERP_CACHE", str(place / "other"))
    for seed in (3, 4):
        cli.trained_model((recipe, seed, place / f"here{seed}", "cpu", None))
        assert model_files(place / f"here{seed}") == model_files(place / f"ray{seed}")


def test_run_and_verify_spread_an_experiment(cluster, place, monkeypatch, capsys):
    folder = place / "pids"
    folder.mkdir()
    def make():
        found = in_parallel(population.measured, [(folder, n, ()) for n in range(4)])
        return {f"number{n}": Result(value, value, value, n=1, seeds=1, unit="", how="") for n, value, _ in found}, {}
    for module, name in ((cli, "_experiment"), (report, "experiment")): monkeypatch.setattr(module, name, lambda name: SimpleNamespace(STAGES={"stage": Stage(make, {})}))
    def said(*words):
        assert cli.main([words[0], "induction_heads", *words[1:]]) == 0
        out, err = capsys.readouterr()
        assert ("on a Ray cluster with" in err) == ("ray" in words)
        return out
    written, spread = place / "home" / "results" / "induction_heads" / "summary.json", ["--executor", "ray", "--address", cluster.address]
    said("run", *spread)
    there = written.read_bytes()
    assert "4 of 4 numbers recomputed, 0 differences" in said("verify", *spread)
    attempts = [path.read_text() for path in folder.glob("*.pid")]
    assert len(attempts) == 8 and str(os.getpid()) not in attempts
    said("run")
    assert written.read_bytes() == there


def test_an_error_is_an_answer(cluster, place):
    for bad, kind, text in ((1, InputError, "n: got 1; allowed: another"), (2, KeyError, "'two'")):
        folder = place / str(bad)
        folder.mkdir()
        with executor("ray", cluster.address), pytest.raises(kind) as raised: in_parallel(population.refusing, [(folder, 0), (folder, bad)])
        assert type(raised.value) is kind and str(raised.value) == text and not (folder / f"{bad}.1.pid").exists()


def test_a_command_tells_an_error_in_one_line(cluster, place, recipe):
    (run_dir(load_recipe(recipe()), 0) / "checkpoint.pt").parent.mkdir(parents=True, exist_ok=True)
    (run_dir(load_recipe(recipe()), 0) / "checkpoint.pt").write_text("broken")
    done = subprocess.run([*COMMAND, "train", recipe(), "--device", "cpu", "--executor", "ray", "--address", cluster.address], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    first, *said = [line for line in done.stderr.splitlines() if line.strip() and "?training/s]" not in line]          # beside the progress bar
    assert first.startswith("on a Ray cluster with ") and len(said) == 1 and said[0].startswith("mechinterp: checkpoint: ") and "delete it" in said[0], said


def test_a_worker_that_would_do_something_else_is_refused(cluster, place, monkeypatch):
    items = [(place, 5, ())]
    with executor("ray", cluster.address):
        with monkeypatch.context() as changed:
            changed.setenv("MECHINTERP_DATA", str(place / "nowhere"))
            with pytest.raises(InputError, match="lacks .*nowhere"): in_parallel(population.measured, items)
        with monkeypatch.context() as changed:
            changed.setattr(executors, "versions", lambda real=executors.versions: real() | {"core.py": "another"})
            with pytest.raises(InputError, match=r"another version of core\.py"): in_parallel(population.measured, items)
        torch.set_num_threads(64)
        with pytest.raises(InputError, match="a task needs 64"): list(in_turn(population.measured, items))
        assert not list(place.glob("*.pid"))
        assert in_parallel(population.measured, items)[0][0] == 5


@pytest.mark.parametrize("own", [True, False])
def test_interrupting_stops_the_cluster_that_was_started(own, request, place, recipe):
    if own: pytest.importorskip("ray")
    address = [] if own else ["--address", request.getfixturevalue("cluster").address]
    words = ["train", recipe(steps=100_000), "--seed", "0", "1", "--device", "cpu", "--executor", "ray", *address]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, env=os.environ | {"POPULATION": str(place)})
    try:
        wait_for(lambda: list((place / "cache").rglob("checkpoint.pt")) or process.poll() is not None)
        assert at_work()
        os.killpg(process.pid, signal.SIGINT)
        out, said = process.communicate(timeout=400)
        assert process.returncode == 130 and said.strip().splitlines()[-1] == "mechinterp: stopped" and "Traceback" not in said, said
        wait_for(lambda: not left_over(str(place)))
    finally:
        for process in left_over(str(place)): process.kill()
    if own: return
    wait_for(lambda: not at_work())                                         # no training goes on
    with executor("ray", address[1]): assert in_parallel(population.measured, [(place, 6, ())])[0][0] == 6


def test_several_seeds_on_a_cluster_of_its_own(place, recipe, monkeypatch):
    pytest.importorskip("ray")
    words, marked = ["train", recipe(), "--seed", "2", "0", "2", "--device", "cpu"], os.environ | {"POPULATION": str(place)}
    done = subprocess.run([*COMMAND, *words, "--out", place / "ray", "--executor", "ray"], capture_output=True, text=True, env=marked)
    assert done.returncode == 0 and [line.split(":")[0] for line in done.stdout.splitlines()] == [str(place / "ray" / f"seed{seed}") for seed in (2, 0)], done.stderr
    wait_for(lambda: not left_over(str(place)))
    monkeypatch.setenv("MECHINTERP_CACHE", str(place / "other"))
    assert cli.main([*words, "--out", str(place / "here")]) == 0
    for seed in (0, 2): assert model_files(place / "here" / f"seed{seed}") == model_files(place / "ray" / f"seed{seed}")


def wrong_use(capsys, *words):
    "The one line that a wrong use prints."
    assert cli.main(["train", "induction-2l", "--device", "cpu", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_what_is_not_there(capsys, monkeypatch):
    assert "only together with" in wrong_use(capsys, "--address", "127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'mechinterp-lib[ray]'" in wrong_use(capsys, "--executor", "ray")


def test_no_cluster_at_the_address(capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "127.0.0.1:1" in wrong_use(capsys, "--executor", "ray")


def test_an_executor_holds_inside_its_block():
    with pytest.raises(RuntimeError, match="inside"):
        with executor("local"): raise RuntimeError("inside")
    with pytest.raises(InputError, match="did you mean 'ray'"):
        with executor("rays"): pass
