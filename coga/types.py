"""Typed objects that pass between grouping, kernels and models.

Legend: B batch, T tokens, H heads, C content width, P rotary width, L = C+P, W window, R group size,
G = W/R groups in a window, N closed windows, M = N*G groups in a sequence, S slots of a group,
K opened groups a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Far", "Grouping", "GroupingStats"]


@dataclass(frozen=True)
class GroupingStats:
    """What the step after the optimizer needs; nothing here has a gradient but `coherence_loss`.

    coherence_loss  scalar, unweighted: mean over tokens of 1 - cos(content, centroid of its group)
    usage_G         share of tokens whose best prototype is g: before capacity, without noise
    candidate_GC    unit content vectors of poorly served tokens, for the revival of unused prototypes
    """

    coherence_loss: Tensor
    usage_G: Tensor
    candidate_GC: Tensor


@dataclass(frozen=True)
class Grouping:
    """Groups of the N closed windows of each row (N*W tokens from position 0).

    Positions count from the row's first real token. In a padded batch every row has the windows of the
    longest one; those beyond a row's real tokens hold padding and are never read.

    index_BNW    int64, group of each token within its window, 0..G-1
    weight_BNWG  straight-through weights: exactly one-hot forward, gradient of the soft assignment
    order_BS     int64 (S = N*W), token positions in slot order: by window, group, then position
    offset_BM    int64, where the members of group m start in `order_BS`
    size_BM      int64, members of group m, |g|
    """

    index_BNW: Tensor
    weight_BNWG: Tensor
    order_BS: Tensor
    offset_BM: Tensor
    size_BM: Tensor
    stats: GroupingStats | None = None


@dataclass(frozen=True)
class Far:
    """What attention reads beyond the near windows.

    group_BML     (refined) group latents, the summaries; None where only opened groups are read
    log_size_BM   log |g|, float32 or float64; -inf for an empty group; None with group_BML
    far_bias_H    learned bias per head on the score of a group summary; None with group_BML
    slot_BSL      token latents in slot order; None when nothing is opened (K = 0)
    offset_BM, size_BM   int64, members of group m are slots offset .. offset+size-1
    open_BTK      int64, groups opened by each token, ascending, -1 for none; None when K = 0
    groups        G, groups in a window
    slots         the most members a group can have
    open_shift    scalar added to the scores of opened members, without a gradient; None for none
    """

    group_BML: Tensor | None
    log_size_BM: Tensor | None
    far_bias_H: Tensor | None
    offset_BM: Tensor
    size_BM: Tensor
    slot_BSL: Tensor | None
    open_BTK: Tensor | None
    groups: int
    slots: int
    open_shift: Tensor | None = None

    @property
    def total(self) -> int:
        """Groups of a row."""
        return self.size_BM.shape[1]
