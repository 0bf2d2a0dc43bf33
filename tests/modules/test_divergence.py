"""Divergences against plain float64 sums over probabilities."""

import math

import pytest
import torch
import torch.nn.functional as F

from fedproxy.modules import divergence
from fedproxy.modules.divergence import DIVERGENCES, forward_kl, jensen_shannon, log_outcomes, mean_divergence

TOKENS, VOCABULARY, HIDDEN = 13, 29, 6


def draw(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain(kind, p, q):
    """The textbook sum for one pair of probability lists."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def bucketed(probabilities, index):
    named = [probabilities[i] for i in index]
    return named if len(index) == len(probabilities) else [*named, 1 - sum(named)]


class Fixed:
    """A teacher with given logits."""

    def __init__(self, logits, index=None, temperature=1.0):
        self.logits, self.index, self.temperature = logits, index, temperature

    def outcomes(self, start, stop):
        index = None if self.index is None else self.index[start:stop]
        return log_outcomes(self.logits[start:stop], index, self.temperature), index


def test_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2) = 0.130812 nats; p against itself is 0.
    log_p = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    kl = forward_kl(log_p, torch.full((2, 2), 0.5).log())
    assert kl.tolist() == pytest.approx([0.130812, 0.0], abs=1e-6)
    # (1, 0) against (0, 1), as near as logits of +-50 come: nothing in common, log 2.
    far = torch.tensor([[100.0, 0.0]]).log_softmax(1), torch.tensor([[0.0, 100.0]]).log_softmax(1)
    assert jensen_shannon(*far).item() == pytest.approx(math.log(2), rel=1e-6)
    assert forward_kl(*far).item() == pytest.approx(100.0, rel=1e-6)  # never infinite


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 1, 5, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_plain_float64_sum(kind, k, temperature):
    teacher, student = draw(TOKENS, VOCABULARY), draw(TOKENS, VOCABULARY, seed=1)
    index = None if k is None else teacher.topk(k).indices
    got = DIVERGENCES[kind](log_outcomes(teacher, index, temperature), log_outcomes(student, index, temperature))
    p, q = (F.softmax(logits.double() / temperature, dim=1).tolist() for logits in (teacher, student))
    chosen = [list(range(VOCABULARY))] * TOKENS if index is None else index.tolist()
    wanted = [plain(kind, bucketed(a, i), bucketed(b, i)) for a, b, i in zip(p, q, chosen, strict=True)]
    assert got.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_what_the_bucket_hides_is_the_divergence_within_it(k):
    # Chain rule: KL(p || q) = KL over outcomes + p(rest) * KL(p given rest || q given rest); so a lower bound.
    teacher, student = draw(TOKENS, VOCABULARY).double(), draw(TOKENS, VOCABULARY, seed=1).double()
    index = teacher.topk(k).indices
    full = forward_kl(log_outcomes(teacher), log_outcomes(student))
    part = forward_kl(log_outcomes(teacher, index), log_outcomes(student, index))
    rest = torch.ones_like(teacher).scatter(1, index, 0).bool()
    inside = [
        forward_kl(t[r].log_softmax(0), s[r].log_softmax(0)) for t, s, r in zip(teacher, student, rest, strict=True)
    ]
    mass = (teacher.softmax(1) * rest).sum(1)
    torch.testing.assert_close(full - part, (mass * torch.stack(inside)).float(), rtol=1e-3, atol=1e-5)
    assert (part <= full + 1e-6).all()


def test_a_rest_too_small_for_a_probability_keeps_its_logarithm():
    # exp(-200) underflows in float32; KL between a rest of -200 and one of -100 is still 0, and finite.
    sharp, other = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[100.0, 0.0, 0.0]])
    index = torch.tensor([[0]])
    assert log_outcomes(sharp, index)[0, 1].item() == pytest.approx(math.log(2) - 200, rel=1e-6)
    assert forward_kl(log_outcomes(sharp, index), log_outcomes(other, index)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 4])
def test_chunks_give_value_and_gradient_of_the_whole(kind, k, monkeypatch):
    weight, teacher = draw(VOCABULARY, HIDDEN, seed=2), draw(TOKENS, VOCABULARY)
    index = None if k is None else teacher.topk(k).indices
    hidden = draw(TOKENS, HIDDEN, seed=3)
    whole = hidden.clone().double().requires_grad_()
    logits = whole @ weight.double().T
    log_p = log_outcomes(teacher, index, 2.0)
    # log_outcomes works in float32, so the reference's own softmax: everything in float64.
    scaled = logits / 2.0
    log_q = scaled.log_softmax(1)
    if index is not None:
        named = log_q.gather(1, index)
        log_q = torch.cat([named, torch.log1p(-named.exp().sum(1, keepdim=True))], dim=1)
    wanted = DIVERGENCES[kind](log_p.double(), log_q).mean() * 4.0
    (3 * wanted).backward()
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 5 * VOCABULARY)  # chunks of 5, 5 and 3 tokens
    mine = hidden.clone().requires_grad_()
    sizes = []

    def head(part):
        sizes.append(len(part))
        return part @ weight.T

    teacher_side = Fixed(teacher, index, 2.0)
    got = mean_divergence(mine, head, teacher_side, vocabulary=VOCABULARY, kind=kind, temperature=2.0)
    (3 * got).backward()
    assert sizes == [5, 5, 3]
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(mine.grad.double(), whole.grad, rtol=1e-3, atol=1e-5)


def test_no_gradient_is_computed_where_none_is_wanted():
    calls = []

    def head(part):
        calls.append(torch.is_grad_enabled())
        return part @ draw(VOCABULARY, HIDDEN).T

    mean_divergence(draw(TOKENS, HIDDEN), head, Fixed(draw(TOKENS, VOCABULARY)), vocabulary=VOCABULARY)
    assert calls == [False]


def test_half_precision_states_keep_their_dtype():
    weight = draw(VOCABULARY, HIDDEN).bfloat16()
    hidden = draw(TOKENS, HIDDEN).bfloat16().requires_grad_()
    loss = mean_divergence(hidden, lambda part: part @ weight.T, Fixed(draw(TOKENS, VOCABULARY)), vocabulary=VOCABULARY)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
