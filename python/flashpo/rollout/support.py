"""Which models the engine can run, and what their layers ask of the cache."""

from dataclasses import dataclass

from torch import nn

from flashpo.rollout import seam


@dataclass(frozen=True)
class Layer:
    """One attention layer: what it caches for a token, and how far back it looks (window 0: everything)."""

    index: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int


@dataclass(frozen=True)
class Support:
    ok: bool
    reason: str
    layers: tuple[Layer, ...]


def support(model: nn.Module) -> Support:
    """Whether the engine can run `model`, and if not, why."""
    try:
        calls = seam.probe(model)
    except seam.Unsupported as error:
        return Support(False, str(error), ())
    if not calls:
        return Support(False, f"{type(model).__name__} does not call the attention interface", ())
    return Support(True, "", tuple(Layer(c.layer, c.kv_heads, c.head_dim, c.value_dim, c.window or 0) for c in calls))
