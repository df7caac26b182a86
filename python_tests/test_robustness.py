"""Killed, out of disk, read-only, used twice: a run folder is whole, or it is refused; and the ledger is never behind
the weights. Edited: test_tampered.py, test_edited.py."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from small import digits_npz, vit_folder

from lalora_kernels import cli
from lalora_kernels.data import BadInput
from lalora_kernels.federated.checkpoint import load_checkpoint
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, Watch, prepare
from lalora_kernels.files import uninterrupted, write_atomic
from lalora_kernels.privacy.accountant import show_bound
from lalora_kernels.privacy.ledger import BudgetExceeded, Ledger, LedgerError

K, EPSILON, DELTA = 2, 8.0, 1e-4
KILLS = int(os.environ.get("KILLS", 0))  # make kill-test


@pytest.fixture(scope="module", name="config")
def small_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    config = {
        "model": vit_folder(folder / "vit"), "dataset": digits_npz(folder / "d.npz", 120, 30), "clients": 4,
        "fraction": 0.5, "rounds": 3, "local_steps": K, "rank": 2, "batch_size": 8, "partition": "iid",
        "epsilon": EPSILON, "delta": DELTA, "lr": 1.0, "device": "cpu",
    }  # fmt: skip
    return make_config(config)


@pytest.fixture(name="task")
def fresh_task(config):
    return prepare(config)


class Stop(KeyboardInterrupt):
    pass


def stop_at(step: int) -> Watch:
    count = [0]

    def on_step():
        count[0] += 1
        if count[0] == step:
            raise Stop

    return Watch(on_step=on_step)


@pytest.fixture(scope="module", name="stopped")
def stopped_folder(config, tmp_path_factory):
    """A folder that was interrupted in its second round, one client's update being stored already."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run = Run.start(prepare(config), folder)
    with pytest.raises(Stop):
        run.train(stop_at(3 * K + 1))
    return folder


@pytest.fixture(name="run_folder")
def copy_of_it(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def in_child(function) -> int:
    """Run it in a fork of this process; the child's exit code (0: returned), negative: the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            function()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def books(folder: Path) -> dict:
    return json.loads((folder / "ledger.json").read_text())


def whole(folder: Path) -> None:
    """What is on disk is consistent: no half-written file, and all that the stored weights cost is on the ledger."""
    at, plan = load_checkpoint(folder), json.loads((folder / "config.json").read_text())["plan"]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    for name, book in books(folder)["clients"].items():
        ledger = Ledger()
        ledger.load_state_dict(book["ledger"])
        rounds = sum(int(name) in chosen for chosen in plan["participation"][: at.round]) + (int(name) in at.updates)
        assert ledger.steps >= K * rounds
        assert book["noise"]["next_release"] >= ledger.steps


def finishes(folder: Path, task) -> None:
    """It goes on to its end within the budget, whatever happened before."""
    if not (folder / "config.json").exists():  # the run had not begun
        run = Run.start(task, folder)
    else:
        whole(folder)
        run = Run.resume(folder)
        assert not list(folder.glob(".*"))
    run.train()
    assert run.at.round == 3 and (folder / "adapter/adapter_model.safetensors").exists()
    for client, plan in zip(run.clients, run.plan.clients):
        assert client.ledger.steps <= plan.steps and client.ledger.epsilon(DELTA) <= EPSILON
    whole(folder)


# ---------------------------------------------------------------- killed


def start_and_die(task, folder: Path, moment: int) -> None:
    """Train in this process, which kills itself at its ``moment``-th event: before a private step, a file's making, its
    flush to disk, its renaming."""
    events = [0]

    def tick():
        events[0] += 1
        if events[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*args, **kwargs):
            tick()
            return function(*args, **kwargs)

        return call

    for module, name in ((tempfile, "mkstemp"), (os, "fsync"), (os, "replace"), (os, "chmod")):
        setattr(module, name, counted(getattr(module, name)))
    Run.start(task, folder).train(Watch(on_step=tick))
    assert events[0] < moment


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_moment_it_resumes(task, tmp_path, seed):
    moment = random.Random(seed).randrange(1, 110)  # a run has a few more events than that
    assert in_child(lambda: start_and_die(task, tmp_path / "run", moment)) == -signal.SIGKILL
    finishes(tmp_path / "run", task)


if KILLS:

    @pytest.mark.parametrize("seed", range(KILLS))
    def test_killed_at_a_random_time_it_resumes(task, tmp_path, seed):
        folder = tmp_path / "run"
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            Run.start(task, folder).train()
            os._exit(0)
        time.sleep(random.Random(seed).uniform(0.0, 2.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        finishes(folder, task)


def test_ctrl_c_right_after_a_renaming_is_a_ctrl_c(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "whole"


@pytest.fixture
def listening():
    """What a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("file", ["ledger.json", "checkpoint.safetensors"])
def test_ctrl_c_between_what_an_update_cost_and_the_update_waits(task, run_folder, monkeypatch, listening, file):
    """Else it would be paid for and lost; the second client of the second round is under way."""
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        if Path(target).name == file:
            os.kill(os.getpid(), signal.SIGINT)

    run = Run.resume(run_folder)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert len(load_checkpoint(run_folder).updates) == 2 and signal.getsignal(signal.SIGINT) is listening
    monkeypatch.undo()
    finishes(run_folder, task)
    rounds = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["clients"]) for record in rounds] == [0, 2, 2, 2]


