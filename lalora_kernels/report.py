"""One HTML file, no network, that says what runs reached, what they cost, and what that guarantees."""

import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalora_kernels.files import write_atomic

NOT_PRIVATE = "not_private"  # metrics.jsonl's name for what is computed on private data
PRIVATE_TEST = "test_is_private"  # there where test records were set aside from private ones

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --ground: #fff; --line: #8885; --soft: #8881; --warn: #9a3412;
  --c0: #1f6feb; --c1: #c2410c; --c2: #15803d; --c3: #9333ea;
  --c4: #b45309; --c5: #be185d; --c6: #0e7490; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --ground: #14171a; --warn: #fdba74;
  --c0: #6cb0ff; --c1: #ff9b6a; --c2: #6bd48c; --c3: #cfa5ff;
  --c4: #f0c050; --c5: #ff8dbb; --c6: #62d3e8; --c7: #b3bac2; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); max-width: 64rem;
  margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; padding: 0; }
.numbers div { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; }
.numbers dt { font-size: .9rem; } .numbers dd { margin: 0; font-size: 1.4rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; max-width: 30rem; } figcaption { font-weight: 600; }
figcaption small { font-weight: 400; } figure svg { width: 100%; height: auto; display: block; }
figure text { fill: var(--text); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: .7; }
.level { stroke: var(--text); stroke-width: 1.4; stroke-dasharray: 2 4; }
.line { fill: none; stroke-width: 2; } .thin { stroke: var(--c7); stroke-width: 1; opacity: .6; } .dot { stroke: none; }
.band { stroke: none; opacity: .18; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; padding: 0; margin: .3rem 0 0;
  font-size: .85rem; }
.legend svg.key { width: 24px; height: 12px; display: inline-block; margin-right: .35rem; vertical-align: middle; }
.wide { overflow-x: auto; margin: .8rem 0; } .wide:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text, th.text { text-align: left; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
.settings th, .settings td { text-align: left; } .settings td:last-child { white-space: normal; }
details { margin: .8rem 0; } summary { cursor: pointer; padding: .25rem 0; }
.private { border-left: 4px solid var(--warn); padding: .1rem 0 .1rem 1rem; margin: 1.5rem 0; }
.mark { color: var(--warn); font-weight: 600; }
article > details > summary { font-size: 1.2rem; font-weight: 600; }
""" + "".join(
    f".line.c{i} {{ stroke: var(--c{i}); stroke-dasharray: {dash}; }} .dot.c{i}, .band.c{i} {{ fill: var(--c{i}); }}\n"
    for i, dash in enumerate(("none", "7 3", "2 2", "9 3 2 3", "12 4", "4 4", "1 3", "9 2 2 2 2 2"))
)

GUARANTEE = """
Each client's records are protected at record level: ({epsilon}, {delta:g})-differential privacy, adding or removing one
record, against everyone who sees what the client sends, the server included. Every private step is a Poisson-subsampled
Gaussian release; a client's ledger composes all of its steps with privacy loss distributions. No amplification by the
choice of clients is claimed.
"""
ELSEWHERE = """
Each client's records are protected at record level, by its own budget and its own ledger, which stay with the client:
what was spent is not known here.
"""
NO_GUARANTEE = "This run added no noise (ε = ∞): it is a yardstick and guarantees nothing."
NO_EPSILON = "No ε is reported: a client's ledger says that none can be claimed (a fixed key, which is for tests)."
NOT_COVERED = """
Not covered: the sizes of the clients' data sets and who took part, which are public here; settings that were chosen by
looking at private data; other runs on the same records, which add to what is spent; and what this page marks as not
private, with the number of records left out because their gradient was not finite.
"""
AHEAD = """
The ledgers hold more steps than the rounds below show, since the run was stopped between the two. All of them count.
"""
MARK = "not private: computed on private data, without noise; do not publish"
SHORT = " (not private)"  # MARK of one row or column


@dataclass
class RunData:
    """One run folder, read."""

    name: str
    about: dict[str, Any]
    history: list[dict[str, Any]]
    books: dict[str, Any]  # each client's part of ledger.json; empty where ledgers stay with the clients
    ledgers: dict[str, Any]  # client -> Ledger, its hash chain verified
    spent: dict[str, float | None]  # client -> ε by that ledger, None where it claims none

    @property
    def settings(self) -> dict[str, Any]:
        return self.about["settings"]

    @property
    def private(self) -> bool:
        return self.settings["epsilon"] != "inf"

    @property
    def over_flower(self) -> bool:
        """Whether this is the folder of a Flower server, which was told the clients' sizes and holds no ledger."""
        return not self.books and "sizes" in self.about

    @property
    def epsilon(self) -> float | None:
        """The most exposed client's ε, by ledgers or metrics, whichever say more; None where none can be claimed.

        A run that was stopped has paid for steps that no line of metrics.jsonl shows.
        """
        known = [*self.spent.values(), self.history[-1]["epsilon"]]
        return None if None in known else max(known)

    @property
    def ahead(self) -> bool:
        """Whether a ledger holds more steps than its client made in the rounds of metrics.jsonl."""
        rounds = self.about["plan"]["participation"][: self.history[-1]["round"]]
        owed = {c: self.settings["local_steps"] * sum(int(c) in chosen for chosen in rounds) for c in self.ledgers}
        return any(ledger.steps > owed[client] for client, ledger in self.ledgers.items())

    @property
    def own_models(self) -> bool:
        """Whether every client ends with a model of its own, so that accuracy and loss are means over these."""
        from lalora_kernels.federated.methods import FURTHER

        return self.settings["method"] in FURTHER and bool(FURTHER[self.settings["method"]].keeps)

    @property
    def accuracy(self) -> str:
        """What metrics.jsonl's accuracy is, in words."""
        what = "mean test accuracy of the clients' models" if self.own_models else "test accuracy"
        return f"{what}, of private records set aside" if self.private_test else what

    @property
    def private_test(self) -> bool:
        """Whether accuracy and loss are of records that were set aside from the private ones."""
        return any(PRIVATE_TEST in record for record in self.history)

    @property
    def budget(self) -> float | None:
        return float(self.settings["epsilon"]) if self.private else None


def read_run(folder: str | Path) -> RunData:
    """Read and verify a run folder. Raises FileNotFoundError for a file that is missing, BadInput for one that is not a
    run's, LedgerError where a ledger's hash chain does not hold."""
    from lalora_kernels.data import BadInput
    from lalora_kernels.federated.run import read_ledgers
    from lalora_kernels.privacy.ledger import LedgerError

    folder = Path(folder)
    try:
        about, history, books = _parsed(folder / "config.json"), _rounds(folder / "metrics.jsonl"), {}
        if (folder / "ledger.json").exists() or "plan" in about:
            books = _parsed(folder / "ledger.json")
        ledgers = read_ledgers(folder, books) if books else {}
        run = RunData(folder.resolve().name, about, history, books.get("clients", {}), ledgers, {})
        if not run.settings or not history:
            raise ValueError("it holds no settings or no round")
        for client, ledger in ledgers.items():
            claims = run.private and not ledger.refusals
            run.spent[client] = ledger.epsilon(run.settings["delta"]) if claims else None
        if run.over_flower and [type(n) is int and n > 0 for n in about["sizes"]] != [True] * run.settings["clients"]:
            raise ValueError("its sizes are not whole numbers, one a client")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, (BadInput, LedgerError)):
            raise
        raise BadInput(f"{folder} is not a complete run: {error}") from error
    return run


