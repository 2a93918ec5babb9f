"""Worker of test_stop.py: a whole run that sends itself SIGTERM at a moment named beforehand.

main(recipe, None)                   the run must end by itself
main(recipe, [where, count, rank])   SIGTERM comes on that rank when the wish to stop is asked for the count-th time
                                     within train, eval or samples (data: before the count-th document is tokenised);
                                     the run must end with exit code 75
main(recipe, [..., "twice"])         and once more, on its own, while the checkpoint is written
"""

import os
import signal
import threading

from rwkv_accel import evaluation, hooks, interrupt, loop
from rwkv_accel.config.load import load_config
from rwkv_accel.data import corpus
from rwkv_accel.data.documents import DocumentReader
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.interrupt import StopRequest
from rwkv_accel.runtime import EXIT_STOPPED, set_environment_defaults


def main(recipe, stop):
    set_environment_defaults()
    if stop is not None:
        send_signal_within(*stop)
    try:
        loop.train(load_config(recipe))
        code = 0
    except SystemExit as end:
        code = end.code
    return code == (0 if stop is None else EXIT_STOPPED)


def send_signal_within(where, count, rank, twice=None):
    inside, asked = [], [0]

    def reached():
        if int(os.environ.get("RANK", "0")) == rank:
            asked[0] += 1
        return asked[0] == count

    if where == "data":
        tokenise = DocumentReader.document

        def document(self, *args):
            if reached():
                os.kill(os.getpid(), signal.SIGTERM)
            return tokenise(self, *args)

        DocumentReader.document = document
        corpus.CACHE_MIN_BYTES = 0  # through the cache, like large data

    def marked(owner, name, mark):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            inside.append(mark)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        setattr(owner, name, call)

    marked(loop, "train_window", "train")
    marked(evaluation, "evaluate", "eval")
    marked(TextGenerator, "generate", "samples")
    marked(hooks, "on_samples", "after samples")
    loop.on_samples = hooks.on_samples
    original = StopRequest.wanted

    def wanted(self):
        if inside and inside[-1] == where and reached():
            os.kill(os.getpid(), signal.SIGTERM)
            if twice:
                signal_while_writing()
        return original(self)

    StopRequest.wanted = wanted


def signal_while_writing():
    def interrupted(descriptor):
        interrupt.SAME_SIGNAL_SECONDS = -1.0
        os.kill(os.getpid(), signal.SIGTERM)
        # The main thread takes the signal; a thread that writes must not be done before that.
        threading.Event().wait(60)

    os.fsync = interrupted
