"""How well a model copies: what a passage costs when it is met again.

    first   mean -ln p of the passage, the end of a held-out context as it is
    near    the same, where the passage stands right before itself: 256 tokens back, inside a window
    far     the same, where the context begins with it

All three predict the same tokens. What stood where the passage is written is lost to them, and any model that
counts gains a little by a repetition; one that copies loses a small part of what it lost at first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from _fit import validate
from torch import Tensor

from coga.models import CoGAGPT

__all__ = ["copying", "copying_line", "hardly_copies", "repeated"]

SPAN = 256  # tokens of the passage
LEAD = 16  # of it before the count starts: what is copied must be recognised first
# Three dense models of 11M parameters that lost at most 0.62 of it again went on with 5 groups of 64 at a
# cost of up to 0.010 bits, one that lost 0.71 at 0.022-0.024 (docs/findings.md): a rough mark.
HARDLY = 0.65


def repeated(text_BX: Tensor, span: int) -> dict[str, Tensor]:
    """The text, and the text with its last `span` tokens written over earlier ones."""
    found = {"first": text_BX}
    for name, start in (("near", text_BX.shape[1] - 2 * span), ("far", 0)):
        found[name] = text_BX.clone()
        found[name][:, start : start + span] = text_BX[:, -span:]
    return found


def copying(
    model: CoGAGPT, tokens_BT: Tensor, targets_BT: Tensor, device: torch.device, batch: int
) -> dict[str, float]:
    """Nats a token of each; empty where a quarter of a context, the longest passage, is `LEAD` or less."""
    text = torch.cat([tokens_BT, targets_BT[:, -1:]], 1)
    span = min(SPAN, text.shape[1] // 4)
    if span <= LEAD:
        return {}
    found = {}
    for name, here in repeated(text, span).items():
        loss_T, _ = validate(model, here[:, :-1], here[:, 1:], device, batch)
        found[name] = float(loss_T[LEAD - span :].mean())
    return found


def _known(found: Mapping[str, float | None]) -> bool:
    """Whether all three were measured and are finite (rows of JSON have None where they are not)."""
    return bool(found) and all(value is not None and math.isfinite(value) for value in found.values())


def copying_line(found: Mapping[str, float | None]) -> str:
    """For the terminal; empty where there is nothing to say."""
    if not _known(found):
        return ""
    first, near, far = (found[name] for name in ("first", "near", "far"))
    return f"copying {first:.3f} nats a token, read again {near:.3f} near and {far:.3f} far"


def hardly_copies(found: Mapping[str, float | None]) -> bool:
    """Whether a dense model is not ready to be read through groups; False where that is not known."""
    return _known(found) and found["near"] > HARDLY * found["first"]
