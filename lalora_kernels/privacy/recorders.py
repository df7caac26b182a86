"""What stands between a module's backward and the engine: a LoRA layer's recorder, and what all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lalora_kernels import dispatch, functional, opaque
from lalora_kernels.privacy import compiled
from lalora_kernels.privacy.accounts import AGAIN
from lalora_kernels.privacy.sites import Site
from lalora_kernels.privacy.ties import TABLE, defer
from lalora_kernels.privacy.trees import leaves

if TYPE_CHECKING:
    from lalora_kernels.adapted import Adapted, Tensors
    from lalora_kernels.privacy.engine import Engine


# Relative to sum_t ||x_t|| ||dy_t||, by which norms are raised: a sample's weighted terms stay below C / SLACK, so that
# what rounding adds to a sum of terms that cancel (in float64 over several positions) keeps the bound.
SLACK = 4e-7


class Recorder:
    """Stands between one module's backward and the engine; never copied or pickled with the module."""

    module: nn.Module
    pairs: list[tuple[Tensor, Tensor]]  # what a deferred weight's gradient is made of, where there is one
    batch_axis = 0  # 1 where the first batch's check found positions first: (T, N, ...)
    varies = False  # whether ``verify`` may fail while the modules hold the same

    def __init__(self, engine: Engine, name: str, sites: dict[str, Site]):
        self.engine, self.name, self.sites = engine, name, sites
        self.handle, self.token = opaque.register(self), torch.zeros(1, device=next(iter(sites.values())).param.device)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()

    def active(self, parameter: str) -> Site | None:
        """The parameter's site while it trains, else None."""
        site = self.sites.get(parameter)
        return site if site is not None and site.param.requires_grad else None

    def expand(self, x: Tensor) -> Tensor:
        """x with a row for each record where it came with one for all (position embeddings of batch 1)."""
        if torch.compiler.is_compiling():  # one graph for every batch size; fold refuses what does not divide
            return x
        batch, axis = self.engine.batch, self.batch_axis
        if batch is None or batch.rows == 1 or x.dim() < 2 or x.shape[axis] != 1 or not torch.is_grad_enabled():
            return x
        self.engine.expanded.add(self.name)
        return x.expand(*x.shape[:axis], batch.rows, *x.shape[axis + 1 :])

    def fold(self, t: Tensor, features: int = 1, axis: int | None = None) -> Tensor:
        """(k*N, ..., features) -> (N, T, features...), one record's rows side by side; of (T, N, ..., features) where
        the batch is the second axis (``axis`` 1; default: where the first batch's check found it)."""
        if self.engine.batch is None:
            raise RuntimeError(
                f"backward through {self.name} outside a batch of the private loader; iterate the loader that "
                f"make_private returned, and call optimizer.step() once for each batch"
            )
        N = self.engine.batch.rows
        if (self.batch_axis if axis is None else axis) == 1:
            if t.dim() - features < 2 or t.shape[1] != N:
                raise ValueError(
                    f"{self.name} saw {tuple(t.shape)}, where the first batch had its records along the second axis; "
                    f"the batch has {N} of them"
                )
            t = t.transpose(0, 1)
        if features == 1 and t.dim() == 3 and t.shape[0] == N:
            return t
        if t.dim() <= features or t.shape[0] % N:
            raise ValueError(
                f"{self.name} saw {tuple(t.shape)}, which does not divide into the batch's {N} records along the first "
                f"axis; the layer must be batch-major, with as many rows for every record (images of other sizes, one "
                f"after the other, have not), or frozen (positions pass with a batch axis of 1)"
            )
        positions = t.numel() // max(N * t.shape[t.dim() - features :].numel(), 1)
        return t.reshape(N, positions, *t.shape[t.dim() - features :])

    def reset(self) -> None:
        """A physical batch begins or is done."""

    def verify(self) -> Tensors | None:
        """Raises RuntimeError where the module no longer uses the tensors that were attached. An adapted layer's are
        returned."""
        return None


