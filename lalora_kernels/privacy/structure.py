"""Whether a model still is the one that ``make_private`` was given: asked at every private step, in one cheap pass."""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from lalora_kernels.adapted import Factors, Tensors, factors_of, submodules
from lalora_kernels.privacy.accounts import AGAIN
from lalora_kernels.privacy.recorders import Recorder
from lalora_kernels.privacy.sites import Site

HOLDING = ("_modules", "_parameters")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
EVERYWHERE = [f"_global{kind}" for kind in HOOKS]  # of torch.nn.modules.module
_trains, _training = attrgetter("requires_grad"), attrgetter("training")


class Structure:
    """What a model consists of: its modules, what each holds and is replaced or hooked by, and the factors of the
    adapted ones.

    A step compares the modules with what they held last time, in a few calls of built-in functions: a model of 12
    layers has 250 modules and as many tensors. Only where that differs (a frozen module was added, say) is all looked
    at anew.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.looks = 0  # at all of it: the first step's, and one whenever something differed
        self._parts: list[nn.Module] = []
        self._attributes: list[dict[str, Any]] = []  # of every module
        self._holding: dict[str, list[Any]] = {}  # its dictionaries of children and of tensors
        self._hooking: dict[str, list[Any]] = {}  # ... and of hooks
        self._sizes: list[int] = []
        self._held: list[Any] = []  # what stands in them, side by side
        self._forwards: list[Any] = []  # what stands in the place of each module's own, or None
        self._hooks: list[Any] = []
        self._handles = -1  # torch's number for the next hook of all, which moves wherever one is put
        self._frozen: list[nn.Parameter] = []
        self._factors: Factors = []

    def factors(self, sites: Sequence[Site], recorders: Sequence[Recorder]) -> Factors:
        """("lora_A" or "lora_B", parameter) of every adapted layer.

        Raises RuntimeError where the model is no longer the one that ``sites`` and ``recorders`` were made for.
        """
        if self._attributes and self._same():
            for site in sites:
                site.verify_kind()
            for recorder in recorders:
                if recorder.varies:
                    recorder.verify()
            return self._factors
        self.looks += 1
        modules = submodules(self.model)
        told = refuse_changes(self.model, modules, sites, recorders)
        known = {site.param for site in sites}
        self._parts, self._attributes = modules, [vars(module) for module in modules]
        self._holding = {name: [getattr(module, name) for module in modules] for name in HOLDING}
        self._sizes, self._held = list(map(len, self._dicts())), list(self._contents())
        self._forwards = list(map(dict.get, self._attributes, repeat("forward")))
        self._hooking = {name: [getattr(module, name) for module in modules] for name in HOOKS}
        self._handles, self._hooks = RemovableHandle.next_id, self._hooks_now()
        tensors = (p for held in self._holding["_parameters"] for p in held.values() if p is not None)
        self._frozen = [p for p in tensors if p not in known]
        self._factors = factors_of(modules, told)
        return self._factors

    def modes(self) -> tuple[bool, ...]:
        """Which modules were in train mode, of those that there were at the last look."""
        return tuple(map(_training, self._parts))

    def _hooks_now(self) -> list[Any]:
        everywhere = [getattr(torch_module, kind) for kind in EVERYWHERE]
        hooks = filter(None, chain(everywhere, *self._hooking.values()))  # of those dictionaries most are empty
        return list(chain.from_iterable(map(dict.values, hooks)))

    def _same_hooks(self) -> bool:
        if self._handles != RemovableHandle.next_id:  # a tensor's, say, or those of an evaluation, which are gone again
            now, self._handles = self._hooks_now(), RemovableHandle.next_id
            return self._stand(self._hooking) and len(now) == len(self._hooks) and all(map(is_, now, self._hooks))
        return True

    def _stand(self, dicts: dict[str, list[Any]]) -> bool:
        """Whether every module still has these dictionaries."""
        return all(all(map(is_, map(dict.get, self._attributes, repeat(n)), held)) for n, held in dicts.items())

    def _dicts(self) -> Iterator[Any]:
        return chain.from_iterable(self._holding.values())

    def _contents(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._dicts()))

    def _same(self) -> bool:
        return (
            self._stand(self._holding)
            and list(map(len, self._dicts())) == self._sizes  # or what moved from one to the next would not show
            and all(map(is_, self._contents(), self._held))
            and all(map(is_, map(dict.get, self._attributes, repeat("forward")), self._forwards))
            and self._same_hooks()
            and not any(map(_trains, self._frozen))
        )


def refuse_changes(
    model: nn.Module, modules: list[nn.Module], sites: Sequence[Site], recorders: Sequence[Recorder]
) -> dict[nn.Module, Tensors]:
    """Raise RuntimeError where the model, of these ``modules``, is no longer the one that the others were made for.

    Returns what the adapted layers have just told of their tensors.
    """
    for s in sites:
        s.verify()
    told = {r.module: r.verify() for r in recorders}
    inside = set(modules)
    for r in recorders:
        if r.module not in inside:
            raise RuntimeError(
                f"{r.name} was taken out of the model after make_private (merged, unloaded or replaced); {AGAIN}"
            )
    known = {id(s.param) for s in sites}  # which the sites hold, so no other tensor has one of these
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in known:
            raise RuntimeError(
                f"{name} was added or unfrozen after make_private, so nothing clips or noises it; freeze it, or {AGAIN}"
            )
    return {module: tensors for module, tensors in told.items() if tensors is not None}
