"""transformers' Trainer as a private one: seven families against the microbatch oracle, and losses of one's own."""

import copy

import pytest
import torch
from test_private_step import KEY, written_out
from tolerances import AUTOCAST_BF16, LAYER_F32, LAYER_F64, MODEL_F32, PRIVATE_STEP_F64
from torch import nn
from trainer_models import FAMILIES, RECORDS, WHOLE, adapted, bert, rows, text, trainer_of

import lalora_kernels as lk
from lalora_kernels.nn import set_active


def alone(m, record):
    """transformers' loss of one record. Causal models compute it in float32 whatever they are; here it is float64."""
    outputs = m(**record)
    if record["labels"].dim() == 1:
        return outputs.loss
    loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), record["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss.float(), outputs.loss.float(), **LAYER_F32)
    return loss


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
    privacy = WHOLE | ({"lengths": range(RECORDS)} if family == "bert" else {})  # in another order
    trainer = trainer_of(patched, data, tmp_path, privacy=privacy, gradient_accumulation_steps=3, **checkpointing)
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


@pytest.mark.parametrize("kind", ["numbers", "whole numbers", "several labels"])
def test_targets_that_are_no_classes(kind, tmp_path):
    """The model's own loss is a mean over records already."""
    torch.manual_seed(0)
    base, targets, data, saved = bert()
    if kind == "several labels":
        data["labels"] = (torch.arange(2 * RECORDS).view(-1, 2) % 3 == 0).double()
    else:
        base.num_labels = base.config.num_labels = 1
        base.classifier = nn.Linear(24, 1)
        data["labels"] = torch.arange(RECORDS) if kind == "whole numbers" else torch.linspace(-1, 1, RECORDS).double()
    model = lk.adapt(base, r=3, target_modules=targets, modules_to_save=saved, verbose=False).double()
    for _, layer in lk.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    set_active(twin, "B")
    grads = written_out(twin, data, lambda m, r: m(**r).loss, clipping="flat", C=0.3, smoothing=None, divisor=RECORDS)
    trainer_of(model, data, tmp_path, privacy=WHOLE).train()
    for name, p in before.named_parameters():
        expected = p - 0.5 * grads[name] if name in grads else p
        torch.testing.assert_close(model.get_parameter(name), expected, **PRIVATE_STEP_F64, msg=name)


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


def test_empty_draws_and_a_second_call_of_train(tmp_path):
    _, patched, _ = adapted("bert", torch.float32)
    data = text(37, "class", 8)
    privacy = {"noise_multiplier": 1.0, "expected_batch_size": 1, "noise": lk.NoiseSource.fixed(KEY)}
    trainer = trainer_of(patched, data, tmp_path, privacy=privacy, max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert trainer.ledger.steps == trainer.state.global_step == 8  # of which some were empty: (7/8)^8 = 1/3 each
    trainer.train()
    assert trainer.ledger.steps == 16


@pytest.mark.parametrize("b, epochs, steps", [(2, 2, 8), (6, 3, 3)])
def test_an_epoch_takes_each_record_once_on_average(b, epochs, steps, tmp_path):
    """Of 8 records; round(8 / 6) = 1."""
    _, patched, _ = adapted("bert", torch.float32)
    privacy = {"noise_multiplier": 1.0, "expected_batch_size": b}
    trainer = trainer_of(
        patched, text(37, "class", 8), tmp_path, privacy=privacy, max_steps=-1, num_train_epochs=epochs
    )
    trainer.train()
    assert trainer.ledger.steps == trainer.state.global_step == trainer.state.max_steps == steps
    assert {entry.sample_rate for entry in trainer.ledger.entries} == {b / 8}


def test_in_bfloat16_one_record_more_does_not_change_how_the_others_are_rounded(tmp_path):
    """A record without a label adds nothing to the sum; of a mean it would change by what all are divided."""
    _, patched, data = adapted("gpt2", torch.float32)
    data["labels"][3] = -100
    sums = []
    for name, d in (("with", data), ("without", {k: torch.cat([v[:3], v[4:]]) for k, v in data.items()})):
        model, records = copy.deepcopy(patched), len(d["labels"])
        privacy = WHOLE | {"expected_batch_size": records}
        trainer_of(model, d, tmp_path / name, privacy=privacy, bf16=True, per_device_train_batch_size=records).train()
        moved = [(p - q).flatten() for p, q in zip(patched.parameters(), model.parameters())]
        sums.append(records * torch.cat(moved))
    torch.testing.assert_close(sums[0], sums[1], **MODEL_F32)


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


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_what_is_saved_comes_back_with_its_adapter(tmp_path):
    """From the final model and from a checkpoint, here and in PEFT: a base that transformers loads, and the adapter."""
    from peft import PeftModel

    torch.manual_seed(0)
    base, _, data, saved = bert()
    model = lk.adapt(base, r=2, target_modules="qv", modules_to_save=saved, verbose=False)
    for _, layer in lk.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    trainer = trainer_of(
        model, data, tmp_path, privacy={"noise_multiplier": 1.0}, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    inputs = {k: v for k, v in data.items() if k != "labels"}
    expected = model.eval()(**inputs).logits
    for folder in (tmp_path / "final", tmp_path / "checkpoint-2"):
        plain = type(base).from_pretrained(folder).eval()
        assert float((plain(**inputs).logits - expected).abs().max()) > 1e-3  # what it is without
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), folder / "adapter").eval()
        torch.testing.assert_close(theirs(**inputs).logits, expected, **MODEL_F32)
        ours = lk.load_adapter(plain, folder / "adapter").eval()
        torch.testing.assert_close(ours(**inputs).logits, expected, **MODEL_F32)
    first = lk.load_adapter(type(base).from_pretrained(tmp_path / "checkpoint-1"), tmp_path / "checkpoint-1/adapter")
    assert not torch.allclose(first.eval()(**inputs).logits, expected, **MODEL_F32)


def test_an_adapter_of_pefts_is_saved_once_and_one_without_a_file_does_not_stop_the_training(tmp_path, monkeypatch):
    from lalora_kernels import trainer as trainer_module

    _, patched, data = adapted("bert", torch.float32)
    trainer = trainer_of(patched, data, tmp_path / "peft", privacy={"noise_multiplier": 1.0})
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "peft/adapter_model.safetensors").exists() and not (tmp_path / "peft/adapter").exists()
    base, _, data, _ = bert()
    model = lk.adapt(base, r=2, target_modules="qv", verbose=False)
    model.classifier.requires_grad_(True)  # outside modules_to_save, so that no adapter holds it
    trainer = trainer_of(model, data, tmp_path / "ours", privacy={"noise_multiplier": 1.0})
    trainer.train()
    said = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    trainer.save_model()
    assert (tmp_path / "ours/model.safetensors").exists() and not (tmp_path / "ours/adapter").exists()
    assert "adapter was not written: trainable, but neither LoRA factors" in said[0]


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

    def test_a_base_in_half_precision(self, tmp_path):
        """Whose own loss has 8 bits."""
        torch.manual_seed(0)
        base, _, data, _ = bert()
        model = lk.adapt(base.bfloat16(), r=3, target_modules="qv", verbose=False)
        twin = copy.deepcopy(model).double()
        grads = written_out(twin, data, alone, clipping="flat", C=0.3, smoothing=None, divisor=RECORDS)
        before = copy.deepcopy(model.state_dict())
        trainer_of(model, data, tmp_path, privacy=WHOLE).train()
        found = torch.cat([(2 * (before[n] - model.state_dict()[n])).flatten() for n in grads if n.endswith("_B")])
        expected = torch.cat([g.flatten() for n, g in grads.items() if n.endswith("_B")])
        assert (found - expected).norm() < AUTOCAST_BF16 * expected.norm()

    def test_a_batch_without_labels(self, tmp_path):
        _, patched, data = adapted("bert")
        data = {**data, "token_type_ids": data["labels"][:, None].expand(-1, 7)}
        trainer = trainer_of(patched, data, tmp_path, privacy=WHOLE)
        trainer.train_dataset = [{k: v for k, v in r.items() if k != "labels"} for r in rows(data)]
        with pytest.raises(ValueError, match="no 'labels'.*compute_loss_func"):
            trainer.train()

    def test_batches_that_are_no_dict(self, tmp_path):
        _, patched, data = adapted("bert")
        trainer = trainer_of(patched, data, tmp_path, privacy=WHOLE)
        trainer.data_collator = lambda records: torch.stack([r["input_ids"] for r in records])
        with pytest.raises(ValueError, match="no 'labels'.*compute_loss_func"):
            trainer.train()


def test_the_logged_loss_is_the_mean_over_the_records_of_a_logical_batch(tmp_path):
    """Of 8 records in physical batches of 3, 3 and 2."""
    _, patched, _ = adapted("bert", torch.float32)
    parts = []

    def loss(outputs, labels, num_items_in_batch=None):
        value = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        parts.append((float(value.detach()), len(labels)))
        return value

    privacy = {"noise_multiplier": 1.0, "expected_batch_size": 8}
    trainer = trainer_of(
        patched, text(37, "class", 8), tmp_path, privacy=privacy, loss=loss, per_device_train_batch_size=3
    )
    trainer.train()
    parts = parts[-3:]  # before them the check of the loss
    assert [n for _, n in parts] == [3, 3, 2]
    expected = sum(value * n for value, n in parts) / 8
    assert trainer.state.log_history[0]["loss_not_private"] == pytest.approx(expected, rel=1e-3)  # rounded in the log