class LoRARecorder(Recorder):
    """Recorder of a LoRA layer: sites "lora_A", "lora_B" and, where they train, "bias" and PEFT's "lora_bias" of B."""

    TWICE = (
        "{} was backpropagated twice in one batch, but clipping='per_layer' clips at the first; add the losses up and "
        "call backward once"
    )
    calls = 0  # forwards of this physical batch
    asked = None  # the backend that ``use_backend`` named around the last of them
    summed = False  # its gradient of this physical batch is clipped and summed already

    def __init__(self, engine: Engine, name: str, layer: Adapted, sites: dict[str, Site]):
        super().__init__(engine, name, sites)
        self.layer: Any = layer
        self.module, self.varies = self.layer, layer.varies
        layer.recorder = self
        if sites["lora_A"].kind == TABLE:
            defer(sites["lora_A"], self)

    def verify(self) -> Tensors:
        now: Tensors = self.layer.tensors()
        for role in ("lora_A", "lora_B"):
            if now.get(role) not in [place[1:] for place in self.sites[role].places]:
                raise RuntimeError(
                    f"{self.name} uses another adapter than when make_private was called; set that one again, or "
                    f"{AGAIN}"
                )
        return now

    def note_forward(self) -> None:
        self.calls += 1
        self.asked = dispatch.asked()  # here: on a GPU the backward runs in a thread of autograd's

    def reset(self) -> None:
        self.calls, self.summed, self.pairs = 0, False, []
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def record_lora(
        self, dy: Tensor, B: Tensor, scaling: float, h: Tensor | None, x: Tensor | None, need_dz: bool, need_bias: bool
    ) -> Tensor | None:
        """Per-sample gradients of the active factors from dy (..., m), h (..., r), x (..., n); returns dz (..., r)."""
        e = self.engine
        dy3 = self.fold(dy)
        assert e.batch is not None  # or fold has refused
        rows = self.layer.trained_rows
        dyB = dy3 if rows is None else dy3 * rows.t().to(dy3.dtype)  # B's other rows are zero, so dz is the same
        h3 = None if h is None else self.fold(h)
        x3 = None if x is None else self.fold(x)
        a, b = self.active("lora_A") if x is not None else None, self.active("lora_B") if h is not None else None
        if need_bias:
            for role, scale in (("bias", 1.0), ("lora_bias", scaling)):
                if (site := self.active(role)) is not None:
                    e.add(site, scale * dy3.sum(1, dtype=e.dtype))
        again = shared = False
        for s in (a, b):
            if s is not None:
                e.refuse_idle(s)
                again, shared = again or s.marked, shared or s.shared
        # The one-pass kernel clips during backward, when a GradScaler's scale is not the engine's to know yet.
        if e.clipping == "per_layer" and self.calls == 1 and e.grad_scaler is None and not shared:
            if again:
                raise RuntimeError(self.TWICE.format(self.name))
            self.summed = True
            for s in (a, b):
                if s is not None:
                    s.fused = True
            dz, _, sq_b, _, sq_a = functional.sample_grad_clip(
                dyB,
                B,
                scaling,
                max_norm=e.tensor_bound,
                grad_scale=e.grad_scale,
                valid=e.batch.valid,
                h=h3,
                x=x3,
                need_dz=need_dz,
                S_B=None if b is None else e.sum_of(b).flatten(1),
                S_A=None if a is None else e.sum_of(a).flatten(1),
                backend=e.backend or self.asked,
            )
        else:
            if again and self.summed:
                raise RuntimeError(self.TWICE.format(self.name))
            for s in (a, b):
                if again and s is not None and not s.marked:  # the other one holds another layer's part
                    e.gradient_of(s).zero_()
            dz, _, sq_b, _, sq_a = e.operation("sample_grad", dyB, e.backend or self.asked)(
                dyB,
                B,
                scaling,
                h=h3,
                x=x3,
                need_dz=need_dz,
                G_B=None if b is None else _matrices(e.gradient_of(b)),
                G_A=None if a is None else _matrices(e.gradient_of(a)),
                accumulate=again,
            )
        for site, sq in ((a, sq_a), (b, sq_b)):
            if site is not None:
                assert sq is not None  # what was asked for
                site.sq = sq
                e.mark(site)
        if dz is None or dy3 is dy:
            return dz
        if self.batch_axis == 1:  # (N, T, ..., r) -> (T, N, ..., r)
            return dz.view(dy.shape[1], dy.shape[0], *dy.shape[2:-1], -1).transpose(0, 1)
        return dz.view(*dy.shape[:-1], dz.shape[-1])

    def record_embedding(self, dy: Tensor, B: Tensor, scaling: float, h: Tensor | None, ids: Tensor) -> None:
        """An adapted table's: dy (..., m), h (..., r), ids (...). A (r,V) is deferred: few of V tokens are named."""
        e, a = self.engine, self.active("lora_A")
        dz: Tensor | None
        if h is None:
            dz = scaling * (dy @ B)
        else:
            dz = self.record_lora(dy, B, scaling, h, None, a is not None, False)
        if a is not None:
            assert dz is not None  # asked for
            e.mark(a)
            self.pairs.append((self.fold(dz).to(e.dtype), self.fold(ids, 0)))

    def _token_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            dz, ids = (torch.cat(part, 1) for part in zip(*self.pairs))
            table: Any = self.layer  # an embedding, of our own or PEFT's
            self._sums = token_sums(dz, ids, table.num_embeddings, table.padding_idx)
        return self._sums

    def squared_norms(self) -> Tensor:
        """||G_A[i]||^2 of an adapted table, (N,) float64."""
        sample, _, sums = self._token_sums()
        sq = torch.zeros(len(self.pairs[0][0]), dtype=torch.float64, device=sums.device)
        return sq.index_add_(0, sample, sums.double().square().sum(1))

    def add_weighted_sum(self, weights: Tensor, out: Tensor) -> None:
        """out (r,V) += sum_i weights[i] G_A[i]; samples of weight 0 are masked, whatever they hold."""
        sample, token, sums = self._token_sums()
        out.index_add_(1, token, weighted(weights, sample, sums.to(out.dtype)).t())

    def add_sample(self, i: int, out: Tensor) -> None:
        """out (r,V) += G_A[i]."""
        sample, token, sums = self._token_sums()
        mine = sample == i
        out.index_add_(1, token[mine], sums[mine].to(out.dtype).t())

    def slack(self) -> Tensor:
        """What rounding may add to a sample's share of a sum that is added up in several parts, (N,) float64."""
        return SLACK * torch.stack([dz.double().norm(dim=2).sum(1) for dz, _ in self.pairs]).sum(0)


