"""Hand-written backward passes have no second derivative, and say so."""

from __future__ import annotations

import torch


def check_first_order(op: str) -> None:
    """Call in a backward pass. Raises RuntimeError under create_graph=True.

    torch's `once_differentiable` lets that pass where the incoming gradient is a constant, and the second derivative
    then lacks the op's part without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} can be differentiated once; create_graph=True asks for a second derivative")
