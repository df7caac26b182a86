"""``lalora ledger``: what was released and what it cost, recomputed from the entries after their hash chain held."""

import math
from pathlib import Path

from lalora_kernels.data import BadInput
from lalora_kernels.federated.run import LEDGERS, read_json, read_ledgers
from lalora_kernels.privacy.accountant import NEIGHBORING_RELATIONS, check_delta
from lalora_kernels.privacy.ledger import Ledger, LedgerError

SAME = 1e-3  # relative; an accountant of another version may differ from the stored ε by less
WORDS = {"add_or_remove_one": "add or remove one record", "replace_one": "replace one record"}


def show_ledger(run: str | Path, *, accountant: str = "pld", delta: float | None = None) -> str:
    """The report on a run folder, its ledger.json, or a file that ``Ledger.save`` wrote: each client's entries, and ε.

    ε comes from the entries alone, by ``accountant`` ("pld" or "rdp"), for both neighbouring relations (RDP: add or
    remove only), at ``delta`` (default: the ledger's own). Raises BadInput for what is missing, edited or unreadable,
    and where the ε that the run wrote beside a ledger is not the ledger's.
    """
    path = Path(run)
    path = path / LEDGERS if path.is_dir() else path
    books = read_json(path)
    try:
        if isinstance(books, dict) and "clients" in books:
            ledgers = read_ledgers(path.parent, books)
            claimed = {name: book.get("epsilon") for name, book in books["clients"].items()}
            run_delta = books.get("delta")
        elif isinstance(books, dict) and "ledger" in books:  # a client's own, node.py
            ledgers, claimed, run_delta = {"": Ledger()}, {}, None
            ledgers[""].load_state_dict(books["ledger"])
        else:
            ledgers, claimed, run_delta = {"": Ledger.load(path)}, {}, None
        delta = run_delta if delta is None else delta
        blocks = [_client(n, ledger, claimed.get(n), accountant, delta, run_delta) for n, ledger in ledgers.items()]
    except (LedgerError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    steps = sum(ledger.steps for ledger in ledgers.values())
    many = f"{len(ledgers)} ledger{'s' * (len(ledgers) != 1)}, {steps} releases"
    return "\n".join([f"{path}: {many}; every hash chain holds; epsilon by {accountant.upper()}", *blocks])


def _client(
    name: str, ledger: Ledger, claimed: object, accountant: str, delta: float | None, run_delta: float | None
) -> str:
    delta = ledger.target_delta if delta is None else check_delta(delta)
    lines = [f"\n{f'client {name}, ' if name else ''}run {ledger.id}, {ledger.steps} releases"]
    for e in ledger.entries:
        numbers = f"{e.first_release}" if e.count == 1 else f"{e.first_release}-{e.first_release + e.count - 1}"
        bound = "" if e.max_grad_norm is None else f", C {e.max_grad_norm:g}"
        size = "" if e.expected_batch_size is None else f", b {e.expected_batch_size:g}"
        lines.append(
            f"  {numbers:>12}  {e.count:>6} x sigma {e.noise_multiplier:.6g}, q {e.sample_rate:.6g}, {e.clipping}"
            f"{bound}{size}, {e.sampling}"
        )
    if ledger.refusals:
        return "\n".join([*lines, f"  no epsilon can be reported: {'; '.join(ledger.refusals)}"])
    if delta is None:
        return "\n".join([*lines, "  no delta on record; --delta asks for an epsilon"])
    for relation in NEIGHBORING_RELATIONS if accountant == "pld" else NEIGHBORING_RELATIONS[:1]:
        spent = ledger.epsilon(delta, accountant=accountant, neighboring_relation=relation)
        own = (delta, relation) == (ledger.target_delta, ledger.neighboring_relation) and ledger.target_epsilon
        budget = f" of {ledger.target_epsilon:g}" if own else ""
        lines.append(f"  epsilon {spent:.4f}{budget} at delta {delta:g}, {WORDS[relation]}")
    if claimed is not None and run_delta is not None:
        _refuse_other_claim(ledger, claimed, run_delta)
    return "\n".join(lines)


def _refuse_other_claim(ledger: Ledger, claimed: object, delta: float) -> None:
    found = ledger.epsilon(delta)
    if not isinstance(claimed, (int, float)) or not math.isclose(found, claimed, rel_tol=SAME, abs_tol=1e-9):
        raise BadInput(f"the file claims epsilon {claimed!r}, but its entries cost {found:.4f}; it was edited")
