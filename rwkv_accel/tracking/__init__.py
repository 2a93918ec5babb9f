"""What a run tells about itself: train_log.txt, loss_data.json, experiment trackers, progress of the updates.

RunLog       the one object that the loop calls, on every rank
StepRecord   the numbers of one logged step; TIME_FIELDS are those that a resumed run does not reproduce
"""

from rwkv_accel.tracking.record import TIME_FIELDS, StepRecord
from rwkv_accel.tracking.run_log import LOSS_FILE, TRAIN_LOG_FILE, RunLog

__all__ = ["LOSS_FILE", "TIME_FIELDS", "TRAIN_LOG_FILE", "RunLog", "StepRecord"]
