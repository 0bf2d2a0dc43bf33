import copy

import pytest
import torch
from safetensors.torch import save_file

from fedproxy.errors import ModelError
from fedproxy.models.decoder import Decoder
from fedproxy.models.layer_map import LayerMap
from fedproxy.models.streaming import streamed
from fedproxy.modules.distillation import DistillationModule, check_pair, mean_kl
from fedproxy.modules.distillation_config import DistillationConfig
from fedproxy.modules.divergence import DIVERGENCES
from fedproxy.modules.losses import hidden_distance
from fedproxy.modules.teacher import Teacher
from fedproxy.strategies.compression import distilling
from fedproxy.strategies.compression.distilling import distil

FAMILIES = ["llama", "gemma2", "cohere", "opt", "gpt2"]
PI = (0, 2)


def text_batches(count=3):
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 61, (3, 8), generator=generator)
        mask = (torch.arange(8) < torch.tensor([8, 5, 6])[:, None]).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def make_pair(make_model, family="llama"):
    teacher = make_model(family)
    return Decoder.of(teacher).subset(PI), teacher


def run(
    student,
    teacher,
    *,
    batches=None,
    places=PI,
    seed=0,
    cache=None,
    steps=3,
    lr=1e-3,
    device="cpu",
    told=None,
    **options,
):
    return distil(
        student,
        teacher,
        batches or text_batches(),
        settings=DistillationConfig(steps=steps, lr=lr, **options),
        layer_map=LayerMap(places, "0" * 64),
        trainer={"accelerator": device, "devices": 1},
        generator=torch.Generator().manual_seed(seed),
        cache=cache,
        advance=lambda *parts: None if told is None else told.append(parts),
    )


def flat(model):
    return torch.cat([tensor.flatten() for _, tensor in sorted(model.state_dict().items())])


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_proxy_that_ends_as_nan_is_refused(make_model, train):
    student, teacher = make_pair(make_model)
    with pytest.raises(
        ModelError, match=r"distillation.lr=1e\+300: after 3 steps .* holds NaN or infinity, .*lower it"
    ):
        run(student, teacher, lr=1e300, train=train)


