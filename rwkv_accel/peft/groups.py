"""Parameter groups by name: what gets its own learning rate and what decays.

The rule of RWKV-LM train_temp/src/model.py: `att.w0` learns at twice the rate; weight decay touches only
the large `.weight` matrices of the base. Everything that an adapter adds has its own group and never
decays.
"""

from __future__ import annotations

GROUPS = ("w0", "emb", "head", "lora_A", "lora_B", "state", "matrix", "other")
DECAYED = frozenset(("emb", "head", "matrix"))

MATRICES = tuple(f"{name}.weight" for name in ("receptance", "att.key", "att.value", "output", "ffn.key", "ffn.value"))


def group_of(name: str) -> str:
    """Group of a parameter by its official or adapter name; one of GROUPS, those in DECAYED have weight
    decay.
    """
    last = name.rsplit(".", 1)[-1]
    if name.endswith("att.w0"):
        return "w0"
    if last in ("lora_A", "lora_B"):
        return last
    if last == "time_state":
        return "state"
    if name in ("emb.weight", "head.weight"):
        return name.split(".")[0]
    return "matrix" if name.endswith(MATRICES) else "other"
