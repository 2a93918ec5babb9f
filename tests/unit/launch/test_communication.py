"""Communication on paper: sizes against published totals, volumes against a simulated ring, README against both."""

from dataclasses import replace

import pytest

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.plan.communication import (
    Cluster,
    Training,
    Update,
    compute_seconds,
    efficiency,
    readme_table,
    update_of,
)
from tests.helpers import ROOT

# (layers, channels, rank of decay and learning rate, of the value residual, of the gate) of released files, and their
# totals without the first layer's unused value matrices.
PUBLISHED = {(24, 2048, 96, 64, 256): 1_527_404_544, (32, 4096, 128, 96, 480): 7_199_141_888}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_totals_are_the_released_ones(size):
    n_layer, n_embd, decay, value, gate = size
    ranks = {"decay_rank": decay, "iclr_rank": decay, "value_rank": value, "gate_rank": gate}
    config = replace(RWKV7Config.for_new_model(n_layer, n_embd, 65536), **ranks)
    full = Training.of(config, PeftConfig(method="full"))
    assert full.all_params == full.trained_params == PUBLISHED[size]


def test_lora_trains_rank_times_in_plus_out_of_each_target():
    config = RWKV7Config.for_new_model(24, 2048, 65536)
    lora = Training.of(config, PeftConfig(rank=64, targets=("att.key", "ffn.value")))
    assert lora.trained_params == 24 * 64 * ((2048 + 2048) + (4 * 2048 + 2048))
    with pytest.raises(ValueError, match="sizes are known for"):
        Training.of(config, PeftConfig(method="miss"))


def ring(processes: int, size: int, rounds: str) -> list[int]:
    """Bytes that each process sends when chunks travel a ring: rounds of "reduce" and "gather"."""
    chunk = size // processes
    owned = [{rank: {c: 1 for c in range(processes)}} for rank in range(processes)]
    sums = [owned[rank][rank] for rank in range(processes)]  # chunk -> contributions that this rank has summed
    sent = [0] * processes
    if "reduce" in rounds:
        for turn in range(processes - 1):
            moving = [
                (rank, (rank - turn) % processes, sums[rank][(rank - turn) % processes]) for rank in range(processes)
            ]
            for rank, c, contributions in moving:
                sums[(rank + 1) % processes][c] += contributions
                sent[rank] += chunk
        assert all(sums[rank][(rank + 1) % processes] == processes for rank in range(processes))
    if "gather" in rounds:
        have = [{(rank + 1) % processes} for rank in range(processes)]
        for turn in range(processes - 1):
            moving = [(rank, (rank + 1 - turn) % processes) for rank in range(processes)]
            for rank, c in moving:
                assert c in have[rank]
                have[(rank + 1) % processes].add(c)
                sent[rank] += chunk
        assert all(len(chunks) == processes for chunks in have)
    return sent


@pytest.mark.parametrize("processes", [2, 8, 64, 256])
def test_bytes_per_process_are_those_of_a_simulated_ring(processes):
    size = processes * 1000
    for update, rounds in (
        (Update(size, size, 1), "reduce gather"),
        (Update(size, 0, 1), "gather"),
        (Update(0, size, 1), "reduce"),
    ):
        assert set(ring(processes, size, rounds)) == {update.bytes_per_process(processes)}


def network_card_bytes(nodes: int, gpus: int, size: int) -> int:
    """Bytes that leave a node in a hierarchical all-gather: each GPU forwards its share of the node's part around."""
    part = size // nodes
    shares = [part // gpus] * gpus
    return sum(share * (nodes - 1) for share in shares)


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 8), (16, 8), (128, 8)])
def test_time_between_nodes_is_what_the_cards_carry(nodes, gpus):
    size = nodes * gpus * 10_000
    cluster = Cluster(gpus_per_node=gpus, gpu_link=float("inf"), node_link=1e9, latency_seconds=0)
    seconds = Update(size, 0, 1).seconds(nodes * gpus, cluster)
    assert seconds == pytest.approx(network_card_bytes(nodes, gpus, size) / 1e9)


def test_strategies_move_what_the_papers_say():
    # arXiv 1910.02054 section 7: ZeRO-1 and -2 move as much as DDP (2 psi), ZeRO-3 half as much again (3 psi).
    full = Training(all_params=10**9, trained_params=10**9)
    psi = 4e9
    volume = {
        s: update_of(s, full).gathered_bytes + update_of(s, full).reduced_bytes
        for s in ("ddp", "zero1", "zero2", "zero3")
    }
    assert volume == {"ddp": 2 * psi, "zero1": 2 * psi, "zero2": 2 * psi, "zero3": 3 * psi}
    # Under LoRA only ZeRO-3 moves the frozen weights, twice per micro-batch.
    lora = Training(all_params=10**9, trained_params=10**6, micro_batches=4)
    assert update_of("ddp", lora).gathered_bytes == 4e6
    assert update_of("zero2", lora).reduced_bytes == 16e6
    assert update_of("zero3", lora).gathered_bytes == pytest.approx(8 * 2e9, rel=2e-3)


def test_efficiency_is_compute_over_everything():
    training, cluster = Training(10**9, 10**9), Cluster(latency_seconds=0)
    assert efficiency("ddp", training, 1, 1000, cluster) == 1
    assert compute_seconds(training, 1000, cluster) == pytest.approx(8e9 * 1000 / 400e12)
    communication = 8e9 * (7 / 8) / 350e9 + 8e9 * (1 / 2) / 40e9
    compute = 8e9 * 1000 / 400e12
    assert efficiency("ddp", training, 16, 1000, cluster) == pytest.approx(compute / (compute + communication))


def test_readme_shows_the_table_of_the_formulas():
    assert "\n".join(readme_table()) in (ROOT / "launch/README.md").read_text()
