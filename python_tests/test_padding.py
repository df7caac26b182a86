"""What a model makes of a record must not depend on how far the others' lengths pad it."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lalora_kernels as lk
from lalora_kernels.privacy.padding import LOOKS, TRIES, PaddingCheck, refuse_padding

WORDS, WIDTH = 50, 8
REFUSED = "changes when the padding of its batch is cut away.*padding='max_length'"


def records(lengths):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(5, WORDS, (n,), generator=generator), i % 2) for i, n in enumerate(lengths)]


def padding_to(side="right", longest=None):
    """A collate function that pads with 0, to ``longest`` tokens or to the batch's longest record."""

    def collate(rows):
        length = longest or max(len(ids) for ids, _ in rows)
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
        for i, (tokens, _) in enumerate(rows):
            place = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
            ids[i, place], mask[i, place] = tokens, 1
        return {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for _, label in rows])

    return collate


class Words(nn.Module):
    """Classifies by the mean over positions: over a record's own, or over all there are."""

    def __init__(self, masked, convolution=False):
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.table, self.fc = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1) if convolution else None
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids, attention_mask):
        x = torch.tanh(self.fc(self.table(input_ids)))
        if self.conv is not None:
            x = self.conv(x.mT).mT
        weight = attention_mask.to(x.dtype) if self.masked else torch.ones_like(attention_mask).to(x.dtype)
        return self.head((x * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True))


def train(model, lengths, collate, steps=8, check=True, logits=lambda out: out, targets=("fc",)):
    lk.adapt(model, target_modules=list(targets), modules_to_save=[], r=2, verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(records(lengths), batch_size=4, collate_fn=collate), noise_multiplier=1.0,
        check=check,
    )  # fmt: skip
    for batch, target in loader.steps(steps):
        nn.functional.cross_entropy(logits(model(**batch)), target).backward()
        optimizer.step()
    return optimizer.ledger.steps


MIXED = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 4, 7]


class TestALoop:
    def test_a_mean_over_padding_is_refused(self):
        with pytest.raises(ValueError, match=REFUSED):
            train(Words(masked=False), MIXED, padding_to(), steps=40)

    def test_a_mean_over_a_record_s_own_positions_is_not(self):
        assert train(Words(masked=True), MIXED, padding_to()) == 8

    def test_where_all_batches_have_one_length_nothing_depends_on_it(self):
        assert train(Words(masked=False), MIXED, padding_to(longest=12)) == 8

    @pytest.mark.parametrize("check", ["loss", False])
    def test_it_is_part_of_the_check_of_the_first_batches(self, check):
        assert train(Words(masked=False), MIXED, padding_to(), check=check) == 8


def test_a_padded_record_is_not_looked_for_for_ever():
    """On a GPU every look waits for the device; parts of one record each never hold a padded one."""
    asked, model = PaddingCheck(), Words(masked=False)
    for i in range(LOOKS + 3):
        batch, _ = padding_to()(records([3 + i % 2]))
        asked(model, (), batch)
    assert (asked.looks, asked.left) == (0, TRIES)
    batch, _ = padding_to()(records([9, 3]))
    asked(model, (), batch)  # is not asked any more


class TestOneRecord:
    """The most padded record of a batch, alone."""

    def asked(self, model, lengths, side="right"):
        batch, _ = padding_to(side)(records(lengths))
        return refuse_padding(model, (), batch)

    def test_a_convolution_reaches_into_the_padding(self):
        with pytest.raises(ValueError, match=REFUSED):
            self.asked(Words(masked=True, convolution=True), [9, 5, 3])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_model_that_is_indifferent_passes(self, side):
        assert self.asked(Words(masked=True), [9, 5, 3], side)

    def test_without_padding_there_is_nothing_to_ask(self):
        assert not self.asked(Words(masked=False), [4, 4])

    def test_a_placeholder_s_mask_is_no_record_s(self):
        batch, _ = padding_to()(records([6, 4]))
        batch["attention_mask"][1] = 0
        assert not refuse_padding(Words(masked=False), (), batch)

    def test_a_model_that_takes_one_length_alone_is_not_judged(self):
        model = Words(masked=False)
        model.register_forward_pre_hook(lambda m, a, k: self.refuse_short(k), with_kwargs=True)
        assert self.asked(model, [9, 5, 3])

    @staticmethod
    def refuse_short(kwargs):
        if kwargs["input_ids"].shape[1] != 9:
            raise ValueError("nine tokens, please")

    def test_the_model_is_left_as_it_was(self):
        model = Words(masked=True).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        self.asked(model, [9, 3])
        assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def tiny(kind, **settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=WORDS, pad_token_id=0, **settings)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("longest, alpha, refused", [(None, 5.0, True), (12, 5.0, False), (None, None, False)])
def test_neftune_s_noise_goes_by_the_longest_record(longest, alpha, refused):
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = tiny("Bert", **SIZES).train()
    if alpha is not None:
        embeddings = model.get_input_embeddings()
        embeddings.neftune_noise_alpha = alpha
        embeddings.register_forward_hook(neftune_post_forward_hook)
    step = {"steps": 8, "logits": lambda out: out.logits, "targets": ["query"]}
    if refused:
        with pytest.raises(ValueError, match="NEFTune adds noise to .*word_embeddings.*padding='max_length'"):
            train(model, MIXED, padding_to(longest=longest), **step)
    else:
        assert train(model, MIXED, padding_to(longest=longest), **step) == 8


@pytest.mark.parametrize(
    "kind, settings, side, fits",
    [
        ("Bert", SIZES, "right", True),
        ("Bert", SIZES, "left", False),  # positions are counted from the padding on
        ("GPT2", GPT2, "right", True),
        ("GPT2", GPT2, "left", False),
        ("Llama", SIZES, "right", True),
        ("Llama", SIZES, "left", True),  # rotary positions are relative
        ("Qwen2", SIZES | {"num_key_value_heads": 2}, "left", True),
    ],
)
def test_families_of_transformers(kind, settings, side, fits):
    model = tiny(kind, **settings)
    batch, _ = padding_to(side)(records([12, 5, 7]))
    if fits:
        assert refuse_padding(model, (), batch)
    else:
        with pytest.raises(ValueError, match=REFUSED):
            refuse_padding(model, (), batch)


class Always(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.3)


@pytest.mark.parametrize("masked", [True, False])
def test_a_model_that_draws_in_eval_mode_too_is_told_apart_all_the_same(masked):
    model = Words(masked)
    model.fc = nn.Sequential(model.fc, Always())
    if masked:
        assert train(model, MIXED, padding_to(), targets=("0",)) == 8
    else:
        with pytest.raises(ValueError, match=REFUSED):
            train(model, MIXED, padding_to(), steps=40, targets=("0",))
