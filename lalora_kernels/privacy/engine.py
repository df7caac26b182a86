"""The private step: what one model, one loader and one optimizer share between a batch and its release (SPEC section 2).

``begin`` (from the loader) announces a physical batch; the layers' backward record per-sample gradients; ``finish``
(from ``optimizer.step``) clips them and, on the last physical batch of a logical one, charges the ledger and releases
the noisy, smoothed gradient into ``p.grad``.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lalora_kernels import functional
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.clipping import clip_weights, tensor_bound
from lalora_kernels.privacy.rules import ExtraRecorder, Recorder, rule_of
from lalora_kernels.privacy.sampling import BatchInfo


@dataclass(eq=False)
class Site:
    """One tensor that may train: its stream of noise, its axis of smoothing, its places in the workspaces."""

    name: str
    param: nn.Parameter
    index: int  # nonce word 0 of its noise
    smooth_dim: int | None
    deferred: "ExtraRecorder | None" = None  # holds a full weight's factors; no per-sample gradient is materialized
    row: int = -1  # row of the squared norms while active
    G: Tensor | None = None  # (N, *shape) of this physical batch
    S: Tensor | None = None  # running clipped sum over physical batches
    released: Tensor | None = None  # the gradient last put into param.grad
    marked: bool = False  # something was recorded in this physical batch


class LoRARecorder(Recorder):
    """Recorder of one LoRA layer: sites "lora_A", "lora_B" and, where it trains, "bias"."""

    TWICE = (
        "{} was backpropagated twice in one batch, but clipping='per_layer' clips at the first; add the losses up and "
        "call backward once"
    )
    calls = 0  # forwards of this physical batch
    summed = False  # its gradient of this physical batch is clipped and summed already

    def note_forward(self) -> None:
        self.calls += 1

    def reset(self) -> None:
        self.calls, self.summed = 0, False

    def record_lora(self, dy, B, scaling, h, x, need_dz, need_bias) -> Tensor | None:
        """Per-sample gradients of the active factors from dy (..., m) and h (..., r) or x (..., n); returns dz (..., r)."""
        e = self.engine
        lead = dy.shape[:-1]
        dy3 = e.fold(dy, self.name)
        h3 = None if h is None else e.fold(h, self.name)
        x3 = None if x is None else e.fold(x, self.name)
        a, b = self.active("lora_A") if x is not None else None, self.active("lora_B") if h is not None else None
        if need_bias:
            e.add(self.sites["bias"], dy3.sum(1, dtype=e.dtype))
        again = any(s is not None and s.marked for s in (a, b))
        if e.clipping == "per_layer" and self.calls == 1:
            if again:
                raise RuntimeError(self.TWICE.format(self.name))
            self.summed = True
            dz, _, sq_b, _, sq_a = functional.sample_grad_clip(
                dy3,
                B,
                scaling,
                max_norm=e.tensor_bound,
                grad_scale=e.grad_scale,
                valid=e.batch.valid,
                h=h3,
                x=x3,
                need_dz=need_dz,
                S_B=None if b is None else e.sum_of(b),
                S_A=None if a is None else e.sum_of(a),
                backend=e.backend,
            )
        else:
            if again and self.summed:
                raise RuntimeError(self.TWICE.format(self.name))
            dz, _, sq_b, _, sq_a = functional.sample_grad(
                dy3,
                B,
                scaling,
                h=h3,
                x=x3,
                need_dz=need_dz,
                G_B=None if b is None else e.gradient_of(b),
                G_A=None if a is None else e.gradient_of(a),
                accumulate=again,
                backend=e.backend,
            )
        for site, sq in ((a, sq_a), (b, sq_b)):
            if site is not None:
                e.mark(site)
                e.sq[site.row].copy_(sq)
        return None if dz is None else dz.view(*lead, -1)


class Engine:
    """See the module's docstring; users meet it through ``make_private``."""

    def __init__(self, model: nn.Module, *, clipping: str, max_grad_norm: float, noise_std: float, noise, divisor: float,
                 smoothing: str | None, loss_reduction: str, charge, backend: str | None = None):
        self.model, self.clipping, self.max_grad_norm = model, clipping, max_grad_norm
        self.noise_std, self.noise, self.divisor = noise_std, noise, divisor
        self.smoothing, self.loss_reduction, self.charge, self.backend = smoothing, loss_reduction, charge, backend
        self.sites: list[Site] = []
        self.recorders: list[Recorder] = []
        self.active: list[Site] = []
        self.batch: BatchInfo | None = None
        self.nonfinite_samples = 0
        self._buffers: dict[str, Tensor] = {}
        self._handles: list = []
        self._open = False  # a logical batch has begun and is not released
        self._partial = False  # ... and some of its physical batches are summed already
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    # ---------------------------------------------------------------- attaching

    def _attach(self) -> None:
        self._norms = [
            (name, m) for name, m in self.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats
        ]
        self._refuse_batch_statistics()
        seen: dict[nn.Parameter, str] = {}
        for name, module in self.model.named_modules():
            lora = isinstance(module, LoRALinear)
            found = {}
            for key, p in module.named_parameters(recurse=False):
                full = f"{name}.{key}" if name else key
                if not p.requires_grad and not (lora and key.startswith("lora_")):
                    continue
                covered = key != "weight" if lora else rule_of(module) is not None
                if not covered:
                    raise ValueError(
                        f"{full} is trainable, but no rule gives its gradient per sample ({type(module).__name__}); "
                        f"freeze it with requires_grad_(False), or train it through an adapter"
                    )
                if p in seen:
                    raise ValueError(f"{full} and {seen[p]} are one parameter in two modules; freeze it or untie them")
                seen[p] = full
                found[key] = self._add_site(full, p, {"lora_A": 1, "lora_B": 0}.get(key) if lora else None)
            if found:
                self._record(name, module, found, lora)
        if not self.sites:
            raise ValueError("the model has no trainable parameter; adapt() it first")
        dtypes = {s.param.dtype == torch.float64 for s in self.sites}
        if len(dtypes) > 1:
            raise ValueError("some trainable parameters are float64 and some are not; use one precision")
        self.dtype = torch.float64 if dtypes.pop() else torch.float32
        self._handles.append(self.model.register_forward_pre_hook(self._check_input, with_kwargs=True))

    def _add_site(self, name: str, p: nn.Parameter, smooth_dim: int | None) -> Site:
        site = Site(name, p, len(self.sites), smooth_dim)
        self.sites.append(site)
        trains = p.requires_grad  # torch takes the hook only while it does; the schedule may not have reached it yet
        p.requires_grad_(True)
        self._handles.append(p.register_post_accumulate_grad_hook(lambda p: self._refuse_foreign(p, name)))
        p.requires_grad_(trains)
        return site

    def _record(self, name: str, module: nn.Module, sites: dict, lora: bool) -> None:
        if getattr(module, "recorder" if lora else "_recorder", None) is not None:
            raise RuntimeError(f"{name} already belongs to a private optimizer; call its detach() first")
        if lora:
            module.recorder = LoRARecorder(self, name, sites)
            self.recorders.append(module.recorder)
            self._handles.append(_Undo(module))
        else:
            self.recorders.append(ExtraRecorder(self, name, module, sites))

    def detach(self) -> None:
        """Give the model back to ordinary training; the workspace is freed."""
        for handle in self._handles:
            handle.remove()
        for recorder in self.recorders:
            if isinstance(recorder, ExtraRecorder):
                recorder.detach()
        self._handles, self.recorders, self._buffers, self.batch = [], [], {}, None

    # ---------------------------------------------------------------- refusals

    def _refuse_batch_statistics(self) -> None:
        for name, m in self._norms:
            if m.training:
                raise ValueError(
                    f"{name} ({type(m).__name__}) mixes the records of a batch in train mode; replace it by GroupNorm or "
                    f"LayerNorm, or keep it in eval mode"
                )

    def _refuse_foreign(self, p: nn.Parameter, name: str) -> None:
        if p.grad is not None:  # None: what a private layer's own backward hands to autograd
            raise RuntimeError(
                f"{name} received a gradient that is not the engine's (a penalty on the weights, a use of the tensor outside "
                f"its module, a p.grad of your own), which nothing clips or noises. Freeze it, or call its module instead"
            )

    def _check_input(self, model, args, kwargs) -> None:
        if self.batch is None or not model.training or not torch.is_grad_enabled():
            return
        self._refuse_batch_statistics()
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if first is not None and first.shape[0] != self.batch.rows:
            raise ValueError(
                f"the model was given {first.shape[0]} rows, but the loader's batch has {self.batch.rows} records; pass "
                f"the batch as the loader yields it, batch axis first"
            )

    def fold(self, t: Tensor, name: str, features: int = 1) -> Tensor:
        """(k*N, ..., features) -> (N, T, features...): the rows of one record side by side (batch-major)."""
        if self.batch is None:
            raise RuntimeError(
                f"backward through {name} outside a batch of the private loader; iterate the loader that make_private "
                f"returned, and call optimizer.step() once for each batch"
            )
        N = self.batch.rows
        if t.dim() <= features or t.shape[0] % N:
            raise ValueError(
                f"{name} saw {tuple(t.shape)}, which does not divide into the batch's {N} records along the first axis; "
                f"the layer must be batch-major"
            )
        positions = t.numel() // max(N * t.shape[t.dim() - features :].numel(), 1)
        return t.reshape(N, positions, *t.shape[t.dim() - features :])

    # ---------------------------------------------------------------- workspace

    def _buffer(self, kind: str, count: int) -> Tensor:
        """A flat buffer kept from step to step; grows, never shrinks."""
        have = self._buffers.get(kind)
        device = self.sites[0].param.device
        if have is None or have.numel() < count or have.device != device:
            have = self._buffers[kind] = torch.empty(count, dtype=self.dtype, device=device)
        return have[:count]

    def _carve(self, kind: str, sites: list[Site], rows: int | None) -> list[Tensor]:
        sizes = [s.param.numel() * (1 if rows is None else rows) for s in sites]
        parts = self._buffer(kind, sum(sizes)).split(sizes) if sizes else []
        return [p.view(*(() if rows is None else (rows,)), *s.param.shape) for p, s in zip(parts, sites)]

    def gradient_of(self, site: Site) -> Tensor:
        """(N, *shape), uninitialized until the site is marked."""
        if site.G is None:
            materialized = [s for s in self.active if s.deferred is None]
            for s, G in zip(materialized, self._carve("G", materialized, self.batch.rows)):
                s.G = G
        return site.G

    def sum_of(self, site: Site) -> Tensor:
        """The running sum, zero at the start of a logical batch."""
        if site.S is None:
            for s, S in zip(self.active, self._carve("S", self.active, None)):
                s.S = S.zero_()
        return site.S

    def mark(self, site: Site) -> None:
        if site.row < 0:
            raise RuntimeError(f"{site.name} became trainable within a batch; set requires_grad between steps")
        site.marked = True

    def add(self, site: Site, G: Tensor) -> None:
        """Record (or add to) a small tensor's per-sample gradient (N, *shape)."""
        into = self.gradient_of(site)
        into.add_(G) if site.marked else into.copy_(G)
        self.mark(site)
        self.sq[site.row].copy_(into.double().square().flatten(1).sum(1))

    # ---------------------------------------------------------------- a step

    def begin(self, batch: BatchInfo) -> None:
        """Called by the loader before it yields a physical batch."""
        if self.batch is not None and any(s.marked for s in self.sites):
            raise RuntimeError("the last batch was backpropagated but not stepped; call optimizer.step() after backward")
        if self._partial if batch.first else not self._open:
            self._partial = False
            raise RuntimeError(
                "a logical batch was left before its last physical batch and is lost; iterate the loader to its end"
            )
        for s in self.sites:
            if s.param.grad is s.released:
                s.param.grad = None
            self._refuse_foreign(s.param, s.name)
        trainable = [s for s in self.sites if s.param.requires_grad]
        if batch.first:
            self._start(trainable)
        elif trainable != self.active:
            raise RuntimeError("the trainable tensors changed within a logical batch")
        self._open = True
        self.batch = batch
        self.grad_scale = float(batch.rows) if self.loss_reduction == "mean" else 1.0
        self.tensor_bound = tensor_bound(self.clipping, self.max_grad_norm, len(self.active))
        self.sq = torch.zeros(len(self.active), batch.rows, dtype=torch.float64, device=self.sites[0].param.device)
        self._clear_batch()

    def _start(self, trainable: list[Site]) -> None:
        for s in self.sites:
            s.S, s.row = None, -1
        for row, s in enumerate(trainable):
            s.row = row
        self.active = trainable

    def _clear_batch(self) -> None:
        for s in self.sites:
            s.G, s.marked = None, False
        for r in self.recorders:
            r.reset()

    def finish(self) -> bool:
        """Clip what was recorded. On the last physical batch, charge and release into ``p.grad``; True then."""
        if self.batch is None:
            raise RuntimeError("optimizer.step() without a new batch of the private loader, or called twice on one batch")
        batch, sites = self.batch, self.active
        for s in self.sites:
            self._refuse_foreign(s.param, s.name)
        if [s for s in self.sites if s.param.requires_grad] != sites:
            raise RuntimeError("the trainable tensors changed between the batch and optimizer.step()")
        if batch.valid and not any(s.marked for s in sites):
            raise RuntimeError("optimizer.step() before loss.backward(): no gradient was recorded for this batch")
        for s in sites:
            if s.marked and s.deferred is not None:
                self.sq[s.row].copy_(s.deferred.squared_norms())
        weights, bad = clip_weights(
            self.sq, clipping=self.clipping, max_grad_norm=self.max_grad_norm, grad_scale=self.grad_scale,
            valid=batch.valid,
        )
        self._count_nonfinite(bad)
        for s in sites:
            if s.marked and s.deferred is not None:
                s.deferred.add_weighted_sum(weights[s.row], self.sum_of(s))
        if batch.last:
            self._release(weights)
            self._open = self._partial = False
        else:
            self._partial = True
            full = [s for s in sites if s.G is not None and s.marked]
            if full:
                rows = weights[[s.row for s in full]]
                functional.clip_reduce([s.G for s in full], rows, [self.sum_of(s) for s in full], backend=self.backend)
        self._clear_batch()
        self.batch = None
        return batch.last

    def _release(self, weights: Tensor) -> None:
        # The ledger first: a crash from here on may waste budget, never overspend it.
        self.charge()
        sites = self.active
        out = self._carve("grad", sites, None)
        functional.privatize(
            [s.G if s.marked and s.deferred is None else None for s in sites],
            [s.S for s in sites],
            weights,
            out,
            noise_std=self.noise_std,
            key=self.noise.key if self.noise_std else None,
            release=self.noise.take_release(),
            tensor_index=[s.index for s in sites],
            smooth_dim=[s.smooth_dim if self.smoothing else None for s in sites],
            divisor=self.divisor,
            backend=self.backend,
        )
        for s, grad in zip(sites, out):
            s.param.grad = s.released = grad if grad.dtype == s.param.dtype else grad.to(s.param.dtype)

    def _count_nonfinite(self, bad: Tensor) -> None:
        self.nonfinite_samples = self.nonfinite_samples + bad
        if bad.device.type == "cpu" and int(bad):
            warnings.warn(
                f"{int(bad)} record(s) of this batch had a gradient that is NaN, Inf or beyond float32; they contribute "
                f"nothing to the step",
                stacklevel=4,
            )


class _Undo:
    """Clears a LoRA layer's recorder, in the shape of torch's removable handles."""

    def __init__(self, layer: LoRALinear):
        self.layer = layer

    def remove(self) -> None:
        self.layer.recorder = None
