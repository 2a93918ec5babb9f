"""What the launcher and the doctor share: facts about a node, its network, and a watch over the other nodes."""

from rwkv_accel.cluster.facts import NodeFacts, compare, gather_facts, read_recipe
from rwkv_accel.cluster.watch import PeerWatch

__all__ = ["NodeFacts", "PeerWatch", "compare", "gather_facts", "read_recipe"]
