"""Plain PyTorch attention over near tokens, opened groups and group summaries: the ground truth.

For a token at position i in window w = i // W, one softmax over four parts (DESIGN: section 6):

    near     j in [max(0, (w-1) W), i]      s_ij = q_i . k_j + alpha_h (q_j . c_i)[0 <= i-j < band]
    opened   members j of opened groups     s_ij = q_i . k_j
    far      unopened groups m < (w-1) G    s_im = q_i . g_m + log|g_m| + bias_h
    sink     a logit per head whose value is zero

k_j is the whole latent (content and rotary part), c_i its first C dims; the value of a token or a group is
the first C dims of its latent. Queries arrive scaled: gain_h / sqrt(L) is inside q.

Memory: queries are taken in chunks, and the backward pass recomputes each chunk, so neither T x T scores
nor the opened members of all tokens exist at once. Cost: O(T (W + K S + T/R) H L).

Legend: B batch, T tokens, t queries of a chunk, s keys of a chunk, H heads, C content width, L = C + P,
M groups, G groups in a window, K opened groups a token, S slots of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from coga.types import Far

__all__ = [
    "CHUNK",
    "Parts",
    "attend",
    "attend_backward",
    "attend_chunk",
    "attention_parts",
    "far_at",
    "gather_members",
    "group_attend",
    "group_attend_backward",
    "rounding_step",
    "select",
    "select_members",
    "visible_groups",
]

CHUNK = 256  # queries at a time: 128 x K*S members x L floats is the largest temporary

STEPS = {
    torch.float64: 2.0**-32,
    torch.float32: 2.0**-12,
    torch.bfloat16: 2.0**-6,
    torch.float16: 2.0**-8,
}


def rounding_step(dtype: torch.dtype) -> float:
    """Step to which scores are rounded before a discrete choice, so that one ulp moves no token."""
    return STEPS[dtype]


def wide(x: Tensor) -> Tensor:
    """At least float32: half precision is raised, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def wide_or_none(x: Tensor | None) -> Tensor | None:
    """`wide` of what may be absent."""
    return None if x is None else wide(x)


