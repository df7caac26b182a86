"""Arguments, settings and models that the private Trainer refuses."""

import pytest
import torch
import torch.distributed as dist
from trainer_models import adapted, trainer_of
from transformers import TrainingArguments


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"train_sampling_strategy": "group_by_length"}, "picks records by another rule than Poisson sampling"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size starts over after a step was charged"),
            ({"include_num_input_tokens_seen": True}, "counts the tokens of private batches"),
            ({"max_grad_norm": 0.0}, "max_grad_norm is C, and above 0"),
            ({"max_grad_norm": None}, "max_grad_norm is C, and above 0; got None"),
            ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["x"]}, "steps within backward"),
        ],
    )
    def test_arguments(self, arguments, message, tmp_path):
        _, patched, data = adapted("bert")
        with pytest.raises(ValueError, match=message):
            trainer_of(patched, data, tmp_path, **arguments)

    @pytest.mark.parametrize("name, value", [("fp16", True), ("_n_gpu", 2), ("use_liger_kernel", True), ("fsdp", "x")])
    def test_what_this_machine_cannot_ask_for(self, name, value, tmp_path):
        from lalora_kernels.trainer_refusals import refuse_arguments

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.args.max_grad_norm = 1.0
        refuse_arguments(trainer)
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match="nn.DataParallel" if name == "_n_gpu" else name):
            refuse_arguments(trainer)

    def test_adapters_that_were_loaded_to_be_used(self, tmp_path):
        _, patched, data = adapted("bert")
        for name, p in patched.named_parameters():
            if "lora_" in name:
                p.requires_grad_(False)
        with pytest.raises(ValueError, match=r"both factors of .* are frozen.*is_trainable=True"):
            trainer_of(patched, data, tmp_path).train()

    def test_several_processes(self, tmp_path, monkeypatch):
        from lalora_kernels.trainer_refusals import refuse_arguments

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.args.max_grad_norm = 1.0
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        with pytest.raises(ValueError, match="several processes are those of torch.distributed"):
            refuse_arguments(trainer)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        refuse_arguments(trainer)
        trainer.args.torch_compile = True
        with pytest.raises(ValueError, match="torch_compile is not tested in several processes"):
            refuse_arguments(trainer)

    def test_a_model_sharded_at_load_time(self, tmp_path):
        from lalora_kernels.trainer_refusals import refuse_arguments

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.args.max_grad_norm, trainer.is_distributed_loading_by_transformers = 1.0, True
        with pytest.raises(ValueError, match="sharded at load time has no per-sample gradients"):
            refuse_arguments(trainer)

    @pytest.mark.parametrize(
        "privacy, message",
        [
            ({"steps": 3}, "privacy holds steps, which it does not know or which follow from TrainingArguments"),
            ({"target_delta": None}, "privacy needs target_delta"),
            ({"target_epsilon": 1.0}, "either target_epsilon or noise_multiplier"),
            ({"noise_multiplier": None}, "either target_epsilon or noise_multiplier"),
        ],
    )
    def test_settings(self, privacy, message, tmp_path):
        _, patched, data = adapted("bert")
        with pytest.raises(ValueError, match=message):
            trainer_of(patched, data, tmp_path, privacy=privacy)

    def test_a_search(self, tmp_path):
        _, patched, data = adapted("bert")
        with pytest.raises(ValueError, match="every trial of a search spends"):
            trainer_of(patched, data, tmp_path).hyperparameter_search()

    def test_a_data_set_without_addresses(self, tmp_path):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([])

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.train_dataset = Stream()
        with pytest.raises((ValueError, TypeError), match="IterableDataset"):
            trainer.train()

    @pytest.mark.parametrize("noise", [{"noise_multiplier": 1.0}, {"noise_multiplier": None, "target_epsilon": 3.0}])
    @pytest.mark.parametrize("how", ["arguments", "privacy"])
    def test_a_batch_larger_than_the_data_set(self, noise, how, tmp_path):
        _, patched, data = adapted("bert")
        arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3} if how == "arguments" else {}
        privacy = noise | ({} if how == "arguments" else {"expected_batch_size": 12})
        with pytest.raises(
            ValueError, match=r"5 records, fewer than the expected batch size 12;.*per_device_train_batch_size \* grad"
        ):
            trainer_of(patched, data, tmp_path, privacy=privacy, **arguments).train()

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_a_loader_of_ones_own(self, by_hand, tmp_path, monkeypatch):
        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)

        class Balanced(type(trainer)):
            def get_train_dataloader(self):
                super().get_train_dataloader()
                return torch.utils.data.DataLoader(self.train_dataset, batch_size=4)

        trainer.__class__ = Balanced
        with pytest.raises(
            ValueError, match=r"Balanced.get_train_dataloader returns a DataLoader.*give train_dataset and data_coll"
        ):
            trainer.create_optimizer() if by_hand else trainer.train()

    def test_peft_unpatched(self, tmp_path):
        model, _, data = adapted("bert")
        with pytest.raises(ValueError, match="call lalora_kernels.patch_peft"):
            trainer_of(model, data, tmp_path).train()
