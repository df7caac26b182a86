"""The page that ``lalora report`` writes: sections of one run, and several runs beside each other."""

import html
from collections.abc import Sequence
from typing import Any

from lalora_kernels.charts import COLORS, Line, bar_chart, line_chart
from lalora_kernels.report import (
    AHEAD,
    ELSEWHERE,
    GUARANTEE,
    MARK,
    NO_EPSILON,
    NO_GUARANTEE,
    NOT_COVERED,
    NOT_PRIVATE,
    SHORT,
    STYLE,
    RunData,
    show_epsilon,
    table,
)
from lalora_kernels.report_flower import IMPLIED, at_most, clients_table, epsilon_chart

DASH = "–"
BASE = "base model"  # of the fingerprints the only one of public things
NO_TIMES = "How long training took depends on how many records were drawn, so a public page has no times."
OWN_MODELS = (
    "There is no one model: each client ends with a factor of its own. Accuracy and loss are means over the models of "
    "all clients, each on all test records; a client that has not trained yet has the common start."
)
PARTS = (
    '<p><span class="mark">Parts of this page are not private</span> and marked so; '
    "<code>lalora report --public</code> writes it without them.</p>"
)


def page(runs: Sequence[RunData], public: bool = False) -> str:
    """The whole HTML document."""
    if len(runs) == 1:
        title = _title(runs[0])
        body = f"<h1>{html.escape(title)}</h1>" + _run(runs[0], public)
    else:
        title = f"{len(runs)} runs compared"
        body = (
            f"<h1>{title}</h1>"
            + _comparison(_named(runs), public)
            + "".join(
                f"<article><details><summary>{html.escape(run.name)}: {html.escape(_title(run))}</summary>"
                f"{_run(run, public)}</details></article>"
                for run in _named(runs)
            )
        )
    if not public:
        body = body.replace("</h1>", f"</h1>{PARTS}", 1)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _title(run: RunData) -> str:
    s = run.settings
    return f"{s['method']} on {s['dataset']}, {s['clients']} clients"


