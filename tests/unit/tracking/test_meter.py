"""Rates by hand with a clock that the test moves."""

import math

import pytest

from rwkv_accel.tracking.meter import Meter, peak_memory_bytes, smooth


def update(meter, num_steps=1, tokens=1000, targets=500, left=10):
    return meter.update(num_steps=num_steps, tokens=tokens, target_tokens=targets, steps_left=left)


def test_rates_of_an_interval(clock):
    meter = Meter(clock)
    clock.advance(4)
    rates = update(meter, num_steps=2, tokens=12_000, targets=3_000)
    assert rates.kt_s == pytest.approx(3.0)
    assert rates.target_kt_s == pytest.approx(0.75)
    assert rates.it_s == pytest.approx(0.5)
    assert rates.wait_share == 0
    assert rates.wall_seconds == pytest.approx(4)
    assert rates.eta_seconds == pytest.approx(20)


def test_pauses_are_not_training_time_but_wall_time(clock):
    meter = Meter(clock)
    clock.advance(1)
    with meter.pause():
        clock.advance(50)
        with meter.pause():
            clock.advance(30)
        clock.advance(20)
    clock.advance(1)
    rates = update(meter, tokens=8000)
    assert rates.kt_s == pytest.approx(4.0)
    assert rates.it_s == pytest.approx(0.5)
    assert rates.wall_seconds == pytest.approx(102)
    clock.advance(2)
    assert update(meter, tokens=8000).kt_s == pytest.approx(4.0), "the pause must count once"


def test_pause_ends_when_the_save_fails(clock):
    meter = Meter(clock)

    def failing_save():
        with meter.pause():
            clock.advance(5)
            raise OSError

    with pytest.raises(OSError):
        failing_save()
    clock.advance(1)
    assert update(meter, tokens=1000).kt_s == pytest.approx(1.0)


def test_wait_share_counts_only_the_time_until_an_item_comes(clock):
    def slow_loader():
        for item in "abc":
            clock.advance(1)
            yield item

    meter, seen = Meter(clock), []
    for item in meter.watch(slow_loader()):
        clock.advance(3)
        seen.append((item, update(meter).wait_share))
    assert seen == [("a", 0.25), ("b", 0.25), ("c", 0.25)]


def test_time_to_go_follows_the_recent_pace(clock):
    meter = Meter(clock)
    clock.advance(10)
    assert update(meter, left=100).eta_seconds == pytest.approx(1000)
    clock.advance(2)
    assert update(meter, num_steps=2, left=100).eta_seconds == pytest.approx(100 * (1 + 0.95**2 * 9))
    for _ in range(300):
        clock.advance(1)
        rates = update(meter, left=100)
    assert rates.eta_seconds == pytest.approx(100, rel=1e-3)


def test_wall_time_goes_on_over_starts(clock):
    meter = Meter(clock, wall_seconds=3600)
    clock.advance(5)
    assert update(meter).wall_seconds == pytest.approx(3605)
    assert meter.wall_seconds() == pytest.approx(3605)


def test_smoothed_loss():
    assert smooth(None, 4.0, 1) == 4.0
    assert smooth(4.0, 2.0, 1) == pytest.approx(0.98 * 4 + 0.02 * 2)
    one_by_one = smooth(smooth(4.0, 2.0, 1), 2.0, 1)
    assert smooth(4.0, 2.0, 2) == pytest.approx(one_by_one)
    assert smooth(4.0, math.nan, 1) == 4.0
    assert smooth(4.0, math.inf, 1) == 4.0
    assert smooth(math.nan, 3.0, 1) == 3.0


def test_memory_on_cpu_is_the_resident_set_in_bytes():
    before = peak_memory_bytes("cpu")
    block = bytearray(b"x" * (64 << 20))
    grown = peak_memory_bytes("cpu")
    assert 20 << 20 < before < 1 << 36
    assert grown >= len(block)
