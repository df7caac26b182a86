"""What a server sends is clipped, counted or refused like anything else, whatever its adapter state and settings are."""

import torch
from flower_nodes import settings, small_world  # noqa: F401

from lalora_kernels.federated.task import prepare


def test_a_records_gradient_has_the_same_bits_however_many_others_were_drawn(world, monkeypatch):
    """Of a mean 1/N rounds it, and in a state whose terms cancel that is no small thing. N = 13 is no power of two."""
    task = prepare(settings(world))
    task.classifier.model.eval()
    scores = task.classifier.logits(task.classifier.collate([task.data.train[0]])[0]).detach()
    found = []
    for n in (1, 13):
        logits = scores.repeat(n, 1).requires_grad_()
        monkeypatch.setattr(task.classifier, "logits", lambda inputs, model, logits=logits: logits)
        loss = task.classifier.loss((None, torch.full((n,), 3)))
        found.append(torch.autograd.grad(loss, logits)[0][0])
    assert torch.equal(*found)
