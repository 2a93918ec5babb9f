"""When a checkpoint is due."""

from rwkv_accel.checkpoint import SaveCadence
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.interrupt import StopRequest


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def due_steps(**config):
    cadence = SaveCadence(CheckpointConfig(**config))
    return [step for step in range(1, 13) if cadence.due(step)]


def test_by_updates():
    assert due_steps() == []
    assert due_steps(every_n_steps=5) == [5, 10]
    assert due_steps(keep_every_n_steps=6) == [6, 12]
    assert due_steps(every_n_steps=5, keep_every_n_steps=6) == [5, 6, 10, 12]


def test_minutes_count_from_the_last_checkpoint_and_only_once_agreed():
    clock, stop = Clock(), StopRequest()
    stop.cadence = cadence = SaveCadence(CheckpointConfig(every_n_minutes=0.5), clock)
    clock.now += 29.0
    assert not stop.agreed()
    assert not cadence.due(1)
    clock.now += 1.5
    assert not cadence.due(1), "a rank's own clock decides nothing"
    assert not stop.agreed(), "it is no wish to stop"
    assert cadence.due(1)
    cadence.restart()
    stop.agreed()
    assert not cadence.due(2)
    clock.now += 30.0
    stop.agreed()
    assert cadence.due(3)


def test_the_agreement_lasts_until_the_end_of_the_update():
    clock, stop = Clock(), StopRequest()
    stop.cadence = cadence = SaveCadence(CheckpointConfig(every_n_minutes=1), clock)
    clock.now += 60
    stop.agreed()
    clock.now -= 60
    stop.agreed()
    assert cadence.due(1)
