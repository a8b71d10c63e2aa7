"""Groupings of the tokens of a window: learned (gumbel), k-means, contiguous, random."""

from coga.config import CoGAConfig, LayerConfig
from coga.grouping.base import BaseGrouping, GroupingContext, make_grouping, pool
from coga.grouping.contiguous import ContiguousGrouping
from coga.grouping.gumbel import GumbelGrouping
from coga.grouping.kmeans import KMeansGrouping
from coga.grouping.random import RandomGrouping

__all__ = [
    "BaseGrouping",
    "ContiguousGrouping",
    "GroupingContext",
    "GumbelGrouping",
    "KMeansGrouping",
    "RandomGrouping",
    "build_grouping",
    "make_grouping",
    "pool",
]

GROUPINGS = {
    "gumbel": GumbelGrouping,
    "contiguous": ContiguousGrouping,
    "kmeans": KMeansGrouping,
    "random": RandomGrouping,
}


def build_grouping(config: CoGAConfig, layer: LayerConfig) -> BaseGrouping:
    """The grouping module of one layer."""
    return GROUPINGS[layer.grouping](config, layer)
