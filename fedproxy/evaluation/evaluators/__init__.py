"""Evaluators: what models are asked at the end of a run, and how their answers are scored."""

from fedproxy.evaluation.evaluators.base import Evaluator
from fedproxy.registry import import_members

import_members(__name__, __path__)

__all__ = ["Evaluator"]
