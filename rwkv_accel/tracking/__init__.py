"""What a run tells about itself: train_log.txt, loss_data.json, experiment trackers, progress.

RunLog       the one object that the loop calls, on every rank
StepRecord   the numbers of one logged step; TIME_FIELDS are those that a resumed run does not reproduce
progress     a bar or plain lines around any other long work
"""

from rwkv_accel.tracking.progress import progress
from rwkv_accel.tracking.record import TIME_FIELDS, StepRecord
from rwkv_accel.tracking.run_log import LOSS_FILE, TRAIN_LOG_FILE, RunLog

__all__ = ["LOSS_FILE", "TIME_FIELDS", "TRAIN_LOG_FILE", "RunLog", "StepRecord", "progress"]
