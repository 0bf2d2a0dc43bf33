"""Holds one update's file to the door, as the server does: ``python -m tests.fuzz.door PATH``.

A refusal is one line and exit code 2. What is let in must be exactly what the round asked for, and finite.
"""

from pathlib import Path

import torch

from fedproxy.command import run_command
from fedproxy.federation.server.admission import Form, Vault, admit
from fedproxy.federation.server.expected import Expected, Group
from fedproxy.federation.server.update_checks import LARGEST_CHANGE, check_update
from fedproxy.messages import UpdateFile
from fedproxy.protocol import Broadcast, ClientUpdate

CLIENT = "ann"
STATE = {"a": torch.zeros(3, 2), "b": torch.zeros(()), "c": torch.zeros(2, dtype=torch.bfloat16), "d": torch.zeros(0)}
SENT = Broadcast(2, STATE, job={"epochs": 2})
FISHER = {"a": torch.ones(3, 2), "c": torch.ones(2)}
EXPECTED = Expected(
    rows={CLIENT: 7}, target_tokens=5, extras={"fisher": Group(FISHER, squares=True, non_negative=True)}
)
FORM = Form.of(SENT, EXPECTED)


def honest(path: Path) -> None:
    """Write an update that must be let in."""
    delta = {name: torch.full_like(tensor, 0.5) for name, tensor in STATE.items()}
    figures = {"num_examples": 7, "num_tokens": 40, "train_loss": 1.5, "seconds": 2.0, "round": 2}
    ClientUpdate(CLIENT, delta, extras={"fisher": FISHER}, **figures).save(path)


def main(arguments: list[str]) -> None:
    """Admit one update.

    Raises:
        ClientError: In one line, if it is refused.
    """
    path = Path(*arguments)
    try:
        update = admit(UpdateFile(CLIENT, path), FORM, Vault(path.parent))
        norms = check_update(update, SENT, EXPECTED)
    finally:
        assert path.is_dir() or (not path.is_symlink() and not path.exists()), "the file was left behind"
    FORM.check({part: _kinds(tensors) for part, tensors in {"": update.delta, **update.extras}.items()})
    for tensors in (update.delta, *update.extras.values()):
        for name, tensor in tensors.items():
            assert bool(torch.isfinite(tensor).all()), name
    assert all(float(tensor.abs().max()) <= LARGEST_CHANGE for tensor in update.delta.values() if tensor.numel())
    assert all(0 <= norm < float("inf") for norm in norms.values())
    assert (update.client_id, update.round, update.num_examples) == (CLIENT, 2, 7)
    assert 14 <= update.num_tokens <= 70
    print("let in")


def _kinds(tensors):
    form = Form.of(Broadcast(2, dict(tensors)), Expected())
    return form.parts[""]


if __name__ == "__main__":
    run_command(main, __doc__)
