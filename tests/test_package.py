"""What the package says of itself is said once, or alike wherever it stands."""

import re
import tomllib
from pathlib import Path

import yaml

import fedproxy

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def test_the_citation_names_this_version_and_this_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fedproxy.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]


def test_every_python_that_is_promised_is_tried_by_the_script_of_versions():
    promised = {found[1] for line in PROJECT["classifiers"] if (found := re.fullmatch(r".* :: (3\.\d+)", line))}
    script = (ROOT / ".ci" / "versions").read_text()
    tried = re.findall(r"(3\.\d+):(highest|lowest-direct)", re.search(r"^all=\((.*)\)$", script, re.MULTILINE)[1])
    oldest = min(promised, key=lambda version: int(version.partition(".")[2]))
    assert {version for version, resolution in tried if resolution == "highest"} == promised
    assert [version for version, resolution in tried if resolution == "lowest-direct"] == [oldest]
    assert PROJECT["requires-python"] == f">={oldest}"


def test_what_ci_pins_lies_within_every_range():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    extras = [entry for group in PROJECT["optional-dependencies"].values() for entry in group]
    ranges = [Requirement(entry) for entry in (*PROJECT["dependencies"], *extras)]
    assert len(ranges) > 30
    assert not [str(wanted) for wanted in ranges if pins[wanted.name] not in wanted.specifier]


def test_types_are_shipped():
    assert (ROOT / "fedproxy" / "py.typed").read_bytes() == b""
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_long_description_has_no_link_that_only_the_repository_can_follow():
    readme = SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / fragment["path"]).read_text() for fragment in readme["fragments"])
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert len(links) > 20
    for rule in readme["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert set(re.findall(r"\]\(([a-z]+:|.)", text)) == {"https:"}
    assert not [link for link in links if f"`{link}" not in text]  # each becomes its path
