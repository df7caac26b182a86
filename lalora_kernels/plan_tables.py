"""A plan for people: rich's tables in a terminal, Markdown where the output goes elsewhere."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lalora_kernels.report import show_epsilon

NOT_KNOWN = "–"


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print what ``plan_command.make`` returned."""
    console = console or Console(highlight=False, soft_wrap=True)
    settings, clients = plan["settings"], plan["clients"]
    print_ = functools.partial(console.print, markup=False, emoji=False)  # a path may hold [brackets] or :colons:
    print_(
        f"{settings['model']}, {plan['records']:,} records in {plan['classes']} classes held by "
        f"{settings['clients']} clients; {settings['rounds']} rounds of {settings['local_steps']} private steps, "
        f"expected batch {settings['batch_size']}"
    )
    if plan["placeholder_labels"] and settings["partition"] == "dirichlet":
        print_("The clients' shares are those of labels that are equally frequent; the data's own deal them otherwise.")
    if plan["epsilon_curve"]:
        print_(f"\nNoise for ε = {settings['epsilon']:g} at δ = {plan['delta']:g}")
        rows = [
            (str(c["client"]), f"{c['records']:,}", f"{c['sample_rate']:.4f}", str(c["steps"]),
             f"{c['noise_multiplier']:.3f}" if c["steps"] else NOT_KNOWN)
            for c in clients
        ]  # fmt: skip
        _table(console, ("client", "records", "rate q", "private steps", "noise σ/C"), rows)
        print_("\nExpected ε after each round, of the most exposed client")
        points = plan["epsilon_curve"]
        head = ("round", *(str(point["round"]) for point in points))
        _table(console, head, [("ε", *(show_epsilon(p["epsilon"]).removeprefix("ε = ") for p in points))])
    else:
        print_("\nε = ∞: no noise, and no guarantee.")
    for rank in plan["ranks"]:
        print_("")
        columns = [*rank["methods"], rank["opacus"]]
        cells = [(name, *(value(row) for row in columns)) for name, value in QUANTITIES]
        cells = [row for row in cells if set(row[1:]) != {NOT_KNOWN}]
        _table(console, (f"r = {rank['rank']}", *(row["method"] for row in columns)), cells)
    _notes(plan, print_)


def _notes(plan: dict[str, Any], print_: Callable[[str], None]) -> None:
    rows = [row for rank in plan["ranks"] for row in (*rank["methods"], rank["opacus"])]
    if plan["settings"]["wire"] == "bfloat16":
        print_("\nOver Flower, --wire bfloat16 sends half of these bytes.")
    if not any("seconds_per_step" in row or "error" in row for row in rows):
        print_("\nMemory and time are not measured (--no-dry-run).")
        return
    print_(
        "\nOpacus: DP-LoRA with its per-sample gradients on PEFT's layers. Of four steps of each factor that the run "
        "trains the last three count, each factor as often as it is trained; a batch was exactly of the expected size, "
        "and a Poisson batch may be larger. The run's steps are those of all clients, one after the other, without "
        "evaluation."
    )
    failed = [f"{row['method']} was not measured: {row['error']}" for row in rows if "error" in row]
    for why in dict.fromkeys(failed):
        print_(why)


def _bytes(count: float | None) -> str:
    """Decimal units, three digits."""
    if count is None:
        return NOT_KNOWN
    units = ["B", "kB", "MB", "GB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if units[0] == "B" or count >= 99.95 else f"{count:.1f} {units[0]}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOT_KNOWN
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return _bytes(low) if low == high else f"{_bytes(low)} to {_bytes(high)}"


def _ratio(row: dict[str, Any], name: str) -> str:
    found = row.get("against_opacus", {}).get(name)
    return NOT_KNOWN if found is None else f"{found:.2f}"


QUANTITIES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("trainable parameters", lambda row: f"{row['trainable_parameters']:,}"),
    ("an update sends", lambda row: _range(row["bytes_sent_per_update"])),
    ("a round sends", lambda row: _range(row["bytes_sent_per_round"])),
    ("the run sends", lambda row: _bytes(row["bytes_sent"])),
    ("time of a step", lambda row: _time(row.get("seconds_per_step"))),
    ("time of the run's steps", lambda row: _time(row.get("seconds"))),
    ("memory of the process", lambda row: _bytes(row.get("peak_memory"))),
    ("of which a step needs", lambda row: _bytes(row.get("step_memory"))),
    ("memory on the GPU", lambda row: _bytes(row.get("device_memory"))),
    ("time / Opacus'", lambda row: _ratio(row, "seconds_per_step")),
    ("a step's memory / Opacus'", lambda row: _ratio(row, "step_memory")),
    ("bytes / DP-LoRA's", lambda row: _ratio(row, "bytes_sent")),
)


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not console.is_terminal:
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        ruler = ["-" * width + ":" * (i > 0) for i, width in enumerate(widths)]
        lines = [[f"{c:{'>' if i else '<'}{w + (i > 0)}}" for i, (c, w) in enumerate(zip(row, widths))] for row in
                 (head, *rows)]  # fmt: skip
        console.print("\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ruler, *lines[1:])))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
