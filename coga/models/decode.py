"""Chunked prefill and token-by-token decode from a `DecodeState`, and generation.

A chunk of any length is appended layer by layer: project, close the windows that the chunk completes
(their groups are formed once, then never change), attend, store. Rows of a batch stand at
different lengths and close windows at their own time.

Legend: B rows, t tokens of a chunk, s keys, H heads, C content width, L = C + P, W window, G groups in a
window, M groups, R ring of 2W latents.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from coga.grouping import GroupingContext, pool
from coga.kernels.reference import (
    attend_chunk,
    gather_members,
    rounding_step,
    select,
    select_members,
    wide,
    wide_or_none,
)
from coga.models.attention import CoGAAttention, log_size
from coga.models.context import Alignment, CallContext
from coga.models.index import index_query
from coga.models.mha import MultiHeadAttention
from coga.models.state import DecodeState, LayerState
from coga.types import Far

if TYPE_CHECKING:
    from coga.models.gpt import CoGAGPT

__all__ = ["DecodeState", "advance", "generate", "step"]

PIECE = 512  # tokens of a chunk that are processed at a time, which bounds the memory of a long prefill


def _take(x_BsX: Tensor, index_Bn: Tensor) -> Tensor:
    """x[b, index[b, n]] for tensors with any trailing axes."""
    view = index_Bn.view(*index_Bn.shape, *[1] * (x_BsX.ndim - 2))
    return x_BsX.gather(1, view.expand(*index_Bn.shape, *x_BsX.shape[2:]))


def _recent(ring: Tensor, length_B: Tensor) -> Tensor:
    """The ring's entries in order of position: those at length - size .. length - 1 (junk before 0)."""
    size = ring.shape[1]
    index = (length_B[:, None] - size + torch.arange(size, device=ring.device)) % size
    return _take(ring, index)


def _write(store: Tensor, chunk: Tensor, length_B: Tensor, count_B: Tensor) -> None:
    """Write the chunk's first count tokens at positions length .. of a store indexed by position, modulo its
    size. Only these places are touched: what a step costs does not follow from what is stored.
    """
    size = store.shape[1]
    chunk = chunk[:, :size]  # no more than that are to be written
    turn = torch.arange(chunk.shape[1], device=store.device)
    # No two tokens of a row share a place, so those that are not to be written put back what was there.
    place = (length_B[:, None] + turn) % size
    fresh = (turn < count_B[:, None]).view(*place.shape, *[1] * (store.ndim - 2))
    new = torch.where(fresh, chunk.to(store.dtype), _take(store, place))
    store.scatter_(1, place.view(fresh.shape).expand_as(new), new)


def _push(ring: Tensor, chunk: Tensor, length_B: Tensor, count_B: Tensor) -> None:
    """Write the chunk's first count tokens at positions length .. length+count-1, modulo the ring's size."""
    size = ring.shape[1]
    if chunk.shape[1] > size:  # of a row's tokens the ring keeps the last
        past_B = (count_B - size).clamp_min(0)
        chunk = _take(chunk, past_B[:, None] + torch.arange(size, device=ring.device))
        length_B, count_B = length_B + past_B, count_B - past_B
    _write(ring, chunk, length_B, count_B)


def _earlier_raw(layer: LayerState, row: Tensor, groups: int) -> Tensor:
    """Raw latents of the first groups of some rows: stored, or the means of their members."""
    raw = layer.get("raw")
    if raw is not None:
        return raw[row, :groups]
    size, slot = layer["size"][row, :groups].long(), layer["slot"][row]
    offset = size.cumsum(-1) - size
    place = torch.arange(layer.layer.slots, device=slot.device)
    inside = place < size[..., None]
    index = torch.where(inside, offset[..., None] + place, 0)
    member = wide(_take(slot, index.flatten(1))).view(*index.shape, slot.shape[-1])
    total = torch.where(inside[..., None], member, 0).sum(2)
    return (total / size.clamp_min(1)[..., None]).to(slot.dtype)


