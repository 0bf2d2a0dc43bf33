"""Both halves of a secure sum: the weighted mean comes out, however small or large numbers may be."""

import pytest
import torch

from fedproxy.privacy.keys import Occasion
from fedproxy.privacy.one_time import OneTime
from fedproxy.privacy.registration import register_all
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.strategies.round_parts import ClientRound
from fedproxy.strategies.round_parts.secure_sum import SecureSum, with_shares


@pytest.mark.parametrize("largest", [1e-4, 0.3, 1.0, 1000.0])
def test_the_mean_is_weighted_by_rows_however_small_or_large_numbers_are(largest, tmp_path):
    """Clients of 10 and 30 rows, where none has more than 40: (10 x + 30 y) / 40."""
    rows = {"a": 10, "b": 30}
    register_all(tmp_path, rows)
    shares = {name: OneTime(tmp_path, name).share(Occasion("run", 1, 0)) for name in rows}
    sent = with_shares(Broadcast(1, {}), shares, 0)
    part = SecureSum(run="run", largest=largest, most=40)
    deltas = {"a": torch.tensor([0.5, -1.0]) * largest, "b": torch.tensor([0.25, 1.0]) * largest}
    updates = []
    for name in rows:
        task = ClientRound(name, sent, None, {}, {}, {}, (), 0, None, torch.device("cpu"), signing=tmp_path)
        updates.append(part.reply(task, ClientUpdate(name, {"w": deltas[name]}, rows[name], round=1)))
    mean = part.summed(updates).delta["w"]
    torch.testing.assert_close(mean, torch.tensor([0.3125, 0.5]) * largest, rtol=1e-6, atol=0.0)
