"""How a run begins: rows are dealt out, what it is made from is looked at, and the folder becomes the run's."""

from typing import Any

from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.partition import Clients, check_same_owners, save_partition
from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import ConfigError
from fedproxy.modules.trainer import is_slow
from fedproxy.pipeline.checks import check_named_clients, check_participation, check_public
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import Dealt, count_examples, deal, length_notes, template_of
from fedproxy.pipeline.inputs import check_inputs, same_rows
from fedproxy.pipeline.privacy import check_budget
from fedproxy.pipeline.stages.compress import fidelity_texts
from fedproxy.pipeline.validation import held_out


def begin(run: Run) -> None:
    """Deal out the rows, draw validation questions from what no client owns, and claim the folder.

    Nothing reads all clients' rows again here.
    """
    if run.config.engine.at_sites:
        run.questions = held_out(run.config, {})
        _meet(run)
    else:
        dealt, inputs = _deal(run)
        run.questions = held_out(run.config, dealt.clients)
        _claim(run, dealt, inputs)
    if is_slow(run.config.trainer, run.device):
        run.display.say(
            f"trainer.precision={run.config.trainer['precision']} is many times slower than 32-true here: this CPU "
            "cannot multiply bfloat16; stop and set trainer.precision=32-true"
        )


def begin_compression(run: Run) -> list[str]:
    """Do the same for a run that ends with its proxy.

    Returns:
        Public texts to measure its fidelity on; none where that was done.
    """
    if run.config.engine.at_sites:
        _meet(run)
        return fidelity_texts(run.config, run.clients.owned)
    (dealt, inputs), texts = _deal(run), list[str]()
    if run.folder.begins or run.facts.fidelity is None:
        texts = fidelity_texts(run.config, _owned(dealt.clients))  # before the work: too little would throw it away
    _claim(run, dealt, inputs)
    return texts


def _meet(run: Run) -> None:
    """Ask real sites for their clients, whose rows stay there, and begin to write.

    Raises:
        ClientError: If a site does not answer, or refuses.
        ConfigError: If there are other clients than the recipe says, or their chat template cannot be used.
    """
    config, clients = run.config, run.config.engine.clients()
    wanted = config.data.partition.count(config.data.tasks, config.data.files)
    if len(clients) != wanted:
        raise ConfigError(
            f"data.partition.clients={wanted}, and the sites hold {len(clients)} ({', '.join(clients)}); set it to that"
        )
    check_named_clients(config, clients)
    check_budget(config, clients)
    template = template_of(config) if clients.converse else None
    inputs = None if run.folder.begins else check_inputs(run, clients)
    if run.folder.replaces:
        _ = run.target  # an older run is deleted only if this one's target can be loaded
    run.folder.claim(config)
    _note_inputs(run, clients, inputs)
    run.note(lengths={"rows": sum(clients.values())}, template=template)
    run.display.say(f"{len(clients)} clients at their sites ({_sizes(clients)} rows)")
    run.clients = clients


def _deal(run: Run) -> tuple[Dealt, dict[str, Any] | None]:
    """Read the sources and say who owns which row, as when the run began; nothing is written yet.

    Returns:
        Every client's rows, and where a run goes on what is to be noted of its inputs.
    """
    dealt = deal(run.config.data, seed=run.config.seed)
    check_participation(run.config, len(dealt.clients))  # a column may name more, of whom no row was drawn
    check_named_clients(run.config, dealt.clients)
    if run.folder.begins:
        return dealt, None
    inputs = check_inputs(run, dealt.clients)
    if same_rows(run, inputs):
        check_same_owners(dealt.clients, run.folder.partition)
    return dealt, inputs


def _claim(run: Run, dealt: Dealt, inputs: dict[str, Any] | None) -> None:
    """Begin to write: give every client the file with its rows; counts and hashes stay.

    An older run is deleted here, after all that could speak against the new one was looked at.
    """
    clients, counted = dealt.clients, count_examples(dealt.clients, run.config)
    check_budget(run.config, counted.examples)
    if run.folder.replaces:
        _ = run.target  # an older run is deleted only if this one's target can be loaded
        check_public(run.config, _owned(clients))
    run.folder.claim(run.config)
    figures = save_partition(clients, run.folder.partition)
    _note_inputs(run, clients, inputs)
    run.note(lengths=counted.lengths, examples=counted.examples, data_notes=dealt.notes, template=counted.template)
    for note in [*dealt.notes, *length_notes(counted.lengths, run.config.data)]:
        run.display.say(note)
    distance = ", ".join(f"{by} {value:.2f}" for by, value in figures.items())
    kept = ClientRows(clients, run.folder.rows, counted.examples)
    run.display.say(f"{len(clients)} clients ({_sizes(kept)} rows); distance from the pooled data by {distance}")
    run.clients = kept


def _note_inputs(run: Run, clients: Clients | ClientRows, inputs: dict[str, Any] | None) -> None:
    """Note what the run is made from; its report is made again."""
    unfinished = {name: key for name, key in run.facts.stages.items() if name != "report"}
    run.note(**(check_inputs(run, clients) if inputs is None else inputs), stages=unfinished)


def _owned(clients: Clients) -> OwnedTexts:
    return OwnedTexts(row for rows in clients.values() for row in rows)


def _sizes(clients: ClientRows) -> str:
    if len(clients) <= 16:
        return ", ".join(f"{name} {rows}" for name, rows in clients.items())
    return f"{min(clients.values())} to {max(clients.values())}"
