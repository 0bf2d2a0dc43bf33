"""One run, from configuration to report: compress, federate, fuse, evaluate."""
