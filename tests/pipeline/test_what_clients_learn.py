"""What a client's process is given: no seed of the run and no place of the server's; and what it says: no row.

A simulation runs all parties as one user, so that this is about what is handed out, not about what a user can open.
"""

import json
import shutil

from fedproxy.federation.client.site import Site
from fedproxy.federation.engines.pool import WorkerPool
from fedproxy.seeding import derive_seed

SEED = 918273645546372819
PRIVATE = "the row of patient 4711"


def test_no_file_that_clients_read_holds_the_runs_seed_or_names_the_servers_folder(run_tiny, monkeypatch, tmp_path):
    close = WorkerPool.close

    def keep(self):
        shutil.copytree(self._base, tmp_path / "exchange")
        close(self)

    monkeypatch.setattr(WorkerPool, "close", keep)
    options = ("federation.rounds=1", "evaluation.models=[]", "data.rows_per_task=8", "trainable.dropout=0.1")
    report, folder = run_tiny(f"seed={SEED}", "engine.name=workers", "engine.workers=1", *options)
    assert report.run.seed == SEED
    given = [path for part in ("proxy", "rows") for path in (folder / part).rglob("*") if path.is_file()]
    given += [path for path in (tmp_path / "exchange").rglob("*") if path.is_file()]
    assert {"setup.json", "broadcast.safetensors", "config.json"} <= {path.name for path in given}
    secrets = [str(SEED), str(derive_seed(SEED, 1, "sampling")), str(folder / "server"), "layer_map"]
    for path in given:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    setup = json.loads(next(path for path in given if path.name == "setup.json").read_text())
    assert set(setup) == {"factory", "options", "plugins", "devices", "logs", "ranks"}
    assert (folder / "server").stat().st_mode & 0o700 == 0o700
    assert not [path for path in (folder / "server").iterdir() if path.name.startswith("tmp")]  # copies of updates


def test_a_row_that_an_error_quotes_reaches_no_file_of_the_server(run_tiny, monkeypatch, capsys):
    train = Site.train

    def fail(self, broadcast, client_id, **limits):
        if client_id == "tiny_places":
            raise ValueError(f"{PRIVATE} is odd")
        return train(self, broadcast, client_id, **limits)

    monkeypatch.setattr(Site, "train", fail)
    options = ("federation.rounds=1", "federation.min_clients=3", "evaluation.models=[]", "data.rows_per_task=8")
    report, folder = run_tiny(*options)
    (reason,) = report.rounds[0].dropped.values()
    assert reason.startswith("ValueError; details in the client's log checkpoints/logs/tiny-places-")
    holding = [path for path in folder.rglob("*") if path.is_file() and PRIVATE.encode() in path.read_bytes()]
    assert [str(path.relative_to(folder)) for path in holding] == [reason.partition("log ")[2]]
    assert PRIVATE not in capsys.readouterr().err
