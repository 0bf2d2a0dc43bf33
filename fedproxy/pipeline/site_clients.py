"""Clients whose rows lie at real sites: the server asks who they are, and deals nothing out."""

from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import ConfigError
from fedproxy.pipeline.components import check_named_clients
from fedproxy.pipeline.inputs import check_inputs
from fedproxy.pipeline.stages import Run


def clients_at_sites(run: Run) -> ClientRows:
    """Ask the sites for their clients, and begin to write the run's folder.

    Raises:
        ClientError: If a site does not answer, or refuses.
        ConfigError: If there are other clients than the recipe says.
    """
    rows = ClientRows.elsewhere(run.config.engine.clients())
    wanted = run.config.data.partition.count(0)
    if len(rows) != wanted:
        raise ConfigError(
            f"data.partition.clients={wanted}, and the sites hold {len(rows)} ({', '.join(rows)}); set it to that"
        )
    check_named_clients(run.config, rows)
    inputs = None if run.folder.begins else check_inputs(run, {})
    run.folder.claim(run.config)
    run.note(**(check_inputs(run, {}) if inputs is None else inputs), lengths={"rows": sum(rows.values())})
    shown = ", ".join(f"{name} {count}" for name, count in rows.items()) if len(rows) <= 16 else str(sum(rows.values()))
    run.display.say(f"{len(rows)} clients at their sites ({shown} rows)")
    return rows
