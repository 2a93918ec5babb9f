"""A watch over the nodes of a run, by their launchers: who joined, who differs, who is gone.

Every launcher writes a beat into the rendezvous store of node 0 and reads the others'. The store and the beats belong
to the launchers, so that a trainer that computes or writes a checkpoint for minutes is never taken for a dead one.
A thread of its own talks to the store: a call into a dead network may never return, and the judge must not hang too.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rwkv_accel.cluster.facts import NodeFacts, compare
from rwkv_accel.cluster.network import check_can_host, wait_until_reachable
from rwkv_accel.errors import UserError

PREFIX = "rwkv_accel/watch"
BEAT_SECONDS = 1.0
# A node that has not beaten for this long when another one fails is taken for the cause.
SILENT_SECONDS = 4.0
SAY_MISSING_SECONDS = 30.0
# A node that has been quiet for so long is named, well before it is given up.
SAY_SILENT_SECONDS = 15.0


@dataclass
class _Peer:
    beat: bytes = b""
    changed_at: float = field(default_factory=time.monotonic)
    ended: bool = False
    quiet: bool = False
    """Named as silent, and not back yet."""
    lost: bool = False


class PeerWatch:
    """The view that one node has of the others. `start`, then `finish` once its own processes have ended.

    `on_lost` hears of a lost node once, with the seconds since its last sign of life.
    """

    def __init__(
        self,
        host: str,
        port: int,
        facts: NodeFacts,
        num_nodes: int,
        *,
        min_nodes: int,
        join_seconds: float,
        lost_seconds: float,
        on_lost: Callable[[float], None],
        say: Callable[[str], None],
    ) -> None:
        self.host, self.port, self.facts = host, port, facts
        self.num_nodes, self.min_nodes = num_nodes, min_nodes
        self.join_seconds, self.lost_seconds = join_seconds, lost_seconds
        self._on_lost, self._say = on_lost, say
        self._store: Any = None
        self._peers: dict[int, _Peer] = {}
        self._names = {0: f"node 0 ({host})"}
        self._contact_at = time.monotonic()
        self._stopped = threading.Event()
        self._talker: threading.Thread | None = None

    def start(self) -> None:
        """Meet the other nodes, compare the facts, and watch from then on.

        Raises:
            UserError: a node did not come, or differs; the message names it.
        """
        self._connect()
        try:
            joined = self._meet()
        except RuntimeError:  # DistNetworkError and its kin: the store went away
            raise UserError(f"{self._names[0]} left before the start; look at its output") from None
        problems = compare(joined)
        if problems:
            raise UserError("\n".join(problems))
        here = {facts.node for facts in joined}
        others = [n for n in range(self.num_nodes) if n != self.facts.node]
        self._peers = {n: _Peer(beat=b"joined" if n in here else b"") for n in others}
        self._contact_at = time.monotonic()
        self._talker = threading.Thread(target=self._talk, name="peer-watch-talk", daemon=True)
        self._talker.start()
        threading.Thread(target=self._judge, name="peer-watch-judge", daemon=True).start()

    def _meet(self) -> list[NodeFacts]:
        for kind in ("ended", "failed", "left"):
            self._store.delete_key(self._key(kind, self.facts.node))
        self._store.set(self._key("facts", self.facts.node), self.facts.dumps())
        joined = self._wait_for_nodes()
        self._names |= {facts.node: facts.name for facts in joined}
        self._store.add(f"{PREFIX}/read", 1)
        # Node 0 must not leave with the store, perhaps over a difference, before the others have read it.
        deadline = time.monotonic() + 10
        while self.facts.node == 0 and time.monotonic() < deadline:
            if self._store.add(f"{PREFIX}/read", 0) >= len(joined):
                break
            time.sleep(0.05)
        return joined

    def finish(self, failed: dict[int, str], seconds: float = 8.0) -> list[str]:
        """Tell the others how this node ended (rank -> how it failed, empty: well) and find out who failed first.

        Waits until every node has ended or fallen silent, so that node 0 does not take the store away too early.
        Returns lines that name the failed or lost nodes.
        """
        self._stopped.set()
        if self._talker is not None:
            self._talker.join(timeout=SILENT_SECONDS)
            if self._talker.is_alive():
                return [self._lost_main()]
        try:
            return self._post_mortem(failed, seconds)
        except RuntimeError:  # DistNetworkError and its kin: the store went away
            return [self._lost_main()] if failed and self.facts.node != 0 else []

    def _post_mortem(self, failed: dict[int, str], seconds: float) -> list[str]:
        if failed:
            order = self._store.add(f"{PREFIX}/failures", 1)
            record = {"order": order, "node": self.facts.name, "ranks": failed}
            self._store.set(self._key("failed", self.facts.node), json.dumps(record))
        self._store.set(self._key("ended", self.facts.node), b"1")
        open_nodes = set(self._peers)
        deadline = time.monotonic() + seconds
        while open_nodes and time.monotonic() < deadline:
            self._read_beats()
            open_nodes = {n for n in open_nodes if not self._peers[n].ended and not self._silent(n)}
            time.sleep(0.25)
        lost = [n for n, peer in self._peers.items() if peer.beat and not peer.ended and self._silent(n)]
        lines = [f"{self._name(n)} is lost: not heard of for {self._age(n):.0f} s" for n in lost]
        if failed and not lost:
            lines = [self._first_failure()]
        self._leave()
        return lines if failed else []

    def _leave(self) -> None:
        """Node 0 leaves last: the others may still be reading its store."""
        self._store.set(self._key("left", self.facts.node), b"1")
        deadline = time.monotonic() + SILENT_SECONDS
        while self.facts.node == 0 and time.monotonic() < deadline:
            if all(self._has("left", n) or self._silent(n) or not peer.beat for n, peer in self._peers.items()):
                return
            time.sleep(0.1)

    def _first_failure(self) -> str:
        records = [
            json.loads(self._store.get(self._key("failed", n))) for n in range(self.num_nodes) if self._has("failed", n)
        ]
        first = min(records, key=lambda record: record["order"])
        ranks = ", ".join(f"rank {rank} {how}" for rank, how in first["ranks"].items())
        return f"{first['node']} failed first: {ranks}"

    def _connect(self) -> None:
        from torch.distributed import TCPStore

        if self.facts.node == 0:
            check_can_host(self.host, self.port)
        else:
            wait_until_reachable(self.host, self.port, self.join_seconds, self._say)
        try:
            # multi_tenant: the launcher's own rendezvous in this process shares the server.
            self._store = TCPStore(
                self.host,
                self.port,
                None,
                self.facts.node == 0,
                timeout=timedelta(seconds=30),
                multi_tenant=True,
            )
        except RuntimeError as error:
            raise UserError(
                f"{socket.gethostname()} finds no rendezvous at {self.host}:{self.port} "
                f"({str(error).splitlines()[0]}); another service may listen there: choose another main port"
            ) from None

    def _wait_for_nodes(self) -> list[NodeFacts]:
        """Facts of all nodes that came; at least min_nodes of them, with node 0."""
        started, next_line = time.monotonic(), SAY_MISSING_SECONDS
        while True:
            here = [n for n in range(self.num_nodes) if self._has("facts", n)]
            absent = [n for n in range(self.num_nodes) if n not in here]
            waited = time.monotonic() - started
            enough = len(here) >= self.min_nodes and 0 in here
            if not absent or (enough and self.min_nodes < self.num_nodes):
                return [NodeFacts.loads(self._store.get(self._key("facts", n))) for n in here]
            listed = ", ".join(str(n) for n in absent)
            if waited >= self.join_seconds:
                raise UserError(
                    f"node{'s' if len(absent) > 1 else ''} {listed} of {self.num_nodes} did not join within "
                    f"{waited:.0f} s; look at the output there, or start with fewer nodes"
                )
            if waited >= next_line:
                next_line += SAY_MISSING_SECONDS
                self._say(f"{self.facts.name} has been waiting {waited:.0f} s for node {listed}")
            time.sleep(0.2)

    def _talk(self) -> None:
        count = 0
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                count += 1
                self._store.set(self._key("beat", self.facts.node), f"{time.time_ns()} {count}")
                self._read_beats()
                self._contact_at = time.monotonic()
            except RuntimeError:  # the store went away; the judge sees the missing contact
                return

    def _read_beats(self) -> None:
        now = time.monotonic()
        for node, peer in self._peers.items():
            peer.ended = self._has("ended", node)
            if not self._has("beat", node):
                continue
            if node not in self._names:  # it came after the start
                self._names[node] = NodeFacts.loads(self._store.get(self._key("facts", node))).name
            beat = self._store.get(self._key("beat", node))
            if beat != peer.beat:
                peer.beat, peer.changed_at = beat, now

    def _judge(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            if time.monotonic() - self._contact_at > self.lost_seconds:
                self._say(self._lost_main())
                self._on_lost(time.monotonic() - self._contact_at)
                return
            for node, peer in self._peers.items():
                if peer.beat and not peer.ended:
                    self._judge_peer(node, peer)

    def _judge_peer(self, node: int, peer: _Peer) -> None:
        age = self._age(node)
        if age > self.lost_seconds and not peer.lost:
            peer.quiet = peer.lost = True
            self._say(f"{self._name(node)} is lost: not heard of for {age:.0f} s")
            self._on_lost(age)
        elif age > SAY_SILENT_SECONDS and not peer.quiet:
            peer.quiet = True
            self._say(f"{self._name(node)} is silent: not heard of for {age:.0f} s")
        elif age < SILENT_SECONDS and peer.quiet:
            peer.quiet = peer.lost = False
            self._say(f"{self._name(node)} is back")

    def _silent(self, node: int) -> bool:
        return self._age(node) > SILENT_SECONDS

    def _age(self, node: int) -> float:
        return time.monotonic() - self._peers[node].changed_at

    def _lost_main(self) -> str:
        return (
            f"{self._names[0]}, which hosts the rendezvous, is lost: "
            f"no answer for {time.monotonic() - self._contact_at:.0f} s"
        )

    def _name(self, node: int) -> str:
        return self._names.get(node, f"node {node}")

    def _has(self, kind: str, node: int) -> bool:
        return bool(self._store.check([self._key(kind, node)]))

    @staticmethod
    def _key(kind: str, node: int) -> str:
        return f"{PREFIX}/{kind}/{node}"
