"""Bar on a terminal, few lines elsewhere, messages in every mode."""

import io

import pytest

from rwkv_accel.tracking.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("mode", "stream", "is_bar"),
    [
        ("auto", Terminal(), True),
        ("auto", io.StringIO(), False),
        ("bar", io.StringIO(), True),
        ("lines", Terminal(), False),
    ],
)
def test_bar_or_lines(mode, stream, is_bar, clock):
    shown = Progress(mode, 10, 0, stream=stream, clock=clock)
    shown.show(10, "loss 1.25")
    shown.close()
    text = stream.getvalue()
    assert ("10/10 |########| loss 1.25" in text) == is_bar
    assert (text == "step 10/10 loss 1.25\n") == (not is_bar)


def test_none_shows_messages_only():
    stream = Terminal()
    shown = Progress("none", 10, 0, stream=stream)
    shown.show(10, "loss 1.25")
    shown.message("saved out/demo")
    assert stream.getvalue() == "saved out/demo\n"


def test_lines_are_some_seconds_apart_and_the_last_is_shown(clock):
    stream = io.StringIO()
    shown = Progress("lines", 100, 0, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.advance(0.5)
        shown.show(step, "x")
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_bar_starts_at_the_resumed_step():
    stream = Terminal()
    shown = Progress("bar", 100, 40, stream=stream)
    assert "40/100 |###" in stream.getvalue()
    shown.show(100, "")
    shown.close()
    assert "100/100 |########|" in stream.getvalue()


def test_message_stands_on_its_own_line_above_the_bar():
    stream = Terminal()
    shown = Progress("bar", 10, 0, stream=stream)
    shown.message("saved out/demo")
    shown.close()
    assert "saved out/demo" in stream.getvalue().replace("\r", "\n").split("\n")


def test_duration():
    assert duration(59.6) == "0:01:00"
    assert duration(3 * 3600 + 62) == "3:01:02"
    assert duration(2 * 86400 + 3600) == "2d 1:00:00"
