"""Classifiers by name: what is loaded, which heads are new, what the embedded model's cache holds."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from small import SENTENCES, bert_folder, vit_folder

from lalora_kernels import embedded
from lalora_kernels.data import BadInput, load_data
from lalora_kernels.models import TextBatch, load_model, torchvision_beside_cpu_torch
from lalora_kernels.placeholders import placeholder_model, placeholder_records


@pytest.fixture
def short_recipe(monkeypatch, tmp_path):
    """A cache of its own and 10 steps of pre-training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(embedded.RECIPE, "steps", 10)


def test_the_embedded_model_learns_digits_once_and_is_then_read_from_the_cache(short_recipe, monkeypatch):
    monkeypatch.setitem(embedded.RECIPE, "steps", 200)
    seen = []
    first = load_model("embedded", 10, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(i + 1, 200) for i in range(200)] and first.new_modules == []
    data = load_data("digits")
    x, y = first.collate([data.test[i] for i in range(len(data.test))])
    with torch.no_grad():
        assert (first.logits(x).argmax(1) == y).float().mean() > 0.5  # chance is 0.1
    again = load_model("embedded", 10, progress=lambda *_: pytest.fail("trained although cached"))
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert not again.model.training and again.model is not first.model


def test_a_cache_that_cannot_be_written_is_warned_of(short_recipe, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept in .*file/lalora_kernels .*set XDG_CACHE_HOME"):
        assert load_model("embedded", 10).new_modules == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_cache_is_made_anew(short_recipe, damage):
    good = load_model("embedded", 10).model.state_dict()
    path = embedded.cache_file()
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes({"truncated": content[:-9], "flipped": content, "empty": b""}[damage])
    steps = []
    model = load_model("embedded", 10, progress=lambda done, _: steps.append(done)).model
    assert len(steps) == 10
    torch.testing.assert_close(model.state_dict(), good, rtol=1e-3, atol=1e-3)
    assert load_model("embedded", 10, progress=lambda *_: pytest.fail("not cached again"))


def test_pretraining_leaves_the_global_generator_alone(short_recipe):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model("embedded", 10)
    assert torch.equal(torch.rand(4), expected)


def test_a_new_head_for_other_classes_comes_from_the_seed(short_recipe):
    a, b, c = (load_model("embedded", 7, seed=seed) for seed in (1, 1, 2))
    assert a.new_modules == ["classifier"] and a.model.classifier.weight.shape == (7, 64)
    assert torch.equal(a.model.classifier.weight, b.model.classifier.weight)
    assert not torch.equal(a.model.classifier.weight, c.model.classifier.weight)


def test_a_transformers_folder_of_images(tmp_path):
    from transformers import ViTForImageClassification

    folder = vit_folder(tmp_path / "vit", classes=10)
    loaded = load_model(folder, 10)
    assert loaded.kind == "image" and loaded.new_modules == [] and loaded.head == ["classifier"]
    assert (loaded.collate.size, loaded.collate.channels) == (8, 1)
    assert loaded.collate.mean == (0.5,) and loaded.collate.std == (0.25,)
    x, _ = loaded.collate([load_data("digits").test[0]])
    with torch.no_grad():
        theirs = ViTForImageClassification.from_pretrained(folder).eval()(x).logits
        assert torch.equal(loaded.model.eval()(x).logits, theirs)
    assert load_model(folder, 4).new_modules == ["classifier"]


def test_a_transformers_folder_of_text_without_a_head(tmp_path):
    from transformers import BertForSequenceClassification

    folder = bert_folder(tmp_path / "bert")
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(folder)
    loaded = load_model(folder, 3, kind="text")
    assert loaded.new_modules == ["classifier"] and loaded.head == ["classifier"]
    inputs, _ = loaded.collate([(s, 0) for s in SENTENCES])
    assert loaded.logits(inputs).shape == (len(SENTENCES), 3)


@pytest.mark.parametrize("kind, longest", [("bert", 16), ("roberta", 15), ("mpnet", 14)])
def test_the_longest_text_is_the_longest_that_the_model_takes(tmp_path, kind, longest):
    """RoBERTa's kind counts positions from behind the padding's own, here 0, MPNet's from 2."""
    folder = bert_folder(tmp_path / kind)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(kind, vocab_size=30, max_position_embeddings=16, pad_token_id=0, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    loaded = load_model(folder, 2, kind="text", max_length=64)
    inputs, _ = loaded.collate([(" ".join(SENTENCES), 0)])
    assert inputs["input_ids"].shape == (1, longest) and loaded.logits(inputs).shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        loaded.logits({key: torch.cat([value, value[:, -1:]], 1) for key, value in inputs.items()})
    planned = placeholder_model(folder, 2, kind="text", max_length=64)
    inputs, _ = planned.collate(placeholder_records(planned, 3, 2))
    assert inputs["input_ids"].shape == (3, longest) and planned.logits(inputs).shape == (3, 2)


def test_a_text_is_no_longer_than_its_tokenizer_says(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(folder)
    loaded = load_model(folder, 2, kind="text")
    assert loaded.collate([(" ".join(SENTENCES), 0)])[0]["input_ids"].shape == (1, 7)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "t5"])
def test_a_folder_without_its_tokenizer(tmp_path, kind):
    """transformers makes one of the special tokens alone, under which all texts are alike."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2} if kind == "t5" else {}
    config = AutoConfig.for_model(kind, vocab_size=300, pad_token_id=0, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / kind)
    with pytest.raises(BadInput, match=r"its tokenizer knows no words.*tokenizer\.save_pretrained\("):
        load_model(str(tmp_path / kind), 2, kind="text")


def test_a_length_without_room_for_text(tmp_path):
    """Below its own tokens a tokenizer cuts nothing at all."""
    from tokenizers.processors import TemplateProcessing

    folder = bert_folder(tmp_path / "bert")
    for length in (1, 2):
        with pytest.raises(BadInput, match=f"--max-length {length}: 2 tokens of a record are the model's own; give 3"):
            load_model(folder, 2, kind="text", max_length=length)
    tokenizer = load_model(folder, 2, kind="text", max_length=3).collate.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    pair = (SENTENCES[0], SENTENCES[5])
    with pytest.raises(BadInput, match="3 tokens of a record are the model's own; give 5 or more"):
        TextBatch(tokenizer, 4)([(pair, 0)])
    assert TextBatch(tokenizer, 5)([(pair, 0)])[0]["input_ids"].shape == (1, 5)


def test_timm_weights_from_a_file(tmp_path):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=6).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        same = load_model("timm:test_vit", 6, weights=str(tmp_path / name))
        assert same.new_modules == [] and same.head == ["head"]
        x, _ = same.collate([load_data("digits").test[0]])
        with torch.no_grad():
            assert torch.equal(same.model.eval()(x), theirs(x))
    other = load_model("timm:test_vit", 4, weights=str(tmp_path / "w.pth"), image_size=96)
    assert other.new_modules == ["head"] and other.model.head.out_features == 4
    assert torch.equal(other.model.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)
    assert other.collate.size == 96


def test_timm_and_torchvision_stay_out_until_a_timm_model_is_asked_for():
    script = (
        "import sys, lalora_kernels, lalora_kernels.cli, lalora_kernels.models, lalora_kernels.federated.run\n"
        "from lalora_kernels.models import torchvision_beside_cpu_torch as f\n"
        "f(); f()\n"
        "print([m for m in ('timm', 'torchvision', 'transformers', 'matplotlib', 'mlxtend') if m in sys.modules])\n"
        "import timm, torchvision.ops\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_torchvision_help_does_nothing_twice_and_says_the_same():
    assert torchvision_beside_cpu_torch() == torchvision_beside_cpu_torch()


def test_a_folder_without_the_scale_of_its_pixels_says_what_is_missing(tmp_path):
    folder = vit_folder(tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").unlink()
    with pytest.raises(BadInput, match="vit: no preprocessor_config.json, .*copy that of the model .*image_mean"):
        load_model(folder, 10)


@pytest.mark.parametrize("name", ["/nonexistent", "./none", "none/", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_name_of_the_hub(name):
    for load in (load_model, placeholder_model):
        with pytest.raises(BadInput, match=f"hf:{name}: no such folder"):
            load(f"hf:{name}", 2, kind="text")


@pytest.mark.parametrize("name", ["embedded", "timm:test_vit"])
def test_a_model_of_images_is_not_made_for_texts(monkeypatch, name):
    for made in ("_embedded", "_timm"):
        monkeypatch.setattr(f"lalora_kernels.models.{made}", lambda *_: pytest.fail("pre-trained or downloaded"))
    with pytest.raises(BadInput, match="classifies images, but the data are texts"):
        load_model(name, 2, kind="text")


def gpt2_folder(path, **tokens):
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(bert_folder(path))
    for role in ("pad", "cls", "sep", "unk", "eos"):
        setattr(tokenizer, f"{role}_token", tokens.get(role))
    tokenizer.save_pretrained(path)
    size = dict(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=32, num_labels=2)
    GPT2ForSequenceClassification(GPT2Config(**size)).save_pretrained(path)
    return str(path)


def test_a_model_without_a_padding_token_pads_with_the_end_of_a_text(tmp_path):
    """GPT-2's and Llama's have none; a text's scores do not depend on how long the others of its batch are."""
    folder = gpt2_folder(tmp_path / "gpt2", eos="[SEP]", unk="[UNK]")
    found = load_model(folder, 2, kind="text")
    model, pad = found.model.eval(), found.collate.tokenizer.pad_token_id
    assert found.collate.tokenizer.pad_token == "[SEP]" and model.config.pad_token_id == pad
    alone, together = (found.collate([(s, 0) for s in SENTENCES[:n]])[0] for n in (1, 4))
    assert together["input_ids"].shape[1] > alone["input_ids"].shape[1]
    torch.testing.assert_close(found.logits(together)[:1], found.logits(alone))
    assert placeholder_model(folder, 2, kind="text").model.config.pad_token_id is not None


def test_a_tokenizer_with_nothing_to_pad_with(tmp_path):
    with pytest.raises(BadInput, match="no padding token and none that ends a text; give it one, tokenizer.pad_token"):
        load_model(gpt2_folder(tmp_path / "gpt2", unk="[UNK]"), 2, kind="text")


def test_a_size_of_images_is_refused_for_texts(tmp_path):
    with pytest.raises(BadInput, match="--image-size 64 is for images, and the data are texts"):
        load_model(bert_folder(tmp_path / "bert"), 2, kind="text", image_size=64)


@pytest.mark.parametrize("made", ["bert", "vit"])
def test_without_a_network_a_model_that_is_stored_loads_at_once_and_no_other(tmp_path, monkeypatch, made):
    """transformers would ask the hub for half a minute, once for each file."""
    from huggingface_hub import constants

    monkeypatch.setattr("lalora_kernels.models.no_hub", lambda: "hub.example")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("asked again"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub/models--some--model"
    make = {"bert": bert_folder, "vit": vit_folder}[made]
    folder = make(stored / "snapshots" / ("0" * 40))
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("0" * 40)
    kind = {"bert": "text", "vit": "image"}[made]
    one, other = (load_model(name, 2, kind=kind).model.state_dict() for name in ("hf:some/model", folder))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(BadInput, match="hf:some/other: hub.example has no address here .*, and no earlier run"):
        load_model("hf:some/other", 2, kind=kind)
