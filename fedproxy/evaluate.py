"""Command: score a model on lm-eval tasks."""

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedproxy.evaluation.harness import EvaluationResult

HELP = """\
Score a causal language model on lm-eval tasks and write what was found.

usage: python -m fedproxy.evaluate model=MODEL tasks=[TASK,...] [key=value ...]

  model         a folder with a from_pretrained checkpoint, asset:NAME (fetched if missing), or a hub id
  tasks         task names; with data from `python -m fedproxy.assets fetch qa` these need no hub:
                {tasks}
  limit         only the first questions of each task           (default null: all)
  num_fewshot   solved examples before each question            (default 0)
  split         test or validation                              (default null: lm-eval's choice)
  seed          seed of the few-shot sampler                    (default 0)
  dtype         float32, bfloat16, float16 or auto              (default float32)
  device        cpu, cuda, cuda:1, mps or auto                  (default auto)
  batch_size    sequences per forward where no prefix is shared (default 16)
  batch_tokens  tokens per forward where prefixes are shared    (default {batch_tokens})
  output_dir    where scores.json, samples.jsonl and results.json go (default evaluation)
  overwrite     write over an evaluation that is there already  (default false)

examples:
  python -m fedproxy.evaluate model=asset:smollm2-135m tasks=[arc_easy,openbookqa] limit=100
  python -m fedproxy.evaluate model=runs/demo/fused tasks=[csqa] num_fewshot=5 output_dir=runs/demo/csqa_5shot
"""
