"""Token trees: batches in which each distinct token is computed once, and models that run on them."""

from flashpo.packing.images import Images
from flashpo.packing.scoring import TreeScores, forward, forward_here, prepare, score
from flashpo.packing.split import split_by_tokens
from flashpo.packing.support import Packable, packable
from flashpo.packing.tree import TokenTree, pack

__all__ = [
    "Images",
    "Packable",
    "TokenTree",
    "TreeScores",
    "forward",
    "forward_here",
    "pack",
    "packable",
    "prepare",
    "score",
    "split_by_tokens",
]
