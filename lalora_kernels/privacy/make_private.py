"""One call that makes an ordinary training loop private."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lalora_kernels.privacy import accounts
from lalora_kernels.privacy.accountant import LARGEST, check_delta, get_noise_multiplier, refuse_delta
from lalora_kernels.privacy.adaptive import AdaptiveClipping
from lalora_kernels.privacy.clipping import CLIPPING
from lalora_kernels.privacy.distributed import Group, find_group, refuse_sharded
from lalora_kernels.privacy.engine import Engine
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.privacy.microbatch import AutoBatch
from lalora_kernels.privacy.model_check import ModelCheck
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.optimizer import MARK, PrivateOptimizer
from lalora_kernels.privacy.postprocess import EXPERIMENTAL
from lalora_kernels.privacy.sampling import PrivateLoader
from lalora_kernels.privacy.scaling import refuse_scaler
from lalora_kernels.privacy.shuffled import ShuffledLoader
from lalora_kernels.privacy.trained import refuse_frozen
from lalora_kernels.schedule import DEFAULT, Schedule, get_schedule

SMOOTHING = ("auto", "binomial5", None, *EXPERIMENTAL)
REDUCTIONS = ("mean", "sum")
UNFIT: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "it evaluates the loss several times a step, and a release is one gradient; use SGD or AdamW",
    torch.optim.SparseAdam: "it takes sparse gradients, and noise is dense; use Adam",
}


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    *,
    method: str | Schedule = DEFAULT,
    smoothing: str | None = "auto",
    clipping: str = "flat",
    max_grad_norm: float = 1.0,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    sample_rate: float | None = None,
    expected_batch_size: int | None = None,
    physical_batch_size: int | str | None = None,
    memory_budget: float | None = None,
    lengths: Sequence[float] | None = None,
    loss_reduction: str = "mean",
    ledger: Ledger | None = None,
    noise: NoiseSource | None = None,
    target_unclipped_quantile: float | None = None,
    clipbound_learning_rate: float = 0.2,
    min_clipbound: float = 1e-6,
    max_clipbound: float = 1e6,
    unclipped_num_std: float | None = None,
    backend: str | None = None,
    check: bool | str = True,
    poisson_sampling: bool = True,
    grad_scaler: "torch.amp.GradScaler | None" = None,
    distributed: bool | None = None,
) -> tuple[PrivateOptimizer, PrivateLoader | ShuffledLoader]:
    """Turn ``optimizer`` and ``data_loader`` private for an adapted ``model``, which is not wrapped or renamed.

    The user's loop stays ``loss.backward(); optimizer.step(); optimizer.zero_grad()`` over the returned loader, which
    draws Poisson batches: each record with probability ``sample_rate``, independently. Before each batch it seeds the
    global generators of torch, NumPy and Python from the operating system: dropout and augmentation are secret, too.

    Args:
        method: which factor trains at which step: "la-lora-unfiltered", "la-lora", "rolora", "ffa-lora", "dp-lora", or
            a ``Schedule``. "rolora" changes with the round: ``optimizer.start_round(t)``, without which only B trains.
        smoothing: "binomial5" filters the noisy adapter gradients along their feature axis; None does not; "auto" does
            what the method's source does: "la-lora" and its periods filter, every other method does not.
            Experimental, slower and in plain torch: "permuted", "temporal", "laplacian", "projected"
            (privacy/postprocess.py).
        clipping: "flat", all tensors together to C; "per_layer", each of L to C / √L; "automatic", divided by the norm,
            so that it is C at most (AUTO-S, 2206.07136).
        max_grad_norm: C, the L2 bound of one record's contribution, in units of the gradient of its own loss.
        noise_multiplier: σ in units of C; 0 trains without noise and reports ε = ∞. Either this, or
        target_epsilon, target_delta, steps: σ is calibrated so that ``steps`` releases spend at most ``target_epsilon``
            at ``target_delta``, after those of ``ledger``; a step beyond the budget is refused.
        epochs: instead of ``steps``: so many passes, each of ``len(loader)`` steps of the returned loader.
        sample_rate, expected_batch_size: q and b = q |D|; give either, or neither: b is the loader's batch size.
        physical_batch_size: a logical batch larger than this is split; the noise is added once. "auto": as many records
            as fit ``memory_budget``, measured at the first forward (privacy/microbatch.py).
        memory_budget: bytes that a step may take above model and optimizer; None: half of what is free then.
        lengths: one number a record, its tokens or characters: a batch that is split is split by length, longest first,
            so that less is padded. The draw and the sum of the gradients stay what they are.
        loss_reduction: how the user's loss treats a batch, "mean" or "sum". ``p.grad`` is the noisy sum divided by
            ``expected_batch_size`` in both.
        ledger, noise: continue with these instead of new ones. Another training on the same records (a second phase)
            takes the first one's ``optimizer.ledger``, so that ε counts both.
        target_unclipped_quantile: γ; with it C is adapted, from max_grad_norm on, so that a share γ of the records is
            not clipped (Andrew et al. 2021, 1905.03871; privacy/adaptive.py). ``clipping`` is "flat" then. The noise on
            the count that this needs is part of ``noise_multiplier``, so ledger and calibrated ε hold both.
        clipbound_learning_rate, min_clipbound, max_clipbound: C's step on the log scale, and its ends.
        unclipped_num_std: deviation of the noise on that count, in records; None: b / 20, or 2 σ where that is more.
        backend: force one kernel backend; None lets dispatch choose.
        check: at the first private batch of two records or more, compare per-sample gradients with single backwards on
            a float64 copy of the model (``check_per_sample``); in the first steps look at the derivatives of the loss
            for what couples records, and at whether ``collate_fn`` makes a row of several. "loss": without the first of
            these, for a model too large to be copied; False: none. They reach into a compiled model's graphs, too.
        grad_scaler: the loop's ``torch.amp.GradScaler``, so that norms are those of unscaled gradients. Needs
            loss_reduction="sum" and an ``init_scale`` below 65504, where the scale stays (privacy/scaling.py). A record
            whose scaled gradient overflows contributes nothing; the step is never skipped.
        distributed: split each batch over the ranks of torch.distributed's process group, noise once; None: where one
            of several ranks is initialized. ``expected_batch_size`` counts the records of all ranks.
        poisson_sampling: False keeps the loader's own batches: clipped and noised alike, but no ε is reported.

    Returns (optimizer, loader). The guarantee: record-level (ε, δ)-DP, add or remove one record, of everything computed
    from the stepped parameters, by the composition in ``optimizer.ledger``.
    Raises ValueError for arguments out of range, a δ of 1 over the number of records or more, a trainable parameter
    that no rule covers or over whose memory the model has another tensor, a BatchNorm in train mode, a parameter that
    trains but is not in the optimizer, an adapter whose factors are both frozen, a model in shards (FSDP, DeepSpeed,
    tensor parallel), and an ε that no σ reaches.
    """
    schedule = get_schedule(method)
    _one_of("smoothing", smoothing, SMOOTHING)
    if smoothing == "auto":
        smoothing = schedule.smoothing
    postprocess: Any = None
    if smoothing in EXPERIMENTAL:
        smoothing, postprocess = EXPERIMENTAL[smoothing]
    _one_of("clipping", clipping, CLIPPING)
    _one_of("check", check, (True, False, "loss"))
    _one_of("loss_reduction", loss_reduction, REDUCTIONS)
    _positive("max_grad_norm", max_grad_norm)
    _refuse_unfit(model, optimizer)
    if grad_scaler is not None:
        refuse_scaler(grad_scaler, loss_reduction)
    if ledger is None:
        accounts.refuse_second_account(model.parameters())
    if lengths is not None and physical_batch_size is None:
        raise ValueError("lengths sort the records of a batch that is split; give physical_batch_size too")
    auto = physical_batch_size == "auto"
    if memory_budget is not None:
        _positive("memory_budget", memory_budget)
        if not auto:
            raise ValueError('memory_budget is what physical_batch_size="auto" goes by; give both')
    noise = NoiseSource() if noise is None else noise
    group = find_group(distributed)
    if auto and group is not None:
        raise ValueError('physical_batch_size="auto" measures one process; give every rank the same number')
    loader: Any
    if poisson_sampling:
        loader = PrivateLoader(
            data_loader,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            physical_batch_size=1 if auto else physical_batch_size,  # type: ignore[arg-type]  # no other string passes
            lengths=lengths,
            noise=noise,
            check=bool(check),
            **({} if group is None else _shared(group, model, noise)),
        )
    else:
        if group is not None:
            raise ValueError("distributed steps need Poisson sampling: the ranks share one draw")
        if target_epsilon is not None:
            raise ValueError("target_epsilon needs Poisson sampling; give noise_multiplier, and no epsilon is claimed")
        if not sample_rate is expected_batch_size is physical_batch_size is lengths is None:
            raise ValueError("without Poisson sampling the loader's batches stay as they are; set them in the loader")
        loader = ShuffledLoader(data_loader)
    q, b = loader.sample_rate, float(loader.expected_batch_size)
    for delta in (target_delta, None if ledger is None else ledger.target_delta):
        if delta is not None and poisson_sampling:
            refuse_delta(check_delta(delta, "target_delta"), len(loader.dataset))
    steps = _steps(noise_multiplier, target_epsilon, steps, epochs, len(loader))
    if target_epsilon is not None:
        if target_delta is None or steps is None:
            raise ValueError("target_epsilon needs target_delta and steps (private steps of the training), or epochs")
        if ledger is None:
            ledger = Ledger(target_epsilon=target_epsilon, target_delta=target_delta)
        _refuse_other_budget(ledger, target_epsilon, target_delta)
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=q,
            steps=steps,
            history=ledger.releases,
        )
        ledger.target_epsilon, ledger.target_delta = float(target_epsilon), float(target_delta)
    elif not isinstance(noise_multiplier, Real) or not 0.0 <= noise_multiplier <= LARGEST:
        raise ValueError(f"noise_multiplier is a finite number >= 0, got {noise_multiplier!r}")
    if ledger is None:
        ledger = Ledger(target_delta=target_delta)
    if not noise.is_secret:
        ledger.refuse_epsilon("the noise key is fixed")

    adaptive: AdaptiveClipping | None = None
    if target_unclipped_quantile is not None:
        if clipping != "flat" or group is not None:
            raise ValueError("target_unclipped_quantile needs clipping='flat', in one process")
        adaptive = AdaptiveClipping(
            target_unclipped_quantile=target_unclipped_quantile,
            clipbound_learning_rate=clipbound_learning_rate,
            min_clipbound=min_clipbound,
            max_clipbound=max_clipbound,
            unclipped_num_std=unclipped_num_std,
            noise_multiplier=float(noise_multiplier),
            expected_batch_size=b,
        )

    def charge() -> None:
        ledger.charge(
            noise_multiplier,
            q,
            release=noise.next_release,
            clipping=clipping if adaptive is None else "flat, adaptive",
            max_grad_norm=max_grad_norm if adaptive is None else None,  # changes with every step
            expected_batch_size=b,
            sampling="poisson" if poisson_sampling else "shuffled",
        )

    engine = Engine(
        model,
        clipping=clipping,
        max_grad_norm=float(max_grad_norm),
        noise_std=float(noise_multiplier) * float(max_grad_norm),
        noise=noise,
        divisor=b,
        smoothing=smoothing,
        loss_reduction=loss_reduction,
        charge=charge,
        backend=backend,
        strict=bool(check),
        model_check=ModelCheck() if check is True else None,
        grad_scaler=grad_scaler,
        group=group,
        adaptive=adaptive,
        auto_batch=AutoBatch(loader.batch_sampler, memory_budget, schedule) if auto else None,
        usual_rows=min(b, physical_batch_size) if isinstance(physical_batch_size, int) else b,
    )
    try:
        private = PrivateOptimizer(optimizer, engine, schedule, ledger, float(noise_multiplier), b, target_delta)
    except BaseException:
        engine.detach()
        raise
    accounts.note((site.param for site in engine.sites), ledger)
    if postprocess is not None:
        private.postprocess = postprocess(engine)
    loader.on_batch = engine.begin
    return private, loader


def _refuse_unfit(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise TypeError or ValueError for what no private step can be made of."""
    if not isinstance(model, nn.Module) or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"make_private takes a model, its torch optimizer and a data loader, in this order; not "
            f"{type(model).__name__} and {type(optimizer).__name__}"
        )
    for given, plain in ((model, "the model that it wraps"), (optimizer, "its original_optimizer")):
        if any(kind.__module__.startswith(("opacus.grad_sample", "opacus.optim")) for kind in type(given).__mro__):
            raise TypeError(
                f"{type(given).__name__} is Opacus', and make_private does what it does; pass {plain} "
                f"(docs/from-opacus.md)"
            )
    if isinstance(optimizer, PrivateOptimizer):
        raise ValueError("this optimizer is private already; make_private takes the plain one")
    for kind, why in UNFIT.items():
        if isinstance(optimizer, kind):
            raise ValueError(f"{type(optimizer).__name__} cannot take a private step: {why}")
    if any(MARK in group for group in optimizer.param_groups):
        raise ValueError(
            "the state of a private training was loaded into the plain optimizer, so what that training spent is "
            "forgotten; call make_private first and load the state into the optimizer that it returns"
        )
    refuse_sharded(model)
    refuse_frozen(model)


