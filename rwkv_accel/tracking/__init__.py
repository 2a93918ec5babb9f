"""What a run tells about itself: train_log.txt, loss_data.json, experiment trackers, progress of the updates.

RunLog       the one object that the loop calls, on every rank
StepRecord   the numbers of one logged step; TIME_FIELDS are those that a resumed run does not reproduce
*_FILE       names of what a run leaves in its folder
"""

from rwkv_accel.tracking.record import TIME_FIELDS, StepRecord
from rwkv_accel.tracking.run_log import (
    ENVIRONMENT_FILE,
    EVAL_FILE,
    LOCK_FILE,
    LOG_FILES,
    LOSS_FILE,
    REPORT_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    TRAIN_LOG_FILE,
    RunLog,
)

__all__ = [
    "ENVIRONMENT_FILE",
    "EVAL_FILE",
    "LOCK_FILE",
    "LOG_FILES",
    "LOSS_FILE",
    "REPORT_FILE",
    "RUN_FILE",
    "SAMPLES_FILE",
    "TIME_FIELDS",
    "TRAIN_LOG_FILE",
    "RunLog",
    "StepRecord",
]