def _parsed(path: Path) -> Any:
    """A JSON file of a run. Raises BadInput, which names it, where it is none."""
    from lalora_kernels.data import BadInput

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is corrupt or truncated ({error}); restore it from a copy") from error


def _rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises BadInput, which names the line, where one is no round."""
    from lalora_kernels.data import BadInput

    rounds = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rounds.append(json.loads(line))
            if not isinstance(rounds[-1], dict):
                raise ValueError(f"a {type(rounds[-1]).__name__}, not the object of a round")
        except (ValueError, RecursionError) as error:
            raise BadInput(
                f"{path.parent} is not a complete run: {path}, line {number} is corrupt or truncated ({error}); "
                f"lalora train --resume writes metrics.jsonl anew"
            ) from error
    return rounds


def _refuse_no_place(path: Path) -> None:
    """Raise BadInput where ``path`` cannot be written: it is a folder, or lies below what is none or is read-only."""
    from lalora_kernels.data import BadInput

    if path.is_dir():
        raise BadInput(f"{path} is a folder; --out names a file")
    above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written to" if above.is_dir() else "is a file, not a folder"
        raise BadInput(f"{path} cannot be made: {above} {why}; --out names a file elsewhere")


def write_report(folder: str | Path, *more: str | Path, out: str | Path | None = None, public: bool = False) -> Path:
    """Write one page on one run, or on several side by side; returns its path.

    ``out``: the file; else report.html in the only run's folder, or comparison.html here. ``public`` leaves out
    whatever was computed on private data. Raises as ``read_run``, and BadInput for files that lack something, for an
    ``out`` that is a folder or cannot be made, and for a public page on a run whose accuracy is of private records.
    """
    from lalora_kernels.data import BadInput
    from lalora_kernels.report_page import page

    path = Path(out) if out is not None else Path("comparison.html") if more else Path(folder) / "report.html"
    if out is not None or path.parent.is_dir():  # else it is the run that is none
        _refuse_no_place(path)
    runs = [read_run(one) for one in (folder, *more)]
    if public and (private := [run.name for run in runs if run.private_test]):
        raise BadInput(
            f"{private[0]}: its test records were set aside from the private ones, so its accuracy and loss are not to "
            f"be published; run it with test records of their own (--test-dataset, or x_test in the .npz)"
        )
    try:
        text = page(runs, public)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        names = " or ".join(run.name for run in runs)
        raise BadInput(
            f"{names} is not a complete run ({type(error).__name__}: {error}); lalora train --resume writes "
            f"metrics.jsonl anew, other files have to come from a copy"
        ) from error
    write_atomic(path, text)
    return path


def show_epsilon(epsilon: float | None, private: bool = True) -> str:
    """ε as a reader should see it: rounded up, so that it stays a bound; none where none can be claimed."""
    if not private or epsilon == math.inf:
        return "ε = ∞"
    if epsilon is None:
        return "no ε"
    return f"ε = {math.ceil(100 * epsilon - 1e-9) / 100:.2f}"


def table(caption: str, header: Sequence[str], rows: Iterable[Iterable[Any]], kind: str = "") -> str:
    """A table in a box that scrolls by itself, also by keyboard."""
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide" role="region" aria-label="{html.escape(caption)}" tabindex="0"><table class="{kind}">'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
