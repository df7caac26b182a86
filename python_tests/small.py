"""Small real inputs for tests of the trainer: models in folders as transformers writes them, digits as .npz, text."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(os.environ.get("LALORA_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"

SENTENCES = ["a fine film", "a dull film", "fine acting", "dull story , dull end", "a fine story", "the end is dull"]


def vit_folder(path: Path, classes: int = 10) -> str:
    """An 8 x 8 grey-image ViT of two layers with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=classes,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25], "size": 8}')
    return str(path)


def bert_folder(path: Path, classes: int = 2) -> str:
    """A two-layer BERT with random weights and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(6)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=classes,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(path)
    return str(path)


def digits_npz(path: Path, records: int = 240, tests: int = 60, **replace: np.ndarray) -> str:
    """scikit-learn's digits as uint8 images; ``replace`` overrides arrays."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = (bunch.images * 15.9).astype(np.uint8), bunch.target
    arrays = {
        "x_train": x[:records], "y_train": y[:records],
        "x_test": x[records : records + tests], "y_test": y[records : records + tests],
    }  # fmt: skip
    np.savez(path, **(arrays | replace))
    return str(path)


def text_tsv(path: Path, copies: int = 20) -> str:
    """Sentences with label 1 where they say "fine"; no two are equal."""
    lines = [f"{int('fine' in s)}\t{s} {i}" for i, s in enumerate(SENTENCES * copies)]
    path.write_text("label\tsentence\n" + "\n".join(lines) + "\n")
    return str(path)


def shared(name: str) -> Path:
    """A file of real data beside the repository; skips the test where it is absent."""
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in {SHARED} (LALORA_SHARED names another place)")
    return SHARED / name
