"""A display that keeps what a run says."""

from fedproxy.pipeline.display import Display


class Lines(Display):
    """Keeps the lines."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)
