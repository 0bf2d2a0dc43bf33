"""How many blocks go, which ones each rule takes, and what is refused."""

import math

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.models.decoder import disclosed_count, parameter_count
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.compression.angular import last_token_states, run_distances
from fedproxy.strategies.compression.cluster import linear_cka, mean_states, neighbour_clusters, shared_by_nearest
from fedproxy.strategies.compression.uniform import even_positions
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.trainable import Trainable
from tests.strategies.compression.architectures import small_model, texts
from tests.strategies.compression.reference import hidden_states, influence

REMOVERS = ["block_influence", "angular", "uniform", "random", "cluster"]


def kept(name, model, **options):
    return Compressor.by_name(name)(**options).compress(model, [texts()])[1].proxy_to_target


@pytest.mark.parametrize("name", REMOVERS)
def test_every_rule_keeps_as_many_as_the_ratio_says_in_order(name):
    model = small_model("llama")
    options = {"first": 1, "last": 1} if name == "uniform" else {}
    for ratio, count in ((0.0, 6), (0.17, 5), (0.5, 3), (0.66, 3), (0.67, 2)):
        found = kept(name, model, ratio=ratio, **options)
        assert len(found) == count
        assert list(found) == sorted(set(found))


@pytest.mark.parametrize("name", REMOVERS)
def test_blocks_kept_by_hand_need_no_text_and_no_ratio(name):
    proxy, layer_map = Compressor.by_name(name)(keep=[0, 4, 5]).compress(small_model("llama"))
    assert layer_map.proxy_to_target == (0, 4, 5)
    assert proxy.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", REMOVERS)
def test_ratio_of_parameters_removes_as_many_whole_blocks_as_fit(name):
    model = small_model("llama")
    total, block = parameter_count(model), parameter_count(model.model.layers[0])
    # two blocks and a half: two go
    options = {"first": 0, "last": 0} if name == "uniform" else {}
    proxy, _ = Compressor.by_name(name)(ratio=2.5 * block / total, ratio_of="parameters", **options).compress(
        model, [texts()]
    )
    assert parameter_count(proxy) == total - 2 * block


@pytest.mark.parametrize("name", REMOVERS)
def test_what_cannot_be_is_one_line(name):
    rule = Compressor.by_name(name)
    model = small_model("llama")
    with pytest.raises(ConfigError, match=r"^compression.ratio must be in \[0, 1\), got 1.0$"):
        rule(ratio=1.0)
    with pytest.raises(ConfigError, match=r"^compression.keep must be ascending .* got \(3, 1\)$"):
        rule(keep=[3, 1])
    with pytest.raises(ConfigError, match=r"^compression.keep must be ascending .* without repeats, got \(1, 1\)$"):
        rule(keep=[1, 1])
    with pytest.raises(ConfigError, match=r"^compression.keep must be ascending .* got \(\)$"):
        rule(keep=[])
    with pytest.raises(ConfigError, match=r"^compression.keep names block 6, but the target has blocks 0 to 5$"):
        rule(keep=[0, 6]).outline(Decoder.of(model))
    with pytest.raises(
        ConfigError, match=r"^compression.ratio=0.99 of the parameters would remove all 6 blocks, .* give less$"
    ):
        rule(ratio=0.99, ratio_of="parameters").outline(Decoder.of(model))
    with pytest.raises(ConfigError, match=r"^compression.ratio_of must be blocks or parameters, got 'neurons'$"):
        rule(ratio_of="neurons")


@pytest.mark.parametrize("name", REMOVERS)
def test_a_ratio_that_removes_nothing_is_refused(name):
    rule, model = Compressor.by_name(name), small_model("llama")
    with pytest.raises(ConfigError) as caught:
        rule(ratio=0.1).outline(Decoder.of(model))
    line = "compression.ratio=0.1 removes no block; give at least 0.1667, or choose compression.name=none to keep all"
    assert str(caught.value) == line
    options = {"first": 1, "last": 1} if name == "uniform" else {}
    assert len(kept(name, model, ratio=0.1667, **options)) == 5
    block = parameter_count(model.model.layers[0]) / parameter_count(model)
    with pytest.raises(ConfigError, match=r"^compression.ratio=0.1 removes no block; give at least 0\.1") as caught:
        rule(ratio=0.1, ratio_of="parameters").outline(Decoder.of(model))
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert block <= least < block + 1e-4
    assert len(kept(name, model, ratio=least, ratio_of="parameters", **options)) == 5
    with pytest.raises(ConfigError, match=r"removes no block; one has to stay; choose compression.name=none"):
        rule(ratio=0.5).outline(Decoder.of(small_model("llama", layers=1)))


