"""What the command line does with a loaded model: print replies, chat, run batch jobs, stop cleanly on a signal."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from rwkv_accel.data.prompt import prompt_writer
from rwkv_accel.data.template import TURN_END
from rwkv_accel.errors import UserError
from rwkv_accel.generation.beam import BeamParams, beam_search
from rwkv_accel.generation.chat import Chat, chat_loop
from rwkv_accel.generation.engine import Completion, Memory, Request, TextGenerator
from rwkv_accel.generation.jobs import run_job
from rwkv_accel.generation.loading import (
    Source,
    checked_device,
    default_device,
    find_source,
    load_generator_model,
    model_id,
)
from rwkv_accel.generation.memory_file import load_memory, save_memory
from rwkv_accel.generation.params import SamplingParams
from rwkv_accel.peft.adapter_file import read_meta
from rwkv_accel.runtime import SIGNALS

PromptWriter = Callable[[str, bool], str]


def run(args: argparse.Namespace, params: SamplingParams) -> int:
    """Everything after the command line was checked; returns the exit code (128 + signal if interrupted)."""
    source = find_source(args.path, base=args.base, adapter=args.adapter)
    write_prompt, params = _in_template(args, source, params)
    model, tokenizer = load_generator_model(
        source,
        precision=args.precision,
        device=checked_device(args.device) if args.device else default_device(),
        tokenizer=args.tokenizer,
        quant=args.quant,
        time_state=args.time_state,
        num_rows=args.batch_size if args.input else args.num_beams or max(len(args.prompts), 1),
    )
    generator = TextGenerator(model, tokenizer, batch_size=args.batch_size)
    start = load_memory(args.memory, model, model_id=model_id(source)) if args.memory else None
    with stop_on_signal(generator) as signals:
        if args.input:
            _job(args, generator, params, write_prompt, source)
        elif args.chat:
            _chat(args, generator, params, start, source, signals)
        elif args.num_beams:
            _beams(args, generator, params, write_prompt)
        else:
            _print_replies(args, generator, params, start, source, write_prompt)
    return 128 + signals.received[0] if signals.received else 0


def _in_template(
    args: argparse.Namespace, source: Source, params: SamplingParams
) -> tuple[PromptWriter, SamplingParams]:
    """How a prompt is written for this model (prompt, raw), and the settings with the stops that go with it."""
    template = args.template or source.template or "rwkv"
    if template != "rwkv" and (args.chat or (args.memory and not args.raw)):
        raise UserError(
            f"a conversation is written in the template rwkv, this model was trained with {template}: give prompts, or "
            "--template rwkv"
        )
    if template == "raw" and not args.stop:
        params = replace(params, stop=tuple(args.stop_text))
    try:
        in_template = prompt_writer("raw" if args.raw else template)
    except UserError as error:
        raise UserError(f"{error}; name it with --template, or leave the prompt as it is with --raw") from None
    return lambda prompt, raw: prompt if raw else in_template(prompt), params


def _print_replies(
    args: argparse.Namespace,
    generator: TextGenerator,
    params: SamplingParams,
    start: Memory | None,
    source: Source,
    write_prompt: PromptWriter,
) -> None:
    """Print the reply to each prompt, a single one as it comes."""
    requests = [
        Request(
            _continued(write_prompt(prompt, args.raw), args),
            replace(params, seed=params.seed + index),
            memory=start,
            keep_memory=args.save_memory is not None,
        )
        for index, prompt in enumerate(args.prompts)
    ]
    done: dict[int, Completion] = {}
    for piece in generator.run(requests):
        if len(requests) == 1:
            _show(piece.text)
        if piece.completion is not None:
            done[piece.index] = piece.completion
    if len(requests) == 1:
        _show("\n")
        memory = done[0].memory if done else None
        if memory is not None:
            save_memory(memory, args.save_memory, model_id=model_id(source))
        return
    for index, completion in sorted(done.items()):
        _show(f"[{index + 1}] {args.prompts[index]}\n{completion.text.strip()}\n\n")


def _beams(
    args: argparse.Namespace, generator: TextGenerator, params: SamplingParams, write_prompt: PromptWriter
) -> None:
    beam_params = BeamParams(
        num_beams=args.num_beams,
        num_best=args.num_best,
        max_new_tokens=params.max_new_tokens,
        length_penalty=args.length_penalty,
        early_stop=not args.no_early_stop,
        stop=params.stop,
    )
    for prompt in args.prompts:
        for hypothesis in beam_search(generator, write_prompt(prompt, args.raw), beam_params):
            _show(f"{hypothesis.score:.4f} {hypothesis.text.strip()}\n")


def _continued(prompt: str, args: argparse.Namespace) -> str:
    """A further turn of a kept conversation begins with the blank line that ends the last one."""
    return TURN_END + prompt if args.memory and not args.raw else prompt


def _chat(
    args: argparse.Namespace,
    generator: TextGenerator,
    params: SamplingParams,
    start: Memory | None,
    source: Source,
    signals: Signals,
) -> None:
    def read() -> str | None:
        signals.is_reading = True
        try:
            return input()
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            signals.is_reading = False

    def save(memory: Memory, path: str) -> None:
        save_memory(memory, path, model_id=model_id(source))

    chat_loop(Chat(generator, params, start, is_first=args.memory is None), read, sys.stdout, save)
    _show("\n")


def _job(
    args: argparse.Namespace,
    generator: TextGenerator,
    params: SamplingParams,
    write_prompt: PromptWriter,
    model: Source,
) -> None:
    source, target = Path(args.input), Path(args.output)
    count = run_job(generator, source, target, params, write_prompt, raw=args.raw, model_id=_job_id(args, model))
    where = f"{target}.tmp; start the same command again to go on" if generator.interrupted else target
    _show(f"{count} replies in {where}\n")


def _job_id(args: argparse.Namespace, model: Source) -> str:
    """What tells this model from others at once, without reading a base of gigabytes."""
    files = [path for path in (model.base, args.time_state) if path is not None]
    stats = [(str(Path(file).resolve()), Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    adapter = read_meta(model.adapter).sha256 if model.adapter else None
    return repr((stats, adapter, args.precision, args.quant, args.tokenizer, args.template or model.template))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@dataclass
class Signals:
    """What came from outside."""

    received: list[int] = field(default_factory=list)
    is_reading: bool = False
    """Waiting for the keyboard: a signal must end that at once."""


@contextmanager
def stop_on_signal(generator: TextGenerator) -> Iterator[Signals]:
    """SIGINT, SIGTERM and SIGUSR1 end generation after the current token, a second one at once."""
    signals = Signals()

    def handler(number: int, frame: FrameType | None) -> None:
        signals.received.append(number)
        generator.interrupted = True
        if signals.is_reading or len(signals.received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, old in before.items():
            signal.signal(number, old)
