"""Generators depend on every part of their purpose and on nothing else."""

import torch

from fedproxy.seeding import ClientSeeds, derive_seed, generator


def test_seed_is_the_same_on_every_machine():
    # first 8 bytes of sha256('[42, 1, "bank", "batches"]'), big endian, halved
    assert derive_seed(42, 1, "bank", "batches") == 4860428492925629443
    assert derive_seed(42, 1, "bank") == derive_seed(42, 1, "bank")


def test_every_part_counts():
    seeds = {derive_seed(1), derive_seed(2), derive_seed(1, "a"), derive_seed(1, "a", 1), derive_seed(1, "a", "1")}
    assert len(seeds) == 5


def test_generator_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=generator(7, "x"))
    assert torch.equal(first, torch.rand(3, generator=generator(7, "x")))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_clients_seeds_are_hashes_for_each_purpose_and_process():
    seeds = ClientSeeds.of(7, 3, "ann", processes=3)
    assert seeds.batches == derive_seed(7, 3, "ann", "batches")
    # the first process's has no rank, so that one process and the first of several draw the same masks
    assert seeds.dropout == [
        derive_seed(7, 3, "ann", "dropout"),
        derive_seed(7, 3, "ann", "dropout", 1),
        derive_seed(7, 3, "ann", "dropout", 2),
    ]
    assert ClientSeeds.of(7, 3, "bob").batches != seeds.batches
