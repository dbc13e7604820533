"""KVCOMM (arXiv 2510.12872): agents that run one checkpoint reuse each other's KV caches.

What the paper calls an anchor, a stored sample with its observed offsets, is an *exemplar* here; `anchor` is
AnchorAttention's first token(s), nothing else. Written from the paper's equations; its public code was not used.
"""

from typing import TYPE_CHECKING

from anchorctx.lazy import lazily

if TYPE_CHECKING:
    from anchorctx.kvcomm.agents import Agent, Messages
    from anchorctx.kvcomm.cache import KV
    from anchorctx.kvcomm.session import Session
    from anchorctx.kvcomm.topology import Topology

__all__ = ["KV", "Agent", "Messages", "Session", "Topology"]
__getattr__, __dir__ = lazily(
    __name__,
    {
        "Agent": "agents",
        "KV": "cache",
        "Messages": "agents",
        "Session": "session",
        "Topology": "topology",
    },
)
