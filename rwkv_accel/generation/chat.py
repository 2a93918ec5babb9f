"""Conversation in a terminal: each turn continues from the memory of the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TextIO

from rwkv_accel.data.template import TURN_END, chat_prompt
from rwkv_accel.generation.engine import Completion, Memory, Request, TextGenerator
from rwkv_accel.generation.params import SamplingParams

HELP = "/reset forgets everything, /retry answers again, /save FILE keeps the conversation, /exit leaves"


class Chat:
    """A conversation with a model. Nothing that was said is read twice."""

    def __init__(
        self, generator: TextGenerator, params: SamplingParams, memory: Memory | None = None, *, is_first: bool = True
    ):
        """`memory`: where to start; `is_first` tells that it holds no conversation yet (a tuned state, a preface)."""
        self.generator, self.params = generator, params
        self.memory = memory
        """After the last reply; None before the first turn."""
        self.turns = 0
        self._start = memory
        self._is_first = self._starts_first = is_first
        self._last: tuple[str, Memory | None, bool] | None = None

    def say(self, question: str, show: Callable[[str], None]) -> Completion:
        """Answer, passing on text as it becomes certain. Every turn has its own seed, params.seed + turn."""
        self._last = (question, self.memory, self._is_first)
        prompt = chat_prompt(question)
        request = Request(
            prompt if self._is_first else TURN_END + prompt,
            replace(self.params, seed=self.params.seed + self.turns),
            memory=self.memory,
            keep_memory=True,
        )
        self.turns += 1
        completion: Completion | None = None
        for piece in self.generator.run([request]):
            show(piece.text)
            completion = piece.completion
        assert completion is not None
        self.memory, self._is_first = completion.memory, False
        return completion

    def retry(self, show: Callable[[str], None]) -> Completion | None:
        """Answer the last question anew (with the next seed); None if there was none."""
        if self._last is None:
            return None
        question, self.memory, self._is_first = self._last
        return self.say(question, show)

    def reset(self) -> None:
        """Forget everything since the start."""
        self.memory, self._is_first, self._last = self._start, self._starts_first, None


def chat_loop(chat: Chat, read: Callable[[], str | None], out: TextIO, save: Callable[[Memory, str], None]) -> None:
    """Read lines until the end or /exit; `save` writes a memory to the file that /save names."""

    def show(text: str) -> None:
        out.write(text)
        out.flush()

    show(HELP + "\n")
    while not chat.generator.interrupted:
        show("\nUser: ")
        line = read()
        if line is None or line.strip() == "/exit":
            break
        command, _, argument = line.strip().partition(" ")
        if command == "/reset":
            chat.reset()
        elif command == "/save":
            if chat.memory is None or not argument:
                show("nothing to save yet\n" if argument else "/save needs a file name\n")
            else:
                save(chat.memory, argument)
                show(f"saved {argument}\n")
        elif command == "/retry":
            show("\nAssistant:")
            chat.retry(show)
        elif command.startswith("/"):
            show(HELP + "\n")
        elif command:
            show("\nAssistant:")
            chat.say(line, show)