def visible_groups(position: Tensor, window: int, groups: int) -> Tensor:
    """How many groups a token may read: those of windows 0 .. w-2, so max(0, w-1) * G."""
    return (position // window - 1).clamp_min(0) * groups


@dataclass(frozen=True)
class Parts:
    """Probabilities of one chunk: near_BtHs, opened_BtHk (k = K*S), far_BtHm, sink_BtH."""

    near_BtHs: Tensor
    opened_BtHk: Tensor | None
    far_BtHm: Tensor | None
    sink_BtH: Tensor | None
    lse_BtH: Tensor


def gather_members(far: Far, open_BtK: Tensor) -> tuple[Tensor, Tensor]:
    """Members of the opened groups: latents (B, t, K*S, L) and a mask (B, t, K*S)."""
    assert far.slot_BSL is not None
    slot = torch.arange(far.slots, device=open_BtK.device)
    valid_BtK = open_BtK >= 0
    flat = rearrange(open_BtK.clamp_min(0), "b t k -> b (t k)")
    start, size = (
        rearrange(x.gather(1, flat), "b (t k) -> b t k 1", t=open_BtK.shape[1])
        for x in (far.offset_BM, far.size_BM)
    )
    mask = (slot < size) & valid_BtK[..., None]
    batch, slots, width = far.slot_BSL.shape
    first = torch.arange(batch, device=start.device).view(-1, 1, 1, 1) * slots
    index = torch.where(mask, start + slot, 0) + first
    members = far.slot_BSL.reshape(-1, width).index_select(0, index.flatten())
    mask = rearrange(mask, "b t k s -> b t (k s)")
    return members.view(*mask.shape, width), mask


def far_at(far: Far | None, position: Tensor) -> tuple[Far | None, tuple[Tensor, Tensor] | None]:
    """`far` in at least float32 for the queries at some positions, and the members that they open."""
    if far is None:
        return None, None
    opened = None if far.open_BTK is None else far.open_BTK[:, position]
    group, slot = wide_or_none(far.group_BML), wide_or_none(far.slot_BSL)
    far = replace(far, group_BML=group, slot_BSL=slot, open_BTK=opened)
    return far, None if opened is None else gather_members(far, opened)


def _scores(q_BtHL: Tensor, key_BsL: Tensor) -> Tensor:
    """q . k for one latent shared by all heads: (B, t, H, s)."""
    rows = rearrange(q_BtHL, "b t h l -> b (t h) l") @ key_BsL.transpose(1, 2)
    return rearrange(rows, "b (t h) s -> b t h s", h=q_BtHL.shape[2])


def _mix(prob_BtHs: Tensor, value_BsC: Tensor) -> Tensor:
    rows = rearrange(prob_BtHs, "b t h s -> b (t h) s") @ value_BsC
    return rearrange(rows, "b (t h) c -> b t h c", h=prob_BtHs.shape[2])


def attention_parts(
    q_BtHL: Tensor,
    position: Tensor,
    key_BsL: Tensor,
    key_position: Tensor,
    *,
    content: int,
    window: int | None,
    band: int = 0,
    alpha_H: Tensor | None = None,
    c_BtC: Tensor | None = None,
    key_query_BnHC: Tensor | None = None,
    sink_H: Tensor | None = None,
    far: Far | None = None,
    members: tuple[Tensor, Tensor] | None = None,
    one_window: bool = False,
    lse_BtH: Tensor | None = None,
) -> Parts:
    """Probabilities of the four parts for one chunk of queries.

    position      (t,) or (B, t), absolute positions of the queries
    key_position  (s,) or (B, s), absolute positions of the keys; negative where a key is absent
    key_query_BnHC  content queries of the LAST n keys; between them they cover the band
    c_BtC         content latents of the queries, read by the reciprocal term
    members       latents (B, t, K*S, L) and mask of `gather_members`
    one_window    the caller vouches that the queries share a window, are the last keys, and that keys and
                  groups hold nothing else that one of them may not see: most masks can be skipped
    lse_BtH       log-sum-exp if it is known already
    """
    # Scores are updated in place: a pass over them costs as much as the matrix product that made them.
    pos, kpos = position[..., :, None], key_position[..., None, :]
    near = _scores(q_BtHL, key_BsL)
    if alpha_H is not None and band > 0:
        assert key_query_BnHC is not None and c_BtC is not None
        n, heads = key_query_BnHC.shape[1:3]
        distance = pos - kpos[..., -n:]
        inside = (distance >= 0) & (distance < band)
        keys = rearrange(key_query_BnHC, "b n h c -> b c (h n)")
        term = rearrange(c_BtC @ keys, "b t (h n) -> b t h n", h=heads) * alpha_H[:, None]
        near[..., -n:] += term.masked_fill(~inside[..., None, :], 0)
    if one_window:
        last = key_position.shape[-1] - position.shape[-1]
        near[..., last:].masked_fill_((kpos[..., last:] > pos)[..., None, :], -torch.inf)
    else:
        lowest = 0 if window is None else (pos // window - 1).clamp_min(0) * window
        seen = (kpos <= pos) & (kpos >= lowest)  # a negative key position is never seen
        near.masked_fill_(~seen[..., None, :], -torch.inf)
    # Each part has scores and an offset per head that they still lack.
    parts: list[tuple[Tensor, Tensor | float]] = [(near, 0.0)]
    if far is not None and far.group_BML is not None:
        assert window is not None and far.log_size_BM is not None and far.far_bias_H is not None
        count = far.group_BML.shape[1]
        added = far.log_size_BM.to(near.dtype)[:, None].expand(-1, position.shape[-1], -1)
        if not one_window:
            group = torch.arange(count, device=q_BtHL.device)
            hidden = group >= visible_groups(position, window, far.groups)[..., None]
            added = added.masked_fill(hidden, -torch.inf)
        if far.open_BTK is not None:
            index = torch.where(far.open_BTK >= 0, far.open_BTK, count)
            added = torch.nn.functional.pad(added, (0, 1)).scatter(2, index, -torch.inf)[..., :count]
        summary = _scores(q_BtHL, far.group_BML)
        summary += added[:, :, None]
        parts.append((summary, far.far_bias_H.to(near.dtype)[:, None]))
    if members is not None:
        latent, mask = members
        direct = q_BtHL @ latent.transpose(-1, -2)
        shift = 0.0 if far is None or far.open_shift is None else far.open_shift.to(near.dtype)
        parts.append((direct.masked_fill_(~mask[:, :, None], -torch.inf), shift))
    if sink_H is not None:
        rows = near.shape[:-1]
        parts.append((sink_H.to(near.dtype)[:, None].expand(*rows, 1).clone(), 0.0))
    if lse_BtH is None:
        lse_BtH = _log_sum_exp(parts)
    # A row with nothing to read has lse = -inf: its probabilities are zero, not NaN.
    lse = torch.where(lse_BtH.isinf(), 0.0, lse_BtH)[..., None]
    pieces = [score.sub_(lse - offset).exp_() for score, offset in parts]
    return Parts(
        near_BtHs=pieces.pop(0),
        far_BtHm=pieces.pop(0) if far is not None and far.group_BML is not None else None,
        opened_BtHk=pieces.pop(0) if members is not None else None,
        sink_BtH=pieces.pop(0)[..., 0] if sink_H is not None else None,
        lse_BtH=lse_BtH,
    )


def _log_sum_exp(parts: list[tuple[Tensor, Tensor | float]]) -> Tensor:
    """Log-sum-exp over all parts, (B, t, H), without putting them into one tensor.

    One maximum for all parts: the log-sum-exp of a part that is masked everywhere has a NaN gradient.
    """
    tops = [(score.detach().amax(-1, keepdim=True) + offset) for score, offset in parts if score.shape[-1]]
    top = torch.stack(torch.broadcast_tensors(*tops)).amax(0)
    top = torch.where(top.isinf(), 0.0, top)
    each = [(score - (top - offset)).exp_().sum(-1) for score, offset in parts]
    return torch.stack(each).sum(0).log() + top[..., 0]


def attend_chunk(
    q_BtHL: Tensor,
    position: Tensor,
    key_BsL: Tensor,
    key_position: Tensor,
    *,
    content: int,
    far: Far | None = None,
    members: tuple[Tensor, Tensor] | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Output (B, t, H, C) and log-sum-exp (B, t, H) of one chunk; arguments as `attention_parts`."""
    parts = attention_parts(
        q_BtHL, position, key_BsL, key_position, content=content, far=far, members=members, **options
    )
    out = _mix(parts.near_BtHs, key_BsL[..., :content])
    if parts.far_BtHm is not None:
        assert far is not None and far.group_BML is not None
        out = out + _mix(parts.far_BtHm, far.group_BML[..., :content])
    if parts.opened_BtHk is not None:
        assert members is not None
        out = out + parts.opened_BtHk @ members[0][..., :content]
    return out, parts.lse_BtH


def _chunks(length: int, window: int | None, band: int):
    """(first query, end, first key, first key inside the band) of each chunk.

    Where windows are not tiny, a chunk stays inside one window, which saves most masks.
    """
    start = 0
    while start < length:
        end = min(start + CHUNK, length)
        if window is not None and window >= CHUNK // 4:
            end = min(end, (start // window + 1) * window)
        low = 0 if window is None else max(0, (start // window - 1) * window)
        yield start, end, low, max(low, start - band + 1)
        start = end


def _far_chunk(far: Far | None, start: int, end: int, window: int | None) -> Far | None:
    """The groups that queries start..end-1 may read; None when there are none yet."""
    if far is None:
        return None
    assert window is not None
    count = min(max(0, (end - 1) // window - 1) * far.groups, far.total)
    if count == 0:
        return None
    return replace(
        far,
        group_BML=None if far.group_BML is None else far.group_BML[:, :count],
        log_size_BM=None if far.log_size_BM is None else far.log_size_BM[:, :count],
        open_BTK=None if far.open_BTK is None else far.open_BTK[:, start:end],
    )


def attend(
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    *,
    content: int,
    window: int | None = None,
    band: int = 0,
    alpha_H: Tensor | None = None,
    sink_H: Tensor | None = None,
    far: Far | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a whole sequence from position 0: output (B, T, H, C), log-sum-exp (B, T, H).

    window None reads the whole past exactly (`full`). Computed in at least float32, returned in the dtype
    of q (the log-sum-exp in the wide one). Differentiable, but keeps every chunk: models use the op of
    `coga.kernels.dispatch`, whose backward is `attend_backward`.
    """
    dtype = q_BTHL.dtype
    args = _Inputs.of(q_BTHL, latent_BTL, alpha_H, sink_H, far)
    length = q_BTHL.shape[1]
    outs, lses = [], []
    for bounds in _chunks(length, window, band if alpha_H is not None else 1):
        out, lse = attend_chunk(**args.chunk(bounds, content, window, band))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1).to(dtype), torch.cat(lses, 1)


@dataclass
class _Inputs:
    """Everything `attend` reads, raised to the wide dtype."""

    q: Tensor
    latent: Tensor
    alpha: Tensor | None
    sink: Tensor | None
    far: Far | None

    @classmethod
    def of(cls, q, latent, alpha, sink, far) -> _Inputs:
        if far is not None:
            parts = (far.group_BML, far.far_bias_H, far.slot_BSL)
            group, bias, slot = map(wide_or_none, parts)
            far = replace(far, group_BML=group, far_bias_H=bias, slot_BSL=slot) if far.total else None
        alpha, sink = map(wide_or_none, (alpha, sink))
        return cls(wide(q), wide(latent), alpha, sink, far)

    def chunk(self, bounds, content, window, band) -> dict:
        """Arguments of `attention_parts` and `attend_chunk` for one chunk."""
        start, end, low, low_band = bounds
        far = _far_chunk(self.far, start, end, window)
        members = None
        if far is not None and far.open_BTK is not None:
            members = gather_members(far, far.open_BTK)
        return dict(
            q_BtHL=self.q[:, start:end],
            position=torch.arange(start, end, device=self.q.device),
            key_BsL=self.latent[:, low:end],
            key_position=torch.arange(low, end, device=self.q.device),
            content=content,
            window=window,
            band=band,
            alpha_H=self.alpha,
            c_BtC=self.latent[:, start:end, :content],
            key_query_BnHC=None if self.alpha is None else self.q[:, low_band:end, :, :content],
            sink_H=self.sink,
            far=far,
            members=members,
            one_window=window is None or start // window == (end - 1) // window,
        )


def _member_index(far: Far, open_BtK: Tensor) -> Tensor:
    """Slot of every gathered member, counted over all rows, in the order of `gather_members`."""
    flat = rearrange(open_BtK.clamp_min(0), "b t k -> b (t k)")
    slot = torch.arange(far.slots, device=open_BtK.device)
    index = far.offset_BM.gather(1, flat)[..., None] + slot
    assert far.slot_BSL is not None
    batch, slots, _ = far.slot_BSL.shape
    first = torch.arange(batch, device=index.device)[:, None, None] * slots
    return (index.clamp_max(slots - 1) + first).flatten()


def _keys_backward(ds: Tensor, prob: Tensor, q: Tensor, grad: Tensor, key: Tensor, content: int):
    """Gradients of queries and of keys shared by all heads, given the gradient of the scores."""
    heads = q.shape[2]
    dq = rearrange(rearrange(ds, "b t h s -> b (t h) s") @ key, "b (t h) l -> b t h l", h=heads)
    dkey = rearrange(ds, "b t h s -> b s (t h)") @ rearrange(q, "b t h l -> b (t h) l")
    value = rearrange(prob, "b t h s -> b s (t h)") @ rearrange(grad, "b t h c -> b (t h) c")
    dkey[..., :content] += value
    return dq, dkey


def attend_backward(
    grad_BTHC: Tensor,
    out_BTHC: Tensor,
    lse_BTH: Tensor,
    q_BTHL: Tensor,
    latent_BTL: Tensor,
    *,
    content: int,
    window: int | None = None,
    band: int = 0,
    alpha_H: Tensor | None = None,
    sink_H: Tensor | None = None,
    far: Far | None = None,
) -> dict[str, Tensor]:
    """Gradients of `attend`, one recomputed chunk at a time.

    With p the probabilities and v the values, the gradient of a score is
    ds = p (do . v - do . o), whatever part of the softmax it belongs to.
    Returns wide tensors by name: q, latent and, where present, alpha, sink, group, far_bias, slot.
    """
    args = _Inputs.of(q_BTHL, latent_BTL, alpha_H, sink_H, far)
    grads = {"q": torch.zeros_like(args.q), "latent": torch.zeros_like(args.latent)}
    named = [("alpha", args.alpha), ("sink", args.sink)]
    if far is not None:
        named += [("group", far.group_BML), ("far_bias", far.far_bias_H), ("slot", far.slot_BSL)]
    grads |= {name: torch.zeros_like(wide(x)) for name, x in named if x is not None}
    reach = band if alpha_H is not None else 1
    for bounds in _chunks(q_BTHL.shape[1], window, reach):
        rows = slice(bounds[0], bounds[1])
        chunk = args.chunk(bounds, content, window, band) | {"lse_BtH": lse_BTH[:, rows]}
        grad = wide(grad_BTHC[:, rows])
        # The output of this dtype, as rounded as the forward returned it, is exact enough for delta.
        delta = (grad * wide(out_BTHC[:, rows])).sum(-1)[..., None]
        _chunk_backward(grads, chunk, bounds, grad, delta)
    return grads


def _chunk_backward(grads, chunk, bounds, grad: Tensor, delta: Tensor) -> None:
    start, end, low, low_band = bounds
    q, key, content = chunk["q_BtHL"], chunk["key_BsL"], chunk["content"]
    far, members, alpha = chunk["far"], chunk["members"], chunk["alpha_H"]
    heads = q.shape[2]
    parts = attention_parts(**chunk)
    near = parts.near_BtHs
    ds = _scores(grad, key[..., :content]).sub_(delta).mul_(near)
    dq, dkey = _keys_backward(ds, near, q, grad, key, content)
    grads["latent"][:, low:end] += dkey
    if alpha is not None:
        n = end - low_band
        distance = chunk["position"][:, None] - chunk["key_position"][-n:]
        inside = (distance >= 0) & (distance < chunk["band"])
        band_ds = ds[..., -n:].masked_fill(~inside[:, None], 0)
        key_query, c = chunk["key_query_BnHC"], chunk["c_BtC"]
        rows = rearrange(band_ds * alpha[:, None], "b t h n -> b t (h n)")
        grads["latent"][:, start:end, :content] += rows @ rearrange(key_query, "b n h c -> b (h n) c")
        dkey_query = rearrange(rows.transpose(1, 2) @ c, "b (h n) c -> b n h c", h=heads)
        grads["q"][:, low_band:end, :, :content] += dkey_query
        term = c @ rearrange(key_query, "b n h c -> b c (h n)")
        term = rearrange(term, "b t (h n) -> b t h n", h=heads)
        grads["alpha"] += (band_ds * term).sum((0, 1, 3))
    if far is not None and parts.far_BtHm is not None:
        group, prob = far.group_BML, parts.far_BtHm
        ds = _scores(grad, group[..., :content]).sub_(delta).mul_(prob)
        far_dq, dgroup = _keys_backward(ds, prob, q, grad, group, content)
        dq = dq + far_dq
        grads["group"][:, : group.shape[1]] += dgroup
        grads["far_bias"] += ds.sum((0, 1, 3))
    if members is not None and parts.opened_BtHk is not None:
        latent, prob = members[0], parts.opened_BtHk
        ds = (grad @ latent[..., :content].transpose(-1, -2)).sub_(delta).mul_(prob)
        dq = dq + ds @ latent
        dmember = ds.transpose(-1, -2) @ q
        dmember[..., :content] += prob.transpose(-1, -2) @ grad
        # Masked members have zero gradient, so the slot they point at does not matter.
        index = _member_index(far, far.open_BTK)
        grads["slot"].flatten(0, 1).index_add_(0, index, dmember.flatten(0, 2))
    if parts.sink_BtH is not None:
        grads["sink"] += (parts.sink_BtH * -delta[..., 0]).sum((0, 1))
    grads["q"][:, start:end] += dq


def select(
    index_q_BtL: Tensor,
    position: Tensor,
    group_BML: Tensor,
    log_size_BM: Tensor,
    *,
    count: int,
    window: int,
    groups: int,
    step: float,
) -> Tensor:
    """The K = `count` far groups each token opens: (B, t, min(K, M)) int64, ascending, -1 for none.

    score[t, m] = index_q_t . g_m + log|g_m|, rounded to `step`; ties go to the lower group. Every token
    selects for itself, among the groups of windows <= w-2. No gradient.
    """
    g, log_size = wide(group_BML.detach()).transpose(1, 2), log_size_BM[:, None]

    def scores(q_BtL: Tensor, visible_Bt: Tensor) -> Tensor:
        return q_BtL @ g + log_size.to(q_BtL.dtype)

    return _choose(scores, index_q_BtL, position, 4 * CHUNK, count, window, groups, step)


def select_members(
    index_q_BtL: Tensor,
    position: Tensor,
    slot_BSL: Tensor,
    offset_BM: Tensor,
    size_BM: Tensor,
    *,
    count: int,
    window: int,
    groups: int,
    slots: int,
    step: float,
) -> Tensor:
    """`select` by the best member of each group: score[t, m] = max over its members j of index_q_t . k_j.

    A mean hides the one member that a token looks for. Cost: B t S L multiply-adds, one head of dense
    attention's scores; no gradient. `slots`: the most members of a group. Members are packed: those of each
    group follow those of the group before, from slot 0 on; slots beyond the last group's are of no group.
    """
    slot = wide(slot_BSL.detach())
    batch, total = offset_BM.shape
    full = slots * groups == window  # then groups are rows of `slots` slots
    owner = None
    if not full:
        # Members lie in slots one group after the other: a slot's group is the first that ends beyond it.
        place = torch.arange(slot.shape[1], device=slot.device).expand(batch, -1).contiguous()
        owner = torch.searchsorted((offset_BM + size_BM).contiguous(), place, right=True)

    def scores(q_BtL: Tensor, visible_Bt: Tensor) -> Tensor:
        end = min(total * slots, slot.shape[1]) if full else slot.shape[1]
        if slot.device.type == "cpu":  # elsewhere the host would wait
            end = min(end, int(visible_Bt.max()) // groups * window)
        member = q_BtL @ slot[:, :end].transpose(1, 2)
        score = member.new_full((*member.shape[:2], total + 1), -torch.inf)
        if owner is None:
            score[..., : end // slots] = member.unflatten(-1, (end // slots, slots)).amax(-1)
        else:
            index = owner[:, None, :end].expand_as(member)
            score.scatter_reduce_(2, index, member, "amax")
        return score[..., :total]

    return _choose(scores, index_q_BtL, position, CHUNK, count, window, groups, step)


def _choose(
    scores: Callable[[Tensor, Tensor], Tensor],
    index_q_BtL: Tensor,
    position: Tensor,
    rows: int,
    count: int,
    window: int,
    groups: int,
    step: float,
) -> Tensor:
    """The best `count` groups by `scores` (of queries and how many groups they see), some rows at a time.

    Without autocast, which would round the scores of a wide dtype to half precision again.
    """
    q = wide(index_q_BtL.detach())
    visible = visible_groups(position.expand(q.shape[0], -1), window, groups)
    picked = []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, q.shape[1], rows):
            seen = visible[:, start : start + rows]
            picked.append(_best_groups(scores(q[:, start : start + rows], seen), seen, count, step))
    return torch.cat(picked, 1)


def _best_groups(score_BtM: Tensor, visible_Bt: Tensor, count: int, step: float) -> Tensor:
    """The best `count` of the first `visible` groups, ascending, -1 last; a score of -inf: never."""
    total = score_BtM.shape[-1]
    group = torch.arange(total, device=score_BtM.device)
    absent = (group >= visible_Bt[..., None]) | score_BtM.isinf()
    # One integer key orders by rounded score first, then by lower group.
    rounded = (score_BtM.masked_fill(absent, 0) / step).round().to(torch.int64)
    key = torch.where(absent, torch.iinfo(torch.int64).min, rounded * total + (total - 1 - group))
    best, index = key.topk(min(count, total), dim=-1)
    index = torch.where(best == torch.iinfo(torch.int64).min, total, index).sort(-1).values
    return torch.where(index == total, -1, index)


def _group_scores(q, query_window, latent, log_size, key_window, alpha, c, key_query):
    """Scores (B, m, H, M) of group attention, the reciprocal term unscaled, and its mask."""
    lag = query_window[:, :, None] - key_window
    score = _scores(q, latent) + log_size[:, None, None].to(q.dtype)
    term = near = None
    if alpha is not None:
        n, heads = key_query.shape[1:3]
        term = c @ rearrange(key_query, "b n h c -> b c (h n)")
        term = rearrange(term, "b t (h n) -> b t h n", h=heads)
        near = ((lag[..., -n:] >= 0) & (lag[..., -n:] <= 1))[:, :, None]
        added = (term * alpha[:, None]).masked_fill(~near, 0)
        score = torch.cat([score[..., :-n], score[..., -n:] + added], -1)
    return score.masked_fill((lag < 0)[:, :, None], -torch.inf), term, near


def _softmax(score: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp; a row with nothing to read gives zeros, not NaN."""
    lse = torch.logsumexp(score, -1)
    return torch.exp(score - torch.where(lse.isinf(), 0.0, lse)[..., None]), lse


def group_attend(
    q_BmHL: Tensor,
    query_window: Tensor,
    latent_BML: Tensor,
    log_size_BM: Tensor,
    *,
    content: int,
    groups: int,
    alpha_H: Tensor | None = None,
    key_query_BnHC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Groups attend to the raw group latents of windows <= their own: (B, m, H, C) and log-sum-exp.

    s_ij = q_i . g_j + log|g_j| + alpha_h (q_j . c_i)[window_i - window_j in {0, 1}]

    query_window    (m,) or (B, m): window of each query group; keys lie in windows 0, 0, .., 1, 1, ..
    key_query_BnHC  content queries of the LAST n key groups (None: the queries are the keys)
    The content part c_i of a query group is read from `latent_BML`: query groups are the LAST m keys.
    """
    dtype = q_BmHL.dtype
    q, latent, log_size = wide(q_BmHL), wide(latent_BML), wide(log_size_BM)
    rows, total = q.shape[1], latent.shape[1]
    key_window = torch.arange(total, device=q.device) // groups
    query_window = query_window.expand(q.shape[0], -1) if query_window.ndim == 1 else query_window
    key_query = q[..., :content] if key_query_BnHC is None else wide(key_query_BnHC)
    own = latent[:, total - rows :, :content]
    alpha = None if alpha_H is None else wide(alpha_H)
    outs, lses = [], []
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        score, _, _ = _group_scores(
            q[:, part], query_window[:, part], latent, log_size, key_window, alpha, own[:, part], key_query
        )
        prob, lse = _softmax(score)
        outs.append(_mix(prob, latent[..., :content]))
        lses.append(lse)
    return torch.cat(outs, 1).to(dtype), torch.cat(lses, 1)


def group_attend_backward(
    grad_BMHC: Tensor,
    out_BMHC: Tensor,
    lse_BMH: Tensor,
    q_BMHL: Tensor,
    latent_BML: Tensor,
    log_size_BM: Tensor,
    *,
    content: int,
    groups: int,
    alpha_H: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients of `group_attend` over all groups of a sequence, recomputed chunk by chunk (wide)."""
    q, latent, log_size = wide(q_BMHL), wide(latent_BML), wide(log_size_BM)
    alpha = None if alpha_H is None else wide(alpha_H)
    grads = {"q": torch.zeros_like(q), "latent": torch.zeros_like(latent)}
    if alpha is not None:
        grads["alpha"] = torch.zeros_like(alpha)
    window = (torch.arange(q.shape[1], device=q.device) // groups).expand(q.shape[0], -1)
    size = max(1, CHUNK // groups) * groups  # whole windows, so that the keys end with the queries
    for start in range(0, q.shape[1], size):
        end = min(start + size, q.shape[1])
        low = max(0, start // groups - 1) * groups  # reciprocal partners: own and previous window
        rows = slice(start, end)
        c, key_query, key = latent[:, rows, :content], q[:, low:end, :, :content], latent[:, :end]
        score, term, near = _group_scores(
            q[:, rows], window[:, rows], key, log_size[:, :end], window[0, :end], alpha, c, key_query
        )
        prob, _ = _softmax(score)
        grad = wide(grad_BMHC[:, rows])
        delta = (grad * wide(out_BMHC[:, rows])).sum(-1)[..., None]
        ds = prob * (_scores(grad, key[..., :content]) - delta)
        dq, dkey = _keys_backward(ds, prob, q[:, rows], grad, key, content)
        grads["q"][:, rows] += dq
        grads["latent"][:, :end] += dkey
        if alpha is not None:
            band_ds = ds[..., low - end :].masked_fill(~near, 0)
            scaled = rearrange(band_ds * alpha[:, None], "b t h n -> b t (h n)")
            grads["latent"][:, rows, :content] += scaled @ rearrange(key_query, "b n h c -> b (h n) c")
            back = rearrange(scaled.transpose(1, 2) @ c, "b (h n) c -> b n h c", h=q.shape[2])
            grads["q"][:, low:end, :, :content] += back
            grads["alpha"] += (band_ds * term).sum((0, 1, 3))
    return grads
