"""Plain references: every hidden state kept at once, float64, one text at a time."""

import torch

from fedproxy.models import Decoder


@torch.no_grad()
def hidden_states(model, batch):
    """Return, per text, the states before each block and after the last one, float64 (blocks + 1, tokens, hidden)."""
    decoder, found = Decoder.of(model), []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        states = []
        handles = [
            block.register_forward_hook(
                lambda _, args, kwargs, out, states=states: states.append(
                    (args[0] if args else kwargs["hidden_states"], out if isinstance(out, torch.Tensor) else out[0])
                ),
                with_kwargs=True,
            )
            for block in decoder.blocks
        ]
        model(input_ids=ids[mask.bool()][None], use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(torch.stack([before[0] for before, _ in states] + [states[-1][1][0]]).double())
    return found


def influence(model, batch):
    """Return Eq (4) per block."""
    cosines = [torch.cosine_similarity(states[:-1], states[1:], dim=-1) for states in hidden_states(model, batch)]
    return 1 - torch.cat(cosines, dim=1).mean(dim=1)
