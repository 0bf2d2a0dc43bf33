"""Attacks on what leaves a client, on a tiny model: what they find out without protection, and with it.

    python -m benchmarks.privacy_attacks                 # both attacks
    python -m benchmarks.privacy_attacks --shadows 4     # a quick look

Membership inference: who sees a tuned model and a row guesses whether the row was trained on, by the row's loss
(Yeom et al. 2018, arXiv 1709.01604) and by a likelihood ratio against shadow models (LiRA, Carlini et al. 2022, arXiv
2112.03570, the offline variant with a normal law of losses). Reconstruction: who sees one step's gradient of the LoRA
factors finds the tokens of a row, as the gradients of the first block's A lie in the span of what its layers read
(Petrov et al. 2024, arXiv 2405.15586).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedproxy.data.batching import collate
from fedproxy.data.examples import Example
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.losses import answer_nll
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.privacy.accounting import Release, calibrate
from fedproxy.privacy.dp_sgd import PoissonLoader, PrivateLMModule, PrivateTraining, row_losses, sampling_of
from fedproxy.privacy.noise import SecretStream, noised
from fedproxy.privacy.row_gradients import RowGradients
from fedproxy.strategies.trainable import Trainable

VOCABULARY, LENGTH, ROWS, BATCH, EPOCHS, LR, CLIENTS, DELTA = 64, 12, 512, 4, 20, 2e-3, 4, 1e-5


def model():
    """Return the same random model with LoRA every time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    proxy = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)).eval()
    return Trainable.by_name("lora")(r=8, alpha=16).attach(proxy, torch.Generator().manual_seed(0))


def rows(count: int, seed: int) -> list[Example]:
    """Return rows of random tokens, the latter half of which is the answer: all there is to learn is the rows."""
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(tuple(row), ((LENGTH // 2, LENGTH),), str(index)) for index, row in enumerate(ids)]


def tuned(members: Sequence[Example], seed: int, epsilon: float | None) -> dict[str, Tensor]:
    """Return the state after tuning on members, by DP-SGD where there is a budget."""
    trainable = model()
    options = {"lr": LR, "parameters": trainable.parameters()}
    if epsilon is None:
        loader = ExampleDataModule(members, BATCH, pad_id=0, generator=torch.Generator().manual_seed(seed))
        module = CausalLMModule(trainable.model, **options)
    else:
        rate, steps = sampling_of(len(members), BATCH)
        noise = calibrate(Release(0.0, "poisson", rate, steps=steps * EPOCHS), epsilon, DELTA, "rdp")
        training = PrivateTraining(0.1, noise, rate, steps, steps * EPOCHS, BATCH, SecretStream(bytes(32), str(seed)))
        loader = PoissonLoader(members, training, pad_id=0)
        module = PrivateLMModule(trainable.model, training, len(members), **options)
    fit(make_trainer({"accelerator": "cpu"}, max_epochs=EPOCHS), module, loader, seed=seed)
    return trainable.state()


@torch.no_grad()
def losses(state: dict[str, Tensor], examples: Sequence[Example]) -> Tensor:
    """Return each row's mean loss under a tuned state."""
    trainable = model()
    trainable.load_state(state)
    batch = collate(examples, 0)
    return row_losses(answer_nll(*answer_logits(trainable.model, batch)), batch["labels"]).double()


def auc(scores: Tensor, member: Tensor) -> float:
    """Return the chance that a member scores above another row, ties counting half."""
    inside, outside = scores[member], scores[~member]
    difference = inside[:, None] - outside[None, :]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def released(members: Sequence[Example], seed: int, setting: str) -> dict[str, Tensor]:
    """Return what an attacker sees: a client's state, or the mean with those of others whose rows are not asked for."""
    if setting != "secure sum":
        budget = {"nothing": None, "epsilon 8": 8.0, "epsilon 3": 3.0}[setting]
        return tuned(members, seed, budget)
    states = [tuned(members, seed, None)]
    states += [tuned(rows(ROWS, 1000 * seed + index), seed, None) for index in range(1, CLIENTS)]
    return {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}


def membership(setting: str, shadows: int) -> dict[str, float]:
    """Return the areas under the curve of both attacks; 0.5 is chance."""
    pool = rows(2 * ROWS, 7)
    picks = [torch.randperm(len(pool), generator=torch.Generator().manual_seed(90 + i)) for i in range(shadows + 1)]
    inside = torch.zeros(shadows + 1, len(pool), dtype=torch.bool)
    found = torch.zeros(shadows + 1, len(pool), dtype=torch.float64)
    for index, pick in enumerate(picks):
        inside[index, pick[:ROWS]] = True
        found[index] = losses(released([pool[i] for i in pick[:ROWS]], index + 1, setting), pool)
    outside = torch.where(inside[1:], math.nan, found[1:])
    mean = outside.nanmean(dim=0)
    spread = (outside - mean).square().nanmean(dim=0).sqrt().nan_to_num().mean().clamp_min(1e-6)
    known = ~mean.isnan()  # rows that some shadow model did not see
    ratio = (mean - found[0]) / spread
    return {"threshold": auc(-found[0], inside[0]), "lira": auc(ratio[known], inside[0][known])}


def gradient(trainable, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the sum of the rows' gradients by parameter."""
    sink = RowGradients(trainable.model, trainable.parameters())
    batch = collate(examples, 0)
    with sink.of(len(examples)):
        row_losses(answer_nll(*answer_logits(trainable.model, batch)), batch["labels"]).sum().backward()
    return sink.clipped_sum(math.inf)


def reconstruction(setting: str) -> float:
    """Return the share of a row's tokens that are among as many guesses; chance is about 0.2."""
    trainable, secret = model(), rows(1, 55)[0]
    start = torch.Generator().manual_seed(3)
    trainable.load_state({n: t + 0.05 * torch.randn(t.shape, generator=start) for n, t in trainable.state().items()})
    seen = gradient(trainable, [secret, *rows(CLIENTS - 1, 56)] if setting == "secure sum" else [secret])
    if setting.startswith("epsilon"):
        noise = calibrate(Release(0.0), float(setting.split()[1]), DELTA, "rdp")
        norm = math.sqrt(sum(float(part.square().sum()) for part in seen.values()))
        seen = noised(seen, noise * norm, SecretStream(bytes(32), "reconstruction"))  # clipped at its own norm
    first = [name for name in seen if ".layers.0.self_attn." in name and "lora_A" in name and "o_proj" not in name]
    read = torch.cat([seen[name] for name in first]).double()
    _, sizes, directions = torch.linalg.svd(read, full_matrices=False)
    span = directions[sizes > 1e-5 * sizes[0]]
    block = trainable.model.model.layers[0]
    with torch.no_grad():
        inputs = block.input_layernorm(trainable.model.model.embed_tokens.weight).double()
    inputs /= inputs.norm(dim=1, keepdim=True)
    outside = (inputs - inputs @ span.T @ span).norm(dim=1)
    tokens = set(secret.input_ids[:-1])  # no loss is taken behind the last
    guesses = set(outside.argsort()[: len(tokens)].tolist())
    return len(tokens & guesses) / len(tokens)


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shadows", type=int, default=16, help="shadow models of LiRA")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for setting in ("nothing", "secure sum", "epsilon 8", "epsilon 3"):
        figures[setting] = {"tokens_found": round(reconstruction(setting), 3)}
        shadows = min(options.shadows, 4) if setting == "secure sum" else options.shadows
        figures[setting] |= membership(setting, shadows)
        print(setting, json.dumps(figures[setting]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
