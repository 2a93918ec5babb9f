"""Memory after a reply: going on from it equals reading everything again."""

import io

import pytest
import torch

from rwkv_accel.errors import UserError
from rwkv_accel.generation.chat import Chat, chat_loop
from rwkv_accel.generation.engine import Memory, Request, TextGenerator
from rwkv_accel.generation.memory_file import load_memory, save_memory
from rwkv_accel.generation.params import SamplingParams


def complete(generator, prompt, memory=None, **params):
    request = Request(prompt, SamplingParams(**params), memory=memory, keep_memory=True)
    return next(p.completion for p in generator.run([request]) if p.completion)


def assert_memory_is(generator, memory: Memory, text_bytes: list[int]):
    """Reading on from the memory gives the state of reading the whole text."""
    more = generator.tokenizer.encode("!")
    continued = generator.read("!", memory).state
    whole = text_bytes + more
    with torch.no_grad():
        _, state = generator.model(torch.tensor([whole]), return_state=True)
    for name in ("att_shift", "wkv", "ffn_shift"):
        for got, want in zip(getattr(continued, name), getattr(state, name)):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_memory_after_a_length_stop_has_everything(generator):
    reply = complete(generator, "Once", max_new_tokens=9, temperature=None, stop_ids=())
    assert len(reply.memory.pending_ids) == 1
    assert_memory_is(generator, reply.memory, generator.tokenizer.encode("Once") + list(reply.ids))


def test_memory_after_a_stop_token_ends_before_it(generator):
    free = complete(generator, "Once", max_new_tokens=30, seed=2)
    reply = complete(generator, "Once", max_new_tokens=30, seed=2, stop_ids=(free.ids[12],))
    assert reply.stop_reason == "eot"
    assert len(reply.ids) <= 12
    assert reply.memory.pending_ids == ()
    assert_memory_is(generator, reply.memory, generator.tokenizer.encode("Once") + list(reply.ids))


@pytest.mark.parametrize("stop_size", [1, 2, 5])
def test_memory_after_a_stop_string_goes_back_before_it(generator, stop_size):
    ascii_only = tuple(range(129, 257))
    settings = {"max_new_tokens": 40, "seed": 1, "ban_ids": (0, *ascii_only)}
    free = complete(generator, "Once", **settings)
    stop = free.text[20 : 20 + stop_size]
    at = free.text.index(stop)
    reply = complete(generator, "Once", stop=(stop,), **settings)
    assert reply.stop_reason == "stop"
    assert reply.text == free.text[:at]
    assert len(reply.ids) == at + stop_size
    assert_memory_is(generator, reply.memory, generator.tokenizer.encode("Once" + reply.text))


class PairTokenizer:
    """Token 3 holds a letter and the stop string."""

    vocab_size = 5
    texts = ("", "a", "b", "a\n", "b\n")

    def encode(self, text):
        return [self.texts.index(letter) for letter in text]

    def decode_bytes(self, ids):
        return "".join(self.texts[i] for i in ids).encode()


def test_memory_keeps_what_a_token_holds_before_the_stop_string(make_model):
    generator = TextGenerator(make_model(5), PairTokenizer())
    reply = complete(generator, "bab", stop=("\n",), ban_ids=(0, 1, 2, 4))
    assert (reply.text, reply.ids) == ("a", (3,))
    continued = generator.read("b", reply.memory).state
    whole = generator.read("bab" + "a" + "b").state
    for got, want in zip(continued.wkv, whole.wkv):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_continuing_equals_one_long_generation(generator):
    whole = complete(generator, "Once", max_new_tokens=20, temperature=None, stop_ids=())
    first = complete(generator, "Once", max_new_tokens=8, temperature=None, stop_ids=())
    # The next turn's text is part of the conversation: force it to be what greedy decoding said.
    said = generator.tokenizer.decode_bytes(whole.ids[8:10]).decode("latin-1")
    assert said.isascii()
    second = complete(generator, said, first.memory, max_new_tokens=10, temperature=None, stop_ids=())
    assert whole.ids == first.ids + whole.ids[8:10] + second.ids


def test_memory_is_not_changed_by_using_it(generator):
    memory = generator.read("A common beginning. ")
    before = memory.state.clone()
    one = complete(generator, "a", memory, max_new_tokens=5)
    two = complete(generator, "a", memory, max_new_tokens=5)
    assert one.ids == two.ids
    assert all(torch.equal(x, y) for x, y in zip(memory.state.wkv, before.wkv))


def test_file_keeps_a_conversation(generator, tmp_path):
    memory = complete(generator, "Hello", max_new_tokens=6).memory
    save_memory(memory, tmp_path / "m.safetensors", model_id="sha256:1")
    again = load_memory(tmp_path / "m.safetensors", generator.model, model_id="sha256:1")
    assert again.pending_ids == memory.pending_ids
    assert (
        complete(generator, "x", again, max_new_tokens=9).ids == complete(generator, "x", memory, max_new_tokens=9).ids
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_wrong_memory_files_are_refused(generator, tmp_path):
    path = tmp_path / "m.safetensors"
    save_memory(generator.read("a"), path, model_id="sha256:1")
    with pytest.raises(UserError, match="belongs to other weights"):
        load_memory(path, generator.model, model_id="sha256:2")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or no memory file"):
        load_memory(path, generator.model, model_id="sha256:1")
    with pytest.raises(UserError, match="does not exist"):
        load_memory(tmp_path / "none", generator.model, model_id="sha256:1")
    with pytest.raises(UserError, match="cannot write"):
        save_memory(generator.read("a"), tmp_path / "no" / "m", model_id="")


def chat_of(generator, **params):
    return Chat(generator, SamplingParams(max_new_tokens=6, ban_ids=tuple(range(129, 257)), **params))


def test_chat_turns_read_like_the_template(generator):
    chat = chat_of(generator, temperature=None, stop_ids=())
    one = chat.say("Hi", lambda text: None)
    chat.say("And\n\n\nthen?", lambda text: None)
    text = f"User: Hi\n\nAssistant:{one.text}\n\nUser: And\nthen?\n\nAssistant:"
    fresh = complete(generator, text, max_new_tokens=6, temperature=None, stop_ids=(), ban_ids=tuple(range(129, 257)))
    again = chat.retry(lambda text: None)
    assert again.text == fresh.text


def test_chat_commands(generator, tmp_path):
    chat = chat_of(generator, temperature=None)
    lines = iter(["/save", "/save f", "Hi", "/retry", "/save f", "/what", "/reset", "Hi", "/exit", "never read"])
    saved, out = [], io.StringIO()
    chat_loop(chat, lambda: next(lines), out, lambda memory, name: saved.append(name))
    assert saved == ["f"]
    text = out.getvalue()
    assert "/save needs a file name" in text
    assert "nothing to save yet" in text
    replies = [part.split("\nUser:")[0] for part in text.split("Assistant:")[1:]]
    assert len(replies) == 3
    assert replies[0] == replies[1]
    assert replies[0] == replies[2]
    assert next(lines) == "never read"


def test_chat_ends_with_its_input(generator):
    out = io.StringIO()
    chat_loop(chat_of(generator), lambda: None, out, lambda memory, name: None)
    assert out.getvalue().endswith("User: ")
