"""Arms, grids and tables of ``lalora reproduce``, without a run; intervals against SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from lalora_kernels.reproduce import cost, runs, tables
from lalora_kernels.reproduce.command import _whole
from lalora_kernels.reproduce.presets import (
    EQUAL_NOISE,
    FOUR,
    PRESETS,
    QUESTIONS,
    arm_settings,
    base_settings,
    tuned_arms,
)


def results(values):
    return [
        {"arm": arm, "epsilon": e, "seed": seed, "accuracy": a / 100, "accuracy_before": 0.1}
        for (arm, e), by_seed in values.items()
        for seed, a in by_seed.items()
    ]


VALUES = {
    ("la", 1.0): {0: 60.0, 1: 62.0, 2: 61.0}, ("dp", 1.0): {0: 50.0, 1: 55.0, 2: 51.5},
    ("la", "inf"): {0: 80.0, 1: 81.0, 2: 79.0}, ("dp", "inf"): {2: 79.0, 0: 81.0},
}  # fmt: skip


def test_differences_are_scipys_paired_intervals():
    grid = tables.gather(results(VALUES))
    d = tables.difference(grid["dp", 1.0], grid["la", 1.0])
    test = stats.ttest_rel([50.0, 55.0, 51.5], [60.0, 62.0, 61.0])
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose((d.mean, d.low, d.high), (-26.5 / 3, low, high), rtol=1e-9)
    assert d.clear and test.pvalue < 0.05
    d = tables.difference(grid["dp", math.inf], grid["la", math.inf])
    low, high = stats.ttest_rel([81.0, 79.0], [80.0, 79.0]).confidence_interval(0.95)
    np.testing.assert_allclose((d.mean, d.low, d.high), (0.5, low, high), rtol=1e-9)
    assert d.seeds == (0, 2) and not d.clear
    assert tables.difference({0: 1.0}, {1: 1.0}) is None
    assert not tables.difference({0: 5.0}, {0: 1.0}).clear


def test_a_table_of_given_results():
    twin = {("twin", epsilon): values for (arm, epsilon), values in VALUES.items() if arm == "la"}
    text = tables.markdown("T", results(VALUES | twin), ["dp", "la", "twin", "never"], "la", "Note.")
    assert "| arm | ε = 1 | ε = ∞ | − la, ε = 1 | − la, ε = ∞ |" in text
    assert "| la | 61.0 ± 1.0 | 80.0 ± 1.0 |  |  |" in text
    assert "| dp | 52.2 ± 2.6 | 80.0 ± 1.4 | -8.8 [-12.8, -4.8] * | +0.5 [-5.9, +6.9] |" in text
    assert "| twin | 61.0 ± 1.0 | 80.0 ± 1.0 | the same | the same |" in text
    assert "| never | — | — | — | — |" in text
    assert "No run is complete" in tables.markdown("T", [], ["dp"], "dp", "")


# ---------------------------------------------------------------- presets


def test_every_arm_of_every_question_is_a_valid_run():
    for name, preset in PRESETS.items():
        for task in preset.tasks:
            if name == "small-language":
                base = preset.settings | {"model": "folder", "dataset": "x.tsv"}
            else:
                base = base_settings(name, task, "large", None)
            tuned = {f"la-lora, filtered, ε = {e:g}": {"lr": 3.0} for e in preset.epsilons}
            for question in QUESTIONS.values():
                jobs = runs.jobs_of(question, base, tuned, preset.epsilons, preset.seeds)
                assert question.against in question.arms
                same = {job.name for job in jobs if job.arm == question.against}
                others = [job.name for job in jobs if job.arm != question.against]
                # an arm that the preset's own settings are already (r = 16 of the paper's) is that run, none other
                assert len(set(others) - same) == len([name for name in others if name not in same])
            assert set(preset.tuning) <= {"lr", "max_grad_norm", "batch_size"}
            assert {key for step in preset.then for one in step for key in one} <= {"batch_size", "@C"}
    assert {key for key, _ in tuned_arms(QUESTIONS[1], [1.0, math.inf])} == {
        f"{arm}, ε = {epsilon}"
        for arm in ("dp-lora, plain", "ffa-lora, plain", "rolora, plain", "la-lora, filtered", "la-lora, plain")
        for epsilon in ("1", "inf")
    }
    # a low-pass over steps leaves the mean gradient its length, so it is not tuned as the filters of the features are
    third = dict(tuned_arms(QUESTIONS[3], [3.0]))
    assert {key: arm["smoothing"] for key, arm in third.items()} == {
        "la-lora, plain, ε = 3": "none",
        "la-lora, filtered, ε = 3": "binomial5",
        "la-lora, temporal, ε = 3": "temporal",
    }
    assert list(_whole(QUESTIONS[1], True).arms)[len(FOUR) + 1 :] == [
        n for n in cost.CONTENDERS if n not in (*FOUR, "la-lora-unfiltered", cost.OPACUS)
    ]


def test_settings_go_by_loss_or_by_accuracy():
    tried = [
        {"lr": 1.0, "accuracy": 0.5, "loss": 1.0}, {"lr": 2.0, "accuracy": 0.6, "loss": 1.5},
        {"lr": 3.0, "accuracy": 0.6, "loss": 1.2}, {"lr": 4.0, "accuracy": 0.1, "loss": None},
    ]  # fmt: skip
    assert runs.best(tried) == {"lr": 1.0} and runs.best(tried, "accuracy") == {"lr": 3.0}
    assert runs.best(tried[3:] + tried[1:2]) == {"lr": 2.0}


def test_equal_noise_scales_the_filters_rate_and_equal_runs_are_one():
    tuned = {"la-lora, filtered, ε = 3": {"lr": 2.0}, "la-lora, plain, ε = 3": {"lr": 0.5}}
    rates = {j.arm: j.config.lr for j in runs.jobs_of(QUESTIONS[3], {"lr": 9.0}, tuned, [3.0], [0])}
    assert rates["binomial5"] == 2.0 and rates["none"] == 0.5
    assert rates["none, equal noise"] == pytest.approx(2.0 * math.sqrt(70 / 256))
    assert rates["none, 0.52 of its rate"] == pytest.approx(0.5 * math.sqrt(70 / 256))
    assert EQUAL_NOISE == pytest.approx(0.5229, abs=1e-4)
    one, two = (runs.jobs_of(QUESTIONS[n], {"lr": 1.0}, {}, [3.0], [0]) for n in (1, 2))
    assert {j.name for j in one if j.arm == "la-lora"} == {j.name for j in two if j.arm == "both"}


def test_local_steps_at_the_same_noise_or_as_many_steps():
    arms, base = QUESTIONS[4].arms, {"lr": 9.0, "local_steps": 10, "rounds": 3}
    got = {k: arm_settings(base, arms[f"K = {k}"], {"lr": 2.0}) for k in (5, 20, 50)}
    assert {k: (s["local_steps"], s["rounds"], s["lr"]) for k, s in got.items()} == {
        5: (5, 3, 4.0), 20: (20, 3, 1.0), 50: (50, 3, 0.4),
    }  # fmt: skip
    more, fewer = (arm_settings(base, arms[a], {}) for a in ("K / 2, twice the rounds", "3 K, a third of the rounds"))
    assert (more["local_steps"], more["rounds"], more["lr"]) == (5, 6, 9.0)
    assert (fewer["local_steps"], fewer["rounds"], fewer["lr"]) == (30, 1, 9.0)
    assert base == {"lr": 9.0, "local_steps": 10, "rounds": 3}
