"""The run folder: who may write into it, where things lie, and what is already done."""

import glob
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from fedproxy.config import RunConfig, to_dict, to_yaml
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.files import at_home, parse_json, private_folder, read_whole, write_text
from fedproxy.locks import locked
from fedproxy.pipeline.ownership import check_parts, check_removable, is_marked, mark, only_remains, remove_own
from fedproxy.pipeline.reads import MAY_CHANGE, flat, lies_below
from fedproxy.sealed import read_sealed
from fedproxy.yaml_files import read_mapping


class RunFolder:
    """Paths of one run; see docs/architecture.md for what lies where.

    Args:
        root: ``output_dir`` of the run.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = at_home(root)
        self.config = self.root / "config.yaml"
        self.journal = self.root / "rounds.jsonl"
        self.partition = self.root / "partition.json"
        self.rows = self.root / "rows"
        self.exchange = self.root / "exchange"
        self.checkpoints = self.root / "checkpoints"
        self.server = self.root / "server"
        self.facts = self.server / "facts.json"
        self.now = self.server / "now.json"
        self.layer_map = self.server / "layer_map.json"
        self.undistilled = self.server / "proxy_undistilled"
        self.proxy = self.root / "proxy"
        self.adapter = self.root / "adapter"
        self.fused = self.root / "fused"
        self.evaluation = self.root / "evaluation"
        self.report = self.root / "report.json"
        self.influence_plot = self.root / "block_influence.png"
        self.trainer_logs = self.root / "logs" / "trainer"
        self.is_claimed = False
        """Whether this process has begun to write here."""
        self.begins = False
        """Whether a run begins here, as :meth:`check` found."""

    def held(self) -> AbstractContextManager[None]:
        """Keep other processes out for the length of a context; see :func:`fedproxy.locks.locked`."""
        return locked(self.root)

    @property
    def replaces(self) -> bool:
        """Whether :meth:`claim` will delete what an older run left here."""
        return self.begins and not only_remains(self.root)

    def check(self, config: RunConfig) -> bool:
        """Say whether a run begins or goes on here, without changing anything.

        Raises:
            ConfigError: If the folder holds another run, or files that are none, and the command line does not say
                what to do about it, or something that must not be deleted.
            CheckpointError: If it cannot be read.
        """
        self.begins = True
        if self._holds_run():
            self.begins = config.overwrite
            self._check_run(config)
        elif config.overwrite and is_marked(self.root):
            check_removable(self.root)
        elif self.root.exists() and not only_remains(self.root):
            raise ConfigError(
                f"output_dir {self.root} holds what is left of a run whose config.yaml is gone; use overwrite=true to "
                "delete it, or another output_dir"
                if is_marked(self.root)
                else f"output_dir {self.root} already contains files that are not a run; choose another output_dir"
            )
        return self.begins

    def claim(self, config: RunConfig) -> None:
        """Delete what :meth:`check` allowed to delete, mark the folder and write ``config.yaml``, before any work.

        Raises:
            ConfigError: If something foreign came into the folder since it was checked.
            CheckpointError: If it cannot be written; a run that was to go on stays as it was.
        """
        if self.replaces:
            check_removable(self.root)
        try:
            if self.begins:
                self.root.mkdir(parents=True, exist_ok=True)
                remove_own(self.root)
                mark(self.root)
            for folder in (self.server, self.rows, self.checkpoints):
                private_folder(folder)
            write_text(self.config, to_yaml(config))
            self.is_claimed = True
        except BaseException as error:
            self.clear()
            if not isinstance(error, OSError):
                raise
            reason = error.strerror or error
            raise CheckpointError(
                f"output_dir {self.root} cannot be written ({reason}); choose another output_dir"
            ) from error

    def check_continues(self, config: RunConfig, way_out: str) -> None:
        """Refuse to go on with a run that was begun here under another configuration.

        Args:
            config: The configuration now.
            way_out: What the error's line ends with, after "set it back, or".

        Raises:
            ConfigError: Naming the first key that differs, with both values.
            CheckpointError: If the run's configuration cannot be read.
        """
        if self._holds_run():
            check_same_run(_read_config(self.config), config, self.root, way_out)

    def remove(self) -> None:
        """Delete the run.

        Raises:
            ConfigError: If the folder is not marked as a run's, or holds something foreign; nothing is deleted then.
            CheckpointError: If something cannot be deleted.
        """
        check_removable(self.root)
        remove_own(self.root)

    def clear(self) -> None:
        """Take back what a run that began here wrote; one that went on keeps everything."""
        if self.begins:
            with suppress(CheckpointError):
                remove_own(self.root)

    def check_fused(self) -> None:
        """Refuse to replace adapters and fused models of fewer rounds where something lies among them.

        Raises:
            ConfigError: Naming the first thing that no run made.
        """
        check_parts(self.root, ("adapter", "fused"))

    def clear_exchange(self) -> None:
        """Delete what processes of this run exchanged."""
        shutil.rmtree(self.exchange, ignore_errors=True)

    def is_past_compression(self) -> bool:
        """Return whether a run here went on after its proxy was made."""
        facts = read_sealed(self.server / "facts.json") or {}
        return bool("report" in facts.get("stages", {}) or self.rounds() or self.fused.is_dir())

    def fused_folders(self) -> list[Path]:
        """Return the folders of fused models: ``fused`` itself, or one for each client."""
        if (self.fused / "config.json").is_file():
            return [self.fused]
        return sorted(path.parent for path in self.fused.glob("*/config.json"))

    def rounds(self) -> list[dict[str, Any]]:
        """Return the lines of rounds.jsonl; half a line at its end, which a full disk leaves, is none.

        Raises:
            CheckpointError: If it cannot be read; a run that goes on writes it again from its last checkpoint.
        """
        if not os.path.lexists(self.journal):
            return []
        try:
            *lines, _ = read_whole(self.journal).split(b"\n")
            return [parse_json(line, dict) for line in lines]
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.journal} cannot be read: {getattr(error, 'strerror', None) or error}; python -m fedproxy.fit "
                "with resume=auto writes it again from the last checkpoint"
            ) from error

    def _holds_run(self) -> bool:
        return self.config.is_file() and self.server.is_dir()

    def _check_run(self, config: RunConfig) -> None:
        if config.overwrite:
            check_inputs_outside(to_dict(config), self.root)
            check_removable(self.root)
        elif config.resume == "auto":
            self.check_continues(config, "use overwrite=true or another output_dir")
            facts = read_sealed(self.server / "facts.json") or {}
            again = facts.get("fused_after_round") != config.federation.rounds
            check_parts(self.root, ("exchange", "logs/csv", *(("adapter", "fused") if again else ())))
        else:
            raise ConfigError(
                f"output_dir {self.root} already holds a run; use resume=auto to go on with it, overwrite=true to "
                f"delete it, or another output_dir"
            )


def check_inputs_outside(config: Mapping[str, Any], root: Path) -> None:
    """Refuse to delete a run's folder while the recipe reads something that lies in it.

    Args:
        config: The configuration as plain values; its inputs are every ``path``, ``data.template``, and what
            ``data.files`` names, patterns too.
        root: The folder.

    Raises:
        ConfigError: Naming the first such key.
    """
    folders = {Path(os.path.abspath(root)), root.resolve()}
    for key, value in flat(config).items():
        if not (key.endswith((".path", ".template")) or key.startswith("data.files.")) or not isinstance(value, str):
            continue
        value = os.fspath(at_home(value))
        found = [value] if os.path.lexists(value) else glob.glob(value, recursive=True)
        places = {place for path in found for place in (Path(os.path.abspath(path)), Path(path).resolve())}
        if any(place.is_relative_to(folder) for place in places for folder in folders):
            raise ConfigError(
                f"overwrite=true would delete {key}={value}, which lies in output_dir {root}; copy it elsewhere and "
                f"name the copy, or choose another output_dir"
            )


def check_same_run(old: Mapping[str, Any], new: RunConfig, root: Path, way_out: str) -> None:
    """Refuse to go on with a run under another configuration; see :meth:`RunFolder.check_continues`.

    Args:
        old: The run's configuration, as its file has it.
        new: What it is to go on with.
        root: The run's folder, for the message.
        way_out: What to do instead, for the message.

    Raises:
        ConfigError: If a key differs that may not change; names it.
    """
    before, after, longer = flat(old), flat(to_dict(new)), new.client.schedule.needs_rounds
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        fewer = key == "federation.rounds" and not (isinstance(was, int) and isinstance(now, int) and now >= was)
        more = key == "federation.rounds" and not fewer and was != now and longer
        if more:
            way_out = f"{way_out}: client.schedule goes over all rounds"
        if was != now and (fewer or more or not lies_below(key, MAY_CHANGE)):
            raise ConfigError(
                f"resume=auto: {key} is {now!r}, but the run in {root} has {was!r}; set it back, or {way_out}"
            )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path, "configuration")
    except ConfigError as error:
        raise CheckpointError(f"{error}; or use overwrite=true or another output_dir") from None