def _shared(group: Group, model: nn.Module, noise: NoiseSource) -> dict[str, Any]:
    """What the loader of one of several ranks is given, whose models have rank 0's parameters from now on."""
    device = next(model.parameters()).device
    group.share_parameters([p for p in model.parameters() if p.requires_grad])
    return {"source": group.sampling_source(noise, device), "rank": group.rank, "world": group.world}


def _steps(
    noise_multiplier: float | None, target_epsilon: float | None, steps: int | None, epochs: int | None, epoch: int
) -> int | None:
    """Releases to calibrate the noise to, of which a pass takes ``epoch``; None beside a noise_multiplier."""
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError("give either noise_multiplier, or target_epsilon with target_delta and steps")
    if noise_multiplier is not None and not steps is epochs is None:
        raise ValueError(
            "steps and epochs calibrate the noise to target_epsilon; beside noise_multiplier they would limit nothing. "
            "Leave them out, and iterate loader.steps(n)"
        )
    if epochs is None:
        return steps
    if steps is not None or type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs is a whole number >= 1, and given instead of steps; got {epochs!r}")
    return epochs * epoch


def _refuse_other_budget(ledger: Ledger, target_epsilon: float, target_delta: float) -> None:
    asked, has = (target_epsilon, target_delta), (ledger.target_epsilon, ledger.target_delta)
    relation = ledger.neighboring_relation
    if (has[0] is not None and has != asked) or relation != "add_or_remove_one":
        budget = "no budget" if has[0] is None else f"the budget epsilon {has[0]:g}, delta {has[1]:g}"
        raise ValueError(
            f"the ledger has {budget} ({relation}), and make_private was asked for epsilon {asked[0]:g}, delta "
            f"{asked[1]:g} (add_or_remove_one); give the ledger's, or noise_multiplier instead, or raise "
            f"ledger.target_epsilon knowingly"
        )


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}; got {value!r}")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, Real) or not 0.0 < value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} is a finite number > 0, got {value!r}")
