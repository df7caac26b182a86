"""Ledgers of a run that were edited, exchanged, deleted or are older are refused, by resume and by lalora ledger."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_robustness import DELTA, EPSILON, K, books, copy_of_it, fresh_task, small_config, stopped_folder  # noqa: F401

from lalora_kernels import cli
from lalora_kernels.data import BadInput
from lalora_kernels.federated.checkpoint import load_checkpoint
from lalora_kernels.federated.run import Run
from lalora_kernels.privacy.ledger import Ledger


def edited(folder: Path, change) -> None:
    state = books(folder)
    change(state["clients"])
    (folder / "ledger.json").write_text(json.dumps(state))


def older(clients: dict) -> None:
    """A true ledger of this run, from before its first release: a consistent file that forgets."""
    for name, book in clients.items():
        fresh = Ledger(target_epsilon=EPSILON, target_delta=DELTA)
        fresh.id = book["ledger"]["id"]
        clients[name] = {**book, "ledger": fresh.state_dict()}


def first_with_releases(clients: dict) -> dict:
    return next(book["ledger"] for book in clients.values() if book["ledger"]["entries"])


def swap(clients: dict) -> None:
    """Give the clients with releases those of a client that drew with another noise."""
    for book in clients.values():
        ledger = Ledger()
        for _ in range(4 * K):
            ledger.charge(50.0, 0.1)
        book["ledger"] = ledger.state_dict()


def charged_again(entries: list[dict], less: int = 0, **changes) -> Ledger:
    """A ledger with the releases of these entries but the last ``less``, but for ``changes``."""
    ledger, kept = Ledger(target_epsilon=EPSILON, target_delta=DELTA), []
    for entry in entries:
        names = ("noise_multiplier", "sample_rate", "clipping", "max_grad_norm", "expected_batch_size")
        kept += [{name: entry[name] for name in names} | changes] * entry["count"]
    for release in kept[: len(kept) - less]:
        ledger.charge(**release)
    return ledger


def other(**changes):
    """What gives every client as many releases, but for ``changes``."""

    def change(clients: dict) -> None:
        for book in clients.values():
            book["ledger"] = charged_again(book["ledger"]["entries"], **changes).state_dict()

    return change


TAMPERED = {
    "an entry": (lambda c: first_with_releases(c)["entries"][0].update(count=1), "changed after it was written"),
    "the budget": (lambda c: first_with_releases(c).update(target_epsilon=80.0), "changed after it was written"),
    "no entries": (lambda c: first_with_releases(c)["entries"].clear(), "changed after it was written"),
    "an older one": (older, "0 releases on record, but the stored weights hold"),
    "another client's": (swap, "releases that are not this client's"),
    "another C": (other(max_grad_norm=5.0), "releases that are not this client's"),
    "another rule": (other(clipping="automatic"), "releases that are not this client's"),
    "a client gone": (lambda c: c.pop("2"), "not a complete run: KeyError '2'"),
    "no client": (lambda c: c.clear(), "not a complete run: KeyError '0'"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_ledger_is_refused_with_exit_code_2(run_folder, capsys, how):
    change, message = TAMPERED[how]
    edited(run_folder, change)
    with pytest.raises(BadInput, match=message):
        Run.resume(run_folder)
    assert cli.main(["train", "--resume", str(run_folder), "--quiet"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_ledger_from_before_the_update_that_is_stored_is_refused(run_folder):
    """Of the end of the round before: the update would count, and its client could spend that budget once more."""
    (client,) = load_checkpoint(run_folder).updates
    entries = books(run_folder)["clients"][str(client)]["ledger"]["entries"]
    steps = sum(entry["count"] for entry in entries)
    before = charged_again(entries, less=K)
    edited(run_folder, lambda clients: clients[str(client)].update(ledger=before.state_dict()))
    with pytest.raises(BadInput, match=f"client {client} has {steps - K} releases on record, .* weights hold {steps};"):
        Run.resume(run_folder)


def test_a_deleted_ledger_is_refused_and_so_is_a_new_start_over_an_old_one(task, run_folder, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "other")
    (run_folder / "ledger.json").unlink()
    for command in (["train", "--quiet", "--resume"], ["ledger"]):
        assert cli.main([*command, str(run_folder)]) == 2
        assert "ledger.json is missing" in capsys.readouterr().err
    (tmp_path / "other/config.json").unlink()
    with pytest.raises(BadInput, match="lost its config.json"):
        Run.start(task, tmp_path / "other")


def test_the_ledger_command_refuses_an_edited_chain_and_an_edited_claim(run_folder, capsys):
    shutil.copy(run_folder / "ledger.json", run_folder / "copy.json")
    edited(run_folder, TAMPERED["an entry"][0])
    assert cli.main(["ledger", str(run_folder)]) == 2
    assert "its hash chain does not hold" in capsys.readouterr().err
    shutil.move(run_folder / "copy.json", run_folder / "ledger.json")
    edited(run_folder, lambda c: [book.update(epsilon=0.5) for book in c.values()])
    assert cli.main(["ledger", str(run_folder)]) == 2
    assert "claims epsilon 0.5" in capsys.readouterr().err
