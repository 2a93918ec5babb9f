"""Batched generation: the same text as the plainest loop, whatever is in the batch."""

import pytest
import torch

from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import Request, TextGenerator
from rwkv_accel.generation.params import SamplingParams
from rwkv_accel.generation.prefill import prefill

RAGGED = ["a", "Hello, world", "xyz" * 30, "The quick brown fox", "é"]


def argmax_loop(model, ids: list[int], count: int, banned=()) -> list[int]:
    """Greedy by a full forward pass over everything, for every token."""
    ids, new = list(ids), []
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[list(banned)] = -torch.inf
        token = int(logits.argmax())
        if token == 0:
            break
        new.append(token)
        ids.append(token)
    return new


@torch.no_grad()
def test_greedy_equals_argmax_over_full_forwards(generator, byte_model, byte_tokenizer):
    done = generator.generate(RAGGED, max_new_tokens=12, temperature=None)
    for prompt, completion in zip(RAGGED, done):
        assert list(completion.ids) == argmax_loop(byte_model, byte_tokenizer.encode(prompt), 12)
        assert completion.num_prompt_tokens == len(prompt.encode())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_equals_singles(byte_model, byte_tokenizer, batch_size):
    settings = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.3}
    batched = TextGenerator(byte_model, byte_tokenizer, batch_size=batch_size).generate(RAGGED, seed=7, **settings)
    for index, prompt in enumerate(RAGGED):
        single = TextGenerator(byte_model, byte_tokenizer).generate([prompt], seed=7 + index, **settings)
        assert single == [batched[index]]
    assert len({completion.ids for completion in batched}) == len(RAGGED)


def test_rows_leave_at_different_times_and_mixed_settings_do_not_mix(generator):
    kinds = [
        SamplingParams(max_new_tokens=3, temperature=None),
        SamplingParams(max_new_tokens=17, temperature=0.7, top_k=5, seed=3),
        SamplingParams(max_new_tokens=9, temperature=1.3, top_p=0.8, order="hf", seed=3),
        SamplingParams(max_new_tokens=1, temperature=1.0, min_p=0.1, seed=4),
        SamplingParams(max_new_tokens=11, temperature=0.7, top_k=5, presence_penalty=1.0, seed=9, ban_ids=(0,)),
    ]
    requests = [Request(prompt, params) for prompt, params in zip(RAGGED, kinds)]
    together = {p.index: p.completion for p in generator.run(iter(requests)) if p.completion}
    assert [together[i].stop_reason for i in range(5)] == ["length"] * 5
    assert [len(together[i].ids) for i in range(5)] == [3, 17, 9, 1, 11]
    for index, request in enumerate(requests):
        alone = [p.completion for p in generator.run([request]) if p.completion]
        assert alone == [together[index]]


@torch.no_grad()
@pytest.mark.parametrize(("chunk_tokens", "pass_tokens"), [(512, 2048), (4, 9), (1, 1), (7, 14)])
def test_chunked_prefill_is_the_full_forward(byte_model, byte_tokenizer, chunk_tokens, pass_tokens):
    prompts = [byte_tokenizer.encode(text) for text in RAGGED]
    start = byte_model.fresh_state(len(prompts))
    logits, state = prefill(byte_model, prompts, start, chunk_tokens=chunk_tokens, pass_tokens=pass_tokens)
    for row, ids in enumerate(prompts):
        expected, expected_state = byte_model(torch.tensor([ids]), return_state=True)
        torch.testing.assert_close(logits[row], expected[0, -1], rtol=1e-9, atol=1e-9)
        for name in ("att_shift", "wkv", "ffn_shift"):
            for got, want in zip(getattr(state, name), getattr(expected_state, name)):
                torch.testing.assert_close(got[row], want[0], rtol=1e-9, atol=1e-9)


def test_prefill_refuses_an_empty_prompt(byte_model):
    with pytest.raises(ValueError, match="at least one token"):
        prefill(byte_model, [[1], []], byte_model.fresh_state(2))


def test_same_prompt_twice_in_a_call_gives_two_samples(generator):
    one, two = generator.generate(["same", "same"], max_new_tokens=24, seed=5)
    assert one.ids != two.ids


def test_train_mode_is_kept_and_no_inference_mode_leaks(generator, byte_model):
    byte_model.train()
    pieces = generator.run([Request("ab", SamplingParams(max_new_tokens=4))])
    next(pieces)
    assert byte_model.training
    assert not torch.is_inference_mode_enabled()
    list(pieces)
    assert not generator.generate(["ab"], max_new_tokens=1)[0].stopped_by_itself
    byte_model.eval()


def test_empty_prompt_and_foreign_ids_are_refused(generator):
    with pytest.raises(UserError, match="prompt is empty"):
        generator.generate(["ok", ""])
    with pytest.raises(UserError, match="stop_ids holds token id 257, the model has 0 to 256"):
        generator.generate(["ok"], stop_ids=(257,))
    with pytest.raises(UserError, match="ban_ids holds token id -1"):
        generator.generate(["ok"], ban_ids=(-1,))
    with pytest.raises(UserError, match="batch_size 0"):
        TextGenerator(generator.model, generator.tokenizer, batch_size=0)
