"""A torch optimizer whose ``step`` is a private step."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from lalora_kernels.adapted import Factors, activate, factor_parameters
from lalora_kernels.privacy.accounts import AGAIN
from lalora_kernels.privacy.engine import Engine
from lalora_kernels.privacy.graphs import GraphedBackward
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.privacy.scaling import hold
from lalora_kernels.schedule import Schedule

STRAY = " trains but is not in the optimizer; build it from all trainable parameters"
MARK = "lalora_ledger"  # in a saved state's first group: a plain optimizer that loads it shows where it comes from


class PrivateOptimizer(Optimizer):
    """Wraps any ``torch.optim`` optimizer; made by ``make_private``.

    ``step`` clips what backward recorded. On the last physical batch of a logical batch it charges the ledger, releases
    the gradient into ``p.grad`` and lets the wrapped optimizer step; on the others it only accumulates. The next factor
    becomes active with the next logical batch. ``param_groups`` and state are the wrapped optimizer's own, so that
    learning-rate schedulers work on either.
    """

    _step_supports_amp_scaling = True  # GradScaler.step leaves the unscaling to ``step``

    def __init__(
        self,
        optimizer: Optimizer,
        engine: Engine,
        schedule: Schedule,
        ledger: Ledger,
        noise_multiplier: float,
        expected_batch_size: float,
        target_delta: float | None,
    ):
        # The base class is not initialized: its state is the wrapped optimizer's, by the properties below.
        self.original_optimizer, self.engine, self.schedule, self.ledger = optimizer, engine, schedule, ledger
        self._noise_multiplier, self.expected_batch_size = noise_multiplier, expected_batch_size
        self.target_delta = target_delta
        self.round = self.local_step = 1
        self._versions_count = False
        self._private = {id(site.param) for site in engine.sites}  # which the sites hold, so these ids are theirs
        self.stepped = False  # whether the last ``step`` released, or only added a physical batch to the sum
        self.postprocess: Callable | None = None  # of released gradients; see postprocess.py
        self._settings: list[dict[str, Any]] | None = None  # of a logical batch whose first parts are summed
        self._refuse_strays()
        self._activate()
        engine.next_factors = self._next_factors

    # ---------------------------------------------------------------- the wrapped optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """``train`` and ``eval`` of an optimizer that has them: schedule-free ones keep other weights in each."""
        if name in ("train", "eval") and "original_optimizer" in vars(self):
            return getattr(self.original_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a private optimizer holds a secret key and is not pickled; save its state_dict() instead")

    def __repr__(self) -> str:
        inner = type(self.original_optimizer).__name__
        return f"PrivateOptimizer({inner}, noise_multiplier={self.noise_multiplier:.4g})"

    def register_step_pre_hook(self, hook: Any) -> Any:
        """The wrapped optimizer's: called at each release, not at each physical batch."""
        return self.original_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """The wrapped optimizer's: called at each release, not at each physical batch."""
        return self.original_optimizer.register_step_post_hook(hook)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what trains is fixed by ``make_private``."""
        raise RuntimeError(f"parameters cannot be added to a private optimizer; {AGAIN}")

    # ---------------------------------------------------------------- privacy

    @property
    def noise_multiplier(self) -> float:
        """σ of this account, in units of C: fixed, since it is what the ledger is charged."""
        return self._noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """C; with adaptive clipping that of the next logical batch, which is as private as all that is released."""
        return self.engine.max_grad_norm

    @property
    def nonfinite_samples(self) -> int:
        """Records left out so far, with clipping="per_layer" of some tensors at least: their gradient was NaN, Inf or
        beyond float32. Not privatized: do not publish."""
        return int(self.engine.nonfinite.total)

    @property
    def per_sample_checked(self) -> bool:
        """Whether per-sample gradients of two records were compared with single backwards (make_private's check)."""
        check = self.engine.model_check
        return check is not None and not check.pending

    @property
    def loss_reduction_checked(self) -> bool:
        """Whether a loss of the loop showed the claimed ``loss_reduction`` (see privacy/reduction.py)."""
        return self.engine.reduction.seen is not None

    def get_epsilon(self, delta: float | None = None) -> float:
        """ε spent so far at ``delta`` (default: ``target_delta``). Raises where no ε can be claimed; see ``Ledger``."""
        delta = self.target_delta if delta is None else delta
        if delta is None:
            raise ValueError("get_epsilon needs a delta, since make_private was given no target_delta")
        return self.ledger.epsilon(delta)

    def start_round(self, round: int) -> None:
        """Federated round ``round`` (from 1): local steps count from 1 again and the active factor follows."""
        self.schedule.active(round, 1)
        self.round, self.local_step = round, 1
        self._activate()

    def _activate(self) -> None:
        self._next_factors()(list(factor_parameters(self.engine.model)))

    def _next_factors(self) -> Callable[..., None]:
        """What makes them the active ones. The schedule, which may be anybody's code, is asked here: of what is seen of
        the model from now on, nothing is out of date when that is called."""
        return partial(self._train, self.schedule.active(self.round, self.local_step))

    def _train(self, factors: str, found: Factors) -> None:
        activate(found, factors)
        inside = {id(p) for group in self.param_groups for p in group["params"]}
        for site in self.engine.sites:
            if site.param.requires_grad and id(site.param) not in inside:
                raise ValueError(f"{site.name}{STRAY}")

    def _refuse_strays(self) -> None:
        """Every tensor that the schedule ever trains is in the optimizer, and nothing else that trains is."""
        inside = {p for group in self.param_groups for p in group["params"]}
        # as far as a period is expected to reach; _activate asks again, of each step
        factors = {f for r in range(1, 5) for s in range(1, 65) for f in self.schedule.active(r, s)}
        sites = {site.param: site for site in self.engine.sites}
        if "A" in factors and any(site.role == "lora_A" for site in self.engine.sites):
            self._refuse_lora_fa()
        for p, site in sites.items():
            frozen = site.role in ("lora_A", "lora_B") and site.role[-1] not in factors
            if p not in inside and not frozen:
                raise ValueError(f"{site.name}{STRAY}")
        held = [p for group in self.param_groups for p in group["params"]]
        if len(held) > len(inside):
            twice = next((sites[p].name for p in inside if p in sites and sum(p is q for q in held) > 1), "a tensor")
            raise ValueError(f"the optimizer holds {twice} twice, and would step on one release twice; give it once")
        for p in inside:
            if p.requires_grad and p not in sites:
                raise ValueError(
                    f"the optimizer holds a trainable tensor of shape {tuple(p.shape)} that is not the model's; its "
                    f"gradient would not be private. Give it an optimizer of its own, or freeze it"
                )
            if p.grad is not None:
                raise ValueError(
                    f"{self._name_of(p)} has a gradient from before make_private, on which the first step would step; "
                    f"call optimizer.zero_grad() first"
                )

    def _refuse_lora_fa(self) -> None:
        wrapped = getattr(self.original_optimizer, "optimizer", self.original_optimizer)  # accelerate's holds it
        if any(kind.__name__ == "LoraFAOptimizer" for kind in type(wrapped).__mro__):
            raise ValueError(
                f"{type(wrapped).__name__} cannot take a private step of this method: it moves every factor B by a "
                f'factor A that stays frozen, and the method trains A, too; give method="ffa-lora", or AdamW'
            )

    def _name_of(self, param: torch.Tensor) -> str:
        names = (n for n, p in self.engine.model.named_parameters() if p is param)
        return next(names, f"a tensor of shape {tuple(param.shape)}")

    def _refuse_raw(self) -> None:
        """The wrapped optimizer steps on whatever gradient it finds: there must be none that no release made."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in self._private:
                    raise RuntimeError(
                        f"{self._name_of(p)} has a gradient that nothing clips or noises (it was unfrozen or added "
                        f"after make_private), and the step would release it; freeze it and set its grad to None, or "
                        f"{AGAIN}"
                    )

    def _refuse_accumulation(self) -> None:
        state = getattr(self.original_optimizer, "gradient_state", None)  # accelerate's, after prepare()
        if state is not None and not state.sync_gradients:
            raise RuntimeError(
                f"{type(self.original_optimizer).__name__} steps at the end of a gradient accumulation alone, and each "
                f"release is a step; leave out accelerator.accumulate() and gradient_accumulation_steps, give the "
                f"DataLoader the whole batch's size, and have it split by make_private(physical_batch_size=...)"
            )

    def _settings_now(self) -> list[dict[str, Any]]:
        """Rates and the like of each group; of a tensor, whose value is the device's to know, how often it was set."""
        return [
            {k: (id(v), v._version) if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            for group in self.param_groups
        ]

    def _refuse_new_settings(self) -> None:
        """How many physical batches a logical one has is a matter of the records drawn, so nothing may go by it."""
        if self._settings is not None and self.engine.within_logical_batch and self._settings != self._settings_now():
            raise RuntimeError(
                "the optimizer's settings changed between two parts of one logical batch, so a learning rate would "
                "tell how many records were drawn, which no ε covers; call scheduler.step(), and whatever else counts "
                "steps, only `if optimizer.stepped`"
            )

    # ---------------------------------------------------------------- stepping

    def graph(self, backward: Callable[..., None], rows: int) -> GraphedBackward:
        """``backward(*batch)``, the loop's forward and backward, as a CUDA graph for batches of up to ``rows`` records.

        Call what is returned on every batch, then ``step``. Tensors of ``batch`` have a row for each record; the loss
        is not returned. Raises ValueError for clipping="per_layer" and for rows < 1; see ``privacy/graphs.py``.
        """
        return GraphedBackward(self.engine, backward, rows)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One physical batch's share of a private step; see the class. Returns the closure's value, if any.

        Raises RuntimeError without a new batch or a backward before it, BudgetExceeded before a release that the
        ledger's budget does not allow.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_accumulation()
        self._refuse_raw()
        self._refuse_new_settings()
        last = self.stepped = self.engine.finish()
        self._tell_scaler()
        self._settings = None if last else self._settings_now()
        if last:
            if self.postprocess is not None:
                self.postprocess(self.engine.active)
            before = self._probe()
            self.original_optimizer.step()
            self._verify_moves(before)
            self.local_step += 1
        return loss

    def _tell_scaler(self) -> None:
        """Nothing of what overflowed, which GradScaler asks after; see scaling.py."""
        scaler = self.engine.grad_scaler
        if scaler is not None and scaler.is_enabled():
            none = torch.zeros((), device=self.engine.sites[0].param.device)
            scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = {none.device: none}
            hold(scaler)
        elif getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("GradScaler.step needs make_private(grad_scaler=...), or clipping sees scaled gradients")

    def _probe(self) -> list[tuple[int, torch.Tensor | None, bool]]:
        """Of every site: its version, until versions have proved to count steps its first elements, and whether the
        optimizer knows it from a step before."""
        params = [s.param for s in self.engine.sites]
        first = [None if self._versions_count else p.detach().flatten()[:8].clone() for p in params]
        return [(p._version, some, bool(self.state.get(p))) for p, some in zip(params, first)]

    def _verify_moves(self, before: list[tuple[int, torch.Tensor | None, bool]]) -> None:
        """The silent no-op of a factor that never moves while ε grows, and a frozen factor that moves, are errors.

        A tensor's first step may only begin its statistics (ADOPT's, 2411.02853).
        """
        counted, name = True, type(self.original_optimizer).__name__
        for site, (version, probe, known) in zip(self.engine.sites, before):
            stepped = site.param._version != version
            if site.row < 0:
                if stepped:
                    raise RuntimeError(f"{site.name} is not active in this step, but {name} moved it")
            elif not stepped:
                # Optimizers that write to p.data leave the version alone; a rate of 0 (warm-up) leaves the value alone.
                counted = False
                still = probe is None or torch.equal(probe, site.param.detach().flatten()[:8])
                begins = not known and bool(self.state.get(site.param))
                if still and not begins and self._rate(site.param) != 0.0:
                    raise RuntimeError(
                        f"{site.name} was released but {name} did not move it, and each such step costs ε; use an "
                        f"optimizer that steps on every gradient that it finds"
                    )
        self._versions_count = counted

    def _rate(self, param: torch.Tensor) -> float:
        return next(float(g.get("lr", 1.0)) for g in self.param_groups if any(p is param for p in g["params"]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the released gradients; the sums of an unfinished logical batch stay."""
        self.original_optimizer.zero_grad(set_to_none=True)

    def detach(self) -> None:
        """Give model and optimizer back to ordinary, non-private use."""
        self.engine.detach()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state plus "privacy": ledger, next release number, place in the schedule. No key."""
        inner = self.original_optimizer.state_dict()
        inner["param_groups"][0][MARK] = self.ledger.id
        return {
            **inner,
            "privacy": {
                "ledger": self.ledger.state_dict(),
                "noise": self.engine.noise.state_dict(),
                "round": self.round,
                "local_step": self.local_step,
                "max_grad_norm": self.max_grad_norm,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``: what was spent is spent, the key is fresh.

        Raises ValueError for a state without a ledger or a damaged one, LedgerError as ``Ledger.load_state_dict``.
        """
        if "privacy" not in state_dict:
            raise ValueError(
                "this checkpoint holds no privacy ledger, so what it spent is unknown; load it into the optimizer "
                "before make_private if it was trained on public data only"
            )
        privacy = state_dict["privacy"]
        self._refuse_damaged(privacy)
        self.ledger.load_state_dict(privacy["ledger"])
        self.engine.noise.load_state_dict(privacy["noise"])
        self.original_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "privacy"})
        self.param_groups[0].pop(MARK, None)
        self.round, self.local_step = privacy["round"], privacy["local_step"]
        if self.engine.adaptive is not None:
            self.engine.adaptive.set_bound(self.engine, privacy["max_grad_norm"])
        self._activate()

    def _refuse_damaged(self, privacy: Any) -> None:
        """Before anything is taken over of it."""
        needed = ["ledger", "noise", "round", "local_step", *(["max_grad_norm"] if self.engine.adaptive else [])]
        lacks = [key for key in needed if not isinstance(privacy, Mapping) or key not in privacy]
        counts = [] if lacks else [privacy["round"], privacy["local_step"]]
        if lacks or any(type(count) is not int or count < 1 for count in counts):
            what = f"lacks {', '.join(lacks)}" if lacks else f"counts rounds and local steps from 1, not {counts}"
            raise ValueError(f'the "privacy" of this checkpoint {what}: it is damaged; restore it from a copy')
