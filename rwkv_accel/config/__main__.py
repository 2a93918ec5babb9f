"""Print the reference of all keys: python -m rwkv_accel.config"""

from __future__ import annotations

import sys

from rwkv_accel.config.reference import reference

if __name__ == "__main__":
    sys.stdout.write(reference())
