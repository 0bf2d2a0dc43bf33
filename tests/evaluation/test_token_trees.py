import pytest
import torch

from fedproxy.evaluation.token_trees import Query, TokenTree, batches, plant, score


def query(*tokens, targets=(0,)):
    return Query(list(tokens), list(targets))


def test_tree_shares_prefixes_and_nothing_else():
    tree = TokenTree()
    for index, one in enumerate([query(1, 2), query(1, 2, 3), query(1, 2, 4), query(1, 5)]):
        tree.add(index, one)
    assert tree.tokens == [1, 2, 3, 4, 5]
    assert tree.depths == [0, 1, 2, 2, 1]
    # Node 3 (token 4) hangs below 1-2 and must not see its sibling 3; node 4 (token 5) hangs below 1 alone.
    assert tree.visible().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert [nodes for _, nodes in tree.scored] == [[1], [2], [3], [4]]


def test_targets_are_scored_at_the_nodes_before_them():
    tree = TokenTree()
    tree.add(0, query(7, 8, 9, targets=(8, 9, 5)))
    assert tree.scored == [(0, [0, 1, 2])]
    assert tree.targets == 3


def test_queries_with_one_context_grow_one_tree_and_strangers_their_own():
    context = list(range(10, 20))
    queries = [query(*context, 3), query(5, 6, 7), query(*context, 1, 2), query(*context)]
    trees = plant(queries, hidden_size=64, max_nodes=100)
    assert sorted(sorted(index for index, _ in tree.scored) for tree in trees) == [[0, 2, 3], [1]]
    assert sorted(len(tree.tokens) for tree in trees) == [3, 13]  # 10 + 1 + 2 shared, against 33 alone


def test_a_tree_stops_growing_at_max_nodes():
    queries = [query(1, 2, 3, 4, branch) for branch in range(10, 20)]
    assert [len(tree.tokens) for tree in plant(queries, hidden_size=64, max_nodes=9)] == [9, 9]
    assert len(plant(queries, hidden_size=64, max_nodes=3)) == 10


def test_a_little_prefix_is_not_worth_a_wide_row():
    # Joining saves 1 token (4 * 8 * 1 = 32 units) and costs 2 * 20 * 19 + 19^2 - 20^2 > 32 further pairs.
    long = [query(1, *range(100 + 20 * i, 119 + 20 * i)) for i in range(2)]
    assert len(plant(long, hidden_size=8, max_nodes=100)) == 2
    assert len(plant(long, hidden_size=1000, max_nodes=100)) == 1


def sizes(split):
    return [[len(tree.tokens) for tree in batch] for batch in split]


def grow(*lengths):
    trees = []
    for length in lengths:
        trees.append(TokenTree())
        trees[-1].add(0, query(*range(length)))
    return trees


def test_batches_cost_the_least_padding_and_overhead():
    trees = grow(3, 10, 3, 9, 3)
    # Apart 20 + 9 nodes and two forwards (31 with overhead 1); together 50 nodes and one forward.
    assert sizes(batches(trees, 1000, 1000, overhead=1)) == [[10], [9], [3, 3, 3]]
    assert sizes(batches(trees, 1000, 1000, overhead=2)) == [[10, 9], [3, 3, 3]]
    assert sizes(batches(trees, 1000, 1000, overhead=100)) == [[10, 9, 3, 3, 3]]


def test_batches_keep_their_bounds():
    trees = grow(3, 10, 3, 9, 3)
    assert sizes(batches(trees, 6, 1000, overhead=100)) == [[10], [9], [3], [3, 3]]
    assert sizes(batches(trees, 1000, 2, overhead=100)) == [[10, 9], [3], [3, 3]]  # one target each
    assert batches([], 10, 10, 1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_equal_plain_forwards(model, dtype):
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(model.config.vocab_size, (200,), generator=generator).tolist()
    context = words[:12]
    queries = [
        Query(context + words[20:24], words[20:25]),
        Query(context + words[20:22], words[20:23]),
        Query(context, words[40:41]),
        Query(context, words[41:42]),
        Query(words[50:53], words[51:54]),
        Query(words[60:61], words[61:62]),
    ]
    logits = [model(torch.tensor([one.tokens])).logits[0, -len(one.targets) :] for one in queries]
    likeliest = logits[2].argmax(-1).tolist()
    queries.append(Query(context, likeliest))
    logits.append(logits[2])
    trees = plant(queries, hidden_size=32, max_nodes=100)
    assert len(trees) == 3
    found = score(model, trees, queries)
    for index, (one, plain) in enumerate(zip(queries, logits, strict=True)):
        expected = plain.detach().log_softmax(-1)[torch.arange(len(one.targets)), torch.tensor(one.targets)].sum()
        assert found[index][0] == pytest.approx(float(expected), abs=1e-4)
        assert found[index][1] == (plain.argmax(-1).tolist() == one.targets)
    assert found[6][1]


def test_a_tie_is_settled_as_argmax_settles_it(model):
    # A head of zeros gives equal logits on every machine (products of equal rows may differ in the last bit): of two
    # likeliest tokens only the first is the argmax.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    queries = [Query([1, 2], [0]), Query([1, 2], [4])]
    found = score(model, plant(queries, 32, 10), queries)
    assert found[0][0] == pytest.approx(found[1][0])
    assert (found[0][1], found[1][1]) == (True, False)


def test_the_head_runs_at_scored_tokens_only_and_is_left_as_it_was(model):
    made = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: made.append(tuple(output.shape)))
    queries = [Query([1, 2, 3, 4, 5], [6]), Query([1, 2, 3, 4, 5, 7], [7, 8])]
    score(model, plant(queries, 32, 10), queries)
    assert made == [(1, 2, model.config.vocab_size)]  # after 5 and after 7; both queries score the node of 5
    assert not model.lm_head._forward_pre_hooks