def test_hidden_distance_by_hand():
    # Token 1: |(3, 4) - (3, 0)|^2 / 2 = 8 over RMS^2 = 25 / 2; token 2, a hundred times longer, agrees.
    teacher, student = torch.tensor([[3.0, 4.0], [300.0, 400.0]]), torch.tensor([[3.0, 0.0], [300.0, 400.0]])
    assert hidden_distance(student, teacher).item() == pytest.approx(8 / 12.5 / 2)
    assert hidden_distance(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0.0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_models_have_no_loss(kind, make_model):
    teacher = make_model("llama")
    student = copy.deepcopy(teacher)
    pairs = tuple(enumerate(range(3)))
    module = DistillationModule(
        student, Teacher(teacher, range(3)), [], lr=1.0, pairs=pairs, hidden_weight=1.0, divergence=kind
    )
    module.log = lambda *_, **__: None
    assert module.training_step(text_batches(1)[0], 0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_step_is_that_of_the_plain_loss(family, make_model):
    # The reference: both models' own forward, full softmaxes, autograd through everything.
    student, teacher = make_pair(make_model, family)
    [batch] = text_batches(1)
    real = batch["attention_mask"].bool()
    reference = copy.deepcopy(student).requires_grad_(True)
    theirs, mine = (model(**batch, output_hidden_states=True) for model in (teacher, reference))
    p, q = (torch.log_softmax(output.logits[real].double(), -1) for output in (theirs, mine))
    e, e_star = theirs.hidden_states[1][real].double(), mine.hidden_states[1][real].double()
    hidden = ((e - e_star).square().mean(-1) / e.square().mean(-1)).mean()
    wanted = 0.5 * (p.exp() * (p - q)).sum(-1).mean() + 2.0 * hidden
    wanted.backward()
    student.requires_grad_(True)
    module = DistillationModule(
        student, Teacher(teacher, [0]), [], lr=1.0, pairs=[(0, 0)], kl_weight=0.5, hidden_weight=2.0
    )
    module.log = lambda *_, **__: None
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for index in (0, 1):
        for name, parameter in Decoder.of(reference).blocks[index].named_parameters():
            own = Decoder.of(student).blocks[index].get_parameter(name)
            torch.testing.assert_close(own.grad, parameter.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_training_brings_the_proxy_closer(weights, train, make_model):
    student, teacher = make_pair(make_model)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    kwargs = {"kl_weight": weights[0], "hidden_weight": weights[1], "lr": 3e-3 if train == "full" else 1e-2}
    first = run(copy.deepcopy(student), teacher, steps=1, train=train, **kwargs)
    last = run(student, teacher, steps=40, train=train, **kwargs)
    assert last < 0.8 * first
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_every_step_is_told(make_model):
    told = []
    run(*make_pair(make_model), steps=4, told=told)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_divergence_lowers_the_forward_kl(kind, make_model):
    student, teacher = make_pair(make_model)
    before = mean_kl(student, teacher, text_batches())
    run(student, teacher, steps=40, lr=3e-3, divergence=kind)
    assert mean_kl(student, teacher, text_batches()) < 0.8 * before


def test_mean_kl_is_the_plain_mean_over_tokens(make_model):
    student, teacher = make_pair(make_model)
    total = tokens = 0.0
    for batch in text_batches():
        real = batch["attention_mask"].bool()
        p, q = (torch.log_softmax(model(**batch).logits[real].double(), -1) for model in (teacher, student))
        total += (p.exp() * (p - q)).sum().item()
        tokens += int(real.sum())
    assert mean_kl(student, teacher, text_batches()) == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_only_blocks_change_and_the_proxy_stays_plain(train, make_model):
    for family in ("llama", "gpt2"):
        student, teacher = make_pair(make_model, family)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        run(student, teacher, steps=2, lr=1e-2, train=train)
        assert sorted(student.state_dict()) == sorted(before)
        changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
        blocks = Decoder.of(student)
        linear = {name for name in before if name.startswith(blocks.prefix) and before[name].ndim == 2}
        assert linear <= changed
        assert changed <= {blocks.full_name(i, name) for i in (0, 1) for name in blocks.weight_names(i)}
        if train == "lora":
            assert changed == linear


def test_lora_leaves_the_base_untouched_until_it_is_merged(make_model, monkeypatch):
    student, teacher = make_pair(make_model)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    seen = []

    def fit_and_look(trainer, module, batches, *, seed):
        trainer_fit(trainer, module, batches, seed=seed)
        base = {name.replace(".base_layer", ""): t for name, t in student.state_dict().items() if "lora_" not in name}
        seen.append(sorted(base) == sorted(before) and all(torch.equal(base[name], before[name]) for name in before))

    trainer_fit = distilling.fit
    monkeypatch.setattr(distilling, "fit", fit_and_look)
    run(student, teacher, steps=3, lr=1e-2, train="lora", lora_r=2, lora_alpha=4.0)
    assert seen == [True]
    name = "model.layers.0.mlp.up_proj.weight"
    change = student.state_dict()[name] - before[name]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


def test_the_seed_decides(make_model):
    states = []
    for seed in (0, 0, 1):
        student, teacher = make_pair(make_model)
        run(student, teacher, steps=7, hidden_weight=1.0, seed=seed)
        states.append(flat(student))
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2], rtol=1e-4, atol=1e-5)


def test_a_cache_of_the_whole_vocabulary_changes_nothing(make_model, tmp_path):
    states = []
    for options in ({}, {"cache_teacher": True, "top_k": 61, "cache": tmp_path}):
        student, teacher = make_pair(make_model)
        run(student, teacher, steps=7, **options)
        states.append(flat(student))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_a_killed_run_and_a_second_proxy_end_with_the_same_bits(make_model, tmp_path, monkeypatch):
    options = {"steps": 7, "hidden_weight": 1.0, "cache_teacher": True, "top_k": 8}
    cold, teacher = make_pair(make_model)
    run(cold, teacher, cache=tmp_path / "cold", **options)
    # Killed while the second entry was written: one whole entry and half a file.
    calls = []

    def killed(tensors, path, metadata):
        if len(calls) == 1:
            with open(path, "wb") as file:
                file.write(b"half")
            raise KeyboardInterrupt
        calls.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("fedproxy.modules.teacher_cache.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run(make_pair(make_model)[0], teacher, cache=tmp_path / "killed", **options)
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 1
    for folder in ("killed", "killed", "cold"):  # continued, warm, warm
        student, teacher = make_pair(make_model)
        run(student, teacher, cache=tmp_path / folder, **options)
        assert torch.equal(flat(student), flat(cold))


def test_an_identical_student_has_no_loss_where_shared_blocks_keep_the_depth(make_model):
    teacher = make_model("llama", layers=6)
    student = copy.deepcopy(teacher)
    only_hidden = {"kl_weight": 0.0, "hidden_weight": 1.0, "steps": 1}
    assert run(student, teacher, places=(0, 1, 1, 4, 4, 4), **only_hidden) == pytest.approx(0.0, abs=1e-9)


def test_blocks_are_compared_with_those_in_whose_stead_they_stand():
    assert LayerMap((0, 1, 1, 4, 4, 4), "").counterparts(6) == (0, 1, 2, 3, 4, 5)
    assert LayerMap((0, 3, 5), "").counterparts(6) == (0, 3, 5)
    assert LayerMap((0, 1, 2), "").counterparts(3) == (0, 1, 2)


def test_a_streamed_teacher_stays_where_it_is_and_says_the_same(make_model, monkeypatch):
    plain, teacher = make_pair(make_model)
    options = {"hidden_weight": 1.0, "lr": 1e-2}
    run(plain, teacher, **options)
    student, _ = make_pair(make_model)
    homes = [tensor.data_ptr() for tensor in teacher.parameters()]

    def moved(*_):
        raise AssertionError("the whole teacher is moved")

    monkeypatch.setattr(teacher, "to", moved)
    with streamed(teacher, torch.device("cpu"), move=torch.clone):
        run(student, teacher, **options)
    assert torch.equal(flat(student), flat(plain))
    assert [tensor.data_ptr() for tensor in teacher.parameters()] == homes


def test_the_teacher_is_placed_on_the_trainers_device(make_model, monkeypatch):
    student, teacher = make_pair(make_model)
    seen = []

    def stand_in(model, device):
        seen.append((model, device))
        return streamed(model, device, move=torch.clone)

    monkeypatch.setattr(distilling, "placed", stand_in)
    run(student, teacher)
    assert seen == [(teacher, torch.device("cpu"))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("room", [False, True])
def test_a_teacher_without_room_on_the_gpu_comes_there_block_by_block(make_model, monkeypatch, room):
    student, teacher = make_pair(make_model)
    monkeypatch.setattr("fedproxy.models.streaming.fits", lambda *_: room)
    blocks, there = Decoder.of(teacher).blocks, set()
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_: there.add(sum(next(one.parameters()).is_cuda for one in blocks)))
    run(student, teacher, hidden_weight=1.0, device="gpu")
    assert there == {3 if room else 1}
    assert not any(parameter.is_cuda for model in (student, teacher) for parameter in model.parameters())


def test_models_and_text_that_do_not_fit(make_model):
    student, teacher = make_pair(make_model)
    with pytest.raises(ModelError, match=r"layer map \[0, 3\] does not fit a proxy of 2 and a target of 3 blocks"):
        check_pair(student, teacher, (0, 3))
    with pytest.raises(ModelError, match=r"layer map \[0\] does not fit"):
        check_pair(student, teacher, (0,))
    with pytest.raises(ModelError, match=r"gives the id 61, but the target's vocabulary has 61 entries; put the"):
        run(student, teacher, batches=[{"input_ids": torch.tensor([[61]]), "attention_mask": torch.ones(1, 1).long()}])
    student.resize_token_embeddings(64)
    with pytest.raises(ModelError, match=r"the proxy's vocabulary has shape \(64, 32\), the target's \(61, 32\)"):
        run(student, teacher)
