"""Sampling functions against the pip package `rwkv`, transformers, and exact distributions."""

import math

import numpy as np
import pytest
import torch
from rwkv.utils import PIPELINE
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rwkv_accel.generation.params import SamplingParams
from rwkv_accel.generation.sampling import (
    apply_penalty,
    apply_temperature,
    draw,
    hf_probabilities,
    min_p_keep,
    probabilities,
    rwkv_probabilities,
    top_k_keep,
    top_p_keep,
)

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.85},
    {"temperature": 0.6, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.9, "top_k": 7},
    {"temperature": 0.3, "top_k": 3},
    {"temperature": 1.7, "top_p": 0.05},
    {"temperature": 0.9, "top_p": 0.999, "top_k": 400},
]


def some_logits(vocab_size: int, rows: int = 4, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale


def pipeline_distribution(logits_V: torch.Tensor, settings: dict, monkeypatch) -> np.ndarray:
    """What PIPELINE.sample_logits hands to its random choice."""
    seen = []

    def choice(a, p):
        assert a == len(p)
        seen.append(p.copy())
        return 0

    monkeypatch.setattr(np.random, "choice", choice)
    PIPELINE.sample_logits(None, logits_V.clone(), **{"top_p": 1.0, **settings})
    return seen[0]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("vocab_size", [11, 1000])
def test_rwkv_order_is_the_pip_packages(settings, vocab_size, monkeypatch):
    logits_RV = some_logits(vocab_size)
    ours = rwkv_probabilities(logits_RV, **settings)
    for row in range(len(logits_RV)):
        # Asked for all the mass, the package cuts where its fp32 sum happens to reach 1.
        theirs = pipeline_distribution(logits_RV[row], {"top_p": 0.99999, **settings}, monkeypatch)
        lost = 1e-5 if "top_p" not in settings else 1e-8
        np.testing.assert_allclose(ours[row].numpy(), theirs, rtol=2e-4, atol=lost)
        if "top_p" in settings:
            assert ((ours[row].numpy() > 0) == (theirs > 0)).all()


def test_rwkv_temperature_zero_is_the_pip_packages(monkeypatch):
    logits_RV = some_logits(50)
    ours = probabilities(logits_RV, SamplingParams(temperature=None, top_p=0.3))
    for row in range(len(logits_RV)):
        theirs = pipeline_distribution(logits_RV[row], {"temperature": 0}, monkeypatch)
        np.testing.assert_array_equal(ours[row].numpy(), theirs)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_hf_order_is_transformers(settings, min_p):
    logits_RV = some_logits(1000)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if settings.get("top_k"):
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if settings.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    theirs = warpers(torch.zeros(4, 1, dtype=torch.long), logits_RV.clone()).softmax(-1)
    ours = hf_probabilities(logits_RV, min_p=min_p, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    assert ((ours > 0) == (theirs > 0)).all()


def test_the_two_orders_differ_and_params_choose():
    logits_RV = some_logits(30)
    params = {"temperature": 2.0, "top_p": 0.6}
    rwkv = probabilities(logits_RV, SamplingParams(order="rwkv", **params))
    hf = probabilities(logits_RV, SamplingParams(order="hf", **params))
    torch.testing.assert_close(rwkv, rwkv_probabilities(logits_RV, **params))
    torch.testing.assert_close(hf, hf_probabilities(logits_RV, **params))
    assert (hf > 0).sum() > (rwkv > 0).sum()  # heat first widens the nucleus


def test_masks_by_hand():
    probs = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])
    assert top_k_keep(probs, 2).tolist() == [[False, True, False, True, False]]
    assert top_k_keep(probs, 0).all()
    assert top_k_keep(probs, 9).all()
    assert top_p_keep(probs, 0.4).tolist() == [[False, True, False, False, False]]
    assert top_p_keep(probs, 0.41).tolist() == [[False, True, False, True, False]]
    assert top_p_keep(probs, 0.85).tolist() == [[False, True, False, True, True]]
    assert top_p_keep(probs, 1.0).all()
    assert min_p_keep(probs, 0.5).tolist() == [[False, True, False, True, True]]
    assert top_k_keep(torch.ones(1, 6), 2).sum() == 2
    assert top_p_keep(torch.full((1, 4), 0.25), 0.3).all()  # ties with the last one stay


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_candidates():
    probs = torch.linspace(1.0, 2.0, 3000, dtype=torch.float64)[None]
    probs = probs / probs.sum()
    keep = top_p_keep(probs, 0.5)
    kept = probs[keep].sum()
    assert 0.5 <= kept < 0.5 + 2 / 3000
    assert keep[0].tolist() == sorted(keep[0].tolist())


def test_penalty_by_hand():
    logits = torch.zeros(1, 4)
    seen = torch.tensor([[True, True, False, False]])
    counts = torch.tensor([[0.0, 2.5, 0.0, 0.0]])
    assert apply_penalty(logits, seen, counts, 0.5, 0.2).tolist() == [[-0.5, -1.0, 0.0, 0.0]]
    assert logits.eq(0).all()


def test_temperature_must_be_positive():
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            apply_temperature(torch.zeros(1, 2), bad)


def test_draw_picks_by_cumulative_probability_and_never_a_token_without_mass():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0], dtype=torch.float64)
    assert draw(probs, uniform).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("order", ["rwkv", "hf"])
@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_match_the_exact_distribution(order, seed):
    """Chi-square at a fixed seed; the bound is the 99.9% quantile (Wilson-Hilferty)."""
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=12, min_p=0.01, order=order)
    probs_V = probabilities(some_logits(20, rows=1, scale=1.0).double(), params)[0]
    num_draws = 40_000
    uniform = torch.rand(num_draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = torch.bincount(draw(probs_V.expand(num_draws, -1), uniform), minlength=20)
    kept = probs_V > 0
    assert counts[~kept].sum() == 0
    expected = probs_V[kept] * num_draws
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 8
    assert chi_square < bound


def test_same_logits_and_settings_draw_like_pipeline():
    """Two samples of 20,000, ours and PIPELINE's, do not differ (chi-square of homogeneity, fixed seeds)."""
    logits_V = some_logits(16, rows=1, scale=1.5)[0]
    settings = {"temperature": 1.3, "top_p": 0.9, "top_k": 8}
    num_draws = 20_000
    np.random.seed(3)
    theirs = np.bincount([PIPELINE.sample_logits(None, logits_V, **settings) for _ in range(num_draws)], minlength=16)
    probs = probabilities(logits_V[None], SamplingParams(**settings)).expand(num_draws, -1)
    uniform = torch.rand(num_draws, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = torch.bincount(draw(probs, uniform), minlength=16).numpy()
    assert ((ours > 0) == (theirs > 0)).all()
    kept = ours > 0
    chi_square = ((ours[kept] - theirs[kept]) ** 2 / (ours[kept] + theirs[kept])).sum()
    freedom = kept.sum() - 1
    assert freedom >= 4
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
