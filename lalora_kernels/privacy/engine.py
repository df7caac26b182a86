"""The private step: what model, loader and optimizer share between a batch and its release.

``begin`` (from the loader) announces a physical batch; the layers' backward record per-sample gradients; ``finish``
(from ``optimizer.step``) clips them and, on the last physical batch of a logical one, charges the ledger and releases
the noisy, smoothed gradient into ``p.grad``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lalora_kernels import dispatch, functional
from lalora_kernels.adapted import Adapted, Factors
from lalora_kernels.privacy.attached import Attached
from lalora_kernels.privacy.clipping import clip_weights, tensor_bound
from lalora_kernels.privacy.distributed import Group, quiet_ddp
from lalora_kernels.privacy.noise import NoiseSource, refuse_known_seed
from lalora_kernels.privacy.nonfinite import NonfiniteCount
from lalora_kernels.privacy.recorders import Recorder, batch_tensor
from lalora_kernels.privacy.rules import refuse_mixing
from lalora_kernels.privacy.sampling import BatchInfo
from lalora_kernels.privacy.sentinel import PASSED, SKIPPED, UNSTEPPED, refuse_gradients, stand_in, take_away
from lalora_kernels.privacy.sites import Site, squared_norms
from lalora_kernels.privacy.structure import Structure
from lalora_kernels.privacy.trained import refuse_upstream
from lalora_kernels.privacy.workspace import Workspace

if TYPE_CHECKING:
    from lalora_kernels.privacy.adaptive import AdaptiveClipping
    from lalora_kernels.privacy.microbatch import AutoBatch
    from lalora_kernels.privacy.model_check import ModelCheck  # whose checks make an Engine of their own

PARTS = (
    "{} was called, but not the model that make_private was given (its parts were, or a copy), so nothing has checked "
    "which rows are whose and that records do not mix; call that model itself, or see to it with check_per_sample and "
    "pass make_private check=False"
)


class Engine(Attached):
    """See the module's docstring; users meet it through ``make_private``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        clipping: str,
        max_grad_norm: float,
        noise_std: float,
        noise: NoiseSource,
        divisor: float,
        smoothing: str | None,
        loss_reduction: str,
        charge: Callable[[], None],
        backend: str | None = None,
        strict: bool = False,
        model_check: "ModelCheck | None" = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        group: Group | None = None,
        adaptive: "AdaptiveClipping | None" = None,
        auto_batch: "AutoBatch | None" = None,
        usual_rows: float | None = None,
    ):
        self.model, self.clipping, self.max_grad_norm = model, clipping, max_grad_norm
        self.noise_std, self.noise, self.divisor = noise_std, noise, divisor
        self.smoothing, self.loss_reduction, self.charge, self.backend = smoothing, loss_reduction, charge, backend
        self.grad_scaler, self.group = grad_scaler, group
        self._ddp = quiet_ddp(model)
        self.strict, self.model_check = strict, model_check
        self.forwarded = False  # the model itself has seen this physical batch
        self.within = 0  # forwards of the model itself that have begun and not ended
        self.sites: list[Site] = []
        self.recorders: list[Recorder] = []
        self.expanded: set[str] = set()  # layers that were given one input for all records
        self.active: list[Site] = []
        self.batch: BatchInfo | None = None
        self.usual_rows = divisor if usual_rows is None else usual_rows  # of a physical batch, by what is public
        self.serial = 0  # of the batch, by which a graph knows its own
        self.nonfinite, self.graphing = NonfiniteCount(), False
        self.auto_batch = auto_batch  # until it has measured the first forward
        self.adaptive = adaptive
        if adaptive is not None:  # which moves max_grad_norm between logical batches
            adaptive.set_bound(self, max_grad_norm)
        # The optimizer's schedule: returns what is called with the model's factors.
        self.next_factors: Callable[[], Callable[[Factors], None]] = lambda: lambda factors: None
        self.structure = Structure(model)
        self._buffers = Workspace()
        self._handles: list[Any] = []
        self._waiting = False  # sentinels stand in p.grad until the step
        self._open = False  # a logical batch has begun and is not released
        self._partial = False  # ... and some of its physical batches are summed already
        self._passed = False  # a batch of this iteration was fetched, and not used, before the next one
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    @property
    def within_logical_batch(self) -> bool:
        """Whether some physical batches of the present logical one are summed."""
        return self._partial

    # ---------------------------------------------------------------- refusals

    def check_input(self, model: nn.Module, args: tuple, kwargs: dict, within_graph: bool = False) -> None:
        """Whatever is differentiated must be the batch that the loader announced; in eval mode as in train mode.

        ``within_graph``: asked by a compiled model, where gradients are off, and what came before is not to be seen.
        """
        if self.batch is None or not (torch.is_grad_enabled() or within_graph):
            return
        if self.batch.seeded:
            refuse_known_seed()
        first = batch_tensor(args, kwargs, self.batch.rows)
        self.check_rows(self.batch.rows if first is None else first.shape[0])
        if not within_graph:
            refuse_upstream((args, kwargs), self.sites)
            if self.auto_batch is not None:
                self.auto_batch.measure(self, model, args, kwargs)
                self.auto_batch = None
        if self.model_check is not None:
            self.model_check(self, model, args, kwargs)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """A block in which there is no batch, so that a private backward refuses."""
        batch, self.batch = self.batch, None
        try:
            yield
        finally:
            self.batch = batch

    def check_rows(self, rows: int) -> None:
        """The model was called with gradients on."""
        if self.batch is None:
            return
        if self._passed:
            raise RuntimeError(PASSED)
        self._factors()  # or what was put in since the batch came would go unseen
        refuse_mixing(self._mixers)
        if rows != self.batch.rows:
            raise ValueError(
                f"the model was given {rows} rows, but the loader's batch has {self.batch.rows} records; pass the "
                f"batch as the loader yields it, batch axis first, and evaluate under torch.no_grad()"
            )
        self.forwarded, self.within = True, self.within + 1

    @property
    def beside(self) -> bool:
        """Whether a layer that is called now is not called by the model; nor by a checkpoint, within backward."""
        outside = self.strict and self.batch is not None and not self.within
        return outside and torch._C._current_graph_task_id() == -1

    def refuse_part(self, name: str) -> None:
        """Raise RuntimeError for a layer that was called by itself: of what the loop does between the model's parts (a
        mean over the batch, another order of the rows) nothing is checked."""
        raise RuntimeError(PARTS.format(name))

    # ---------------------------------------------------------------- workspace

    def _buffer(self, kind: str) -> Tensor:
        count = sum(s.param.numel() for s in self.active)
        return self._buffers.flat(kind, count, self.dtype, self.sites[0].param.device)[:count]

    def _carve(self, kind: str, sites: list[Site], rows: int | None) -> list[Tensor]:
        return self._buffers.carve(kind, sites, rows, self.dtype)

    def operation(self, op: str, like: Tensor, backend: str | None) -> Callable:
        """``dispatch.get``, asked once a physical batch: the answer may change from batch to batch, not within one."""
        key = (op, like.device, like.dtype, backend or dispatch.asked())
        found = self._operations.get(key)
        if found is None:
            found = self._operations[key] = dispatch.get(op, like, backend)
        return found

    def gradient_of(self, site: Site) -> Tensor:
        """(N, *shape), uninitialized until the site is marked."""
        if site.G is None:
            assert self.batch is not None  # or fold has refused
            materialized = [s for s in self.active if s.deferred is None]
            for s, G in zip(materialized, self._carve("G", materialized, self.batch.rows)):
                s.G = G
        return site.made()

    def sum_of(self, site: Site) -> Tensor:
        """The running sum, zero at the start of a logical batch."""
        if site.S is None:
            for s, S in zip(self.active, self._carve("S", self.active, None)):
                s.S = S
            self._buffer("S").zero_()  # one launch, not one a tensor
        return site.summed()

    def refuse_idle(self, site: Site) -> None:
        if site.row < 0:
            raise RuntimeError(f"{site.name} became trainable within a batch; set requires_grad between steps")

    def mark(self, site: Site) -> None:
        self.refuse_idle(site)
        if site.param.is_cuda and torch.cuda.is_current_stream_capturing() != self.graphing:
            if self.graphing:
                raise RuntimeError(
                    f"the backward of {site.name} runs outside of the graph that optimizer.graph() captures (on a "
                    f"stream of its own?), so no replay would repeat it; keep forward and backward on the current one"
                )
            raise RuntimeError(
                "a CUDA graph of your own records a private backward, whose replays the engine would not see; use "
                "optimizer.graph()"
            )
        if not self._waiting:
            self._waiting = True
            stand_in(self.active)
        site.marked = True

    def add(self, site: Site, G: Tensor) -> None:
        """Record (or add to) a small tensor's per-sample gradient (N, *shape)."""
        into = self.gradient_of(site)
        into.add_(G) if site.marked else into.copy_(G)
        site.sq = torch.linalg.vector_norm(into.flatten(1), dim=1, dtype=torch.float64).square()
        self.mark(site)

    # ---------------------------------------------------------------- a step

    @torch.no_grad()
    def begin(self, batch: BatchInfo) -> None:
        """Called by the loader before it yields a physical batch."""
        if not self.recorders:
            raise RuntimeError("this loader's optimizer was detached; use a loader of your own, or make_private again")
        self.serial += 1
        same = self.batch is not None and 0 < batch.iteration == self.batch.iteration
        self._passed = same or self._passed and not batch.first
        if self.batch is not None and (self.forwarded or any(s.marked for s in self.sites)):
            left = UNSTEPPED if any(s.marked for s in self.sites) else SKIPPED
            self._forget()
            raise RuntimeError(left)
        if self._partial if batch.first else not self._open:
            self._partial = False
            raise RuntimeError(
                "a logical batch was left before its last physical batch and is lost; iterate the loader to its end"
            )
        refuse_gradients(self.sites, between_steps=True)
        if batch.first:
            activate = self.next_factors()
            activate(self._factors())
        trainable = [s for s in self.sites if s.param.requires_grad]
        if batch.first:
            self._start(trainable)
        elif trainable != self.active:
            raise RuntimeError("the trainable tensors changed within a logical batch")
        self._open = True
        self.batch = batch
        self.tensor_bound = tensor_bound(self.clipping, self.max_grad_norm, len(self.active))
        self._set_rows(batch.rows)
        self.clear_batch()

    def _set_rows(self, rows: int) -> None:
        self.grad_scale: Any = float(rows) if self.loss_reduction == "mean" else 1.0

    def pad(self, rows: int) -> None:
        """From now on this physical batch has ``rows`` rows; those behind the loader's are placeholders."""
        assert self.batch is not None
        self.batch = replace(self.batch, rows=rows)
        self._set_rows(rows)

    def _start(self, trainable: list[Site]) -> None:
        for s in self.sites:
            s.S, s.row = None, -1
        for row, s in enumerate(trainable):
            s.row = row
        self.active = trainable

    def clear_batch(self) -> None:
        self._waiting, self.forwarded, self.within = False, False, 0
        self.reduction.loop.forget()
        self._operations: dict[tuple, Callable] = {}
        for s in self.sites:
            s.G, s.sq, s.marked, s.fused = None, None, False, False
        for r in self.recorders:
            r.reset()

    @torch.no_grad()
    def finish(self) -> bool:
        """Clip what was recorded. On the last physical batch, charge and release into ``p.grad``; True then."""
        if self.batch is None:
            raise RuntimeError(
                "optimizer.step() without a new batch of the private loader, or called twice on one batch"
            )
        if self._passed:
            raise RuntimeError(PASSED)
        batch, sites = self.batch, self.active
        if self.model_check is not None:
            self.model_check.stepped(batch.valid)
        if self.strict and not self.forwarded and any(s.marked for s in sites):
            self.refuse_part("a part of it")
        if self.auto_batch is not None:
            raise RuntimeError(
                'physical_batch_size="auto" measures the first forward of the model that make_private was given, which '
                "was not called or is compiled; give it a number"
            )
        refuse_gradients(self.sites, between_steps=False)
        if [s for s in self.sites if s.param.requires_grad] != sites:
            raise RuntimeError("the trainable tensors changed between the batch and optimizer.step()")
        if batch.valid and not any(s.marked for s in sites):
            raise RuntimeError(
                "optimizer.step() before loss.backward(): no gradient was recorded for this batch. If there was a "
                "backward, it reached nothing that trains: a layer whose weight the model takes without calling it "
                "(WavLM's q_proj), or none"
            )
        try:
            self._clip_and_release(batch, sites)
        except BaseException:  # halfway: a second step() on the batch would count what is summed already once more
            self._forget()
            raise
        if batch.last:
            self._open = self._partial = False
        self.clear_batch()
        self.batch = None
        return batch.last

    def _forget(self) -> None:
        """The logical batch is lost, as far as it came."""
        self.batch, self._open, self._partial = None, False, False
        take_away(self.sites)
        self.clear_batch()

    def _clip_and_release(self, batch: BatchInfo, sites: list[Site]) -> None:
        for s in sites:
            if s.marked and s.deferred is not None:
                s.sq = s.deferred.squared_norms()
        if (scale := self._loss_scale()) is not None:
            self.grad_scale = self.grad_scale / scale
        self.sq = squared_norms(sites, batch.rows, self.sites[0].param.device)
        weights, bad = clip_weights(
            self.sq,  # also for diagnostics, until the next one's
            clipping=self.clipping,
            max_grad_norm=self.max_grad_norm,
            grad_scale=self.grad_scale,
            valid=batch.valid,
            dtype=self.dtype,
        )
        self.nonfinite.add(bad)
        if self.adaptive is not None:
            self.adaptive.count(self.sq, self.grad_scale, batch, self.max_grad_norm)
        for s in sites:
            if s.marked and s.deferred is not None:
                s.deferred.add_weighted_sum(weights[s.row], self.sum_of(s))
        if not batch.last or self.group is not None:
            self._partial = True
            full = [s for s in sites if s.materialized]
            if full:
                rows = torch.stack([weights[s.row] for s in full])  # a list as index would be copied from the host
                G, S = [s.made() for s in full], [self.sum_of(s) for s in full]
                functional.clip_reduce(G, rows, S, backend=self.backend)
                for s in full:
                    s.fused = True
        if batch.last:
            self._release(weights)

    def _release(self, weights: Tensor) -> None:
        # The ledger first: a crash from here on may waste budget, never overspend it.
        self.charge()
        sites = self.active
        out = self._carve("grad", sites, None)
        release = self.noise.take_release()
        if self.group is not None and sites:
            self.sum_of(sites[0])
            self.group.add_up(self._buffer("S"))
        noisy = self.noise_std if self.group is None or self.group.rank == 0 else 0.0
        functional.privatize(
            [s.G if s.materialized else None for s in sites],
            [s.S for s in sites],
            weights,
            out,
            noise_std=noisy,
            key=self.noise.key if noisy else None,
            release=release,
            tensor_index=[s.index for s in sites],
            smooth_dim=[s.smooth_dim if self.smoothing else None for s in sites],
            divisor=self.divisor,
            backend=self.backend,
        )
        if self.group is not None and sites:
            self.group.send_released(self._buffer("grad"))
        for s, grad in zip(sites, out):
            rows = s.module.trained_rows if s.role == "lora_B" and isinstance(s.module, Adapted) else None
            if rows is not None:
                grad.mul_(rows)
            s.param.grad = s.released = grad if grad.dtype == s.param.dtype else grad.to(s.param.dtype)
        if self.adaptive is not None:
            self.adaptive.release(self, release)

    def _loss_scale(self) -> Tensor | None:
        scaler = self.grad_scaler
        scale = scaler._get_scale_async() if scaler is not None and scaler.is_enabled() else None
        return None if scale is None else scale.double()