def test_a_second_ctrl_c_does_not_wait(tmp_path, listening):
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        write_atomic(tmp_path / "first", "whole")
        os.kill(os.getpid(), signal.SIGINT)
        write_atomic(tmp_path / "second", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


# ---------------------------------------------------------------- no room, no right to write


@pytest.mark.parametrize("room", ["for nothing", "for the ledger"])
def test_a_full_disk_stops_the_run_and_loses_nothing_that_was_saved(task, run_folder, room):
    """The operating system refuses files above a size, in the middle of the write."""
    size = 100 if room == "for nothing" else (run_folder / "ledger.json").stat().st_size + 2000
    assert size < (run_folder / "checkpoint.safetensors").stat().st_size
    before = {name: (run_folder / name).read_bytes() for name in ("ledger.json", "checkpoint.safetensors")}

    def full():
        run = Run.resume(run_folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(OSError, match="File too large"):
            run.train()

    assert in_child(full) == 0
    assert (run_folder / "checkpoint.safetensors").read_bytes() == before["checkpoint.safetensors"]
    assert ((run_folder / "ledger.json").read_bytes() == before["ledger.json"]) == (room == "for nothing")
    finishes(run_folder, task)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(task, stopped):
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders admit their owner only
        folder = Path(shutil.copytree(stopped, Path(outside) / "run"))
        for path in (Path(outside), folder):
            path.chmod(0o555)
        for path in folder.iterdir():
            path.chmod(0o444)

        def refused():
            if os.geteuid() == 0:  # to whom every folder is writable
                os.seteuid(65534)
            for act in (lambda: Run.resume(folder), lambda: Run.start(task, Path(outside) / "new")):
                with pytest.raises(BadInput, match="cannot be written"):
                    act()

        assert in_child(refused) == 0
        for path in (Path(outside), folder):
            path.chmod(0o755)


# ---------------------------------------------------------------- two at once


def test_two_processes_on_one_folder_are_refused_by_name(task, run_folder, capsys):
    run = Run.resume(run_folder)

    def second():
        with pytest.raises(BadInput, match=rf"in use by process {os.getppid()} on \S+; two processes"):
            Run.resume(run_folder)

    assert in_child(second) == 0
    assert cli.main(["train", "--resume", str(run_folder), "--quiet"]) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    run.train()
    with pytest.raises(RuntimeError, match="has ended"):
        run.train()
    Run.resume(run_folder)  # the lock is free again, as it is after a kill


def test_halting_before_the_budget_is_exceeded_survives_resume(task, run_folder):
    run = Run.resume(run_folder)
    run.train()
    resumed = Run.resume(run_folder)
    for client, plan in zip(resumed.clients, resumed.plan.clients):
        if plan.steps:
            with pytest.raises(BudgetExceeded):
                for _ in range(plan.steps):
                    client.ledger.charge(plan.noise_multiplier, plan.sample_rate)
            assert client.ledger.epsilon(DELTA) <= EPSILON


def test_the_count_of_records_that_were_left_out_goes_on(run_folder):
    state = books(run_folder)
    state["clients"]["2"]["nonfinite_samples"] = 7
    (run_folder / "ledger.json").write_text(json.dumps(state))
    run = Run.resume(run_folder)
    assert [client.nonfinite_samples for client in run.clients] == [0, 0, 7, 0]
    run.train()
    assert books(run_folder)["clients"]["2"]["nonfinite_samples"] == 7


# ---------------------------------------------------------------- lalora ledger


def test_the_ledger_command_prints_entries_and_recomputes_epsilon(run_folder, capsys):
    assert cli.main(["ledger", str(run_folder)]) == 0
    pld = capsys.readouterr().out
    assert cli.main(["ledger", str(run_folder), "--accountant", "rdp"]) == 0
    rdp = capsys.readouterr().out
    assert "4 ledgers" in pld and "every hash chain holds" in pld and "by PLD\n" in pld
    assert "by RDP, a looser bound than PLD's, which keeps the budget; it may lie above\n" in rdp
    for text, accountant in ((pld, "pld"), (rdp, "rdp")):
        blocks = text.split("\nclient ")[1:]
        assert len(blocks) == 4
        for name, block in zip(books(run_folder)["clients"], blocks):
            ledger = Ledger()
            ledger.load_state_dict(books(run_folder)["clients"][name]["ledger"])
            assert block.startswith(f"{name}, run {ledger.id}, {ledger.steps} releases")
            for entry in ledger.entries:
                assert f"{entry.count} x sigma {entry.noise_multiplier:.6g}, q {entry.sample_rate:.6g}, flat" in block
            spent = ledger.epsilon(DELTA, accountant=accountant)
            assert f"epsilon {show_bound(spent)} of 8 at delta 0.0001, add or remove one record" in block
            if accountant == "pld":
                replaced = ledger.epsilon(DELTA, neighboring_relation="replace_one")
                assert f"epsilon {show_bound(replaced)} at delta 0.0001, replace one record" in block
                assert replaced > spent or not ledger.steps


def test_the_ledger_command_reads_a_single_ledger_and_says_why_there_is_no_epsilon(tmp_path, capsys):
    ledger = Ledger(target_delta=1e-6)
    ledger.charge(2.0, 0.1, max_grad_norm=0.5, expected_batch_size=16)
    ledger.save(tmp_path / "one.json")
    assert cli.main(["ledger", str(tmp_path / "one.json"), "--delta", "1e-5"]) == 0
    text = capsys.readouterr().out
    assert "1 ledger, 1 releases" in text and "C 0.5, b 16, poisson" in text
    assert f"epsilon {show_bound(ledger.epsilon(1e-5))} at delta 1e-05" in text
    ledger.refuse_epsilon("the noise key is fixed")
    ledger.save(tmp_path / "one.json")
    assert cli.main(["ledger", str(tmp_path / "one.json")]) == 0
    assert "no epsilon can be reported: the noise key is fixed" in capsys.readouterr().out
    (tmp_path / "one.json").write_text("{}")
    assert cli.main(["ledger", str(tmp_path / "one.json")]) == 2
    with pytest.raises(LedgerError):
        Ledger.load(tmp_path / "one.json")
    assert cli.main(["ledger", str(tmp_path / "none.json")]) == 2
