"""FedBiOT's re-alignment against the plain sum of its paper, and what it may and may not change."""

import pytest
import torch

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, LayerMap
from fedproxy.models.streaming import streamed
from fedproxy.strategies.realignment import Material, Realignment
from fedproxy.strategies.realignment.emulator import EmulatorRealignment, with_adapter
from fedproxy.strategies.trainable.lora import Lora

PI = (0, 2, 4)
EMULATOR = (0, 1)


def text(count=2):
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(8) < torch.tensor([8, 5, 6])[:, None]).long()
    return [
        {"input_ids": torch.randint(3, 61, (3, 8), generator=generator) * mask, "attention_mask": mask}
        for _ in range(count)
    ]


def make(make_model, *, neurons=None, distilled=False):
    """A target of 5 blocks, a proxy of 3 whose last is the adapter (already tuned), and the server's material."""
    target = make_model("llama", layers=5).requires_grad_(False)
    proxy = Decoder.of(target).subset(PI)
    if distilled:
        Decoder.of(proxy).blocks[2].mlp.up_proj.weight.data += 0.1
    model = Lora(r=2, alpha=4, blocks="last", last=1).attach(proxy)
    draws = torch.Generator().manual_seed(1)
    model.load_state({name: torch.randn(t.shape, generator=draws) * 0.3 for name, t in model.state().items()})
    return target, model, Material(target, LayerMap(PI, "0" * 64, neurons), text(), {"accelerator": "cpu"})


def align(model, material, seed=0, **options):
    draws = torch.Generator().manual_seed(seed)
    return EmulatorRealignment(**{"steps": 1, **options}).align(model, EMULATOR, material, draws)


def copies(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("distilled", [False, True])
def test_the_teacher_is_the_target_with_the_current_adapter(distilled, make_model):
    target, model, _ = make(make_model, distilled=distilled)
    before = copies(target)
    whole = with_adapter(target, model, EMULATOR, PI).state_dict()
    merged = model.merged_weights()
    own = model.model.state_dict()
    for name, tensor in whole.items():
        if not name.startswith("model.layers.4."):
            assert tensor.data_ptr() == target.state_dict()[name].data_ptr()  # the rest is shared, not copied
        else:
            source = name.replace("layers.4", "layers.2")
            assert torch.equal(tensor, merged[source] if source in merged else own[source])
    assert len(merged) == 7
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_the_loss_is_the_papers_sum(kl_weight, make_model):
    # Plain forwards, float64 sums: over the emulator's two blocks, plus lambda * KL(M || M*).
    target, model, material = make(make_model)
    material = Material(material.target, material.layer_map, text(1), material.trainer)
    [batch] = material.batches
    real = batch["attention_mask"].bool()
    whole = with_adapter(target, model, EMULATOR, PI)
    with torch.no_grad():
        theirs, mine = (m(**batch, output_hidden_states=True) for m in (whole, model.model))
    total = 0.0
    for own in EMULATOR:
        e = theirs.hidden_states[PI[own] + 1][real].double()
        e_star = mine.hidden_states[own + 1][real].double()
        total += ((e - e_star).square().mean(-1) / e.square().mean(-1)).mean().item()
    p, q = (output.logits[real].double().log_softmax(-1) for output in (theirs, mine))
    total += kl_weight * (p.exp() * (p - q)).sum(-1).mean().item()
    assert align(model, material, kl_weight=kl_weight) == pytest.approx(total, rel=1e-4)


def test_an_identical_proxy_has_no_loss_where_shared_blocks_keep_the_depth(make_model):
    target = make_model("llama", layers=5).requires_grad_(False)
    model = Lora(r=2, blocks="last", last=1).attach(Decoder.of(target).subset(range(5)))
    material = Material(target, LayerMap((0, 1, 1, 4, 4), "0" * 64), text(), {"accelerator": "cpu"})
    draws = torch.Generator().manual_seed(0)
    loss = EmulatorRealignment(steps=1).align(model, (0, 1, 2, 3), material, draws)
    assert loss == pytest.approx(0.0, abs=1e-6)


def test_a_target_that_is_streamed_gives_the_same(make_model, monkeypatch):
    states, placed = [], []

    def stand_in(whole, device):
        placed.append(device)
        return streamed(whole, device, move=torch.clone)

    for patch in (False, True):
        if patch:
            monkeypatch.setattr("fedproxy.strategies.realignment.emulator.placed", stand_in)
        target, model, material = make(make_model)
        before = copies(target)
        align(model, material, steps=3, lr=1e-2)
        states.append(torch.cat([tensor.flatten() for tensor in model.model.state_dict().values()]))
        assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert torch.equal(states[0], states[1])
    assert placed == [torch.device("cpu")]


def test_the_emulator_alone_changes_and_comes_closer(make_model):
    target, model, material = make(make_model)
    before, state, of_target = copies(model.model), model.state(), copies(target)
    first = align(model, material)
    last = align(model, material, steps=60, lr=3e-3)
    assert last < 0.8 * first
    changed = {name for name, tensor in model.model.state_dict().items() if not torch.equal(before[name], tensor)}
    emulator = {name for name in before if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert changed == emulator
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state().items())
    assert all(torch.equal(of_target[name], tensor) for name, tensor in target.state_dict().items())
    # What clients train is trainable again, and nothing else is.
    trainable = {id(parameter) for parameter in model.model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in model.parameters().values()}


def test_the_seed_decides_the_order(make_model):
    states = []
    for seed in (0, 0, 1):
        _, model, material = make(make_model)
        align(model, material, seed, steps=3, lr=1e-2)
        states.append(torch.cat([tensor.flatten() for tensor in model.model.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_none_does_nothing(make_model):
    _, model, material = make(make_model)
    before = copies(model.model)
    none = Realignment.by_name("none")()
    assert none.reads == (0, 0)
    assert none.align(model, EMULATOR, material, torch.Generator()) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model.state_dict().items())


def test_what_cannot_be_aligned_is_one_line(make_model):
    _, model, material = make(make_model, neurons=((0,),) * 3)
    with pytest.raises(ModelError, match=r"realignment.name=emulator compares whole blocks, .* lost neurons"):
        align(model, material)
    _, model, material = make(make_model)
    model.model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"realignment.name=emulator trains .* in bfloat16 .*; use realignment.name"):
        align(model, material)
    _, model, material = make(make_model)
    with pytest.raises(ConfigError, match="clients train two copies of target block 4; train one of them"):
        with_adapter(material.target, model, (0,), (0, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"realignment\.steps must be at least 1, got 0"),
        ({"rows": 0}, r"realignment\.rows must be at least 1"),
        ({"batch_size": 0}, r"realignment\.batch_size must be at least 1"),
        ({"lr": 0.0}, r"realignment\.lr must be positive"),
        ({"kl_weight": -1.0}, r"realignment\.kl_weight must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        EmulatorRealignment(**options)
