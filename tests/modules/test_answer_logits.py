import pytest
import torch
import torch.nn.functional as F

from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll

FAMILIES = ["llama", "qwen2", "gemma2", "granite", "cohere", "opt", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_full_forward_with_its_mask(family, make_model, make_batch):
    model, batch = make_model(family), make_batch()
    # The reference is transformers' own loss: full logits, mask given, shifted labels, mean over answer tokens.
    full = model(**batch)
    logits, targets = answer_logits(model, batch)
    at = batch["labels"][:, 1:] != -100
    assert logits.shape == (6, 61)
    torch.testing.assert_close(logits, full.logits[:, :-1][at], rtol=1e-5, atol=1e-5)
    assert targets.tolist() == batch["labels"][:, 1:][at].tolist()
    torch.testing.assert_close(answer_nll(logits, targets).mean(), full.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_full_forwards(family, make_model, make_batch):
    model, batch = make_model(family), make_batch()
    wanted = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    got = torch.autograd.grad(
        answer_nll(*answer_logits(model, batch)).mean(), list(model.parameters()), allow_unused=True
    )
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_head_sees_answer_positions_only(make_model, make_batch):
    model, batch = make_model("llama"), make_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    answer_logits(model, batch)
    assert seen == [(1, 6, 32)]  # 3 + 1 + 2 answer tokens
    assert not model.lm_head._forward_pre_hooks  # and the hook is gone


def test_a_family_that_does_not_call_its_head(make_model, make_batch, monkeypatch):
    model, batch = make_model("llama"), make_batch()
    wanted, _ = answer_logits(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    got, _ = answer_logits(model, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_left_padding_keeps_its_mask(make_model, make_batch):
    model, batch = make_model("llama"), make_batch()
    flipped = {name: tensor.flip(1) for name, tensor in batch.items()}  # padding now on the left
    at = flipped["labels"][:, 1:] != -100
    logits, _ = answer_logits(model, flipped)
    torch.testing.assert_close(logits, model(**flipped).logits[:, :-1][at], rtol=1e-5, atol=1e-5)


def test_nll_of_a_confident_wrong_answer_is_finite():
    # log softmax of [200, 0, 0] at 1 is 0 - log(e^200 + 2) = -200 to float32.
    assert answer_nll(torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([1])).item() == 200.0


def test_nll_of_half_precision_logits_is_taken_in_float32():
    logits = torch.linspace(-3, 3, 7).bfloat16()[None]
    nll = answer_nll(logits, torch.tensor([2]))
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, F.cross_entropy(logits.float(), torch.tensor([2]))[None])
