import pytest
import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.quantisation import (
    bits_for,
    conflict_codes,
    conflict_levels,
    conflict_of,
    dequantise,
    pack,
    packed_bytes,
    quantise,
    unpack,
)


def test_int8_by_hand():
    # Block of 4 with largest magnitude 12.7: scale 0.1; 1.26 / 0.1 = 12.6 rounds to 13. The second block is one value.
    codes, scales = quantise(torch.tensor([12.7, -12.7, 1.26, 0.0, -0.5]), block=4)
    assert codes.tolist() == [127, -127, 13, 0, -127]
    torch.testing.assert_close(scales, torch.tensor([0.1, 0.5 / 127]))
    torch.testing.assert_close(dequantise(codes, scales, (5,), 4), torch.tensor([12.7, -12.7, 1.3, 0.0, -0.5]))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_int8_is_off_by_half_a_scale_at_most(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 10.0
    codes, scales = quantise(values)
    off = (dequantise(codes, scales, (size,)) - values).abs()
    assert bool((off <= 0.5001 * scales.repeat_interleave(64)[:size]).all())
    assert codes.dtype == torch.int8
    assert len(scales) == -(-size // 64)


@pytest.mark.parametrize(
    "values", [torch.zeros(70), torch.tensor([1e-45, 0.0]), torch.tensor([3e38, -3e38, 1.0]), torch.zeros(0)]
)
def test_int8_of_odd_values_stays_finite(values):
    codes, scales = quantise(values)
    back = dequantise(codes, scales, tuple(values.shape))
    assert bool(back.isfinite().all())
    largest = float(values.abs().max()) if len(values) else 0.0
    torch.testing.assert_close(back, values, rtol=0.01, atol=max(largest / 127, 1e-37))


@pytest.mark.parametrize("bits", range(1, 16))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, (1 << 20) + 5])
def test_packing_keeps_every_code(bits, count):
    dtype = torch.uint8 if bits <= 8 else torch.int16
    codes = torch.randint(2**bits, (count,), dtype=dtype, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_packing_by_hand():
    # 3 bits each, lowest first: 5 = 101, 3 = 011, 1 = 001 -> 0b01_011_101 and the last bit of 1 (0) in the next byte.
    assert pack(torch.tensor([5, 3, 1], dtype=torch.uint8), 3).tolist() == [0b01_011_101, 0]


@pytest.mark.parametrize(
    ("levels", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (9, 4), (129, 8), (256, 8), (257, 9)]
)
def test_bits_for_levels(levels, bits):
    assert bits_for(levels) == bits


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 8, 10, 100, 511, 512, 600, 2000])
def test_conflict_of_clients_that_all_moved_survives_to_the_bit(clients):
    signs = (torch.randint(2, (clients, 500), generator=torch.Generator().manual_seed(clients)) * 2 - 1).float()
    updates = [ClientUpdate(f"{k:03d}", {"w": sign}) for k, sign in enumerate(signs)]
    conflict = Aggregator.by_name("fedavg")().aggregate(updates).conflict["w"]
    torch.testing.assert_close(conflict, 1 - signs.sum(dim=0).abs() / clients)  # FedProxy Eq 7
    codes, bits = conflict_codes(conflict, clients), bits_for(conflict_levels(clients))
    assert torch.equal(unpack(pack(codes, bits), bits, 500), codes)
    assert int(codes.max()) < conflict_levels(clients)
    assert torch.equal(conflict_of(codes, clients, (500,)), conflict)


def test_a_client_that_did_not_move_counts_as_agreeing():
    # Of 4 clients three moved, all up: |n| = 3, C = 1/4; the level above is |n| = 4, C = 0.
    assert conflict_of(conflict_codes(torch.tensor([0.25]), 4), 4, (1,)).tolist() == [0.0]
    # Nobody moved: n = 0, C = 1, as Eq 7 has it.
    assert conflict_of(conflict_codes(torch.tensor([1.0]), 4), 4, (1,)).tolist() == [1.0]