class _Piece:
    """One piece of a chunk on its way through the layers.

    static: shapes do not follow the lengths (all storage is read under masks), so that a graph captured once
    can be replayed at any length.
    """

    def __init__(
        self, model: CoGAGPT, state: DecodeState, count: list[int], width: int, static: bool = False
    ) -> None:
        self.state, self.counts, self.static = state, count, static
        device = state.length_B.device
        if all(c == width for c in count):  # no copy from the host: allowed while a graph is captured
            self.count_B = torch.full_like(state.length_B, width)
        else:
            self.count_B = torch.tensor(count, device=device)
        self.position_Bt = state.length_B[:, None] + torch.arange(width, device=device)
        self.context: CallContext = model.call_context(self.position_Bt, None, 0, training=False)

    def attention(self, module, x_BtD: Tensor, layer: LayerState) -> Tensor:
        if isinstance(module, MultiHeadAttention):
            return self._mha(module, x_BtD, layer)
        return self._coga(module, x_BtD, layer)

    def _mha(self, module: MultiHeadAttention, x: Tensor, layer: LayerState) -> Tensor:
        q, k, v = module.project(x, self.context)
        length = self.state.length_B
        for name, new in (("key", k), ("value", v)):
            _write(layer[name], new, length, self.count_B)
        stored = layer["key"].shape[1]
        end = stored if self.static else min(max(self.state.lengths) + x.shape[1], stored)
        seen = torch.arange(end, device=x.device)
        key, value = (layer[n][:, : len(seen)].to(q.dtype).transpose(1, 2) for n in ("key", "value"))
        mask = (seen <= self.position_Bt[..., None])[:, None]
        y = scaled_dot_product_attention(q.transpose(1, 2), key, value, attn_mask=mask)
        return module.out(rearrange(y, "b h t e -> b t (h e)"))

    def _coga(self, module: CoGAAttention, x: Tensor, layer: LayerState) -> Tensor:
        projections, length = module.projections, self.state.length_B
        table = self.context.tables[projections.rotary]
        q, latent = projections.queries(x, table), projections.latents(x, table)
        content, config = projections.content, layer.layer
        queries = layer.get("query")
        key_query = None
        if queries is not None:
            key_query = torch.cat([_recent(queries, length).to(q.dtype), q[..., :content]], 1)
        if config.kind == "full":
            _write(layer["latent"], latent, length, self.count_B)
            key, key_position, key_query = self._full_keys(layer, latent, key_query)
        else:
            size = layer["latent"].shape[1]
            key = torch.cat([_recent(layer["latent"], length).to(latent.dtype), latent], 1)
            key_position = length[:, None] - size + torch.arange(key.shape[1], device=x.device)
        far, members = None, None
        if config.kind == "group":
            self._close_windows(module, x, key, layer)
            far = self._far(module, q, layer)
            members = gather_members(far, far.open_BTK) if far and far.open_BTK is not None else None
        if (
            key_query is not None
        ):  # the ring may reach further back than the keys do, never less than the band
            key_query = key_query[:, -key.shape[1] :]
        if far is not None:
            far = replace(far, group_BML=wide_or_none(far.group_BML))
        mixed, _ = attend_chunk(
            wide(q),
            self.position_Bt,
            wide(key),
            key_position,
            content=content,
            window=None if config.kind == "full" else config.window,
            band=module.config.band,
            alpha_H=None if key_query is None else module._alpha(self.context),
            c_BtC=wide(latent[..., :content]),
            key_query_BnHC=None if key_query is None else wide(key_query),
            sink_H=module.sink_H,
            far=far,
            members=None if members is None else (wide(members[0]), members[1]),
        )
        if queries is not None:
            _push(queries, q[..., :content], length, self.count_B)
        if config.kind != "full":
            _push(layer["latent"], latent, length, self.count_B)
        if "hidden" in layer.tensors:
            _push(layer["hidden"], x, length, self.count_B)
        return projections.output(mixed.to(q.dtype), x, self.context.backend)

    def _full_keys(self, layer: LayerState, latent: Tensor, key_query: Tensor | None):
        """Keys of a dense layer, by position up to each row's end, aligned with the recent queries."""
        length, width = self.state.length_B, latent.shape[1]
        stored = layer["latent"]
        end = stored.shape[1] if self.static else max(self.state.lengths)
        # Right-aligned like the ring, so that the last keys are the chunk's own tokens in every row.
        position = length[:, None] - end + torch.arange(end, device=stored.device)
        past = _take(stored, position.clamp_min(0)).to(latent.dtype)
        key_position = torch.cat([position, length[:, None] + torch.arange(width, device=stored.device)], 1)
        return torch.cat([past, latent], 1), key_position, key_query

    def _close_windows(self, module: CoGAAttention, x: Tensor, key: Tensor, layer: LayerState) -> None:
        """Form the groups of every window that this piece completes; rows at the same one together."""
        width = layer.layer.window
        closing: dict[int, list[int]] = defaultdict(list)
        for row, (old, new) in enumerate(zip(self.state.lengths, self.counts, strict=True)):
            for window in range(old // width, (old + new) // width):
                closing[window].append(row)
        for window in sorted(closing):
            self._close(module, window, closing[window], x, key, layer)

    def _close(self, module: CoGAAttention, window: int, rows: list[int], x, key, layer: LayerState) -> None:
        config, context = layer.layer, self.context
        width, groups = config.window, config.groups
        row = torch.tensor(rows, device=x.device)
        length = self.state.length_B[row][:, None]
        position = window * width + torch.arange(width, device=x.device)
        latent = _take(key[row], position - (length - layer["latent"].shape[1]))
        index = torch.full((len(rows), 1), window, device=x.device)
        assert module.grouping is not None
        with torch.autocast(x.device.type, enabled=False):
            grouping = module.grouping(
                latent[:, None, :, : module.projections.content],
                GroupingContext(
                    window_BN=index,
                    valid_BN=torch.ones_like(index, dtype=torch.bool),
                    step=context.step,
                    backend=context.backend,
                ),
            )
            raw = pool(latent, grouping) if module.reads_summaries else None
        span = slice(window * groups, (window + 1) * groups)
        if "raw" in layer.tensors and raw is not None:
            layer["raw"][row, span] = raw.to(layer["raw"].dtype)
        layer["size"][row, span] = grouping.size_BM.int()
        if "slot" in layer.tensors:
            members = latent.gather(1, grouping.order_BS[..., None].expand_as(latent))
            layer["slot"][row, window * width : (window + 1) * width] = members.to(layer["slot"].dtype)
        if module.group_level is None or raw is None:
            return
        old = _recent(layer["hidden"], self.state.length_B)[row]
        hidden = torch.cat([old.to(x.dtype), x[row]], 1)
        with torch.autocast(x.device.type, enabled=False):
            members = _take(hidden, position - (length - old.shape[1]))
            state = pool(members.to(raw.dtype), grouping)
        end = torch.full((groups,), (window + 1) * width - 1, device=x.device)
        table = context.table_at(end, module.projections.rotary)
        known = torch.cat([_earlier_raw(layer, row, span.start).to(raw.dtype), raw], 1)
        sizes = log_size(layer["size"][row, : span.stop], known.dtype)
        previous = layer.get("group_query")
        earlier = None if previous is None or window == 0 else previous[row].to(x.dtype)
        refined, query = module.group_level.step(
            state, known, sizes, module.projections, table, module.warmth(context), earlier
        )
        layer["refined"][row, span] = refined.to(layer["refined"].dtype)
        if previous is not None:
            previous[row] = query.to(previous.dtype)

    def _far(self, module: CoGAAttention, q: Tensor, layer: LayerState) -> Far | None:
        config = layer.layer
        longest = max(n + c for n, c in zip(self.state.lengths, self.counts, strict=True))
        read = max(0, (longest - 1) // config.window - 1) * config.groups
        if self.static:
            read = layer["size"].shape[1]
        if read == 0:
            return None
        size = layer["size"][:, :read].long()
        group = sizes = None
        if module.reads_summaries:
            group = layer["refined" if module.group_level is not None else "raw"][:, :read].to(q.dtype)
            sizes = log_size(size, group.dtype)
        opened = slot = None
        offset = size.cumsum(-1) - size
        if config.open_groups > 0:
            slot = layer["slot"].to(q.dtype)
            chooser, at, step = index_query(q, module.index_H), self.position_Bt, rounding_step(q.dtype)
            options = dict(count=config.open_groups, window=config.window, groups=config.groups)
            if self.state.config.selection == "members":
                options["slots"] = config.slots
                closed = slot[:, : read // config.groups * config.window]
                opened = select_members(chooser, at, closed, offset, size, step=step, **options)
            else:
                assert group is not None and sizes is not None
                opened = select(chooser, at, group, sizes, step=step, **options)
        bias, shift = module.far_weights(self.context)
        return Far(
            group_BML=group,
            log_size_BM=sizes,
            far_bias_H=bias,
            slot_BSL=slot,
            offset_BM=offset,
            size_BM=size,
            open_BTK=opened,
            groups=config.groups,
            slots=config.slots,
            open_shift=None if opened is None else shift,
        )


def advance(
    model: CoGAGPT, tokens_Bt: Tensor, state: DecodeState, counts: list[int], static: bool = False
) -> Tensor:
    """Run one piece through all layers and store it; hidden states (B, t, D). `state.lengths` stays."""
    piece = _Piece(model, state, counts, tokens_Bt.shape[1], static)
    x = model.embedding(tokens_Bt)
    for block, layer in zip(model.stack, state.layers, strict=True):
        x = x + piece.attention(block.attention, block.attention_norm(x), layer)
        x = x + block.mlp(block.mlp_norm(x))
    state.length_B.add_(piece.count_B)
    return model.norm(x)


@torch.no_grad()
def step(
    model: CoGAGPT,
    tokens_BT: Tensor,
    state: DecodeState,
    attention_mask: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    """Logits (B, T, V) of appended tokens, or (B, 1, V) of each row's last real one; see `CoGAGPT.step`."""
    model.check_tokens(tokens_BT)
    rows, width = tokens_BT.shape
    if rows != len(state.lengths):
        raise ValueError(f"tokens={rows} rows: the state was made for batch_size={len(state.lengths)}")
    mine = state.config  # the very object, but for a state that has moved between models
    if mine is not model.config and mine.replace(backend=model.config.backend) != model.config:
        raise ValueError("state: was made by a model of another configuration; use this model's new_state")
    align, counts = None, [width] * rows
    if attention_mask is not None:
        align = Alignment.of(attention_mask, tokens_BT)
        tokens_BT, counts = align.enter(tokens_BT), align.length_B.tolist()
    state.reserve(max(n + c for n, c in zip(state.lengths, counts, strict=True)))
    hidden = []
    for start in range(0, width, PIECE):
        tokens = tokens_BT[:, start : start + PIECE]
        here = [min(max(c - start, 0), tokens.shape[1]) for c in counts]
        hidden.append(advance(model, tokens, state, here))
        state.lengths[:] = [n + c for n, c in zip(state.lengths, here, strict=True)]
    final = torch.cat(hidden, 1)
    if last_only:
        last = torch.tensor(counts, device=final.device)[:, None] - 1
        return linear(_take(final, last), model.head_weight)
    return linear(final if align is None else align.leave(final), model.head_weight)


@torch.no_grad()
def generate(
    model: CoGAGPT,
    tokens_BT: Tensor,
    max_new_tokens: int = 64,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    eos_token: int | None = None,
) -> Tensor:
    """The prompt followed by max_new_tokens sampled tokens, (B, T + new).

    temperature 0 is greedy; top_k keeps the k likeliest tokens; after eos_token a row repeats it.
    Prompts of different lengths: pad them (left, as usual, or right) and pass the attention_mask.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not (temperature >= 0 and temperature < float("inf")):
        raise ValueError(f"temperature={temperature}: must be a finite number, at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be None or at least 1")
    model.check_tokens(tokens_BT)
    if max_new_tokens == 0:
        return tokens_BT
    if tokens_BT.shape[1] + max_new_tokens > model.config.max_len:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: with {tokens_BT.shape[1]} prompt tokens must stay within "
            f"max_len={model.config.max_len}"
        )
    state = model.new_state(tokens_BT.shape[0], tokens_BT.shape[1] + max_new_tokens)
    logits = step(model, tokens_BT, state, attention_mask, last_only=True)
    out = [tokens_BT]
    done = torch.zeros(tokens_BT.shape[0], 1, dtype=torch.bool, device=tokens_BT.device)
    for i in range(max_new_tokens):
        token = sample(logits[:, -1], temperature, top_k, generator)
        if eos_token is not None:
            token = token.masked_fill(done, eos_token)
            done = done | (token == eos_token)
        out.append(token.to(tokens_BT.dtype))
        if i + 1 < max_new_tokens:
            logits = step(model, token, state, last_only=True)
    return torch.cat(out, 1)


def sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token a row, (B, 1)."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits = wide(logits_BV)
    # The largest is 0 before it is divided: no temperature, however small, makes it overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