def _named(runs: Sequence[RunData]) -> Sequence[RunData]:
    """Folders of one name get a number."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return runs


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _run(run: RunData, public: bool) -> str:
    first, last, settings = run.history[0], run.history[-1], run.settings
    spent = ("most exposed client", _spent(run, run.epsilon))
    if run.budget is not None and run.over_flower:
        spent = ("each client in this run", at_most(run.budget))
    numbers = [
        (run.accuracy, _percent(last["accuracy"])),
        ("before", _percent(first["accuracy"])),
        spent,
        ("rounds", f"{last['round']} of {settings['rounds']}"),
    ]
    boxes = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in numbers)
    return "".join(
        (
            f'<dl class="numbers">{boxes}</dl>',
            f"<h2>What is guaranteed</h2>{_guarantee(run)}",
            f'<h2>Accuracy and ε over rounds</h2><div class="charts">{_accuracy(run)}{_epsilon(run)}</div>',
            _rounds(run, public),
            "<h2>Clients</h2>" + _clients(run, public),
            "" if public else _distribution(run),
            "<h2>Gradients</h2>" + _released(run) + ("" if public else _norms(run)),
            "<h2>Time, memory, traffic</h2>" + _time(run, public) + ("" if public else _client_time(run)),
            "<h2>Ledger</h2>" + _ledger(run),
            "<h2>Settings</h2>" + _settings(run, public),
        )
    )


def _spent(run: RunData, epsilon: float | None) -> str:
    return "its own ledger" if run.private and not run.books else show_epsilon(epsilon, run.private)


def _guarantee(run: RunData) -> str:
    words = [NO_GUARANTEE]
    if run.private and run.over_flower:
        words = [ELSEWHERE, IMPLIED.format(epsilon=run.budget, delta=run.settings["delta"]), NOT_COVERED]
    elif run.private and not run.books:
        words = [ELSEWHERE, NOT_COVERED]
    elif run.private and run.epsilon is None:
        words = [NO_EPSILON]
    elif run.private:
        words = [GUARANTEE.format(epsilon=show_epsilon(run.epsilon), delta=run.settings["delta"])]
        words += [AHEAD, NOT_COVERED] if run.ahead else [NOT_COVERED]
    return "".join(f"<p>{html.escape(text.strip())}</p>" for text in words)


# ---------------------------------------------------------------- over rounds


def _accuracy(run: RunData) -> str:
    points = [(r["round"], 100 * r["accuracy"]) for r in run.history]
    before = [("before", points[0][1])]
    lines = [Line("after the round", points)]
    return line_chart(run.accuracy.capitalize(), lines, x_label="round", y_label="in percent",
                      show="{:.1f} %".format, levels=before)  # fmt: skip


def _epsilon(run: RunData) -> str:
    if run.private and run.over_flower:
        return epsilon_chart(run)
    if run.budget is None or run.history[-1]["epsilon"] is None:
        return ""
    largest = Line("most exposed client", [(r["round"], r["epsilon"]) for r in run.history], "c1")
    each = [
        Line(None, [(r["round"], r["epsilons"][client]) for r in run.history], "thin")
        for client in range(len(run.history[-1]["epsilons"]))
    ]
    return line_chart("ε spent", [*each, largest], x_label="round", y_label="thin: each client",
                      show=lambda e: show_epsilon(e), levels=[("budget", run.budget)])  # fmt: skip


def _rounds(run: RunData, public: bool) -> str:
    rows = [
        [
            r["round"], f"{100 * r['accuracy']:.1f}", DASH if r["loss"] is None else f"{r['loss']:.3f}",
            _spent(run, r["epsilon"]), ", ".join(map(str, r["clients"])) or DASH,
            "; ".join(f"{client}: {why}" for client, why in r.get("dropped", {}).items()) or DASH,
            f"{r['bytes_sent']:,}", *([] if public else [f"{r['seconds']:.1f}"]),
        ]
        for r in run.history
    ]  # fmt: skip
    mean = "mean " if run.own_models else ""
    header = ["round", f"{mean}accuracy, %", f"{mean}test loss", "largest ε", "clients", "left out", "bytes sent up"]
    header += [] if public else [f"seconds{SHORT}"]
    numbers = f"<details><summary>Every round</summary>{table('Every round', header, rows)}</details>"
    return (f"<p>{OWN_MODELS}</p>" if run.own_models else "") + numbers


# ---------------------------------------------------------------- clients


def _clients(run: RunData, public: bool) -> str:
    if run.over_flower:
        return clients_table(run)
    plan = run.about.get("plan", {}).get("clients", [])
    if not plan:
        return "<p>The clients' sizes, noise and budgets stay with them.</p>"
    rows = []
    for c in plan:
        name = str(c["client"])
        row = [name, f"{c['records']:,}", f"{c['sample_rate']:.4f}", c["steps"], f"{c['noise_multiplier']:.3f}",
               show_epsilon(run.spent[name], run.private)]  # fmt: skip
        rows.append(row if public else [*row, run.books[name]["nonfinite_samples"]])
    header = ["client", "records", "sampling rate q", "private steps", "noise σ/C", "ε spent"]
    note = ""
    if not public:
        header.append("left out*")
        note = f'<p>* records whose gradient was not finite, counted once a draw; <span class="mark">{MARK}</span>.</p>'
    return table("Each client", header, rows) + note


def _distribution(run: RunData) -> str:
    labels = run.history[0].get(NOT_PRIVATE, {}).get("labels")
    if not labels:
        return ""
    counts, classes = labels["clients"], [str(c) for c in labels["classes"]]
    chart = bar_chart("Records of each class at each client", list(counts.items()), classes, "labels of the records")
    numbers = table("Records of each class at each client", ("client", *classes), [(c, *n) for c, n in counts.items()])
    return _marked("Data of each client", f'<div class="charts">{chart}</div>' + _numbers(numbers))


def _marked(title: str, body: str) -> str:
    return f'<section class="private"><h3>{html.escape(title)}</h3><p class="mark">{MARK}</p>{body}</section>'


def _numbers(text: str) -> str:
    return f"<details><summary>The numbers</summary>{text}</details>"


# ---------------------------------------------------------------- gradients


def _over_clients(run: RunData, part: str, name: str) -> list[tuple[int, str, Any]]:
    """(round, client, value) of everything that rounds noted of their clients: "diagnostics" or NOT_PRIVATE."""
    found = []
    for record in run.history:
        notes = record.get(part, {})
        notes = notes.get("clients", {}) if part == NOT_PRIVATE else notes
        found += [(record["round"], c, note[name]) for c, note in notes.items() if note.get(name) is not None]
    return found


def _quantile_chart(title: str, found: list, y_label: str, levels: list[tuple[str, float]]) -> str:
    """Each round's median over its clients of their medians, in the band of their lowest 10% and highest 90% points."""
    rounds: dict[int, list] = {}
    for number, _, value in found:
        rounds.setdefault(number, []).append(value)
    middle = [(n, sorted(v[1] for v in values)[len(values) // 2]) for n, values in rounds.items()]
    band = [(min(v[0] for v in values), max(v[2] for v in values)) for values in rounds.values()]
    lines = [Line("median, and the range from 10% to 90%", middle, "c0", band)]
    return line_chart(title, lines, x_label="round", y_label=y_label, levels=levels)


def _quantile_rows(found: list) -> list[tuple]:
    return [(n, c, *(f"{v:.3f}" for v in value)) for n, c, value in found]


def _released(run: RunData) -> str:
    found = _over_clients(run, "diagnostics", "released")
    if not found:
        return "<p>This run has not recorded its released gradients.</p>" if run.private else ""
    chart = _quantile_chart("Released gradients", found, "norm, as a multiple of the noise's alone",
                            [("noise alone", 1.0)])  # fmt: skip
    names = ("round", "client", "10%", "median", "90%")
    numbers = table("Norm of released gradients / norm of their noise alone", names, _quantile_rows(found))
    return (
        "<p>From noised gradients only, so that showing it costs no further privacy. Near 1, a step is hardly more "
        "than noise; a larger batch, more records or fewer trained parameters raise it.</p>"
        f'<div class="charts">{chart}</div>{_numbers(numbers)}'
    )


def _norms(run: RunData) -> str:
    found, clipped = _over_clients(run, NOT_PRIVATE, "norms"), _over_clients(run, NOT_PRIVATE, "clipped")
    if not found:
        return ""
    rounds: dict[int, list[float]] = {}
    for number, _, share in clipped:
        rounds.setdefault(number, []).append(100 * share)
    line = Line("mean of the clients", [(n, sum(v) / len(v)) for n, v in rounds.items()], "c2")
    charts = _quantile_chart("Norms of records' gradients", found, "as a multiple of C", [("C", 1.0)]) + line_chart(
        "Clipped records", [line], x_label="round", y_label="in percent", show="{:.1f} %".format,
        levels=[("all", 100.0)],
    )  # fmt: skip
    share = {(n, c): value for n, c, value in clipped}
    rows = [(*row, _percent(share[row[0], row[1]])) for row in _quantile_rows(found)]
    numbers = table("Norm of a record's gradient / C", ("round", "client", "10%", "median", "90%", "clipped"), rows)
    return _marked("Norms against C, and what was clipped", f'<div class="charts">{charts}</div>' + _numbers(numbers))


# ---------------------------------------------------------------- time, memory, ledger, settings


def _time(run: RunData, public: bool) -> str:
    last = run.history[-1]
    sent = sum(record["bytes_sent"] for record in run.history)
    rounds = max(last["round"], 1)
    spent = last["seconds"] - run.history[0]["seconds"]
    rows = [("bytes sent up, all rounds", f"{sent:,}")]
    if run.over_flower:
        rows.append(("bytes sent down, all rounds", f"{sum(record['bytes_down'] for record in run.history):,}"))
    if public:
        return f"<p>{NO_TIMES}</p>" + table("Traffic", ("", "value"), rows)
    rows += [(f"whole run, seconds{SHORT}", f"{last['seconds']:.1f}"),
             (f"mean of a round, seconds{SHORT}", f"{spent / rounds:.2f}")]  # fmt: skip
    return table("Time and traffic", ("", "value"), rows)


def _client_time(run: RunData) -> str:
    seconds = _over_clients(run, NOT_PRIVATE, "seconds")
    if not seconds:
        return ""
    drawn = {(n, c): value for n, c, value in _over_clients(run, NOT_PRIVATE, "drawn")}
    peak = {(n, c): value for n, c, value in _over_clients(run, NOT_PRIVATE, "peak_memory")}
    steps = run.settings["local_steps"]
    rows = [
        (n, c, f"{s:.2f}", f"{1000 * s / steps:.1f}", drawn.get((n, c), DASH), f"{peak.get((n, c), 0) / 1e6:.0f}")
        for n, c, s in seconds
    ]
    points: dict[str, list[tuple[int, float]]] = {}
    for n, c, s in seconds:
        points.setdefault(c, []).append((n, 1000 * s / steps))
    lines = [Line(f"client {c}", p, f"c{i % COLORS}") for i, (c, p) in enumerate(sorted(points.items()))]
    chart = line_chart("Time of a private step", lines, x_label="round", y_label="in ms", show="{:.1f} ms".format)
    header = ("round", "client", "seconds", "ms a step", "records drawn", "peak memory so far, MB")
    numbers = table("Each client's round", header, rows)
    most = max(peak.values(), default=0)
    words = f"<p>Peak memory of the process: {most / 1e6:.0f} MB.</p>" if most else ""
    return _marked("Each client's round", f'{words}<div class="charts">{chart}</div>' + _numbers(numbers))


def _ledger(run: RunData) -> str:
    if not run.ledgers:
        return "<p>Each client keeps its own ledger.</p>"
    rows = []
    for name, ledger in run.ledgers.items():
        for sigma, rate, count in ledger.releases or ((0.0, 0.0, 0),):
            budget = DASH if ledger.target_epsilon is None else f"{ledger.target_epsilon:g}"
            spent = show_epsilon(run.spent[name], run.private)
            rows.append((name, ledger.id, count, f"{sigma:.6g}", f"{rate:.6g}", spent, budget))
    header = ("client", "ledger", "releases", "noise σ/C", "rate q", "ε spent", "budget")
    chain = "Every client's hash chain held when this page was written; <code>lalora ledger</code> prints every entry."
    return f"<p>{chain}</p>" + table("What was released", header, rows)


def _settings(run: RunData, public: bool) -> str:
    rows = [(k, DASH if v is None else v) for k, v in run.settings.items()]
    rows += list(run.about.get("versions", {}).items())
    # an unsalted hash of the records confirms a guess of the one that was not known
    prints = run.about.get("fingerprints", {})
    rows += [(k + SHORT * (k != BASE), v) for k, v in prints.items() if k == BASE or not public]
    words = f"{run.settings['method']}, ε = {run.settings['epsilon']}, C = {run.settings['max_grad_norm']}"
    return (
        f"<details><summary>{html.escape(words)}, and all others</summary>"
        + table("Settings, versions and fingerprints", ("setting", "value"), rows, "settings")
        + "</details>"
    )


# ---------------------------------------------------------------- several runs


def _with_mean(run: RunData) -> str:
    return f"{run.name} (mean over clients)" if run.own_models else run.name


def _comparison(runs: Sequence[RunData], public: bool) -> str:
    styles = [f"c{i % COLORS}" for i in range(len(runs))]
    accuracy = [
        Line(_with_mean(run), [(r["round"], 100 * r["accuracy"]) for r in run.history], style)
        for run, style in zip(runs, styles)
    ]
    charts = line_chart("Test accuracy", accuracy, x_label="round", y_label="in percent", show="{:.1f} %".format)
    spent = [
        Line(run.name, [(r["round"], r["epsilon"]) for r in run.history], style)
        for run, style in zip(runs, styles)
        if run.private and run.history[-1]["epsilon"] is not None
    ]
    if spent:
        charts += line_chart("ε spent by the most exposed client", spent, x_label="round", y_label="",
                             show=lambda e: show_epsilon(e))  # fmt: skip
    rows = [
        [
            run.name, f"{100 * run.history[-1]['accuracy']:.1f}{'*' * run.own_models}",
            f"{100 * run.history[0]['accuracy']:.1f}",
            _spent(run, run.epsilon), f"{run.settings['delta']:g}", run.history[-1]["round"],
            f"{sum(r['bytes_sent'] for r in run.history):,}",
            *([] if public else [f"{run.history[-1]['seconds']:.1f}"]),
        ]
        for run in runs
    ]  # fmt: skip
    header = ["run", "accuracy, %", "before", "largest ε", "δ", "rounds", "bytes sent up"]
    header += [] if public else [f"seconds{SHORT}"]
    names = list(dict.fromkeys(key for run in runs for key in run.settings))
    differ = [n for n in names if len({str(run.settings.get(n)) for run in runs}) > 1]
    rest = [(n, *(DASH if (v := run.settings.get(n)) is None else v for run in runs)) for n in differ]
    other = table("Settings that differ", ("setting", *(run.name for run in runs)), rest) if rest else ""
    data = {str(run.about.get("fingerprints", {}).get("data")) for run in runs}
    many = "" if public or len(data) == 1 else f"<p>These runs did not train on the same data{SHORT}.</p>"
    means = html.escape(", ".join(run.name for run in runs if run.own_models))
    note = f"<p>* {means}: the mean over the clients' models.</p>" if means else ""
    spend = "<p>Runs on the same records add up: together they have spent more than any one of them.</p>"
    return (
        f'<h2>Accuracy and ε over rounds</h2><div class="charts">{charts}</div>'
        f"<h2>Side by side</h2>{table('Every run', header, rows)}{note}{other}{many}{spend}<h2>Each run</h2>"
    )
