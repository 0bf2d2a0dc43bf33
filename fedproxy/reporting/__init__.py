"""The record of a run and the pages made from it: RunReport, statistics, Markdown, HTML and plots."""

from fedproxy.reporting.model_card import model_card
from fedproxy.reporting.provenance import provenance
from fedproxy.reporting.run_report import (
    CompressionReport,
    Cost,
    Exposure,
    FidelityReport,
    Provenance,
    RoundReport,
    RunInfo,
    RunReport,
)
from fedproxy.reporting.scores import mean_scores, with_means

__all__ = [
    "CompressionReport",
    "Cost",
    "Exposure",
    "FidelityReport",
    "Provenance",
    "RoundReport",
    "RunInfo",
    "RunReport",
    "mean_scores",
    "model_card",
    "provenance",
    "with_means",
]
