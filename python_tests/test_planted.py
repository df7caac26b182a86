"""The list of planted faults, and the tests that docs/privacy.md names, fit what is there. The faults themselves are
planted by ``make planted``."""

import re
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


def test_every_test_that_the_privacy_page_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs/privacy.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^\s*(def|class) {name}\b", (ROOT / "python_tests" / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert not missing
