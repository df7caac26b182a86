"""The private Trainer's ledger: epsilon in the logs, checkpoints, and what goes on after an interruption."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from test_private_step import KEY
from trainer_models import adapted, rows, text, trainer_of

import lalora_kernels as lk
from lalora_kernels import trainer as trainer_module


class TestEpsilonAndResume:
    target = {"noise_multiplier": None, "target_epsilon": 3.0}

    def run(self, folder, steps, resume=None, privacy=None, **kwargs):
        privacy = {"noise_multiplier": 1.5} if privacy is None else privacy  # a calibration takes a second
        _, patched, _ = adapted("bert", torch.float32)
        data = text(37, "class", 12)
        trainer = trainer_of(
            patched, data, folder, privacy=privacy, max_steps=6, save_strategy="steps", save_steps=2,
            eval_strategy="steps", eval_steps=2, eval_data=rows(text(37, "class", 4)), **kwargs,
        )  # fmt: skip
        if steps < 6:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def test_epsilon_is_in_every_log_and_within_the_budget(self, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(trainer_module.logger, "warning", said.append)
        trainer = self.run(tmp_path, 6, privacy=self.target)
        assert sum("do not publish it" in text for text in said) == 1
        logs = [entry for entry in trainer.state.log_history if "epsilon" in entry]
        assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6, 6]
        (release,) = trainer.ledger.releases
        for entry in logs[:6]:
            expected = lk.compute_epsilon([(release[0], 2 / 12, entry["step"])], 1e-5)
            assert entry["epsilon"] == pytest.approx(expected, rel=1e-9)
        assert 2.9 < trainer.get_epsilon() <= 3.0
        assert all("loss_not_private" in entry and "loss" not in entry for entry in logs[:6])
        assert "train_loss_not_private" in logs[6] and "grad_norm" not in logs[0]
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert [entry["step"] for entry in evaluated] == [2, 4, 6]
        assert trainer.state.total_flos == 0  # the number of tokens in private batches

    def test_resume_goes_on_with_the_ledger_and_a_fresh_key(self, tmp_path):
        first = self.run(tmp_path, 4)
        second = self.run(tmp_path, 6, resume=True)
        assert second.state.global_step == 6 and second.ledger.steps == 6
        assert second.ledger.id == first.ledger.id
        assert bytes(second._private.engine.noise.key) != bytes(first._private.engine.noise.key)
        assert second._private.local_step == 7
        assert second.ledger.releases == ((1.5, 2 / 12, 6),)
        assert [(entry.first_release, entry.count) for entry in second.ledger.entries] == [(0, 6)]

    def test_steps_after_the_checkpoint_stay_spent(self, tmp_path):
        self.run(tmp_path, 3, privacy=self.target)  # saved at 2
        second = self.run(tmp_path, 6, resume=str(tmp_path / "checkpoint-2"), privacy=self.target)
        assert second.state.global_step == 6 and second.ledger.steps == 3 + 4
        assert 2.9 < second.get_epsilon() <= 3.0  # and no more noise than that needs
        sigmas = [entry.noise_multiplier for entry in second.ledger.entries]
        assert len(sigmas) == 2 and sigmas[1] > sigmas[0]
        numbers = [(entry.first_release, entry.count) for entry in second.ledger.entries]
        assert numbers == [(0, 3), (3, 4)]

    def test_the_ledger_is_written_before_the_release(self, tmp_path, monkeypatch):
        from lalora_kernels import functional

        def crash(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(functional, "privatize", crash)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path, 6)
        assert lk.Ledger.load(tmp_path / "ledger.json").steps == 1

    def test_every_checkpoint_has_its_ledger(self, tmp_path):
        trainer = self.run(tmp_path, 6)
        for step in (2, 4, 6):
            assert lk.Ledger.load(tmp_path / f"checkpoint-{step}" / "ledger.json").steps == step
        trainer.save_model(str(tmp_path / "final"))
        assert lk.Ledger.load(tmp_path / "final" / "ledger.json").steps == 6

    def test_a_checkpoint_without_its_ledger_or_optimizer(self, tmp_path):
        self.run(tmp_path, 2)
        (tmp_path / "checkpoint-2" / "optimizer.pt").rename(tmp_path / "optimizer.pt")
        with pytest.raises(ValueError, match="holds no optimizer.pt"):
            self.run(tmp_path, 6, resume=True)
        (tmp_path / "optimizer.pt").rename(tmp_path / "checkpoint-2" / "optimizer.pt")
        (tmp_path / "checkpoint-2" / "ledger.json").unlink()
        with pytest.raises(lk.LedgerError, match="there is no ledger"):
            self.run(tmp_path, 6, resume=True)
        (tmp_path / "ledger.json").unlink()
        with pytest.raises(lk.LedgerError, match="there is no ledger.*the output_dir that it was begun with"):
            self.run(tmp_path, 6, resume=True)

    def test_another_budget_or_another_run(self, tmp_path):
        self.run(tmp_path, 2)
        with pytest.raises(ValueError, match="ledger of another run.*resume_from_checkpoint"):
            self.run(tmp_path, 6)
        with pytest.raises(ValueError, match="has the budget"):
            self.run(tmp_path, 6, resume=True, privacy=self.target)

    def test_a_run_that_another_process_has_open(self, tmp_path):
        """A queue that starts a job twice: both would spend what is left."""
        self.run(tmp_path, 3).ledger.path = None  # as when its process ends
        code = "import sys, lalora_kernels as lk; l = lk.Ledger.at(sys.argv[1]); print('open', flush=True); input()"
        command = [sys.executable, "-c", code, str(tmp_path / "ledger.json")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(lk.LedgerError, match=f"in use by process {other.pid}"):
                self.run(tmp_path, 6, resume=True)
            other.communicate("\n")
        assert self.run(tmp_path, 6, resume=True).ledger.steps == 3 + 4

    def test_another_folder_is_no_way_to_begin_at_zero(self, tmp_path):
        trainer = self.run(tmp_path / "first", 2)
        with pytest.raises(ValueError, match=r"privately already \(2 releases\).*Resume the former run"):
            trainer_of(trainer.model, text(37, "class", 12), tmp_path / "second").train()
        trainer_of(copy.deepcopy(trainer.model), text(37, "class", 12), tmp_path / "third").train()

    def test_a_fixed_key_logs_no_epsilon(self, tmp_path):
        trainer = self.run(tmp_path, 6, privacy={"noise_multiplier": 1.0, "noise": lk.NoiseSource.fixed(KEY)})
        assert trainer.get_epsilon() is None
        assert not any("epsilon" in entry for entry in trainer.state.log_history)
        assert json.loads((tmp_path / "ledger.json").read_text())["refusals"]


class StopAt:
    """A callback that ends training at a step, as an interruption between steps does."""

    def __new__(cls, steps):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= steps

        return Stop()
