"""Whole generations equal those of rwkv.utils.PIPELINE: penalties, decay, bans, order of everything."""

import numpy as np
import pytest
import torch
from rwkv.utils import PIPELINE, PIPELINE_ARGS

from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.generation.engine import Request, TextGenerator
from rwkv_accel.generation.params import SamplingParams


class AsPipelineModel:
    """Our model behind the calls that PIPELINE makes."""

    def __init__(self, model):
        self.model = model

    def forward(self, tokens, state):
        with torch.no_grad():
            logits, state = self.model(torch.tensor([tokens]), state=state, return_state=True)
        return logits[0, -1].clone(), state


class FixedUniform:
    """Feeds both programs the same random numbers, by inversion in the order of the ids."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def choice(self, a, p):
        uniform = float(torch.rand(1, generator=self.generator, dtype=torch.float64))
        cumulative = np.cumsum(p.astype(np.float64))
        return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@pytest.fixture(scope="module")
def world(make_model):
    model = make_model(65536, n_embd=32, n_layer=1, dtype=torch.float32)
    return model, build_tokenizer("world"), PIPELINE(AsPipelineModel(model), "rwkv_vocab_v20230424")


@pytest.mark.parametrize(
    "settings",
    [
        {
            "temperature": 1.0,
            "top_p": 0.85,
            "alpha_presence": 0.2,
            "alpha_frequency": 0.2,
            "alpha_decay": 0.996,
        },
        {"temperature": 0.5, "top_p": 0.3, "alpha_presence": 6.0, "alpha_frequency": 5.0, "alpha_decay": 0.9},
        {"temperature": 1.2, "top_p": 0.5, "top_k": 20, "alpha_presence": 0.0, "alpha_frequency": 4.0},
    ],
)
def test_generation_equals_pipeline(world, settings, monkeypatch):
    model, tokenizer, pipeline = world
    seed, count, prompt = 11, 25, "User: 12 0 1?\n\nAssistant:"
    monkeypatch.setattr(np.random, "choice", FixedUniform(seed).choice)
    ids = []
    banned = [*range(65530, 65536), 0]
    args = PIPELINE_ARGS(**settings, token_ban=banned)
    monkeypatch.setattr(pipeline, "decode", lambda tokens: ids.append(tokens[-1]) or tokenizer.decode(tokens))
    theirs = pipeline.generate(prompt, token_count=count, args=args)
    params = SamplingParams(
        max_new_tokens=count,
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        top_k=settings.get("top_k", 0),
        presence_penalty=settings["alpha_presence"],
        frequency_penalty=settings["alpha_frequency"],
        penalty_decay=settings.get("alpha_decay", 0.996),
        ban_ids=(0,),
        seed=seed,
    )
    pieces = TextGenerator(model, tokenizer).run([Request(prompt, params)])
    ours = next(p.completion for p in pieces if p.completion)
    assert list(ours.ids) == ids[::2]  # it decodes every token twice: for the penalty and for the output
    assert ours.text.startswith(theirs)


def test_digits_and_spaces_are_seen_but_not_counted(world):
    from rwkv_accel.generation.penalty import PenaltyCounter

    tokenizer = world[1]
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=10.0, penalty_decay=0.5)
    counter = PenaltyCounter(tokenizer, params, 65536, torch.device("cpu"))
    seven, cat = tokenizer.encode("7")[0], tokenizer.encode("cat")[0]
    for token in (cat, seven, cat):
        counter.count(token)
    logits = counter.apply(torch.zeros(65536))
    assert float(logits[seven]) == -1.0
    assert float(logits[cat]) == -1.0 - 10.0 * 1.25
    assert int((logits != 0).sum()) == 2
