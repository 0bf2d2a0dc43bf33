"""One run, from configuration to report: compress, federate, fuse, evaluate."""

from fedproxy.pipeline.run import run

__all__ = ["run"]
