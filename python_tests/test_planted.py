"""The list of planted faults fits the product. The faults themselves are planted by ``make planted``."""

from pathlib import Path

import pytest
from planted.faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_the_place_of_a_fault_is_there_exactly_once(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    changed = text.replace(fault.old, fault.new)
    assert changed != text
    if not fault.native:
        compile(changed, fault.file, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_the_tests_that_should_notice_exist(fault):
    assert fault.tests and all((ROOT / "python_tests" / name).exists() for name in fault.tests)


def test_the_faults_are_many_and_told_apart():
    assert len(FAULTS) >= 20
    assert len({f.name for f in FAULTS}) == len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)
