"""Files of a server's folder that were damaged, lost or edited, and what it is told at its start that is none."""

import json
import shutil
import types

import pytest
from flower_nodes import Calls, K, close_logs, ledger_of, make_nodes, same, settings, small_world  # noqa: F401
from small import digits_npz

from lalora_kernels import flower_command
from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.federated.coordinator import BudgetSpent, Coordinator, serve
from lalora_kernels.federated.plan import participation
from lalora_kernels.federated.run import prepare
from lalora_kernels.federated.spool import Spool
from lalora_kernels.federated.wire import pack, unpack


class Killed(BaseException):
    pass


class Cut(Calls):
    """Killed when all but one client of the first round have answered."""

    def exchange(self, messages, timeout):
        for client, reply in super().exchange(messages, timeout):
            if len(self.up) == len(messages):
                raise Killed
            yield client, reply


@pytest.fixture
def killed(world, tmp_path):
    """(the folder of a run whose server holds the replies of clients 3, 2 and 1 to round 1, its nodes)"""
    config = settings(world, rounds=1)
    nodes = make_nodes(tmp_path, config, key=False)
    with pytest.raises(Killed):
        Coordinator.start(prepare(config), tmp_path / "run").train(Cut(nodes))
    return tmp_path / "run", nodes


def test_a_damaged_reply_is_asked_for_again_and_what_is_no_client_s_does_not_count(killed):
    folder, nodes = killed
    stored = folder / "updates/1"
    assert sorted(path.name for path in stored.iterdir()) == ["1", "2", "3"]
    for stray in ("7", "03", "0~"):
        shutil.copy(stored / "3", stored / stray)
    (stored / "1").write_bytes((stored / "1").read_bytes()[:-1])
    (stored / "2").write_bytes(b"")
    (stored / ".3.half").write_bytes(b"")  # of a server that was killed while writing
    spool = Spool(stored, range(4))
    assert 7 not in spool and spool.get(7) is None and spool[3].get("no tensor") is None
    assert not (stored / ".3.half").exists()
    run, calls = Coordinator.resume(folder), Calls(nodes)
    run.train(calls)
    assert [client for client, _ in calls.down] == [2, 1, 0] and run.at.history[1]["clients"] == [0, 1, 2, 3]
    assert all(ledger_of(node).steps == K for node in nodes)


def test_a_new_run_does_not_begin_over_the_replies_of_a_lost_one(killed, world):
    folder, _ = killed
    (folder / "config.json").rename(folder / "kept")
    before = (folder / "checkpoint.safetensors").read_bytes()
    with pytest.raises(BadInput, match="updates holds replies to a run that lost its config.json; restore that file"):
        Coordinator.start(prepare(settings(world, rounds=1)), folder)
    assert (folder / "checkpoint.safetensors").read_bytes() == before and (folder / "updates/1/3").is_file()
    (folder / "kept").rename(folder / "config.json")
    Coordinator.resume(folder)


def test_a_damaged_config_is_refused_by_the_name_of_what_is_damaged(killed):
    path = killed[0] / "config.json"
    whole = json.loads(path.read_text())
    for name, value in (
        ("run", "zz"), ("run", None), ("sizes", None), ("sizes", [1]), ("sizes", "abcd"), ("sizes", [40, 40, 40, 0]),
        ("timeout", "soon"), ("timeout", float("nan")), ("timeout", True),
    ):  # fmt: skip
        path.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(BadInput, match=f"config.json: {name} should be .*; restore it from a copy"):
            Coordinator.resume(killed[0])
    del whole["timeout"]
    path.write_text(json.dumps(whole))
    with pytest.raises(BadInput, match="not a run with Flower: KeyError 'timeout'"):
        Coordinator.resume(killed[0])


def test_sizes_that_are_none_are_refused_where_they_were_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flower_command, "_need_flower", lambda *_: None)
    monkeypatch.setattr(flower_command, "signal", types.SimpleNamespace(signal=lambda *_: None, SIGTERM=None))
    for sizes in ("100,abc", "100,,100", "1e3"):
        with pytest.raises(BadInput, match=f"--sizes are whole numbers with commas between.*{sizes}"):
            serve(tmp_path / "server", "{}", sizes, 1.0, None)
        assert main(["flower", "run", "--sizes", sizes, "--out", str(tmp_path / "run")]) == 2
        assert f"got '{sizes}'" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(["flower", "run", "--resume", str(tmp_path), "--sizes", "1,2"]) == 2
    assert "--resume continues a run with its own settings" in capsys.readouterr().err