def test_iterative_influence_ranks_again_after_every_removal():
    model = small_model("llama")
    decoder, left, gone = Decoder.of(model), list(range(6)), []
    for _ in range(3):  # the reference really removes the block each time
        scores = influence(decoder.subset(left), texts())
        gone.append(left.pop(int(scores.argmin())))
    rule = Compressor.by_name("block_influence")(ratio=0.5, iterative=True)
    scores = rule.score(decoder, iter([texts()]))  # an iterator can be gone over once alone
    assert [int(index) for index in scores[1].argsort()[:3]] == gone
    assert tuple(rule.select(decoder, scores)) == tuple(left)
    assert torch.allclose(rule.block_scores(6, scores), influence(model, texts()), atol=1e-6)
    assert not any("forward" in vars(block) for block in decoder.blocks)


def test_iterative_and_one_shot_can_differ():
    model = small_model("llama", seed=3, layers=10)  # found by trying seeds
    once, again = (kept("block_influence", model, ratio=0.6, iterative=which) for which in (False, True))
    assert once != again


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_angular_distance_equals_the_reference(family):
    model = small_model(family)
    last = torch.stack([states[:, -1] for states in hidden_states(model, texts())], dim=1)
    n = 2
    expected = []
    for start in range(6 - n + 1):
        x, y = last[start], last[start + n]
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        expected.append((cosine.arccos() / math.pi).mean())
    found = run_distances(last_token_states(Decoder.of(model), [texts()]), n)
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    start = int(torch.stack(expected).argmin())
    assert kept("angular", model, ratio=0.34) == tuple(i for i in range(6) if not start <= i < start + n)


def test_angular_distance_by_hand():
    # 90 degrees are 1/2 of the half turn, 180 degrees 1, 0 degrees 0
    states = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]], [[-1.0, 0.0]]])
    assert run_distances(states, 1).tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert run_distances(states, 2).tolist() == pytest.approx([1.0, 0.5])


