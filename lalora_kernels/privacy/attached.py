"""What ties an engine to its model: the sites and recorders of what trains, the hooks, and the way back."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lalora_kernels.adapted import Adapted, Factors
from lalora_kernels.privacy.distributed import loud_ddp
from lalora_kernels.privacy.recorders import InputCheck, LoRARecorder, Recorder, Undo
from lalora_kernels.privacy.reduction import ReductionCheck
from lalora_kernels.privacy.rules import ExtraRecorder, may_mix, refuse_mixing, refuse_tables, refuse_torchscript
from lalora_kernels.privacy.sampling import BatchInfo
from lalora_kernels.privacy.sentinel import refuse_foreign, take_away
from lalora_kernels.privacy.sites import Site
from lalora_kernels.privacy.structure import Structure
from lalora_kernels.privacy.ties import tie
from lalora_kernels.privacy.trained import Use, refuse_hooks, trained_tensors
from lalora_kernels.privacy.workspace import Workspace

if TYPE_CHECKING:
    from lalora_kernels.privacy.model_check import ModelCheck


class Attached:
    """The engine's part of that; ``Engine`` makes what is declared here."""

    model: nn.Module
    sites: list[Site]
    recorders: list[Recorder]
    structure: Structure
    batch: BatchInfo | None
    strict: bool
    model_check: "ModelCheck | None"
    _ddp: Any
    _handles: list[Any]
    _buffers: Workspace

    def _attach(self) -> None:
        engine: Any = self
        self._refuse_layers()
        seen: dict[nn.Parameter, Site] = {}
        for name, module, uses in trained_tensors(self.model):
            found = {}
            for use in uses:
                if use.param in seen:
                    found[use.role] = tie(seen[use.param], use)
                else:
                    found[use.role] = seen[use.param] = self._add_site(use)
            if found:
                self._record(name, module, found)
        if not self.sites:
            raise ValueError("the model has no trainable parameter; adapt() it first")
        dtypes = {s.param.dtype == torch.float64 for s in self.sites}
        if len(dtypes) > 1:
            raise ValueError("some trainable parameters are float64 and some are not; use one precision")
        self.dtype = torch.float64 if dtypes.pop() else torch.float32
        self._handles.append(self.model.register_forward_pre_hook(InputCheck(engine, self.sites[0]), with_kwargs=True))
        self.reduction = ReductionCheck(engine, self.sites[0])
        self._handles.append(self.reduction)
        if self.strict:
            self._handles.append(self.model.register_forward_hook(self.reduction))

    def _refuse_layers(self) -> None:
        refuse_torchscript(self.model)
        self._mixers = [(n, m) for n, m in self.model.named_modules() if may_mix(m)]
        refuse_mixing(self._mixers)
        refuse_tables(self.model)

    def _factors(self) -> Factors:
        """The model's, which is looked at and checked like a new one where it has other modules than before."""
        looks = self.structure.looks
        found = self.structure.factors(self.sites, self.recorders)
        if self.structure.looks > looks:
            self._refuse_layers()
            if looks and self.model_check is not None:
                self.model_check.ask_again()
        return found

    def _add_site(self, use: Use) -> Site:
        p = use.param
        refuse_hooks(use)
        smooth_dim = {"lora_A": 1, "lora_B": 0}.get(use.role) if use.adapted else None
        site = Site(
            use.name, use.owner, use.key, use.role, p, len(self.sites), smooth_dim, p.requires_grad, kind=use.kind
        )
        self.sites.append(site)
        p.requires_grad_(True)  # torch takes the hook of no other tensor
        # A name alone: what such a hook holds is not freed while the tensor lives, and this one's module holds that.
        self._handles.append(p.register_post_accumulate_grad_hook(partial(refuse_foreign, name=use.name)))
        p.requires_grad_(site.trained)
        return site

    def _record(self, name: str, module: nn.Module, sites: dict[str, Site]) -> None:
        engine: Any = self
        if getattr(module, "recorder" if isinstance(module, Adapted) else "_recorder", None) is not None:
            raise RuntimeError(f"{name} already belongs to a private optimizer; call its detach() first")
        if isinstance(module, Adapted):
            self.recorders.append(LoRARecorder(engine, name, module, sites))
            self._handles.append(Undo(module))
        else:
            self.recorders.append(ExtraRecorder(engine, name, module, sites))

    def turn(self, sequence_first: frozenset[str]) -> None:
        """These modules are given positions first and records second, (T, N, ...)."""
        for recorder in self.recorders:
            if recorder.name in sequence_first:
                recorder.batch_axis = 1

    def detach(self) -> None:
        """Give the model back to ordinary training, trainable as it was found; the workspace is freed."""
        take_away(self.sites)
        for site in self.sites:
            site.param.requires_grad_(site.trained)
        if self._ddp:
            loud_ddp(self.model)
        for handle in self._handles:
            handle.remove()
        for recorder in self.recorders:
            if isinstance(recorder, ExtraRecorder):
                recorder.detach()
        self._buffers.clear()
        self._handles, self.recorders, self.batch = [], [], None
