"""Stage (iv): scores of target, proxy, tuned proxy and fused model."""

from fedproxy.pipeline.context import Run
from fedproxy.pipeline.evaluation import evaluate
from fedproxy.pipeline.kept_scores import KeptScores
from fedproxy.pipeline.reads import EVALUATE
from fedproxy.pipeline.stage import Stage
from fedproxy.pipeline.stages.fuse import Fuse
from fedproxy.pipeline.tuned import TunedProxies
from fedproxy.reporting import with_means


class Evaluate(Stage):
    """Scores every model that the recipe lists; each is kept as soon as it is known, and reused where it still fits.

    Args:
        others: Scores of other runs.
    """

    name, past = "evaluate", "evaluated"
    reads, after = EVALUATE, (Fuse,)
    outputs = ("evaluation",)

    def __init__(self, others: KeptScores | None = None) -> None:
        self._others = others

    def whole(self, run: Run) -> bool:
        """Leave it to the scores: every model's carry settings and hashes of their own."""
        return False

    def do(self, run: Run) -> None:
        """Score the models, into ``run.scores``."""
        if not run.config.asks:
            return
        if run.tuned is None:  # nothing was trained
            run.tuned = TunedProxies(run.proxy(), run.config.trainable, {}, seed=run.config.seed)
        rounds = run.trained[1].round if run.trained else 0
        for name, score in evaluate(run, run.tuned, rounds, self._others):
            run.scores[name] = score  # what was scored before an error is kept
        run.loggers.scores(with_means(run.scores), run.config.federation.rounds)
