"""A ledger kept in a file: what a loop of one's own releases is on record first."""

import copy
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk

BUDGET = {"target_epsilon": 8.0, "target_delta": 1e-5}


def world(ledger: lk.Ledger, steps: int):
    torch.manual_seed(0)
    model = lk.adapt(nn.Sequential(nn.Linear(4, 3)), r=2, target_modules=["0"], verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    data = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,))), batch_size=8)
    return model, *lk.make_private(model, optimizer, data, ledger=ledger, steps=steps, **BUDGET)


def train(model, optimizer, loader, steps):
    for x, y in loader.steps(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_charge_is_in_the_file_before_the_optimizer_moves(tmp_path):
    path = tmp_path / "new" / "ledger.json"
    model, optimizer, loader = world(lk.Ledger.at(path, **BUDGET), 6)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(lk.Ledger.load(path).steps))
    train(model, optimizer, loader, 3)
    assert seen == [1, 2, 3]


def test_nothing_is_released_where_the_file_cannot_be_written(tmp_path):
    model, optimizer, loader = world(lk.Ledger.at(tmp_path / "folder" / "ledger.json", **BUDGET), 6)
    (tmp_path / "folder").rename(tmp_path / "away")
    (tmp_path / "folder").touch()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OSError):
        train(model, optimizer, loader, 1)
    assert optimizer.ledger.steps == 1  # wasted, not overspent
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_what_came_after_a_checkpoint_stays_spent(tmp_path):
    """5 steps, a checkpoint, 4 more that are lost with the process: 3 of 12 are left."""
    path = tmp_path / "ledger.json"
    model, optimizer, loader = world(lk.Ledger.at(path, **BUDGET), 12)
    train(model, optimizer, loader, 5)
    stored = optimizer.state_dict()
    train(model, optimizer, loader, 4)
    ledger = lk.Ledger.at(path, **BUDGET)
    assert ledger.steps == 9
    model, optimizer, loader = world(ledger, 12 - ledger.steps)
    optimizer.load_state_dict(stored)
    assert optimizer.ledger.steps == 9
    train(model, optimizer, loader, 3)
    assert lk.Ledger.load(path).steps == 12 and 7.9 < optimizer.get_epsilon() <= 8.0
    with pytest.raises(lk.BudgetExceeded):
        train(model, optimizer, loader, 1)


def test_another_budget_than_the_files(tmp_path):
    lk.Ledger.at(tmp_path / "ledger.json", **BUDGET)
    with pytest.raises(lk.LedgerError, match=r"has the budget \(epsilon 8, .*asked for with \(epsilon 9,"):
        lk.Ledger.at(tmp_path / "ledger.json", target_epsilon=9.0, target_delta=1e-5)
    assert lk.Ledger.at(tmp_path / "ledger.json").target_epsilon == 8.0


@pytest.mark.parametrize("left", [b"", b"{", b"\xff"])
def test_a_damaged_file_is_no_new_ledger(tmp_path, left):
    path = tmp_path / "ledger.json"
    lk.Ledger.at(path, **BUDGET).charge(1.0, 0.1)
    path.write_bytes(left)
    with pytest.raises(lk.LedgerError, match="truncated or corrupt"):
        lk.Ledger.at(path, **BUDGET)
    with pytest.raises(lk.LedgerError, match="truncated or corrupt"):
        lk.Ledger().path = path
    assert path.read_bytes() == left


