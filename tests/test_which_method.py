"""What docs/which_method.md tells people to write exists and is accepted."""

import re
from pathlib import Path

import pytest

from fedproxy.config import check_arguments
from fedproxy.recipe_files import recipe_names

PAGE = (Path(__file__).parent.parent / "docs" / "which_method.md").read_text()
CODE = re.findall(r"`([^`]+)`", PAGE)
SETTINGS = [words.split() for words in CODE if re.match(r"[\w.]+=", words) and "..." not in words]


@pytest.mark.parametrize("words", SETTINGS, ids=" ".join)
def test_its_words_are_accepted(words):
    check_arguments([*([] if words[0].startswith("recipe=") else ["recipe=fedproxy_llama"]), *words])


def test_it_names_recipes_that_exist():
    named = {word.removeprefix("recipe=") for words in SETTINGS for word in words if word.startswith("recipe=")}
    assert len(named) > 8
    assert named <= set(recipe_names())


def test_its_shares_are_those_of_the_results():
    results = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    table = results[results.index("| target, zero-shot |") : results.index("### Eight clients")]
    rows = {line.split("|")[1].strip(" *"): line for line in table.splitlines() if line.startswith("|")}
    for recipe, name in (("fedproxy_plus", "fedproxy_plus"), ("proxy_tuning", "proxy_tuning"), ("fedot", "fedot")):
        share = re.search(rf"`recipe={recipe}` \| (\d+) %", PAGE)[1]
        assert re.search(rf"\| {share} % \([^|]*\) \|[^|]*\|$", rows[name]), recipe
