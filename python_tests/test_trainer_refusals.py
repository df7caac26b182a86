"""Arguments, settings and models that the private Trainer refuses."""

import pytest
import torch
import torch.distributed as dist
from trainer_models import adapted, rows, trainer_of
from transformers import TrainingArguments

import lalora_kernels as lk


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

    @pytest.mark.parametrize(
        "name, value", [
            ("fp16", True), ("_n_gpu", 2), ("use_liger_kernel", True), ("fsdp", "x"), ("deepspeed", "x"),
            ("parallelism_config", object()), ("is_deepspeed_enabled", True), ("is_fsdp_enabled", True),
        ],
    )  # fmt: skip
    def test_what_this_machine_cannot_ask_for(self, name, value, tmp_path):
        from lalora_kernels.trainer_refusals import refuse_arguments

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.args.max_grad_norm = 1.0
        refuse_arguments(trainer)
        setattr(trainer if name.startswith("is_") else trainer.args, name, value)
        word = "nn.DataParallel" if name == "_n_gpu" else name.removeprefix("is_").removesuffix("_enabled")
        with pytest.raises(ValueError, match=f"PrivateTrainer: {word} "):
            refuse_arguments(trainer)

    @pytest.mark.parametrize(
        "given, message",
        [("model_init", "model_init starts over while the ledger"), ("optimizers", "the optimizer is private already")],
    )
    def test_what_is_given_beside_the_arguments(self, given, message, tmp_path):
        from lalora_kernels.trainer import PrivateTrainer

        _, patched, data = adapted("bert")
        plain = torch.optim.SGD([p for p in patched.parameters() if p.requires_grad], lr=0.1)
        model, more = None, {"model_init": lambda: patched}
        if given == "optimizers":
            private, _ = lk.make_private(patched, plain, rows(data), noise_multiplier=1.0, sample_rate=0.5)
            model, more = patched, {"optimizers": (private, None)}
        args = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=1.0, report_to="none", use_cpu=True)
        privacy = {"noise_multiplier": 1.0, "target_delta": 1e-2}
        with pytest.raises(ValueError, match=message):
            PrivateTrainer(model, args, train_dataset=rows(data), privacy=privacy, **more)

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

    def test_a_trainer_whose_loss_calls_the_model_itself(self, tmp_path):
        from lalora_kernels.trainer import PrivateTrainer

        other = type("SentenceTransformerTrainer", (PrivateTrainer,), {"__module__": "sentence_transformers.trainer"})
        model, _, data = adapted("bert")
        with pytest.raises(ValueError, match="make_private and a loss of each pair alone"):
            other(model, None, train_dataset=data, privacy={"noise_multiplier": 1.0, "target_delta": 1e-2})

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

    def test_a_ledger_before_there_is_one(self, tmp_path):
        _, patched, data = adapted("bert")
        with pytest.raises(RuntimeError, match="no ledger before train"):
            trainer_of(patched, data, tmp_path).get_epsilon()

    def test_peft_unpatched(self, tmp_path):
        model, _, data = adapted("bert")
        with pytest.raises(ValueError, match="call lalora_kernels.patch_peft"):
            trainer_of(model, data, tmp_path).train()


def a_head(kind):
    """A model whose own loss is a mean over records, but of no "labels" that a cross-entropy takes; its records."""
    from transformers import BertConfig, BertForQuestionAnswering, Wav2Vec2Config, Wav2Vec2ForCTC

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    if kind == "answers":
        model = BertForQuestionAnswering(BertConfig(vocab_size=20, max_position_embeddings=8, **small))
        spans = [{"start_positions": i % 4, "end_positions": 5} for i in range(20)]
        return model, [{"input_ids": torch.randint(0, 20, (6,)), **span} for span in spans]
    config = Wav2Vec2Config(
        vocab_size=9, conv_dim=(8,), conv_stride=(4,), conv_kernel=(8,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=1, feat_extract_norm="layer", layerdrop=0.0,
        do_stable_layer_norm=True, mask_time_prob=0.0, ctc_loss_reduction="mean", **small,
    )  # fmt: skip
    records = [{"input_values": torch.randn(60), "labels": torch.randint(1, 9, (3,))} for _ in range(20)]
    return Wav2Vec2ForCTC(config), records


class Renamed(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_values, targets):
        return self.model(input_values, labels=targets)


@pytest.mark.parametrize("kind, message", [("answers", "the batch has no 'labels'"), ("ctc", "by another name")])
def test_the_cure_for_a_loss_that_only_the_model_knows(kind, message, tmp_path):
    from lalora_kernels.trainer import PrivateTrainer

    def train(model, records, name, **more):
        args = TrainingArguments(
            output_dir=str(tmp_path / name), per_device_train_batch_size=8, max_steps=1, max_grad_norm=1.0,
            report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        privacy = {"target_epsilon": 3.0, "target_delta": 1e-2}
        trainer = PrivateTrainer(model, args, train_dataset=records, privacy=privacy, **more)
        trainer.train()
        return trainer.ledger.steps

    model, records = a_head(kind)
    lk.adapt(model, r=2, target_modules="qv", verbose=False)
    with pytest.raises(ValueError, match=f"{message}.*lambda outputs, labels, num_items_in_batch=None: outputs"):
        train(model, records, "refused")
    model, records = a_head(kind)
    lk.adapt(model, r=2, target_modules="qv", verbose=False)
    if kind == "ctc":
        records = [{"input_values": r["input_values"], "targets": r["labels"]} for r in records]
        model = Renamed(model)
    own = lambda outputs, labels, num_items_in_batch=None: outputs["loss"]  # noqa: E731
    assert train(model, records, "cured", compute_loss_func=own) == 1
