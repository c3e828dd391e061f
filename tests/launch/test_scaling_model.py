"""The prediction of more GPUs, against numbers worked out by hand."""

import pytest

from benchmarks.scaling_model import Links, Work, efficiency, exposed_s, fixed_batch_s, step_s, tables

WORK = Work(0.02, 0.01, 0.005, accumulation=4, tokens=32768, trained=100_000_000, floor_s=0.015)
LINKS = Links("test", node_gb_per_s=10.0, inside_gb_per_s=100.0, gpus_per_node=8, hop_s=0.0)


def test_one_gpu_waits_for_nobody():
    for zero in range(4):
        assert exposed_s(WORK, 1, zero, LINKS) == 0
        assert step_s(WORK, 1, zero, LINKS) == pytest.approx(4 * 0.03 + 0.005)


def test_two_gpus_of_a_node():
    # 200 MB, half of it over 100 GB/s: 1 ms once; the all-reduce of 2 ms hides but for a bucket of 100 MB
    told = [exposed_s(WORK, 2, zero, LINKS) for zero in range(4)]
    assert told == pytest.approx([0.002, 0.001 + 0.001, 4 * 0.001 + 0.001, 0.0])


def test_sixteen_gpus_on_two_nodes():
    # 200 MB x 15/16 over 10 GB/s: 18.75 ms once
    told = [exposed_s(WORK, 16, zero, LINKS) for zero in range(4)]
    reduction = 0.0375 - 0.01
    assert told == pytest.approx([0.0375, reduction + 0.01875, 4 * reduction + 0.01875, 4 * (0.0375 - 0.01)])


def test_latency_counts_per_hop_and_message():
    slow = Links("test", node_gb_per_s=1e9, inside_gb_per_s=1e9, hop_s=1e-3)
    assert exposed_s(WORK, 16, 0, slow) == pytest.approx(2 * 1e-3 * 4 * 2, rel=1e-3)


def test_a_fixed_batch_is_cut_into_fewer_then_smaller_micro_batches_down_to_the_hosts_floor():
    quarter = WORK.scaled(32768)
    assert (quarter.accumulation, quarter.tokens, quarter.forward_s) == (1, 32768, 0.02)
    half = WORK.scaled(16384)
    assert (half.accumulation, half.forward_s + half.backward_s) == (1, pytest.approx(0.015))
    assert WORK.scaled(1024).forward_s == half.forward_s
    assert fixed_batch_s(WORK, 1, 1, LINKS, 4 * 32768) == step_s(WORK, 1, 1, LINKS)


def test_efficiency_falls_and_every_stage_has_a_row():
    for zero in (1, 2, 3):
        values = [efficiency(WORK, gpus, zero, LINKS) for gpus in (1, 8, 16, 512)]
        assert values == sorted(values, reverse=True)
        assert values[0] == 1
    assert tables({1: WORK, 3: WORK}, 2**20).count("| efficiency") == 6