def test_a_server_whose_clients_hold_records_of_their_own_deals_none(world, tmp_path):
    """Its own training records, 30 here, would not do for one of them; it begins and goes on without."""
    few = digits_npz(tmp_path / "public.npz", 30, 40)
    config = settings((world[0], few), clients=2, rounds=1, min_records=100)
    nodes = make_nodes(tmp_path, config, key=False)
    for node in nodes:
        (node.home / "client.toml").write_text(f"dataset = '{world[1]}'\n")

    class Down(Calls):
        def exchange(self, messages, timeout):
            raise Killed

    with pytest.raises(Killed):
        serve(tmp_path / "run", config.to_json(), "160,160", 1.0, Down(nodes))
    serve(tmp_path / "run", "", "", 1.0, Calls(nodes))
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])["clients"] == [0, 1]
    with pytest.raises(BadInput, match="30 records cannot give each of 2 clients 100"):
        serve(tmp_path / "dealt", config.to_json(), "", 1.0, None)


def spent(node, blob):
    _, about = unpack(blob)
    return pack({}, {"run": about["run"], "round": about["round"], "client": node.client, "status": "budget"})


@pytest.mark.parametrize("quorum, ends", [(0.5, 4), (1.0, 3)])
def test_spent_budgets_end_a_run_only_where_no_round_that_is_left_has_a_quorum(world, tmp_path, quorum, ends):
    config = settings(world, fraction=0.5, rounds=4, quorum=quorum)
    first, second, *later = participation(config)
    assert not set(first) & set(second) and all(set(first) & set(chosen) for chosen in later)
    run = Coordinator.start(prepare(config), tmp_path / "run")
    calls = Calls(make_nodes(tmp_path, config), dict.fromkeys(first, spent))
    if ends == 4:
        run.train(calls)
        assert [record["moved"] for record in run.at.history] == [True, False, True, True, True]
    else:
        with pytest.raises(BudgetSpent, match="round 3: 2 of 4 clients refused"):
            run.train(calls)
        assert [record["moved"] for record in run.at.history] == [True, False, True, False]


def test_a_resumed_server_has_its_data_and_writes_its_metrics_anew(world, tmp_path):
    data = digits_npz(tmp_path / "d.npz", 160, 40)
    run = Coordinator.start(prepare(settings((world[0], data))), tmp_path / "run")
    run.lock.release()
    metrics = tmp_path / "run/metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.unlink()
    Coordinator.resume(tmp_path / "run").lock.release()
    assert whole and metrics.read_bytes() == whole
    digits_npz(tmp_path / "d.npz", 160, 39)
    with pytest.raises(BadInput, match="the data is not the one that this run was started with"):
        Coordinator.resume(tmp_path / "run")


class Again(Calls):
    """Each client of a round answers a second time, with other tensors, and so does one who was not asked."""

    def exchange(self, messages, timeout):
        for client, reply in super().exchange(messages, timeout):
            yield client, reply
            tensors, about = unpack(reply)
            for other in (client, (set(range(4)) - set(messages)).pop()):
                yield other, pack({key: value + 0.5 for key, value in tensors.items()}, about | {"client": other})


def test_one_answer_of_each_client_that_was_asked_counts(world, tmp_path):
    """With the run's and the round's numbers right, as a client of the federation knows them."""
    config, runs = settings(world, rounds=1, fraction=0.5), []
    for transport in (Calls, Again):
        folder = tmp_path / transport.__name__
        runs.append(Coordinator.start(prepare(config), folder / "run"))
        runs[-1].train(transport(make_nodes(folder, config)))
        assert not list((folder / "run/updates").glob("*"))  # nor are they kept
    plain, again = (run.at.history[1] for run in runs)
    assert same(runs[0].at.state, runs[1].at.state) and len(plain["clients"]) == 2
    assert {**again, "seconds": 0} == {**plain, "seconds": 0}
