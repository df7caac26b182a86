"""The planted faults. ``old`` stands exactly once in ``file``; ``new`` takes its place."""

from dataclasses import dataclass

ENGINE, MAKE, CLIPPING = (f"lalora_kernels/privacy/{name}.py" for name in ("engine", "make_private", "clipping"))
NOISE, SAMPLING, LEDGER = (f"lalora_kernels/privacy/{name}.py" for name in ("noise", "sampling", "ledger"))
RECORDERS, RULES, ACCOUNTANT = (f"lalora_kernels/privacy/{name}.py" for name in ("recorders", "rules", "accountant"))
REFERENCE, CPU, FEDERATED = "lalora_kernels/reference", "csrc/cpu", "lalora_kernels/federated"


@dataclass(frozen=True)
class Fault:
    """``tests`` are the files of python_tests that should notice, the likeliest first."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def native(self) -> bool:
        """Whether the kernels must be built again."""
        return self.file.startswith("csrc/")


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, file, old, new, tuple(f"test_{t}.py" for t in tests))


_CLIP_AFTER_SUM = (
    "whole = sum(s.G.sum(0).square().sum() for s in sites if s.materialized).sqrt() * self.grad_scale; "
    "weights = torch.full_like(weights, self.grad_scale * min(1.0, self.max_grad_norm / float(whole)))"
)

FAULTS = (
    # ---- noise
    _fault(
        "noise omitted",
        ENGINE,
        "noise_std=noisy,",
        "noise_std=0.0,",
        "private_step",
    ),
    _fault(
        "noise std without C",
        MAKE,
        "noise_std=float(noise_multiplier) * float(max_grad_norm),",
        "noise_std=float(noise_multiplier),",
        "private_step",
    ),
    _fault(
        "noise in every physical batch",
        ENGINE,
        "self._partial = True\n",
        "self._partial = True; [self.sum_of(s).add_(self.noise_std * torch.randn_like(s.S)) for s in sites]\n",
        "private_step",
    ),
    _fault(
        "an empty batch is not noised",
        ENGINE,
        "noise_std=noisy,",
        "noise_std=noisy if self.batch.valid else 0.0,",
        "private_step",
    ),
    _fault(
        "an empty draw is skipped",
        SAMPLING,
        "yield [0], BatchInfo(rows=1, valid=0, first=True, last=True)",
        "pass",
        "sampling",
    ),
    _fault(
        "noise reused in the next step",
        ENGINE,
        "release = self.noise.take_release()",
        "release = self.noise.next_release",
        "private_step",
    ),
    _fault(
        "one noise stream for all tensors",
        ENGINE,
        "tensor_index=[s.index for s in sites],",
        "tensor_index=[0 for s in sites],",
        "private_step",
    ),
    _fault(
        "the release number's high word left out of the nonce",
        f"{REFERENCE}/chacha20_normal.py",
        "nonce = (tensor_index, release & MASK, release >> 32)",
        "nonce = (tensor_index, release & MASK, 0)",
        "chacha20_normal",
    ),
    _fault(
        "normals of too small a variance",
        f"{REFERENCE}/chacha20_normal.py",
        "(angle1.cos() + angle1.sin())) / 2.0",
        "(angle1.cos() + angle1.sin())) / 2.1",
        "chacha20_normal",
    ),
    _fault(
        "noise of a tensor's tail columns dropped (C++)",
        f"{CPU}/privatize.cpp",
        "(noise ? p.noise_std * noise[e] : 0.0f)",
        "(noise && count >= kGroup ? p.noise_std * noise[e] : 0.0f)",
        "privatize",
    ),
    _fault(
        "adaptive clipping counts without noise",
        "lalora_kernels/privacy/adaptive.py",
        "noise = self.std * float(",
        "noise = 0.0 * float(",
        "adaptive",
    ),
    _fault(
        "the noise does not follow an adapted C",
        "lalora_kernels/privacy/adaptive.py",
        "engine.noise_std = self.sum_multiplier * engine.max_grad_norm",
        "engine.noise_std = engine.noise_std or self.sum_multiplier * engine.max_grad_norm",
        "adaptive",
    ),
    # ---- keys
    _fault(
        "resumed with the same key",
        NOISE,
        "            self._rekey()\n            self._next = max(",
        "            self._next = max(",
        "noise",
    ),
    _fault(
        "release numbers go back on resume",
        NOISE,
        "self._next = max(self._next, number)",
        "self._next = number",
        "noise",
    ),
    _fault(
        "a fork keeps the key",
        NOISE,
        "        source._rekey()\n",
        "",
        "noise",
    ),
    _fault(
        "keys from the process number",
        NOISE,
        "self._start(Key(os.urandom(KEY_BYTES)), is_secret=True)",
        'self._start(Key(os.getpid().to_bytes(KEY_BYTES, "little")), is_secret=True)',
        "noise",
    ),
    _fault(
        "key reused across clients",
        f"{FEDERATED}/run.py",
        "source = NoiseSource() if noise is None else noise(plan.client)",
        "source = NoiseSource() if noise is None else noise(plan.client); "
        "noise is None and setattr(source, '_key', type(source._key)(bytes(32)))",
        "federated",
    ),
    _fault(
        "ε reported for a fixed key",
        MAKE,
        "if not noise.is_secret:",
        "if False:",
        "private_step",
    ),
    # ---- sensitivity
    _fault(
        "norm without the first layer",
        CLIPPING,
        "sq.sum(0, keepdim=True)",
        "sq[1:].sum(0, keepdim=True)",
        "private_step",
    ),
    _fault(
        "norm without the head's weight",
        ENGINE,
        "self.sq[s.row].copy_(s.deferred.squared_norms())",
        "pass",
        "private_step",
    ),
    _fault(
        "norm without scales and biases",
        ENGINE,
        "self.sq[site.row].copy_(into.double().square().flatten(1).sum(1))",
        "pass",
        "private_step",
    ),
    _fault(
        "one clip factor for the whole batch",
        CLIPPING,
        "factor = (bound / norm).clamp(max=1.0)",
        "factor = (bound / norm.mean(1, keepdim=True)).clamp(max=1.0).expand_as(norm)",
        "private_step",
    ),
    _fault(
        "clipped after the sum",
        ENGINE,
        'out = self._carve("grad", sites, None)',
        f'out = self._carve("grad", sites, None); {_CLIP_AFTER_SUM}',
        "private_step",
    ),
    _fault(
        "every layer clipped to C instead of C / sqrt(L)",
        CLIPPING,
        'return max_grad_norm / math.sqrt(max(tensors, 1)) if clipping == "per_layer" else max_grad_norm',
        "return max_grad_norm",
        "private_step",
    ),
    _fault(
        "a mean loss is not scaled back before clipping",
        ENGINE,
        'float(batch.rows) if self.loss_reduction == "mean" else 1.0',
        "1.0",
        "private_step",
    ),
    _fault(
        "calls of one layer clipped apart",
        RECORDERS,
        "accumulate=again,",
        "accumulate=False,",
        "per_sample",
    ),
    _fault(
        "windows of several records taken for one record",
        ENGINE,
        "return t.reshape(N, positions,",
        "return (t if t.shape[0] == N else t.unflatten(0, (-1, N)).transpose(0, 1)).reshape(N, positions,",
        "per_sample",
    ),
    _fault(
        "NaN sample passed",
        CLIPPING,
        "finite = (norm.isfinite() & (factor * grad_scale >= SMALLEST_FACTOR)).all(0)",
        "finite = torch.ones(N, dtype=torch.bool, device=sq.device)",
        "private_step",
    ),
    _fault(
        "NaN sample masked by multiplication",
        f"{REFERENCE}/clip_reduce.py",
        "torch.where(w == 0, torch.zeros((), dtype=G.dtype, device=G.device), w * G).sum(0)",
        "(w * G).sum(0)",
        "private_step",
        "privatize",
    ),
    _fault(
        "the placeholder counted as a record",
        CLIPPING,
        "real = torch.arange(N, device=sq.device) < valid",
        "real = torch.arange(N, device=sq.device) < max(valid, 1)",
        "private_step",
    ),
    _fault(
        "the placeholder counted by fused clipping",
        f"{REFERENCE}/sample_grad_clip.py",
        "c[valid if valid is not None else len(c) :] = 0.0",
        "pass",
        "backends",
    ),
    _fault(
        "norm without the tail columns (C++)",
        f"{CPU}/grad.h",
        "        sum += (double)g * g;\n    }\n",
        "    }\n",
        "backends",
    ),
    _fault(
        "clip factor not applied by the fused kernel (C++)",
        "csrc/clip.h",
        "max_norm / norm * grad_scale",
        "grad_scale",
        "backends",
    ),
    _fault(
        "tail columns dropped from the clipped sum (C++)",
        f"{CPU}/privatize.cpp",
        "if (w != 0.0f) sum += w *",
        "if (w != 0.0f && count >= kGroup) sum += w *",
        "privatize",
    ),
    # ---- what is released
    _fault(
        "smoothing before noise",
        ENGINE,
        "[s.G if s.materialized else None for s in sites],",
        "[functional.smooth(s.G, 1 + (s.smooth_dim or 0)) if s.materialized else None for s in sites],",
        "private_step",
    ),
    _fault(
        "divided by the realised batch size",
        ENGINE,
        "divisor=self.divisor,",
        "divisor=float(max(self.batch.valid, 1)),",
        "private_step",
    ),
    _fault(
        "the inactive factor trains too",
        "lalora_kernels/nn.py",
        "p.requires_grad_(factor in factors)",
        "p.requires_grad_(True)",
        "private_step",
    ),
    _fault(
        "the inactive factor keeps its gradient",
        "lalora_kernels/nn.py",
        "            if factor not in factors:\n                p.grad = None\n",
        "",
        "privacy_gaps",
    ),
    _fault(
        "a gradient that is not the engine's is let through",
        ENGINE,
        "if p.grad is not None:  # None: what a private layer's own backward hands to autograd",
        "if False:",
        "private_step",
    ),
    _fault(
        "everything is sent, whatever the method says",
        f"{FEDERATED}/client.py",
        ".items() if method.travels(key, round)}",
        ".items()}",
        "methods",
    ),
    # ---- sampling
    _fault(
        "records join twice as often",
        SAMPLING,
        "bound = int(self.sample_rate * 2.0**64)",
        "bound = min(int(self.sample_rate * 2.0**65), 2**64)",
        "sampling",
    ),
    _fault(
        "batches of a fixed size",
        SAMPLING,
        "return joins.nonzero().flatten().tolist()",
        "return torch.randperm(self.records)[: round(self.sample_rate * self.records)].sort()[0].tolist()",
        "sampling",
    ),
    _fault(
        "the same draw in every step",
        NOISE,
        "taken, self._words = self._words[:count], self._words[count:]",
        "taken = self._words[:count]",
        "sampling",
        "noise",
    ),
    # ---- the account
    _fault(
        "no charge for an empty step",
        ENGINE,
        "        self.charge()\n",
        "        self.charge() if self.batch.valid else None\n",
        "private_step",
    ),
    _fault(
        "charged at half the sample rate",
        MAKE,
        "            noise_multiplier,\n            q,\n",
        "            noise_multiplier,\n            q / 2,\n",
        "private_step",
        "privacy_gaps",
    ),
    _fault(
        "budget check off by one",
        LEDGER,
        "        if left == 0:\n",
        "        if left < 0:\n",
        "ledger",
    ),
    _fault(
        "one step too few in the composition",
        ACCOUNTANT,
        "self_compose(count)",
        "self_compose(max(count - 1, 1))",
        "accountant",
    ),
    _fault(
        "a new ledger in every round",
        f"{FEDERATED}/client.py",
        "            ledger=self.ledger,\n",
        "",
        "federated",
    ),
    _fault(
        "a resumed run forgets what was spent",
        f"{FEDERATED}/run.py",
        "ledger.load_state_dict(ledgers[name].state_dict())",
        "pass",
        "federated",
    ),
    _fault(
        "the update stored before its cost",
        f"{FEDERATED}/run.py",
        "self._save_ledgers()  # what it cost, before what it bought",
        "pass",
        "federated",
    ),
    _fault(
        "an unfit model is found out in mid-run only",
        f"{FEDERATED}/run.py",
        "        _refuse_unfit(task, clients[0])\n",
        "",
        "privacy_gaps",
    ),
)  # fmt: skip
