"""What decoding keeps per layer, and how many bytes that is.

    near    latents of the open and the previous window (a ring of 2W), content queries inside the band
    full    latents of all tokens, content queries inside the band
    group   near, and: latents and sizes of closed groups; if groups refine, their refined latents and hidden
            states of the open window, and content queries of the last window's groups (if they are
            reciprocal); with K > 0 the latents of all tokens of closed windows in slot order. With K > 0 and
            refinement the raw latents are left out: they are the means of their members, which are there;
            nor are there any where summaries are not read
    mha     keys and values of all tokens

Legend: B rows, L = C + P latent width, W window, G groups in a window, M groups, S slots (closed tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from coga.config import CoGAConfig, LayerConfig

__all__ = ["DecodeState", "LayerState", "mha_bytes", "state_bytes_formula"]

FIRST = 256  # tokens allocated at first when no max_len is given


@dataclass
class LayerState:
    """Tensors of one layer by name; absent ones are not needed by its pattern."""

    layer: LayerConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


def _shapes(config: CoGAConfig, layer: LayerConfig, batch: int, length: int) -> dict[str, tuple]:
    """Shape of every tensor of a layer's state that can hold `length` tokens."""
    width, heads = layer.latent_dim + config.rope_dim, config.n_head
    if layer.kind == "mha":
        shape = (batch, length, heads, config.d_model // heads)
        return {"key": shape, "value": shape}
    shapes: dict[str, tuple] = {}
    shapes["latent"] = (batch, length if layer.kind == "full" else 2 * layer.window, width)
    if config.reciprocal and config.band > 0:
        shapes["query"] = (batch, config.band, heads, layer.latent_dim)
    if layer.kind != "group":
        return shapes
    windows = length // layer.window
    latents = (batch, windows * layer.groups, width)
    if config.reads_summaries and not (config.refine_groups and layer.open_groups > 0):
        shapes["raw"] = latents
    shapes["size"] = (batch, windows * layer.groups)
    if layer.open_groups > 0:
        shapes["slot"] = (batch, windows * layer.window, width)
    if config.refine_groups:
        shapes["refined"] = latents
        shapes["hidden"] = (batch, layer.window, config.d_model)
        if config.reciprocal_groups:
            shapes["group_query"] = (batch, layer.groups, heads, layer.latent_dim)
    return shapes


GROWING = ("key", "value", "raw", "refined", "size", "slot")


@dataclass
class DecodeState:
    """State of a batch of rows that may have different lengths.

    length_B is on the device; lengths is its copy on the host, so that closing a window needs no
    synchronisation. max_len None: storage doubles when it is full.
    """

    config: CoGAConfig
    layers: list[LayerState]
    length_B: Tensor
    lengths: list[int]
    max_len: int | None
    capacity: int

    @classmethod
    def new(cls, model, batch_size: int, max_len: int | None) -> DecodeState:
        config, weight = model.config, model.embedding.weight
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if max_len is not None and not 1 <= max_len <= config.max_len:
            raise ValueError(f"max_len={max_len}: must be between 1 and the model's max_len={config.max_len}")
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        capacity = max_len or min(FIRST, config.max_len)
        layers = []
        for i in range(config.n_layer):
            layer = config.layer(i)
            shapes = _shapes(config, layer, batch_size, capacity)
            tensors = {
                name: torch.zeros(shape, device=weight.device, dtype=torch.int32 if name == "size" else dtype)
                for name, shape in shapes.items()
            }
            layers.append(LayerState(layer, tensors))
        length = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return cls(config, layers, length, [0] * batch_size, max_len, capacity)

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens; ValueError beyond max_len."""
        limit = self.max_len or self.config.max_len
        if length > limit:
            raise ValueError(f"tokens={length} in a row: must be at most max_len={limit}")
        if length <= self.capacity:
            return
        self.capacity = min(limit, max(length, 2 * self.capacity))
        for state in self.layers:
            shapes = _shapes(self.config, state.layer, len(self.lengths), self.capacity)
            growing = (*GROWING, "latent") if state.layer.kind == "full" else GROWING
            for name in growing:
                if name in state.tensors:
                    old = state.tensors[name]
                    new = old.new_zeros(shapes[name])
                    new[:, : old.shape[1]] = old
                    state.tensors[name] = new

    def bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(state.bytes() for state in self.layers)


def state_bytes_formula(config: CoGAConfig, length: int, batch: int = 1, element_size: int = 2) -> list[int]:
    """Bytes a layer that a state for `length` tokens holds; sizes are int32, everything else `element_size`.

    For a group layer with L = C + P, per row:
    2W L + band H C + (T/R) L [unless summaries are off] + [W D + G H C if refining, and (T/R) L once more if
    K = 0] + T L (if K > 0), plus T/R sizes.
    """
    found = []
    for i in range(config.n_layer):
        total = 0
        for name, shape in _shapes(config, config.layer(i), batch, length).items():
            count = 1
            for n in shape:
                count *= n
            total += count * (4 if name == "size" else element_size)
        found.append(total)
    return found


def mha_bytes(config: CoGAConfig, length: int, element_size: int = 2) -> int:
    """Bytes a layer that multi-head attention of the same width keeps for one row: 2 D T."""
    return 2 * config.d_model * length * element_size
