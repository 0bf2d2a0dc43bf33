"""Server optimizers: the merged update as a pseudo-gradient."""

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.strategies.server_optimizers import ServerOptimizer


def test_none_adds_the_update_and_keeps_the_dtype():
    state = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    new, memory = ServerOptimizer.by_name("none")().step(state, {"w": torch.tensor([0.5, -2.0])})
    assert new["w"].tolist() == [1.5, 0.0]
    assert new["w"].dtype == torch.bfloat16
    assert memory == {}
    assert state["w"].tolist() == [1.0, 2.0]


def test_other_tensors_than_the_states_are_refused():
    with pytest.raises(ClientError, match="the merged update must have the state's tensors, but 'v' is in only one"):
        ServerOptimizer.by_name("none")().step({"w": torch.ones(1)}, {"w": torch.ones(1), "v": torch.ones(1)})
