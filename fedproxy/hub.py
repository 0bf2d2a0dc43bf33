"""`python -m fedproxy.hub`: the server's side of a federation of real sites."""

from collections.abc import Sequence
from pathlib import Path

from fedproxy.command import run_command

USAGE = """
usage: python -m fedproxy.hub init HUB.yaml [hosts=[NAME,...]] [port=8443] [superlink_port=9093]
       python -m fedproxy.hub register HUB.yaml NAME KEY.pub
       python -m fedproxy.hub up HUB.yaml
       python -m fedproxy.hub status HUB.yaml

init makes keys and a commented file, register notes a site's public key by name, up runs Flower's SuperLink and the
front door that publishes what sites need alone, status says what runs and which sites are online.

examples:
  python -m fedproxy.hub init hub.yaml hosts=[hub.example]             then give hub/keys/ca.crt to the sites
  python -m fedproxy.hub register hub.yaml ward_a ward_a.pub           the .pub that site init made
  python -m fedproxy.hub up hub.yaml                                   until Ctrl-C; then runs use engine.name=flower
"""


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say."""
    from fedproxy.sites.arguments import options, worded

    verb, path, rest = worded(arguments, "hub", ("init", "register", "up", "status"))
    from fedproxy.sites import hub_commands

    if verb == "init":
        hub_commands.init(path, options(rest, hub_commands.HubInit), say=print)
    elif verb == "register":
        name, key = _two(rest)
        hub_commands.register(path, name, Path(key), say=print)
    elif verb == "up":
        options(rest)
        hub_commands.up(path, say=_say)
    else:
        options(rest)
        return hub_commands.status(path, say=print)
    return 0


def _two(words: Sequence[str]) -> Sequence[str]:
    from fedproxy.errors import ConfigError

    if len(words) != 2:
        raise ConfigError("register takes a site's name and its public key, for example: ward_a ward_a.pub")
    return words


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main, USAGE)
