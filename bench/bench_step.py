"""One whole private training step against PEFT's ordinary one and against other ways of training privately."""

import gc

import pytest
import torch
from contenders import CONTENDERS, LaLora, OpacusHooks, expected, one_gradient, typical_norm
from zoo import MODELS, BaseProducts, Spec

# A float32 forward and backward of a whole model in two orders of summation.
TOLERANCE = 1e-4

STEPS = [Spec(model, targets, r) for model in ("bert", "vit") for targets in ("qv", "all-linear") for r in (8, 16)]
ROUNDS = [Spec(model, "all-linear", 16) for model in ("swin", "roberta")]
DP_LORA = ("Opacus hooks", "Opacus ghost")


def _flat(grads: dict[str, torch.Tensor], order) -> torch.Tensor:
    return torch.cat([grads[name].reshape(-1).double() for name in order])


def check(race, spec: Spec, names) -> None:
    """Every contender's noiseless gradient against the formula on Opacus' per-sample gradients."""
    with_hooks = OpacusHooks(spec, noise=0.0)
    G = {n: g.detach().clone() for n, g in with_hooks.per_sample().items()}
    del with_hooks
    clip = typical_norm(G)
    for name in names:
        got = one_gradient(CONTENDERS[name](spec, noise=0.0, clip=clip))
        want = expected(G, clip, clipping=CONTENDERS[name].clipping)
        race.check(name, _flat(got, want), _flat(want, want), TOLERANCE)
        gc.collect()
    ours = LaLora(spec, noise=0.0, clip=clip, smoothing=None)
    ours.sgd.param_groups[0]["lr"] = 0.0  # so that the second step is taken at the same place
    for factor, frozen in (("B", "lora_A"), ("A", "lora_B")):
        want = expected(G, clip, lambda n, frozen=frozen: not n.endswith(frozen))
        race.check(f"ours, {factor} active", _flat(one_gradient(ours), want), _flat(want, want), TOLERANCE)


def run(race, spec: Spec, names, base: bool) -> None:
    check(race, spec, names)
    gc.collect()
    ours = LaLora(spec)
    others = {name: CONTENDERS[name](spec).step for name in names}
    if base:
        products = BaseProducts(spec, ours.model)
        others["base products"] = products
        race.facts(base_flops=products.flops)
    race.facts(model=spec.model, what=MODELS[spec.model][0], targets=spec.targets, r=spec.r, batch=spec.batch)
    race.run(ours.cycle, others, repeat=False, parts=ours.parts)


@pytest.mark.parametrize("spec", STEPS, ids=str)
def bench_step(race, spec):
    run(race, spec, list(CONTENDERS), base=False)


@pytest.mark.parametrize("spec", ROUNDS, ids=str)
def bench_dp_lora(race, spec):
    run(race, spec, DP_LORA, base=True)
