"""Random draws of a block of code: from a seed, or from where they are, and as if there had been none behind it."""

import pickle
import random
from typing import Any

import numpy as np
import torch
from torch import nn


class Drawn:
    """A block whose random draws (torch's, on the CPU and on the ``model``'s cards, NumPy's, Python's) start from
    ``seed`` and are given back; None: from where they are. ``any``: whether there were some."""

    def __init__(self, model: nn.Module, seed: int | None):
        self.cards, self.seed, self.any = list({p.device for p in model.parameters() if p.is_cuda}), seed, False
        self.fork = torch.random.fork_rng(devices=self.cards)

    def _state(self) -> tuple:
        """To be compared, often: as text it took longer than a small model's forward."""
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(card) for card in self.cards)]
        numpy = pickle.dumps(np.random.get_state(legacy=False))  # with a Gaussian that waits for the next call
        return [t.numpy().tobytes() for t in states], random.getstate(), numpy

    def __enter__(self) -> "Drawn":
        self.fork.__enter__()
        self.theirs = random.getstate(), np.random.get_state()
        if self.seed is not None:
            torch.manual_seed(self.seed)
            random.seed(self.seed)
            np.random.seed(self.seed)
        self.before = self._state()
        return self

    def __exit__(self, *error: Any) -> None:
        self.any = self.before != self._state()
        random.setstate(self.theirs[0])
        np.random.set_state(self.theirs[1])
        self.fork.__exit__(*error)
