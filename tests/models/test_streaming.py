"""Blocks on the device one at a time: the same result, nothing left there."""

import pytest
import torch

from fedproxy.models import Decoder, state_sha256
from fedproxy.models.decoder import parameter_count
from fedproxy.models.streaming import streamed
from fedproxy.strategies.compression.block_influence import block_influence

IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_scores_are_the_same_and_every_tensor_comes_home(make_model, family):
    model = make_model(family, layers=5)
    decoder = Decoder.of(model)
    expected, before = block_influence(decoder, [IDS]), state_sha256(model)
    homes = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    with streamed(model, torch.device("cpu"), move=torch.clone):
        assert torch.equal(block_influence(decoder, [IDS]), expected)
        assert model.get_input_embeddings().weight.data_ptr() not in homes
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == homes
    assert state_sha256(model) == before
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in decoder.blocks)


def test_one_block_at_a_time_is_there(make_model):
    model = make_model("llama", layers=5)
    decoder = Decoder.of(model)
    there = []

    def watch(block, *_):
        now = [next(other.parameters()).data_ptr() for other in decoder.blocks]
        there.append([place != home for place, home in zip(now, homes, strict=True)])

    homes = [next(block.parameters()).data_ptr() for block in decoder.blocks]
    with streamed(model, torch.device("cpu"), move=torch.clone):
        handles = [block.register_forward_pre_hook(watch) for block in decoder.blocks]
        model(IDS, use_cache=False)
        for handle in handles:
            handle.remove()
    assert there == [[index == running for index in range(5)] for running in range(5)]


def test_an_error_on_the_way_brings_the_weights_home(make_model):
    model = make_model("llama", layers=3)
    before = [tensor.data_ptr() for tensor in model.parameters()]

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), streamed(model, torch.device("cpu"), move=torch.clone):
        model(IDS, use_cache=False)
    handle.remove()
    assert [tensor.data_ptr() for tensor in model.parameters()] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_no_more_than_one_block_beside_the_rest(make_model):
    model = make_model("llama", layers=40)
    expected = block_influence(Decoder.of(model), [IDS])
    torch.cuda.reset_peak_memory_stats()
    with streamed(model, torch.device("cuda")):
        found = block_influence(Decoder.of(model), [IDS])
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.cuda.max_memory_allocated() < parameter_count(model) * 4 / 2