def test_uniform_positions():
    # Offsite-Tuning: round(i (n - 1) / (m - 1)); 30 blocks, 2 + 2 protected, 15 kept: 11 of the 26 between, step 2.5
    assert even_positions(26, 11) == [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25]
    assert even_positions(5, 1) == [2]
    assert even_positions(4, 1) == [1]
    assert even_positions(7, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert even_positions(9, 0) == []


def test_uniform_protects_both_ends_or_the_last_blocks_alone():
    model = small_model("llama", layers=10)
    assert kept("uniform", model, ratio=0.3) == (0, 1, 2, 5 - 1, 7, 8, 9)  # of blocks 2..7 those at 0, 2.5 -> 2, 5
    assert kept("uniform", model, ratio=0.5) == (0, 1, 4, 8, 9)
    assert kept("uniform", model, ratio=0.6) == (0, 1, 8, 9)
    # FedBiOT: the last two are the adapter, of blocks 0..7 those at 0, 3.5 -> 4, 7
    assert kept("uniform", model, ratio=0.5, first=0) == (0, 4, 7, 8, 9)
    with pytest.raises(ConfigError, match=r"compression.ratio=0.7 keeps 3 of 10 blocks, but .* protect 4; remove or"):
        kept("uniform", model, ratio=0.7)
    with pytest.raises(ConfigError, match=r"compression.last must be at least 0, got -1"):
        Compressor.by_name("uniform")(last=-1)


def test_random_follows_its_seed_and_reaches_every_block():
    model = Decoder.of(small_model("llama"))
    rule = Compressor.by_name("random")
    draws = [tuple(rule(seed=seed).select(model, None)) for seed in range(40)]
    assert draws == [tuple(rule(seed=seed).select(model, None)) for seed in range(40)]
    assert len(set(draws)) > 10
    assert set().union(*draws) == set(range(6))


def test_cka_equals_its_definition():
    model = small_model("llama")
    means = [states[1:].mean(dim=1) for states in hidden_states(model, texts())]
    x = torch.stack(means, dim=1)
    found_states = mean_states(Decoder.of(model), [texts()])
    assert torch.allclose(found_states, x, atol=1e-5)
    x = x - x.mean(dim=1, keepdim=True)
    similarity = linear_cka(found_states)
    for i in range(6):
        for j in range(6):
            cross = (x[j].T @ x[i]).norm() ** 2 / ((x[i].T @ x[i]).norm() * (x[j].T @ x[j]).norm())
            assert similarity[i, j] == pytest.approx(float(cross), abs=1e-4)


def test_clusters_by_hand():
    # neighbours 1-2 (.9) merge first, then 3-4 (.8); then {0} to {1,2} is (.3+.2)/2, {1,2} to {3,4} (.5+.1+.7+.1)/4
    pairs = {(0, 1): 0.3, (0, 2): 0.2, (1, 2): 0.9, (2, 3): 0.7, (1, 3): 0.5, (3, 4): 0.8, (1, 4): 0.1, (2, 4): 0.1}
    similarity = torch.eye(5)
    for (i, j), value in pairs.items():
        similarity[i, j] = similarity[j, i] = value
    assert neighbour_clusters(similarity, 4) == [[0], [1, 2], [3], [4]]
    assert neighbour_clusters(similarity, 3) == [[0], [1, 2], [3, 4]]
    assert neighbour_clusters(similarity, 2) == [[0], [1, 2, 3, 4]]
    rule = Compressor.by_name("cluster")()
    # means within {1,2,3,4}: (1+.9+.5+.1)/4, (.9+1+.7+.1)/4, (.5+.7+1+.8)/4, (.1+.1+.8+1)/4: block 3 is the centre
    assert rule.choose(5, 2, similarity) == (0, 3)


def test_shared_centres_keep_the_depth_and_are_copies():
    model = small_model("llama")
    rule = Compressor.by_name("cluster")(ratio=0.5, share=True)
    proxy, layer_map = rule.compress(model, [texts()])
    centres = kept("cluster", model, ratio=0.5)
    assert len(layer_map.proxy_to_target) == 6
    assert tuple(dict.fromkeys(layer_map.proxy_to_target)) == centres
    assert layer_map.centres == centres  # each centre stands in its own place
    own, new = model.state_dict(), proxy.state_dict()
    for place, block in enumerate(layer_map.proxy_to_target):
        name = "mlp.up_proj.weight"
        assert torch.equal(new[f"model.layers.{place}.{name}"], own[f"model.layers.{block}.{name}"])
    pointers = {new[f"model.layers.{place}.mlp.up_proj.weight"].data_ptr() for place in range(6)}
    assert len(pointers) == 6
    assert disclosed_count(proxy, layer_map) == parameter_count(model) - 3 * parameter_count(model.model.layers[0])
    assert rule.outline(Decoder.of(model)).num_hidden_layers == 6


@pytest.mark.parametrize("mode", ["replace", "delta"])
def test_of_shared_blocks_the_centres_alone_are_trained_and_plugged_back(mode):
    target = small_model("llama")
    proxy, layer_map = Compressor.by_name("cluster")(ratio=0.5, share=True).compress(target, [texts()])
    fuse = Fusion.by_name("plug_in")(mode=mode).fuse
    assert state_sha256(fuse(target, proxy, proxy, layer_map)) == state_sha256(target)
    before = {name: tensor.clone() for name, tensor in proxy.state_dict().items()}
    lora = Trainable.by_name("lora")(r=2, modules=["up_proj"], blocks="centres")
    model = lora.placed(layer_map).attach(proxy)
    assert {int(name.split(".")[4]) for name in model.state()} == set(layer_map.centres)
    model.load_state({name: torch.randn(tensor.shape) for name, tensor in model.state().items()})
    fused = fuse(target, before, {**before, **model.merged_weights()}, layer_map).state_dict()
    own = target.state_dict()
    moved = {name for name in own if not torch.equal(own[name], fused[name])}
    assert moved == {f"model.layers.{block}.mlp.up_proj.weight" for block in layer_map.centres}
    with pytest.raises(ConfigError, match=r"trainable.blocks=centres needs the server's layer map"):
        lora.attach(small_model("llama"))


def test_sharing_of_blocks_kept_by_hand_takes_the_nearest():
    assert shared_by_nearest((1, 4), 6) == (1, 1, 1, 4, 4, 4)
    assert shared_by_nearest((0, 4), 6) == (0, 0, 0, 4, 4, 4)  # place 2 is as near to 0 as to 4


@pytest.mark.parametrize(
    ("places", "centres"),
    [((0, 1, 2), (0, 1, 2)), ((1, 4), (0, 1)), ((1, 1, 1, 3, 3), (1, 3)), ((2, 2, 0), (0, 2)), ((3, 3), (0,))],
)
def test_centres_are_in_their_own_place_or_the_first(places, centres):
    assert LayerMap(places, "").centres == centres


def test_the_target_stays_as_it_is():
    model = small_model("llama")
    before = state_sha256(model)
    for name in Compressor.names():
        options = {} if name in ("none", "ffn_width") else {"ratio": 0.34}
        Compressor.by_name(name)(**options).compress(model, [texts()])
    assert state_sha256(model) == before
