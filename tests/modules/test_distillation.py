import copy
import math
from types import SimpleNamespace

import pytest
import torch

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models.decoder import Decoder
from fedproxy.models.layer_map import LayerMap
from fedproxy.modules.distillation import DistillationModule, check_same_tokenizer, distil
from fedproxy.modules.losses import distillation_kl, hidden_distance
from fedproxy.modules.teacher import TeacherCache, logits_of, observe

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


def settings(**options):
    defaults = {"steps": 3, "lr": 1e-3, "temperature": 1.0, "kl_weight": 1.0, "hidden_weight": 0.0}
    return SimpleNamespace(**{**defaults, "cache_teacher": False, **options})


def run(student, teacher, *, batches=None, seed=0, **options):
    return distil(
        student,
        teacher,
        batches or text_batches(),
        settings=settings(**options),
        layer_map=LayerMap(PI, "0" * 64),
        trainer={"accelerator": "cpu"},
        generator=torch.Generator().manual_seed(seed),
    )


def test_kl_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2) = 0.130812 nats; the second token agrees.
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    kl = distillation_kl(torch.zeros(2, 2), teacher)
    assert kl.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-5)
    # Temperature 2 halves the logits: p = (sqrt 3, 1) / (sqrt 3 + 1); times 2^2.
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    wanted = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))) / 2
    assert distillation_kl(torch.zeros(2, 2), teacher, 2.0).item() == pytest.approx(wanted, rel=1e-4)


def test_hidden_distance_by_hand():
    # Token 1: |(3, 4) - (3, 0)|^2 / 2 = 8 over RMS^2 = 25 / 2; token 2, a hundred times longer, agrees.
    teacher, student = torch.tensor([[3.0, 4.0], [300.0, 400.0]]), torch.tensor([[3.0, 0.0], [300.0, 400.0]])
    assert hidden_distance(student, teacher).item() == pytest.approx(8 / 12.5 / 2)
    assert hidden_distance(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_states_are_the_full_forwards(family, make_model):
    model, [batch] = make_model(family), text_batches(1)
    real = batch["attention_mask"].bool()
    full = model(**batch, output_hidden_states=True)
    seen = observe(model, batch, [0, 1])
    torch.testing.assert_close(seen["logits"], full.logits[real], rtol=1e-4, atol=1e-4)
    for index in (0, 1):  # hidden_states[0] is the embedding; the last entry is after the final norm, so not looked at
        torch.testing.assert_close(seen[f"block_{index}"], full.hidden_states[index + 1][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, seen["head"]), seen["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_cached_teacher_gives_the_same_in_any_batch_and_runs_once(store, make_model, tmp_path):
    teacher, [batch] = make_model("gemma2"), text_batches(1)
    wanted = TeacherCache(teacher, [1])(batch)
    cache = TeacherCache(teacher, [1], "memory" if store == "memory" else tmp_path)
    cache(batch)
    runs = []
    Decoder.of(teacher).blocks[1].register_forward_hook(lambda _, args, __: runs.append(args[0].shape[1]))
    again = cache(batch)
    assert set(again) == set(wanted) == {"head", "block_1", "logits"}
    for name, tensor in wanted.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)
    # The second row alone, without its padding: tokens 8 to 12 of the batch.
    alone = cache({name: tensor[1:2, :5] for name, tensor in batch.items()})
    torch.testing.assert_close(alone["logits"], wanted["logits"][8:13], rtol=1e-5, atol=1e-5)
    assert runs == [1, 1]  # only the one token under the head, never the text


def test_equal_models_have_no_loss(make_model):
    teacher = make_model("llama")
    module = DistillationModule(copy.deepcopy(teacher), teacher, range(3), lr=1.0, hidden_weight=1.0)
    module.log = lambda *_, **__: None
    assert module.training_step(text_batches(1)[0], 0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_training_brings_the_proxy_closer(weights, make_model):
    student, teacher = make_pair(make_model)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    kwargs = {"kl_weight": weights[0], "hidden_weight": weights[1], "lr": 3e-3}
    first = run(copy.deepcopy(student), teacher, steps=1, **kwargs)
    last = run(student, teacher, steps=40, **kwargs)
    assert last < 0.8 * first
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_only_blocks_change_unless_asked(make_model):
    for whole in (False, True):
        student, teacher = make_pair(make_model)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        module = DistillationModule(student, teacher, PI, lr=1e-2, whole=whole)
        from fedproxy.data.batching import ShuffledBatches
        from fedproxy.modules.trainer import fit, make_trainer

        batches = ShuffledBatches(text_batches(), torch.Generator().manual_seed(0))
        fit(make_trainer({"accelerator": "cpu"}, max_steps=2), module, batches)
        changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
        outside = {name for name in changed if ".layers." not in name}
        assert {name for name in before if "q_proj" in name} <= changed
        assert bool(outside) is whole
        assert not any(name.startswith("_teacher") for name in module.state_dict())


def test_cache_changes_nothing_and_seed_decides(make_model):
    states = []
    for options in ({}, {"cache_teacher": True}, {"seed": 1}):
        student, teacher = make_pair(make_model)
        run(student, teacher, steps=7, hidden_weight=1.0, **options)
        states.append(torch.cat([tensor.flatten() for tensor in student.state_dict().values()]))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[0], states[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"distillation\.lr must be > 0, got 0"),
        ({"temperature": 0.0}, r"distillation\.temperature must be > 0"),
        ({"kl_weight": -1.0}, r"distillation\.kl_weight must be >= 0"),
        ({"kl_weight": 0.0}, r"distillation needs kl_weight > 0 or hidden_weight > 0"),
    ],
)
def test_numbers_out_of_range(options, message, make_model):
    with pytest.raises(ConfigError, match=message):
        run(*make_pair(make_model), **options)


def test_models_that_do_not_fit(make_model):
    student, teacher = make_pair(make_model)
    with pytest.raises(ModelError, match=r"layer map \[0, 3\] does not fit a proxy of 2 and a target of 3 blocks"):
        DistillationModule(student, teacher, (0, 3), lr=1.0)
    with pytest.raises(ModelError, match=r"layer map \[0\] does not fit"):
        DistillationModule(student, teacher, (0,), lr=1.0)
    student.resize_token_embeddings(64)
    with pytest.raises(ModelError, match=r"the proxy's vocabulary has shape \(64, 32\), the target's \(61, 32\)"):
        DistillationModule(student, teacher, PI, lr=1.0)


def test_tokenizers_that_differ():
    def tokenizer(special="<s>", **vocabulary):
        return SimpleNamespace(get_vocab=lambda: vocabulary, special_tokens_map={"bos_token": special})

    check_same_tokenizer(tokenizer(a=0, b=1), tokenizer(a=0, b=1))
    with pytest.raises(ModelError, match="gives 'b' the id 1, the target's 2"):
        check_same_tokenizer(tokenizer(a=0, b=1), tokenizer(a=0, b=2))
    with pytest.raises(ModelError, match="gives 'c' the id None, the target's 2"):
        check_same_tokenizer(tokenizer(a=0), tokenizer(a=0, c=2))
    with pytest.raises(ModelError, match="special tokens"):
        check_same_tokenizer(tokenizer(a=0), tokenizer("<t>", a=0))
