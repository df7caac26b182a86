"""transformers' Trainer as a private one: seven families against the microbatch oracle, ledger, resume, refusals."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_private_step import KEY, written_out
from tolerances import LAYER_F32, LAYER_F64, MODEL_F32, PRIVATE_STEP_F64
from torch import nn
from transformers import TrainingArguments

import lalora_kernels as lk
from lalora_kernels.nn import set_active
from lalora_kernels.trainer import PrivateTrainer

RECORDS = 5


def text(vocabulary: int, labels: str, n: int = RECORDS):
    """Records of different lengths, padded to 7; ``labels``: "class", or "next" (the tokens, -100 where padded)."""
    torch.manual_seed(2)
    ids = torch.randint(3, vocabulary, (n, 7))
    mask = (torch.arange(7) < torch.tensor([7, 2, 5, 3, 6])[torch.arange(n) % 5, None]).long()
    y = torch.arange(n) % 2 if labels == "class" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": y}


def images(n: int = RECORDS, size: int = 16):
    torch.manual_seed(2)
    return {"pixel_values": torch.randn(n, 3, size, size, dtype=torch.float64), "labels": torch.arange(n) % 2}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), ["query", "value"], text(37, "class"), ["classifier"]


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config), ["query", "value"], text(37, "class"), ["classifier"]


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=37, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=16, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config), ["q_lin", "v_lin"], text(37, "class"), ["classifier"]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config), ["c_attn", "c_fc"], text(31, "next"), None


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config), ["q_proj", "v_proj"], text(31, "next"), None


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=4
    )
    return ViTForImageClassification(config), ["q_proj", "v_proj"], images(), ["classifier"]


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4, drop_path_rate=0.0
    )
    return SwinForImageClassification(config), ["q_proj", "v_proj"], images(), ["classifier"]


FAMILIES = {f.__name__: f for f in (bert, roberta, distilbert, gpt2, llama, vit, swin)}


def adapted(family: str, dtype=torch.float64):
    """(PEFT's model, the same patched, data): factors that are not zero."""
    torch.manual_seed(0)
    base, targets, data, saved = FAMILIES[family]()
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=saved)).to(dtype)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    return model, lk.patch_peft(copy.deepcopy(model)), data


def alone(m, record):
    """transformers' loss of one record. Causal models compute it in float32 whatever they are; here it is float64."""
    outputs = m(**record)
    if record["labels"].dim() == 1:
        return outputs.loss
    loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), record["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss.float(), outputs.loss.float(), **LAYER_F32)
    return loss


def rows(data):
    return [{k: v[i] for k, v in data.items()} for i in range(len(data["labels"]))]


def trainer_of(model, data, folder, privacy=None, eval_data=None, loss=None, **args):
    privacy = {"noise_multiplier": 0.0, "target_delta": 1e-5, **(privacy or {})}
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 1, "optim": "sgd",
        "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.3, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, **args,
    }  # fmt: skip
    return PrivateTrainer(
        model, TrainingArguments(**arguments), train_dataset=rows(data), privacy=privacy, compute_loss_func=loss,
        eval_dataset=eval_data,
    )  # fmt: skip


