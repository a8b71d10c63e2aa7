"""What a layer needs to know about the call it is part of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coga.models.rotary import rotary_table

__all__ = ["Alignment", "CallContext"]


@dataclass(frozen=True)
class CallContext:
    """Arguments shared by all layers of one forward pass.

    position    (T,) or (B, T), positions counted from each row's first real token
    length_B    real tokens of each row; None when no row is padded
    noise_step, step   of the noise and of the schedules
    training    noise is drawn and statistics are kept
    tables      rotary tables by width
    """

    position: Tensor
    length_B: Tensor | None
    noise_step: Tensor | int
    step: Tensor | int
    training: bool
    backend: str
    tables: dict[int, tuple[Tensor, Tensor]]
    theta: float
    dtype: torch.dtype

    @classmethod
    def of(cls, position: Tensor, widths: set[int], theta: float, dtype: torch.dtype, **rest) -> CallContext:
        tables = {w: rotary_table(position, w, theta, dtype) for w in sorted(widths)}
        return cls(position=position, tables=tables, theta=theta, dtype=dtype, **rest)

    def table_at(self, position: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return rotary_table(position, width, self.theta, self.dtype)

    def valid_windows(self, batch: int, windows: int, width: int) -> Tensor:
        """(B, N) bool: windows made of real tokens only."""
        end = (torch.arange(windows, device=self.position.device) + 1) * width
        if self.length_B is None:
            return torch.ones(batch, windows, dtype=torch.bool, device=end.device)
        return end <= self.length_B[:, None]


@dataclass(frozen=True)
class Alignment:
    """Moves padded rows so that each starts with its first real token, and back.

    Windows are counted from there, so left padding shifts the row, not the windows; right padding needs no
    mask at all, since no real token can see a later one and a window with padding in it is never read.
    """

    length_B: Tensor
    shift_B: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor, tokens_BT: Tensor) -> Alignment:
        if mask_BT.shape != tokens_BT.shape:
            raise ValueError(
                f"attention_mask={tuple(mask_BT.shape)}: "
                f"must have the shape of tokens, {tuple(tokens_BT.shape)}"
            )
        real = mask_BT.bool()
        length, shift = real.sum(-1), real.int().argmax(-1)
        if not torch.compiler.is_compiling():
            place = torch.arange(real.shape[1], device=real.device)
            span = (place >= shift[:, None]) & (place < (shift + length)[:, None])
            if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
                raise ValueError(
                    "attention_mask: must hold 1 for real tokens and 0 for padding, nothing else"
                )
            if not bool((span == real).all()) or not bool((length > 0).all()):
                raise ValueError(
                    "attention_mask: each row must be one unbroken run of at least one real token "
                    "(left or right padding)"
                )
        return cls(length, shift)

    def _index(self, width: int, sign: int) -> Tensor:
        place = torch.arange(width, device=self.shift_B.device)
        return (place + sign * self.shift_B[:, None]) % width

    def enter(self, x_BT: Tensor) -> Tensor:
        """Row b moves left by its padding; what falls off comes back at the end, as right padding."""
        return x_BT.gather(1, self._index(x_BT.shape[1], 1))

    def leave(self, x_BTD: Tensor) -> Tensor:
        index = self._index(x_BTD.shape[1], -1)
        return x_BTD.gather(1, index[..., None].expand_as(x_BTD))

    def real(self, width: int) -> Tensor:
        return torch.arange(width, device=self.length_B.device) < self.length_B[:, None]
