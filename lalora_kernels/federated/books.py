"""``lalora ledger``: what was released and what it cost, recomputed from the entries after their hash chain held."""

import math
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput
from lalora_kernels.federated.lifetime import refuse_lost
from lalora_kernels.federated.node import KEPT
from lalora_kernels.federated.run import CONFIG, LEDGERS, read_json, read_ledgers
from lalora_kernels.privacy.accountant import NEIGHBORING_RELATIONS, check_delta, show_bound
from lalora_kernels.privacy.ledger import Ledger, LedgerError

SAME = 1e-3  # relative; an accountant of another version may differ from the stored ε by less
WORDS = {"add_or_remove_one": "add or remove one record", "replace_one": "replace one record"}


def show_ledger(run: str | Path, *, accountant: str = "pld", delta: float | None = None) -> str:
    """The report on a run folder, its ledger.json, a Flower client's folder, or a file that ``Ledger.save`` wrote: each
    client's entries, and ε. A run over Flower has the ledgers of the clients that this machine simulated, or none.

    ε comes from the entries alone, by ``accountant`` ("pld" or "rdp"), for both neighbouring relations (RDP: add or
    remove only), at ``delta`` (default: the ledger's own). Raises BadInput for what is missing, edited or unreadable,
    and where the ε that the run wrote beside a ledger is not the ledger's.
    """
    path = Path(run)
    if not path.exists():
        raise BadInput(f"{path}: there is no such run folder or ledger file")
    if path.is_dir() and not (path / LEDGERS).exists() and (homes := _homes(path)):
        return _show_homes(path, homes, accountant, delta)
    if path.is_dir() and not (path / LEDGERS).exists():
        raise BadInput(
            f"{path}: no run folder, {LEDGERS} is missing; give the one that lalora train made (its --out), or restore "
            f"the file from a copy"
        )
    path = path / LEDGERS if path.is_dir() else path
    books = read_json(path)
    try:
        if isinstance(books, dict) and "clients" in books:
            ledgers = read_ledgers(path.parent, books)
            if not ledgers:
                raise BadInput(f"{path} holds no client's ledger, so it shows nothing; restore it from a copy")
            if lost := [name for name in _planned(path.parent) if name not in ledgers]:
                raise BadInput(
                    f"{path} holds no ledger of client {lost[0]}, which {CONFIG} names; it was cut or edited"
                )
            claimed = {name: book.get("epsilon") for name, book in books["clients"].items()}
            run_delta = books.get("delta")
        elif isinstance(books, dict) and "ledger" in books:  # a client's own, node.py
            ledgers, claimed, run_delta = {"": Ledger()}, {}, None
            ledgers[""].load_state_dict(books["ledger"])
        else:
            ledgers, claimed, run_delta = {"": Ledger.load(path)}, {}, None
        delta = run_delta if delta is None else delta
        blocks = [_client(n, ledger, claimed.get(n), accountant, delta, run_delta) for n, ledger in ledgers.items()]
    except (LedgerError, ValueError, OverflowError) as error:  # a claim of 10**400
        if isinstance(error, BadInput):
            raise
        raise BadInput(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return "\n".join([_head(path, list(ledgers.values()), accountant), *blocks])


def _head(path: Path, ledgers: list[Ledger], accountant: str) -> str:
    many = f"{len(ledgers)} ledger{'s' * (len(ledgers) != 1)}, {sum(ledger.steps for ledger in ledgers)} releases"
    looser = ", a looser bound than PLD's, which keeps the budget; it may lie above" if accountant != "pld" else ""
    return f"{path}: {many}; every hash chain holds; epsilon by {accountant.upper()}{looser}"


def _planned(folder: Path) -> list[str]:
    """The clients of a run, by its config.json; none where that cannot be read: the ledgers are whole without it."""
    try:
        return [str(one["client"]) for one in read_json(folder / CONFIG)["plan"]["clients"]]
    except (ValueError, KeyError, TypeError):  # a BadInput is a ValueError
        return []


def _homes(folder: Path) -> dict[str, Path]:
    """Client -> its own folder, of the Flower clients whose folders are here.

    Raises BadInput for a server's folder without any: what its clients spent is not there.
    """
    if (folder / "ledgers").is_dir():
        return {"": folder}
    about = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    if not isinstance(about, dict) or "sizes" not in about:
        return {}
    homes = [home for home in (folder / "clients").glob("*") if home.is_dir()]
    if not homes:
        raise BadInput(
            f"{folder} is a run over Flower, whose server is sent no ledger: every client keeps its own, in its HOME "
            f"folder. lalora ledger HOME shows it there"
        )
    return {home.name: home for home in sorted(homes, key=lambda home: (len(home.name), home.name))}


def _show_homes(folder: Path, homes: dict[str, Path], accountant: str, delta: float | None) -> str:
    """The ledgers of Flower clients: each over all runs and servers, with the rounds that it was charged for."""
    blocks, ledgers = [], []
    for name, home in homes.items():
        paths = sorted((home / "ledgers").glob(f"*/{LEDGERS}"))
        for path in paths:
            book, ledger = read_json(path), Ledger()
            try:
                ledger.load_state_dict(book["ledger"])
                blocks += [_client(name, ledger, None, accountant, delta, None), *_rounds(book), f"  {path}"]
            except (LedgerError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadInput(f"{path}: {error}") from error
            ledgers.append(ledger)
        try:
            refuse_lost(home / "ledgers", home / "runs", KEPT)
        except LedgerError as error:
            raise BadInput(str(error)) from error
        if not paths:
            blocks.append(f"\n{f'client {name}: ' if name else ''}no ledger in {home}, nothing was released from there")
    return "\n".join([_head(folder, ledgers, accountant), *blocks])


def _rounds(book: dict[str, Any]) -> list[str]:
    return [f"  for run {run}, rounds {', '.join(map(str, rounds))}" for run, rounds in book["rounds"].items()]


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
        lines.append(f"  epsilon {show_bound(spent)}{budget} at delta {delta:g}, {WORDS[relation]}")
    if claimed is not None and run_delta is not None:
        _refuse_other_claim(ledger, claimed, run_delta)
    return "\n".join(lines)


def _refuse_other_claim(ledger: Ledger, claimed: object, delta: float) -> None:
    found = ledger.epsilon(delta)
    if not isinstance(claimed, (int, float)) or not math.isclose(found, claimed, rel_tol=SAME, abs_tol=1e-9):
        raise BadInput(f"the file claims epsilon {claimed!r}, but its entries cost {show_bound(found)}; it was edited")