class TestOneFileOfSeveralNames:
    def test_a_relative_path_stays_where_it_was_opened(self, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        opened, given = lk.Ledger.at("at.json"), lk.Ledger()
        given.path = "given.json"  # as PrivateTrainer does with its output_dir
        monkeypatch.chdir(tmp_path / "elsewhere")
        for ledger in (opened, given):
            ledger.charge(1.0, 0.1)
        assert [lk.Ledger.load(tmp_path / name).steps for name in ("at.json", "given.json")] == [1, 1]
        assert os.listdir() == []

    def test_a_link_stays_one_and_its_file_is_charged(self, tmp_path):
        real, link = tmp_path / "real.json", tmp_path / "link.json"
        lk.Ledger.at(real).charge(1.0, 0.1)
        link.symlink_to(real)
        lk.Ledger.at(link).charge(1.0, 0.1)
        assert link.is_symlink() and lk.Ledger.load(real).steps == 2

    def test_a_hard_link_is_refused(self, tmp_path):
        path = tmp_path / "ledger.json"
        lk.Ledger.at(path).charge(1.0, 0.1)
        os.link(path, tmp_path / "twin.json")
        spent = lk.Ledger.load(path)
        for refused in (lk.Ledger.at, spent.save, lambda path: setattr(lk.Ledger(), "path", path)):
            with pytest.raises(lk.LedgerError, match="another name .a hard link.*find -samefile"):
                refused(path)
        (tmp_path / "twin.json").unlink()
        assert lk.Ledger.at(path).steps == 1


class TestTwoUsers:
    """Of one file: neither may lose what the other has charged."""

    def test_another_process_is_refused_while_this_one_lives(self, tmp_path):
        path = tmp_path / "ledger.json"
        code = "import sys, lalora_kernels as lk; l = lk.Ledger.at(sys.argv[1]); print('open', flush=True); input()"
        command = [sys.executable, "-c", code, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(lk.LedgerError, match=f"in use by process {other.pid} on .*spend its budget twice"):
                lk.Ledger.at(path)
            with pytest.raises(lk.LedgerError, match="in use by process"):
                lk.Ledger().path = path
            with pytest.raises(lk.LedgerError, match="in use by process"):
                lk.Ledger().save(path)
            other.send_signal(signal.SIGKILL)
        assert lk.Ledger.at(path).steps == 0

    def test_a_second_opening_of_this_process_is_refused_when_it_charges(self, tmp_path):
        first, second = (lk.Ledger.at(tmp_path / "ledger.json", **BUDGET) for _ in range(2))
        first.charge(1.0, 0.1)
        with pytest.raises(lk.LedgerError, match="written by somebody else since.*pass that one ledger"):
            second.charge(1.0, 0.1)
        first.charge(1.0, 0.1)
        assert lk.Ledger.load(tmp_path / "ledger.json").steps == 2

    def test_a_second_opening_releases_nothing(self, tmp_path):
        path = tmp_path / "ledger.json"
        one, other = (world(lk.Ledger.at(path, **BUDGET), 6) for _ in range(2))
        train(*one, 1)
        before = [p.clone() for p in other[0].parameters()]
        with pytest.raises(lk.LedgerError, match="written by somebody else"):
            train(*other, 1)
        assert all(torch.equal(p, q) for p, q in zip(other[0].parameters(), before))

    def test_a_second_opening_does_not_save_over_the_first_ones_charges(self, tmp_path):
        first, second = (lk.Ledger.at(tmp_path / "ledger.json", **BUDGET) for _ in range(2))
        first.charge(1.0, 0.1)
        with pytest.raises(lk.LedgerError, match="written by somebody else"):
            second.save(tmp_path / "ledger.json")
        second.save(tmp_path / "copy.json")
        assert lk.Ledger.load(tmp_path / "ledger.json").steps == 1

    def test_what_is_saved_between_charges_is_ones_own(self, tmp_path):
        ledger = lk.Ledger.at(tmp_path / "ledger.json")
        ledger.refuse_epsilon("a reason")
        ledger.save(tmp_path / "ledger.json")
        ledger.charge(1.0, 0.1)
        assert lk.Ledger.load(tmp_path / "ledger.json").refusals == ("a reason",)

    def test_an_opening_that_is_over_leaves_the_file_to_the_next(self, tmp_path):
        lk.Ledger.at(tmp_path / "ledger.json").charge(1.0, 0.1)
        again = lk.Ledger.at(tmp_path / "ledger.json")
        again.charge(1.0, 0.1)
        assert again.steps == lk.Ledger.load(tmp_path / "ledger.json").steps == 2

    def test_a_deleted_file_is_written_anew_with_all_of_it(self, tmp_path):
        ledger = lk.Ledger.at(tmp_path / "ledger.json")
        ledger.charge(1.0, 0.1)
        (tmp_path / "ledger.json").unlink()
        ledger.charge(1.0, 0.1)
        assert lk.Ledger.load(tmp_path / "ledger.json").steps == 2

    def test_ctrl_c_in_the_writing_does_not_make_the_file_a_strangers(self, tmp_path, monkeypatch):
        ledger = lk.Ledger.at(tmp_path / "ledger.json")
        module = sys.modules["lalora_kernels.privacy.ledger_file"]
        write = module.write_atomic

        def interrupted(*args):
            write(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "write_atomic", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(1.0, 0.1)
        monkeypatch.undo()
        ledger.charge(1.0, 0.1)
        assert lk.Ledger.load(tmp_path / "ledger.json").steps == 2

    def test_a_forked_process_does_not_charge(self, tmp_path):
        ledger = lk.Ledger.at(tmp_path / "ledger.json")
        child = os.fork()
        if child == 0:
            try:
                ledger.charge(1.0, 0.1)
            except lk.LedgerError as error:
                os._exit(7 if "of which this is a copy" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert lk.Ledger.load(tmp_path / "ledger.json").steps == 0

    def test_copies(self, tmp_path):
        """A copy in memory is one more opening; in another process it would be one without the lock."""
        ledger = lk.Ledger.at(tmp_path / "ledger.json")
        twin = copy.deepcopy(ledger)
        ledger.charge(1.0, 0.1)
        with pytest.raises(lk.LedgerError, match="written by somebody else"):
            twin.charge(1.0, 0.1)
        with pytest.raises(TypeError, match="belongs to its process"):
            pickle.dumps(ledger)

    def test_a_ledger_that_is_given_a_file_takes_over_what_it_holds(self, tmp_path):
        lk.Ledger.at(tmp_path / "ledger.json", **BUDGET).charge(1.0, 0.1)
        ledger = lk.Ledger()
        ledger.path = tmp_path / "ledger.json"
        assert (ledger.steps, ledger.target_epsilon) == (1, 8.0)
        spent = lk.Ledger()
        spent.charge(1.0, 0.1)
        with pytest.raises(lk.LedgerError, match="cannot take over run"):
            spent.path = tmp_path / "ledger.json"
        assert spent.path is None
