"""Seven families of transformers models with adapters, data for them, and a PrivateTrainer of both."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

import lalora_kernels as lk
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