WHOLE = {"expected_batch_size": RECORDS, "smoothing": None}  # every record in every batch


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_equals_the_microbatch_oracle(family, tmp_path):
    """Logits are PEFT's; the step is that of single-record backwards of the model's own loss, in three microbatches."""
    model, patched, data = adapted(family)
    torch.testing.assert_close(patched(**data).logits, model(**data).logits, **LAYER_F64)
    twin = copy.deepcopy(patched)
    set_active(twin, "B")
    grads = written_out(twin, data, alone, clipping="flat", C=0.3, smoothing=None, divisor=RECORDS)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in grads:
                p -= 0.5 * grads[name]
    checkpointing = {"gradient_checkpointing": True} if family in ("llama", "vit") else {}
    trainer = trainer_of(patched, data, tmp_path, privacy=WHOLE, gradient_accumulation_steps=3, **checkpointing)
    trainer.train()
    assert patched.base_model.model.is_gradient_checkpointing == bool(checkpointing)
    assert trainer.state.global_step == trainer.ledger.steps == 1 and len(grads) >= 4
    moved = 0
    for (name, p), q, was in zip(patched.named_parameters(), twin.parameters(), model.parameters()):
        torch.testing.assert_close(p, q, **PRIVATE_STEP_F64, msg=name)
        moved += not torch.equal(p, was)
    assert moved == len(grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_adapters_of_our_own(family):
    torch.manual_seed(0)
    base, _, data, saved = FAMILIES[family]()
    model = lk.adapt(base, r=3, target_modules="qv", modules_to_save=saved, verbose=False).double()
    assert len(list(lk.lora_layers(model))) >= 2
    columns = {k: v for k, v in data.items() if k != "labels"}
    lk.check_per_sample(model, columns, lambda m, batch: m(**batch).logits.square().mean())


def test_label_smoothing_and_records_without_labels(tmp_path):
    """The oracle is transformers' LabelSmoother on each record alone."""
    from transformers.trainer_pt_utils import LabelSmoother

    _, patched, data = adapted("gpt2")
    data["labels"][3] = -100
    keep = {k: torch.cat([v[:3], v[4:]]) for k, v in data.items()}
    twin = copy.deepcopy(patched)
    set_active(twin, "B")
    smoother = LabelSmoother(epsilon=0.2)

    def loss(m, record):
        return smoother(m(**{k: v for k, v in record.items() if k != "labels"}), record["labels"], shift_labels=True)

    grads = written_out(twin, keep, loss, clipping="flat", C=0.3, smoothing=None, divisor=RECORDS)
    before = {n: p.detach().clone() for n, p in patched.named_parameters()}
    trainer_of(patched, data, tmp_path, privacy=WHOLE, label_smoothing_factor=0.2).train()
    for name, p in patched.named_parameters():
        expected = before[name] - 0.5 * grads[name] if name in grads else before[name]
        torch.testing.assert_close(p, expected, **PRIVATE_STEP_F64, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate(family, tmp_path):
    model, patched, data = adapted(family, torch.float32)
    trainer_of(patched, data, tmp_path, privacy={"noise_multiplier": 1.0}).train()
    lk.set_active(patched, "AB")
    model.load_state_dict(patched.state_dict())
    prompt = {"input_ids": data["input_ids"][:2, :2], "attention_mask": data["attention_mask"][:2, :2]}
    ours, theirs = (m.eval().generate(**prompt, max_new_tokens=6, do_sample=False) for m in (patched, model))
    assert ours.shape == (2, 8) and torch.equal(ours, theirs)


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

    def test_epsilon_is_in_every_log_and_within_the_budget(self, tmp_path):
        trainer = self.run(tmp_path, 6, privacy=self.target)
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
        assert second.get_epsilon() <= 3.0
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
        with pytest.raises(lk.LedgerError, match="there is no ledger"):
            self.run(tmp_path, 6, resume=True)

    def test_another_budget_or_another_run(self, tmp_path):
        self.run(tmp_path, 2)
        with pytest.raises(ValueError, match="ledger of another run.*resume_from_checkpoint"):
            self.run(tmp_path, 6)
        with pytest.raises(ValueError, match="has the budget"):
            self.run(tmp_path, 6, resume=True, privacy=self.target)

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


def test_empty_draws_and_a_second_call_of_train(tmp_path):
    _, patched, _ = adapted("bert", torch.float32)
    data = text(37, "class", 8)
    privacy = {"noise_multiplier": 1.0, "expected_batch_size": 1, "noise": lk.NoiseSource.fixed(KEY)}
    trainer = trainer_of(patched, data, tmp_path, privacy=privacy, max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert trainer.ledger.steps == trainer.state.global_step == 8  # of which some were empty: (7/8)^8 = 1/3 each
    trainer.train()
    assert trainer.ledger.steps == 16


def test_bfloat16_autocast(tmp_path):
    _, patched, data = adapted("bert", torch.float32)
    twin = copy.deepcopy(patched)
    trainer_of(patched, data, tmp_path / "a", privacy=WHOLE, bf16=True).train()
    trainer_of(twin, data, tmp_path / "b", privacy=WHOLE).train()
    name = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.default.weight"
    a, b = patched.get_parameter(name), twin.get_parameter(name)
    assert torch.linalg.norm(a - b) < 0.1 * torch.linalg.norm(b - adapted("bert", torch.float32)[0].get_parameter(name))


def test_compiled(tmp_path):
    torch.compiler.reset()
    _, patched, data = adapted("vit", torch.float32)
    data["pixel_values"] = data["pixel_values"].float()
    twin = copy.deepcopy(patched)
    trainer = trainer_of(
        patched, data, tmp_path / "a", privacy=WHOLE, torch_compile=True, torch_compile_backend="aot_eager"
    )
    trainer.train()
    assert trainer.model_wrapped is not trainer.model
    trainer_of(twin, data, tmp_path / "b", privacy=WHOLE).train()
    for (name, p), q in zip(patched.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, **MODEL_F32, msg=name)


def test_our_own_adapters_and_predict(tmp_path):
    torch.manual_seed(0)
    base, _, data, saved = bert()
    model = lk.adapt(base, r=2, target_modules="qv", modules_to_save=saved, verbose=False)
    trainer = trainer_of(model, data, tmp_path, privacy={"noise_multiplier": 1.0})
    trainer.train()
    predicted = trainer.predict(rows(data))
    torch.testing.assert_close(
        torch.from_numpy(predicted.predictions),
        model(**{k: v for k, v in data.items() if k != "labels"}).logits.detach(),
        **MODEL_F32,
    )
    lk.save_adapter(model, tmp_path / "adapter")
    assert lk.load_adapter(bert()[0], tmp_path / "adapter")


class TestLosses:
    def test_a_mean_over_the_batchs_tokens(self, tmp_path):
        def over_tokens(outputs, labels, num_items_in_batch=None):
            return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        _, patched, data = adapted("gpt2")
        with pytest.raises(ValueError, match="divides by a count over the whole batch.*each record's own positions"):
            trainer_of(patched, data, tmp_path, privacy=WHOLE, loss=over_tokens, per_device_train_batch_size=5).train()

    def test_a_sum_instead_of_a_mean(self, tmp_path):
        def total(outputs, labels, num_items_in_batch=None):
            return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")

        _, patched, data = adapted("bert")
        with pytest.raises(ValueError, match="the loss is a sum over the records"):
            trainer_of(patched, data, tmp_path, privacy=WHOLE, loss=total).train()

    def test_a_mean_over_records_of_your_own(self, tmp_path):
        def focal(outputs, labels, num_items_in_batch=None):
            each = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
            return ((1 - (-each).exp()) ** 2 * each).mean()

        _, patched, data = adapted("bert")
        twin = copy.deepcopy(patched)
        set_active(twin, "B")
        grads = written_out(
            twin, data, lambda m, r: focal(m(r["input_ids"], r["attention_mask"]), r["labels"]), clipping="flat", C=0.3,
            smoothing=None, divisor=RECORDS,
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in patched.named_parameters()}
        trainer_of(patched, data, tmp_path, privacy=WHOLE, loss=focal).train()
        for name, grad in grads.items():
            torch.testing.assert_close(patched.get_parameter(name), before[name] - 0.5 * grad, **PRIVATE_STEP_F64)

    def test_a_model_with_a_loss_of_its_own(self, tmp_path):
        _, patched, data = adapted("bert")

        def scale(module, args, outputs):
            outputs.loss = None if outputs.loss is None else 2 * outputs.loss

        patched.base_model.model.register_forward_hook(scale)
        with pytest.raises(ValueError, match="model's own loss of one record is .* computes something else"):
            trainer_of(patched, data, tmp_path, privacy=WHOLE).train()

    def test_a_batch_without_labels(self, tmp_path):
        _, patched, data = adapted("bert")
        data = {**data, "token_type_ids": data["labels"][:, None].expand(-1, 7)}
        trainer = trainer_of(patched, data, tmp_path, privacy=WHOLE)
        trainer.train_dataset = [{k: v for k, v in r.items() if k != "labels"} for r in rows(data)]
        with pytest.raises(ValueError, match="no 'labels'.*compute_loss_func"):
            trainer.train()


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"train_sampling_strategy": "group_by_length"}, "picks records by another rule than Poisson sampling"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size starts over after a step was charged"),
            ({"include_num_input_tokens_seen": True}, "counts the tokens of private batches"),
            ({"max_grad_norm": 0.0}, "max_grad_norm is C, and above 0"),
            ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["x"]}, "steps within backward"),
        ],
    )
    def test_arguments(self, arguments, message, tmp_path):
        _, patched, data = adapted("bert")
        with pytest.raises(ValueError, match=message):
            trainer_of(patched, data, tmp_path, **arguments)

    @pytest.mark.parametrize("name, value", [("fp16", True), ("_n_gpu", 2), ("use_liger_kernel", True), ("fsdp", "x")])
    def test_what_this_machine_cannot_ask_for(self, name, value, tmp_path):
        from lalora_kernels.trainer import _refuse_arguments

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.args.max_grad_norm = 1.0
        _refuse_arguments(trainer)
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match="nn.DataParallel" if name == "_n_gpu" else name):
            _refuse_arguments(trainer)

    def test_several_processes(self, tmp_path, monkeypatch):
        from lalora_kernels.trainer import _refuse_arguments

        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path)
        trainer.args.max_grad_norm = 1.0
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        with pytest.raises(ValueError, match="several processes are for a loop of your own"):
            _refuse_arguments(trainer)

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

    def test_peft_unpatched(self, tmp_path):
        model, _, data = adapted("bert")
        with pytest.raises(ValueError, match="call lalora_kernels.patch_peft"):
            trainer_of(model, data, tmp_path).train()
