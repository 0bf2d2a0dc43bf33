"""Files for containers and systemd: what they publish, what they start, and that they start what exists."""

import configparser
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_hub_alone_publishes_a_port_and_sites_cannot_reach_each_other():
    services = COMPOSE["services"]
    assert {name for name, service in services.items() if "ports" in service} == {"hub"}
    assert services["hub"]["ports"] == ["8443:8443"]
    networks = [set(services[name]["networks"]) for name in ("ward_a", "ward_b")]
    assert networks[0].isdisjoint(networks[1])
    assert all(service["cap_drop"] == ["ALL"] and service["read_only"] for service in services.values())


def test_no_two_parties_share_a_volume():
    mounted = [volume.partition(":")[0] for service in COMPOSE["services"].values() for volume in service["volumes"]]
    assert len(mounted) == len(set(mounted))


def test_compose_takes_the_file():
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    done = subprocess.run(["docker", "compose", "-f", DEPLOY / "compose.yaml", "config", "-q"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


WORDS = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}


def image(name):
    """Return what a Dockerfile's words say, the last of each, having checked what it copies and who runs it."""
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in lines} <= WORDS
    copied = " ".join(what for word, what in lines if word == "COPY").split()
    assert "." not in copied  # a hub's or a site's folder of keys may lie in the repository's
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    readme = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["fragments"][0]["path"]
    needed = {"pyproject.toml", "constraints.txt", readme, *project["project"]["license-files"]}
    assert set(copied) - {"./"} == needed | {*wheel["packages"], *wheel["force-include"]}
    assert dict(lines)["USER"] == "fedproxy"
    return dict(lines)


@pytest.mark.parametrize("who", ["hub", "site"])
def test_images_run_as_an_ordinary_user_and_start_a_command_that_exists(who):
    found = image(f"Dockerfile.{who}")
    assert json.loads(found["ENTRYPOINT"]) == ["python", "-m", f"fedproxy.{who}"]
    assert json.loads(found["CMD"]) == ["up", f"{who}.yaml"]
    assert ("EXPOSE" in found) == (who == "hub")
    assert (DEPLOY.parent / f"fedproxy/{who}.py").exists()


def test_the_image_of_all_commands_takes_pytorch_from_the_index_that_is_named():
    found = image("Dockerfile")
    assert json.loads(found["ENTRYPOINT"]) == ["fedproxy"]
    assert found["ARG"].startswith("TORCH_INDEX=https://")
    assert re.search(r'--extra-index-url "\$TORCH_INDEX" torch ', found["RUN"])
    assert found["ENV"] == "FEDPROXY_CACHE=/data/cache"
    assert "EXPOSE" not in found


@pytest.mark.parametrize("who", ["hub", "site"])
def test_units_start_again_for_ever_and_not_at_once(who):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / f"fedproxy-{who}.service")
    assert unit["Service"]["Restart"] == "always"
    assert int(unit["Service"]["RestartSec"]) >= 10  # a SuperNode's last life is counted for a minute
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert re.search(rf"-m fedproxy\.{who} up {who}\.yaml$", unit["Service"]["ExecStart"])
