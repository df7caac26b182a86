"""Which factor is active at (round, local step), both counted from 1."""

from collections.abc import Callable
from dataclasses import dataclass

LONGEST = 50  # steps of the longest period among SCHEDULES


@dataclass(frozen=True)
class Schedule:
    """``active(round, step)`` names the factors that a private step trains: "A", "B" or "AB".

    ``smoothing`` is the filter that the method's source has, "binomial5" or None: what smoothing="auto" means.
    """

    name: str
    rule: Callable[[int, int], str]
    smoothing: str | None = None

    def active(self, round: int, step: int) -> str:
        """Factors of local step ``step`` of round ``round``. Raises ValueError where either is below 1."""
        if round < 1 or step < 1:
            raise ValueError(f"rounds and local steps count from 1, got round {round}, step {step}")
        return self.rule(round, step)

    @property
    def least_steps(self) -> int:
        """Local steps of a round after which every factor has trained that this schedule ever trains."""
        first: dict[str, int] = {}
        for step in range(1, LONGEST + 1):
            for round in (1, 2):
                first.setdefault(self.active(round, step), step)
        return max(first.values())


def _both(round: int, step: int) -> str:
    return "AB"


def _b_only(round: int, step: int) -> str:
    return "B"


def _by_round(round: int, step: int) -> str:
    return "B" if round % 2 else "A"


def _by_step(round: int, step: int) -> str:
    return "B" if step % 2 else "A"


def periods(b: int, a: int, first: str = "B") -> Callable[[int, int], str]:
    """``b`` local steps with B active, then ``a`` with A, again and again from step 1 of every round; or A first."""
    order = "B" * b + "A" * a if first == "B" else "A" * a + "B" * b
    return lambda round, step: order[(step - 1) % len(order)]


SCHEDULES = {
    "dp-lora": Schedule("dp-lora", _both),  # 2312.17493
    "ffa-lora": Schedule("ffa-lora", _b_only),  # 2403.12313
    "rolora": Schedule("rolora", _by_round),  # 2409.02346
    "la-lora": Schedule("la-lora", _by_step, "binomial5"),  # 2602.19926
    "la-lora-unfiltered": Schedule("la-lora-unfiltered", _by_step),
}
DEFAULT = "la-lora-unfiltered"  # docs/reproduce.md: under true per-sample DP the filter buys nothing
# LA-LoRA with other periods, k_B-k_A; 5-5, 10-10 and 25-25 are halves of a round of K = 10, 20 and 50.
for _b, _a in ((2, 1), (4, 1), (1, 2), (5, 5), (10, 10), (25, 25)):
    SCHEDULES[f"la-lora-{_b}-{_a}"] = Schedule(f"la-lora-{_b}-{_a}", periods(_b, _a), "binomial5")
SCHEDULES["la-lora-a-first"] = Schedule("la-lora-a-first", periods(1, 1, first="A"), "binomial5")


def get_schedule(method: str | Schedule) -> Schedule:
    """The schedule of a method by name; a ``Schedule`` of your own passes through. Raises ValueError if unknown."""
    if isinstance(method, Schedule):
        return method
    if method not in SCHEDULES:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[method]
