"""What a stage of a run is, and the one rule on when it is not done again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

from fedproxy.config import RunConfig
from fedproxy.errors import CheckpointError
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.reads import MAY_CHANGE, Reads, values
from fedproxy.sealed import content_sha256


class Stage(ABC):
    """A part of a run's work, with all that it reads and all that it leaves.

    What later stages need of it lies in the run's folder, so that a run goes on after it in another process.
    """

    name: ClassVar[str]
    past: ClassVar[str]
    """The same in words: what the display says has been done."""
    reads: ClassVar[Reads]
    """Keys of the recipe and inputs."""
    after: ClassVar[tuple[type["Stage"], ...]] = ()
    """Stages whose outputs it reads."""
    outputs: ClassVar[tuple[str, ...]] = ()
    """Files and folders that it makes, by their path in the run's folder; the last one appears when all others are
    there."""
    learns: ClassVar[tuple[str, ...]] = ()
    """Facts that it notes."""

    def check(self, run: Run) -> None:
        """Refuse what only outputs of earlier stages can show to be wrong, before any work is done.

        Raises:
            FedProxyError: In one line.
        """
        return

    @abstractmethod
    def do(self, run: Run) -> None:
        """Do the work and leave the outputs; what is there of an earlier try may be used or replaced."""

    def load(self, run: Run) -> None:
        """Bring what later stages need into ``run``, whether the work was done now, earlier, or by an equal run."""
        return

    def whole(self, run: Run) -> bool:
        """Return whether all outputs are there and as they were written.

        Raises:
            CheckpointError: If something was changed, and the stage cannot be done again since others built on it.
        """
        if not self.outputs or not (run.folder.root / self.outputs[-1]).exists():
            return False
        try:
            run.verify(*self.outputs)
        except CheckpointError as error:
            if not self.reads.again:
                raise
            run.display.say(f"{self.past} again: {error}")
            return False
        return True

    def texts(self, config: RunConfig) -> tuple[int, ...]:
        """Return how many calibration texts it reads at each go, where it reads any."""
        return ()

    def may_be_shared(self, run: Run) -> bool:
        """Return whether an equal run would do the same work."""
        return True

    def seal(self, run: Run) -> None:
        """Note hashes of all outputs, by which :meth:`whole` knows them."""
        run.note(files=run.hashes(*self.outputs))

    def made(self, run: Run) -> Any:
        """Return what tells its outputs from those of other work: the hashes of its files."""
        inside = [f"{name}/" for name in self.outputs]
        return {
            name: sha for name, sha in run.facts.files.items() if name in self.outputs or name.startswith(tuple(inside))
        }

    def inputs(
        self, run: Run, tell: Callable[[str], Any], before: Callable[["Stage"], Any], *, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return all that the stage depends on.

        Args:
            run: The run.
            tell: Tells an input (``reads.sources``) from another of its name.
            before: Tells what an earlier stage made from other work.
            without: Keys of the recipe to leave out.
        """
        keys, sources = self.reads.of(run.config)
        return {
            "settings": values(run.config, keys, without=without),
            "sources": {name: tell(name) for name in sources},
            "before": {stage.name: before(stage()) for stage in self.after},
        }

    def key(self, run: Run) -> str:
        """Return the hash of the inputs, by which a run that goes on knows the stage's work as its own.

        Settings that may change when a run goes on count where the stage is then done again.
        """
        origin, without = run.facts.origin, () if self.reads.again else MAY_CHANGE
        return content_sha256(self.inputs(run, origin.get, lambda stage: stage.made(run), without=without))

    def is_done(self, run: Run) -> bool:
        """Return whether its inputs are those it was done with, and its outputs are whole."""
        return run.facts.stages.get(self.name) == self.key(run) and self.whole(run)


class Reuse(Protocol):
    """Where stages of equal runs leave what they made."""

    def take(self, stage: Stage, run: Run) -> bool:
        """Give the run the outputs and facts of equal work; False where there is none."""
        ...

    def keep(self, stage: Stage, run: Run) -> None:
        """Leave a finished stage's outputs and facts to other runs."""
        ...


def left_to_do(stages: Sequence[Stage], run: Run, reuse: Reuse | None = None) -> Iterator[Stage]:
    """Yield, in order, every stage that has to be done; whoever asks for the next one has done the last.

    This is the one place that passes a stage over: where the run has done it, or may take over what an equal run made.
    """
    for stage in stages:
        stage.check(run)
        run.let_go()
        if not stage.is_done(run):
            taken = reuse is not None and reuse.take(stage, run)
            if not taken:
                yield stage
            stage.seal(run)
            run.note(stages={**run.facts.stages, stage.name: stage.key(run)})
            if reuse is not None and not taken:
                reuse.keep(stage, run)
        stage.load(run)
