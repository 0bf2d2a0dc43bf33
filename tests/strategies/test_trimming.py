"""Exact top-k: against a stable sort, gathered and streamed, with ties everywhere."""

import numpy as np
import pytest
import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional import trimming
from fedproxy.strategies.functional.trimming import Threshold, Trimmer, find_threshold, top_count


def streams():
    rng = torch.Generator().manual_seed(0)
    gaussian = torch.randn(5000, generator=rng)
    yield "gaussian", gaussian
    yield "many ties", (gaussian * 3).round()
    yield "mostly zero", torch.where(torch.rand(5000, generator=rng) < 0.9, torch.zeros(()), gaussian)
    yield "constant", torch.full((5000,), -2.0)
    yield "tiny and huge", gaussian * 10.0 ** torch.randint(-40, 38, (5000,), generator=rng)
    yield "bfloat16", gaussian.bfloat16().float()


def by_sorting(values, count):
    kept = values.abs().argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(values).index_copy(0, kept, values[kept])


@pytest.mark.parametrize("sample", [1 << 16, 100, 0], ids=["all in the bracket", "sampled", "histogram"])
@pytest.mark.parametrize(("kind", "values"), list(streams()))
def test_top_k_equals_a_stable_sort(kind, values, sample, monkeypatch):
    if sample:
        monkeypatch.setattr(trimming, "_SAMPLE", sample)
    else:
        monkeypatch.setattr(trimming, "gather", lambda *arguments: (0, [np.empty(0, np.float32)]))
    for density in (0.0, 0.0001, 0.2, 0.5, 0.77, 0.9998, 1.0):
        count = top_count(density, len(values))
        threshold = find_threshold(lambda: values.split(700), len(values), count)
        trimmer = Trimmer([threshold])
        trimmed = torch.cat([trimmer.trim([piece], torch.empty(1, len(piece)))[0] for piece in values.split(333)])
        assert torch.equal(trimmed, by_sorting(values, count)), (kind, density)


def test_a_cut_at_zero_keeps_everything():
    values = torch.tensor([0.0, 3.0, 0.0, 0.0])
    assert find_threshold(lambda: [values], 4, 2) == Threshold(0.0, None)


def test_counts_are_floors_with_a_guard():
    assert top_count(0.29, 100) == 29  # .29 * 100 is 28.999999999999996
    assert top_count(0.2, 9) == 1
    assert top_count(0.1, 9) == 0
    assert top_count(1.0, 9) == 9


@pytest.mark.parametrize("rule", ["fedavg", "ties", "h_ties", "median"])
def test_updates_in_files_give_what_those_in_memory_give(rule, tmp_path):
    rng = torch.Generator().manual_seed(1)
    # whole numbers: sums of zero wait for the majority sign
    updates = [
        ClientUpdate(
            f"c{k}", {n: torch.randint(-3, 4, (40, 50), generator=rng).to(dtype) for n, dtype in DTYPES.items()}
        )
        for k in range(4)
    ]
    files = []
    for update in updates:
        update.save(tmp_path / f"{update.client_id}.safetensors")
        files.append(ClientUpdate.load(tmp_path / f"{update.client_id}.safetensors"))
    in_memory = Aggregator.by_name(rule)().aggregate(updates)
    in_files = Aggregator.by_name(rule)().aggregate(files)
    assert in_files.diagnostics == in_memory.diagnostics
    for name, dtype in DTYPES.items():
        assert in_files.delta[name].dtype == dtype
        assert torch.equal(in_files.delta[name], in_memory.delta[name])
        assert torch.equal(in_files.conflict[name], in_memory.conflict[name])


DTYPES = {"a": torch.float32, "b": torch.bfloat16}


def test_parts_of_a_file_are_the_flattened_tensor(tmp_path):
    tensors = {"m": torch.randn(3, 5), "h": torch.randn(7).bfloat16(), "s": torch.tensor(2.5)}
    ClientUpdate("c", tensors).save(tmp_path / "u.safetensors")
    delta = ClientUpdate.load(tmp_path / "u.safetensors").delta
    assert torch.equal(delta.part("m", 4, 11), tensors["m"].flatten()[4:11])
    assert torch.equal(delta.part("h", 0, 7), tensors["h"])
    assert delta.part("s", 0, 1).tolist() == [2.5]
    assert delta.dtype("h") == torch.bfloat16
