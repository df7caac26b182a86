"""The fuzzer itself: what lets an undocumented exception out is caught."""

import csv

import fuzzing
import pytest
import test_fuzz_files as files
import test_fuzz_operations as operations

from lalora_kernels import functional
from lalora_kernels.privacy import ledger as ledgers


@pytest.mark.parametrize("target", [files.test_ledger, files.test_tables, operations.test_operations])
def test_the_fuzzer_finds_what_is_not_documented(target, monkeypatch, tmp_path_factory):
    """A reader that lets another exception out is caught."""
    broken = {files.test_ledger: (ledgers.Ledger, "load"), files.test_tables: (csv, "reader"),
              operations.test_operations: (functional.dispatch, "get")}  # fmt: skip

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(*broken[target], fail)
    monkeypatch.setattr(fuzzing, "MINUTES", 0)
    with pytest.raises(ZeroDivisionError):
        target(tmp_path_factory)
