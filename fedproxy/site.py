"""`python -m fedproxy.site`: a data owner's side of a federation of real sites."""

import logging
from collections.abc import Sequence

from fedproxy.command import run_command

USAGE = """
usage: python -m fedproxy.site init SITE.yaml [name=NAME] [address=HOST:PORT] [node_port=9094]
       python -m fedproxy.site check SITE.yaml
       python -m fedproxy.site up SITE.yaml
       python -m fedproxy.site status SITE.yaml

init makes a key and a commented file, check tries data, model, key, certificate, clock and connection, up serves the
rounds that your policy allows, status says whether it is up and what it did last. Your rows never leave.

examples:
  python -m fedproxy.site init ward_a.yaml name=ward_a address=hub.example:8443
  python -m fedproxy.site check ward_a.yaml                            says what is wrong, line by line
  python -m fedproxy.site up ward_a.yaml                               until Ctrl-C
"""


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say."""
    from fedproxy.sites.arguments import options, worded

    verb, path, rest = worded(arguments, "site", ("init", "check", "up", "status"))
    from fedproxy.sites import site_commands

    if verb == "init":
        site_commands.init(path, options(rest, site_commands.SiteInit), say=print)
        return 0
    options(rest)
    if verb == "status":
        return site_commands.status(path, say=print)
    if verb == "check":
        from fedproxy.sites.site_check import check

        return check(path, say=print)
    from fedproxy.sites.site_up import up

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("fedproxy.sites").setLevel(logging.INFO)
    up(path, say=_say)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main, USAGE)
