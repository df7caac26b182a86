"""``pytest bench``: options, the ``race`` fixture, and the results' files."""

import datetime
import json
import re
from pathlib import Path

import pytest
import report
from harness import Race, cpu_name, machine

ENOUGH = 15  # rounds below which nothing is kept
_records: list[dict] = []


def pytest_addoption(parser) -> None:
    group = parser.getgroup("lalora benchmarks")
    group.addoption("--rounds", type=int, default=ENOUGH, help="rounds a case (fewer than 15: nothing is written)")
    group.addoption(
        "--results", type=Path, default=None, help="folder for the JSON and Markdown (default: bench/results)"
    )
    group.addoption("--light", action="store_true", help="the smallest shape of every benchmark, for a smoke test")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--light"):
        return
    seen, kept = set(), []
    for item in items:
        if item.originalname not in seen:
            kept.append(item)
        seen.add(item.originalname)
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = kept


@pytest.fixture
def race(request, benchmark) -> Race:
    """This case's Race; its record is kept whether it passes or fails."""
    group = request.path.stem.removeprefix("bench_")
    name = request.node.name.removeprefix("bench_")
    case = Race(benchmark, request.config.getoption("--rounds"), name, group)
    _records.append(case.record)
    return case


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    case = getattr(item, "funcargs", {}).get("race")
    if call.when == "call" and call.excinfo is not None and isinstance(case, Race):
        case.record["failed"] = case.record["failed"] or f"{call.excinfo.typename}: {str(call.excinfo.value)[:300]}"
        case.record["seconds"] = {}
    return outcome


def pytest_benchmark_group_stats() -> list:
    """pytest-benchmark's own table is left out: it knows of one contender a case."""
    return []


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not _records:
        return
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "machine": machine(), "cases": _records}
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(report.markdown(result))
    folder = config.getoption("--results")
    if folder is None:
        if config.getoption("--rounds") < ENOUGH or config.getoption("--light"):
            return
        folder = Path(__file__).parent / "results"
    _write(folder, now, result)


def _write(folder: Path, now: datetime.datetime, result: dict) -> None:
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().split(" (family")[0].lower()).strip("-")
    path = folder / f"{now:%Y-%m-%d}-{cpu}.json"
    if path.exists():
        # groups may be run one after the other; what was measured at another commit is not mixed in
        before = json.loads(path.read_text())
        if before["machine"]["commit"] == result["machine"]["commit"]:
            new = {(c["group"], c["name"]) for c in _records}
            old = [c for c in before["cases"] if (c["group"], c["name"]) not in new]
            result["cases"] = sorted(old + _records, key=lambda c: report.GROUPS.index(c["group"]))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(result))
    path.with_name(f"{path.stem}-summary.md").write_text(report.summary(result))
