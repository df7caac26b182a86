"""Saving a ledger loses no account: not another run's, not another branch's, not one that somebody has open."""

import copy
import os

import pytest
from test_ledger import charged

from lalora_kernels.privacy.ledger import Ledger, LedgerError


def test_a_folder_is_no_ledger(tmp_path):
    for refused in (Ledger.load, Ledger.at, Ledger().save):
        with pytest.raises(LedgerError, match="is a folder; give the ledger's file"):
            refused(tmp_path)
    assert not os.path.exists(f"{tmp_path}.lock")


class TestSavingOver:
    """Another run's account is not replaced."""

    def refused(self, ledger: Ledger, path, match: str):
        before = path.read_bytes()
        with pytest.raises(LedgerError, match=match):
            ledger.save(path)
        assert path.read_bytes() == before

    def test_another_run_is_named(self, tmp_path):
        one, other, path = charged(), Ledger(), tmp_path / "ledger.json"
        one.save(path)
        self.refused(other, path, f"account of run {one.id}, 6 releases.*of run {other.id} with 0.*another path")

    def test_an_earlier_state_and_another_branch(self, tmp_path):
        ledger, path = charged(), tmp_path / "ledger.json"
        early, branch = copy.deepcopy(ledger), copy.deepcopy(ledger)
        ledger.charge(5.0, 0.1)
        branch.charge(6.0, 0.1)
        ledger.save(path)
        for one in (early, branch):
            self.refused(one, path, "does not continue it")
        ledger.charge(5.0, 0.1)
        ledger.save(path)
        assert Ledger.load(path).steps == 8

    def test_a_refusal_is_not_forgotten(self, tmp_path):
        ledger, path = charged(), tmp_path / "ledger.json"
        free = copy.deepcopy(ledger)
        ledger.refuse_epsilon("the noise key is fixed")
        ledger.save(path)
        self.refused(free, path, "does not continue it")

    def test_what_cannot_be_read(self, tmp_path):
        path = tmp_path / "ledger.json"
        path.write_bytes(b"{")
        self.refused(charged(), path, "truncated or corrupt")

    def test_a_file_that_another_ledger_has_open(self, tmp_path):
        path = tmp_path / "ledger.json"
        holder = Ledger.at(path)
        loaded = Ledger.load(path)
        self.refused(loaded, path, "the file of another ledger in this process")
        del holder
        loaded.save(path)

    def test_a_link_stays_one(self, tmp_path):
        ledger, path, link = charged(), tmp_path / "ledger.json", tmp_path / "link.json"
        ledger.save(path)
        link.symlink_to(path)
        ledger.charge(5.0, 0.1)
        ledger.save(link)
        assert link.is_symlink() and Ledger.load(path).steps == 7
