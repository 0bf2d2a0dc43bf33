"""The stages of a run, in order: compress, federate, fuse, evaluate, report."""
