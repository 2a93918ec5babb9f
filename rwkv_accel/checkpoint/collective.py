"""Errors that every rank meets together: one that raised alone would leave the others waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
MEET_SECONDS = 5.0


def all_ranks(accelerator: Accelerator, value: Any) -> list[Any]:
    """One small picklable value from each rank, in rank order, on every rank. Collective."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run the action on the main process; every rank returns its value or raises its error. Collective."""
    result: tuple[Any, UserError | None] = (None, None)
    if accelerator.is_main_process:
        try:
            result = (action(), None)
        except UserError as error:
            result = (None, error)
    value, problem = all_ranks(accelerator, result)[0]
    if problem is not None:
        raise problem
    return value


def on_main_for_long(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """on_main for what may take longer than the process group waits: the ranks meet every few seconds. Collective."""
    if accelerator.num_processes == 1:
        return action()
    results: Queue[tuple[T | None, BaseException | None]] = Queue()

    def work() -> None:
        try:
            results.put((action(), None))
        except BaseException as error:  # noqa: BLE001  raised again by the waiting thread
            results.put((None, error))

    thread = Thread(target=work, daemon=True)
    if accelerator.is_main_process:
        thread.start()
    while True:
        thread_ended = True
        if accelerator.is_main_process:
            thread.join(MEET_SECONDS)
            thread_ended = not thread.is_alive()
        if all_ranks(accelerator, thread_ended)[0]:
            break

    def result() -> T:
        value, error = results.get()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    return on_main(accelerator, result)


def once_per_node(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Run the action on one process of each node; every rank waits, or raises the first UserError. Collective."""
    error: UserError | None = None
    if accelerator.is_local_main_process:
        try:
            action()
        except UserError as raised:
            error = raised
    for problem in all_ranks(accelerator, error):
        if problem is not None:
            raise problem
