"""A page's parts on a run over Flower: its server holds no ledger, so it shows what the settings imply and says so."""

from lalora_kernels.charts import Line, line_chart
from lalora_kernels.report import RunData, show_epsilon, table

CLIENTS = 8  # whose ε is computed: each needs its own σ
IMPLIED = """
What the settings imply for this run: a client that keeps to them calibrates its noise so that all of its turns together
cost at most ε = {epsilon:g} at δ = {delta:g}, however many records it has. The chart's way there is computed for the
numbers of records that the server was told, with every turn so far counted as paid. Not known here: the true numbers,
which turns were paid for without an update that arrived or were refused, and what the same records spent in other runs.
Each client's own ledger has all of it; "lalora ledger" reads it there.
"""


def spent_at_most(run: RunData) -> dict[int, list[float]]:
    """client -> ε after each round of the history, in a client that does as the settings say: the σ of ``node.Node``,
    K steps a turn, every turn of the plan taken. Of many clients, the ``CLIENTS`` with the fewest declared records.

    Left out is who cannot take part: more in a batch than it has records, or no σ that reaches ε. Raises BadInput for
    settings that are none.
    """
    from lalora_kernels.federated.config import make_config
    from lalora_kernels.federated.plan import participation
    from lalora_kernels.privacy.accountant import compute_epsilon, get_noise_multiplier

    config, sizes = make_config(run.settings), run.about["sizes"]
    rounds, found = participation(config), {}
    for client in sorted(sorted(range(len(sizes)), key=lambda client: sizes[client])[:CLIENTS]):
        steps = [config.local_steps * sum(client in chosen for chosen in rounds[:n]) for n in range(len(rounds) + 1)]
        if sizes[client] < config.batch_size or not steps[-1]:
            continue
        q = config.batch_size / sizes[client]
        try:
            sigma = get_noise_multiplier(
                target_epsilon=config.epsilon, target_delta=config.delta, sample_rate=q, steps=steps[-1]
            )
        except (ValueError, OverflowError):
            continue
        found[client] = [compute_epsilon([(sigma, q, steps[r["round"]])], config.delta) for r in run.history]
    return found


def epsilon_chart(run: RunData) -> str:
    """ε over rounds as the settings imply it; nothing where no client can take part."""
    spent = spent_at_most(run)
    if not spent:
        return ""
    rounds = [record["round"] for record in run.history]
    each = [Line(None, list(zip(rounds, values)), "thin") for values in spent.values()]
    largest = Line("largest of them", list(zip(rounds, map(max, zip(*spent.values())))), "c1")
    few = len(run.about["sizes"]) > len(spent)
    assert run.budget is not None  # a private run's
    label = f"thin: the {len(spent)} clients with the fewest records" if few else "thin: each client"
    return line_chart("ε spent at most, by the settings", [*each, largest], x_label="round", y_label=label,
                      show=at_most, levels=[("budget of the run", run.budget)])  # fmt: skip


def at_most(epsilon: float) -> str:
    """ "ε ≤ 1.23", rounded up."""
    return show_epsilon(epsilon).replace("=", "≤")


def clients_table(run: RunData) -> str:
    """What the server knows of each client: the records it was told of, turns, what became of its updates."""
    from lalora_kernels.federated.config import make_config
    from lalora_kernels.federated.plan import participation

    plan, done = participation(make_config(run.settings)), run.history[1:]
    rows = []
    for client, records in enumerate(run.about["sizes"]):
        turns = [client in chosen for chosen in plan]
        counted = sum(client in record["clients"] for record in done)
        dropped = sum(str(client) in record["dropped"] for record in done)
        rows.append((client, f"{records:,}", f"{sum(turns[: len(done)])} of {sum(turns)}", counted, dropped))
    header = ("client", "records, as the server was told", "turns", "updates that counted", "left out")
    return table("Each client", header, rows) + "<p>The clients' noise, budgets and ledgers stay with them.</p>"
