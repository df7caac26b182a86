"""A task serves one run, and a run that diverged ends with what was paid for."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from small import digits_npz, vit_folder

from lalora_kernels.data import BadInput
from lalora_kernels.federated import client
from lalora_kernels.federated.client import get_state, set_state
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.coordinator import Coordinator
from lalora_kernels.federated.guard import QuorumLost
from lalora_kernels.federated.methods import get_method
from lalora_kernels.federated.run import Run, Watch, prepare
from lalora_kernels.federated.server import Server


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return make_config({
        "model": vit_folder(folder / "vit"), "dataset": digits_npz(folder / "d.npz", 60, 20), "clients": 2,
        "rounds": 2, "local_steps": 2, "rank": 2, "batch_size": 6, "partition": "iid", "epsilon": 8.0, "delta": 1e-4,
        "lr": 1.0, "device": "cpu",
    })  # fmt: skip


class Stop(KeyboardInterrupt):
    pass


def stop() -> None:
    raise Stop


def test_a_task_that_a_run_has_trained_is_not_started_from_again(config, tmp_path):
    """Its weights would be the start of a run whose ε begins at 0."""
    task = prepare(config)
    run = Run.start(task, tmp_path / "run")
    with pytest.raises(Stop):
        run.train(Watch(on_step=stop))  # after one step of one client
    with pytest.raises(BadInput, match="has been trained since it was prepared; prepare\\(config\\) once more"):
        Run.start(task, tmp_path / "other")
    with pytest.raises(BadInput, match="has been trained since it was prepared"):
        Coordinator.start(task, tmp_path / "other")
    assert not (tmp_path / "other" / "config.json").exists()


def test_a_task_whose_base_weights_a_method_has_folded_into(config, tmp_path):
    task = prepare(dataclasses.replace(config, method="flora", rounds=1))
    start = get_state(task.classifier.model)
    Run.start(task, tmp_path / "run").train()
    set_state(task.classifier.model, start)  # the factors begin anew, the base weights do not
    with pytest.raises(BadInput, match="has been trained since it was prepared"):
        Run.start(task, tmp_path / "other")


def test_a_run_that_diverged_leaves_its_last_good_weights_and_spends_nothing_more(config, tmp_path, monkeypatch):
    rate = client.learning_rate
    monkeypatch.setattr(client, "learning_rate", lambda config, round: rate(config, round) if round < 2 else 1e38)
    run = Run.start(prepare(dataclasses.replace(config, rounds=8)), tmp_path / "run")
    with pytest.raises(QuorumLost, match="lower --lr"):
        run.train()
    assert [record["moved"] for record in run.at.history] == [True, True, False, False, False]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved and all(value.isfinite().all() for value in saved.values())
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)  # the first round's
    again = Run.resume(tmp_path / "run")
    before = [one.ledger.steps for one in again.clients]
    with pytest.raises(QuorumLost, match="lower --lr"):
        again.train()
    assert [one.ledger.steps for one in again.clients] == before


def test_what_is_measured_is_the_server_s_state(config):
    """Not what the model holds, which is the last client's; record by record, in float64."""

    def by_hand(state):
        classifier = prepare(config).classifier
        set_state(classifier.model, state)
        model, right, losses = classifier.model.double().eval(), [], []
        with torch.no_grad():
            for image, label in task.data.test:
                logits = model(classifier.collate([(image, label)])[0].double()).logits[0]
                right.append(int(logits.argmax()) == label)
                losses.append(float(logits.logsumexp(0) - logits[label]))
        return sum(right) / len(right), sum(losses) / len(losses)

    task, generator = prepare(config), torch.Generator().manual_seed(0)
    start = get_state(task.classifier.model)
    state = {key: value + 10 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    task.classifier.model.train()
    measured = Server(get_method(config.method), state).evaluate(task.classifier, task.data.test, batch_size=7)
    assert measured == pytest.approx(by_hand(state), rel=1e-5)
    assert not any(module.training for module in task.classifier.model.modules())
    assert measured[1] != pytest.approx(by_hand(start)[1], rel=1e-3) and measured[0] > 0
