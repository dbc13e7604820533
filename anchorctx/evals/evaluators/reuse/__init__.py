"""How well agents that run a checkpoint reuse each other's KV caches."""
