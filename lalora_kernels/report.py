"""``report.html``: one file, no network, that says what a run reached, what it cost, and what that guarantees."""

import base64
import html
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lalora_kernels.files import write_atomic

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; }
.numbers div { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; }
.numbers b { display: block; font-size: 1.4rem; }
img { max-width: 100%; background: #fff; border-radius: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""

GUARANTEE = """
Each client's records are protected at record level: ({epsilon}, {delta:g})-differential privacy, adding or removing one
record, against everyone who sees what the client sends, the server included. Every private step is a Poisson-subsampled
Gaussian release; a client's ledger composes all of its steps with privacy loss distributions. No amplification by the
choice of clients is claimed.
"""
NO_GUARANTEE = "This run added no noise (ε = ∞): it is a yardstick and guarantees nothing."
NOT_COVERED = """
Not covered: the sizes of the clients' data sets and who took part, which are public here; settings that were chosen by
looking at private data; other runs on the same records, which add to what is spent; and the number of records left out
because their gradient was not finite, which is exact.
"""


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder from its config.json, metrics.jsonl and ledger.json; returns its path."""
    folder = Path(folder)
    about = json.loads((folder / "config.json").read_text())
    ledger = json.loads((folder / "ledger.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    path = folder / "report.html"
    write_atomic(path, _page(about, ledger["clients"], history))
    return path


def curves(history: list[dict[str, Any]], budget: float | None) -> bytes:
    """Accuracy and ε over rounds as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    private = history[-1]["epsilon"] is not None
    figure = Figure(figsize=(10, 4) if private else (6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if private else 1, squeeze=False)[0]
    rounds = [record["round"] for record in history]
    axes[0].plot(rounds, [100 * record["accuracy"] for record in history], color="#1f6feb", marker=".")
    axes[0].axhline(100 * history[0]["accuracy"], color="#888", linestyle=":", label="before")
    axes[0].set(xlabel="round", ylabel="test accuracy, %", title="Accuracy")
    axes[0].legend()
    if private:
        for client in range(len(history[-1]["epsilons"])):
            axes[1].plot(rounds, [record["epsilons"][client] for record in history], color="#bbb", linewidth=1)
        axes[1].plot(rounds, [record["epsilon"] for record in history], color="#d1242f", label="most exposed client")
        if budget is not None:
            axes[1].axhline(budget, color="#888", linestyle=":", label="budget")
        axes[1].set(xlabel="round", ylabel="ε spent", title="Privacy spent, each client")
        axes[1].legend()
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.2)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _page(about: dict[str, Any], books: dict[str, Any], history: list[dict[str, Any]]) -> str:
    settings, plan = about["settings"], about["plan"]
    first, last = history[0], history[-1]
    private = settings["epsilon"] != "inf"
    picture = base64.b64encode(curves(history, settings["epsilon"] if private else None)).decode()
    epsilon = show_epsilon(last["epsilon"], private)
    numbers = [
        (f"{100 * last['accuracy']:.1f} %", "test accuracy"),
        (f"{100 * first['accuracy']:.1f} %", "before"),
        (epsilon, "most exposed client"),
        (f"{last['seconds']:.0f} s", f"{last['round']} of {settings['rounds']} rounds"),
    ]
    clients = [
        (
            c["client"], c["records"], f"{c['sample_rate']:.4f}", c["steps"], f"{c['noise_multiplier']:.3f}",
            show_epsilon(books[str(c["client"])]["epsilon"], private), books[str(c["client"])]["nonfinite_samples"],
        )
        for c in plan["clients"]
    ]  # fmt: skip
    rounds = [
        (
            r["round"], f"{100 * r['accuracy']:.1f}", "–" if r["loss"] is None else f"{r['loss']:.3f}",
            show_epsilon(r["epsilon"], private), ", ".join(map(str, r["clients"])) or "–", f"{r['bytes_sent']:,}",
        )
        for r in history
    ]  # fmt: skip
    guarantee = GUARANTEE.format(epsilon=epsilon, delta=settings["delta"]) + NOT_COVERED if private else NO_GUARANTEE
    title = html.escape(f"{settings['method']} on {settings['dataset']}, {settings['clients']} clients")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<div class="numbers">{"".join(f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for v, k in numbers)}</div>
<p><img alt="accuracy and epsilon over rounds" src="data:image/png;base64,{picture}"></p>
<h2>What is guaranteed</h2><p>{html.escape(guarantee.strip())}</p>
<h2>Clients</h2>
{_table(("client", "records", "sampling rate q", "private steps", "noise σ/C", "ε spent", "left out"), clients)}
<h2>Rounds</h2>
{_table(("round", "accuracy, %", "test loss", "largest ε", "clients", "bytes sent up"), rounds)}
<h2>Settings</h2>
{_table(("setting", "value"), [(k, "–" if v is None else v) for k, v in settings.items()])}
<p>{html.escape(", ".join(f"{k} {v}" for k, v in about["versions"].items()))}</p>
</body></html>
"""


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def show_epsilon(epsilon: float | None, private: bool = True) -> str:
    """ε as a reader should see it: rounded up, so that it stays a bound; none where none can be claimed."""
    if not private:
        return "ε = ∞"
    if epsilon is None:
        return "no ε"
    return f"ε = {math.ceil(100 * epsilon - 1e-9) / 100:.2f}"