def _matrices(G: Tensor) -> Tensor:
    """(N, rows, columns) of a factor's per-sample gradients: a convolution's kernel lies along the columns."""
    return G if G.dim() == 3 else G.flatten(2)


def token_sums(dy: Tensor, ids: Tensor, vocabulary: int, padding_idx: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of dy (N,T,d) over equal tokens of one sample, ids (N,T), of which there are U: (sample, token, sums (.,d)).

    Padding is left out. All have N T rows, those from U on zero: to know U, the host would have to wait for the device.
    """
    N = len(ids)
    key = (torch.arange(N, device=ids.device).view(-1, 1) * vocabulary + ids).flatten()
    dy = dy.flatten(0, 1)
    if padding_idx is not None:
        dy = torch.where((ids == padding_idx).view(-1, 1), 0.0, dy)
    key, order = key.sort()
    new = torch.ones_like(key)
    new[1:] = key[1:] != key[:-1]
    place = new.cumsum(0) - 1
    unique = torch.zeros_like(key).scatter_(0, place, key)
    sums = torch.zeros_like(dy).index_add_(0, place, dy.index_select(0, order))
    return unique // vocabulary, unique % vocabulary, sums


def weighted(weights: Tensor, sample: Tensor, sums: Tensor) -> Tensor:
    """weights[sample] sums, zero where the weight is, whatever the sum holds. Weighted after the sum, so that rounding
    in a sum that cancels is scaled with it and the norm, which knows that sum, stays true."""
    w = weights.index_select(0, sample).to(sums.dtype).view(-1, 1)
    return torch.where(w != 0, w * sums, 0.0)


class Undo:
    """Clears a LoRA layer's recorder, in the shape of torch's removable handles."""

    def __init__(self, layer: Adapted):
        self.layer = layer

    def remove(self) -> None:
        self.layer.recorder = None


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """The first argument of a forward that has a batch axis."""
    return next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)


def batch_tensor(args: tuple, kwargs: dict, rows: int) -> Tensor | None:
    """Of a forward's arguments what should have ``rows`` rows: the first tensor, or within dicts and lists any that has
    them, else the first. None where there is no tensor at all."""
    first = first_tensor(args, kwargs)
    if first is not None:
        return first
    found = [t for t in leaves((args, kwargs)) if t.dim()]
    return next((t for t in found if t.shape[0] == rows), found[0] if found else None)


class InputCheck:
    """The engine's forward pre-hook; a copy of the model gets one that checks nothing."""

    def __init__(self, engine: Engine | None, site: Site | None = None):
        self.engine = engine
        if site is not None:
            self.handle, self.token = opaque.register(self), torch.zeros(1, device=site.param.device)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.engine is None:
            return
        if not torch.compiler.is_compiling():
            self.engine.check_input(model, args, kwargs)
        elif torch.is_grad_enabled():
            call = compiled.Carried(args, kwargs)
            opaque.saw(self.token, call.tensors, call.ints, call.floats, call.form, call.refused, self.handle)

    def saw(self, tensors: list[Tensor], ints: list[int], floats: list[float], form: str, refused: str) -> None:
        """A compiled model's graph began to run."""
        engine: Any = self.engine  # the handle is a live engine's
        always = refused == compiled.DIFFERENTIATED  # what computes the input is asked for whatever ``check`` says
        if refused and engine.batch is not None and (always or engine.model_check is not None):
            raise ValueError(refused)
        args, kwargs = compiled.read(form, tensors, ints, floats)
        with compiled.within_graph():
            engine.check_input(engine.model, args, kwargs, within_graph=True)
        compiled.refuse_attributes(engine.reduction.own.tied)
        engine.reduction.began_compiled()

    def __deepcopy__(self, memo: dict) -> InputCheck:
        return InputCheck(None)

    def __reduce__(self) -> tuple:
        return InputCheck, (None,)
