"""What a recipe will take, from shapes alone: no weight is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedproxy.config import load_config
from fedproxy.pipeline.checks import check
from fedproxy.pipeline.planning.hardware import MEASURE, Hardware
from fedproxy.pipeline.planning.memory import CLIENT_PROCESS, SERVER_PROCESS, Need, calibration_bytes, needs
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.pipeline.planning.speed import RowLength, Seconds, rows_per_client
from fedproxy.pipeline.planning.traffic import Traffic
from fedproxy.pipeline.privacy import privacy_lines
from fedproxy.reporting.formatting import duration, size

Line = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """Predicted size, memory, traffic and time of a run."""

    outline: Outline
    hardware: Hardware
    traffic: Traffic
    memory: tuple[Need, ...]
    seconds: Seconds

    @property
    def target_parameters(self) -> int:
        """Parameters of the target."""
        return self.outline.target_parameters

    @property
    def proxy_parameters(self) -> int:
        """Parameters of the plain proxy."""
        return self.outline.proxy_parameters

    @property
    def trainable_parameters(self) -> int:
        """Parameters that a client trains."""
        return self.outline.trainable.num_parameters

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of the proxy and of the target."""
        return len(self.outline.proxy), len(self.outline.target)

    @property
    def upload_bytes(self) -> int:
        """Bytes that one client sends per round."""
        return self.traffic.up

    @property
    def download_bytes(self) -> int:
        """Bytes that one client receives per round, from the second on."""
        return self.traffic.down(2)

    @property
    def emulator_bytes(self) -> int:
        """Bytes of the re-aligned frozen blocks in every broadcast."""
        return self.traffic.later.get("emulator", 0)

    @property
    def activation_bytes(self) -> int:
        """What the largest batch of calibration text needs while a block runs."""
        return calibration_bytes(self.outline)

    @property
    def compression_bytes(self) -> int:
        """Most that compression holds."""
        return self.peak("server", "compression")

    def peak(self, role: str, stage: str | None = None) -> int:
        """Return the most bytes that a role holds, in one stage or in all, Python and its libraries left out."""
        return max(need.total for need in self.memory if need.role == role and stage in (None, need.stage))

    def __str__(self) -> str:
        """Return the page that ``recipes plan`` prints, one figure a line."""
        lines = [*self._models(), *self._privacy(), *self._bytes(), *self._memory(), *self._time()]
        return "".join(f"{name:28}{value}\n" for name, value in lines)

    def _models(self) -> Iterator[Line]:
        kept, depth = self.blocks
        share = 100 * self.proxy_parameters / self.target_parameters
        yield "target", f"{self.target_parameters:,} parameters, {depth} blocks"
        yield "proxy", f"{self.proxy_parameters:,} parameters ({share:.1f} % of the target), {kept} blocks"
        yield "trained per client", f"{self.trainable_parameters:,} parameters"
        yield "clients", f"{self.traffic.drawn:,} of {self.traffic.clients:,} in each round"

    def _privacy(self) -> Iterator[Line]:
        rows = rows_per_client(self.outline, self.hardware)
        if rows is None and self.outline.config.privacy.unit == "client":
            rows = 1  # a whole client counts as one
        dealt = None if rows is None else self.outline.named(rows)
        return privacy_lines(self.outline.config, dealt, self.trainable_parameters)

    def _bytes(self) -> Iterator[Line]:
        traffic = self.traffic
        yield "proxy, sent once", f"{size(traffic.proxy)} to each client"
        yield (
            "up per client and round",
            size(traffic.up) + _parts(traffic.sent),
        )
        yield (
            "down per client and round",
            f"{size(traffic.down(2))} (first round {size(traffic.down(1))})" + _parts(traffic.later),
        )
        yield "all clients, per round", f"up {size(traffic.all_up())}, down {size(traffic.all_down(2))}"
        if traffic.collected:
            yield "up after the last round", f"{size(traffic.collected)} from each client that took part"

    def _memory(self) -> Iterator[Line]:
        for need in self.memory:
            yield f"{need.role}, {need.stage}", f"{size(need.total)}{_placed(need)}"
        yield "each process, besides", f"{size(SERVER_PROCESS)} (server), {size(CLIENT_PROCESS)} (client): libraries"

    def _devices(self) -> str:
        """Return in words what a round's clients share."""
        each = self.outline.devices
        together = f", {each.count} to a client ({each.strategy})" if each.count > 1 else ""
        return f"{self.seconds.devices:,} device(s){together}"

    def _time(self) -> Iterator[Line]:
        hardware, seconds = self.hardware, self.seconds
        row, rows = RowLength.of(hardware, self.outline), rows_per_client(self.outline, hardware)
        if not self.trainable_parameters:
            yield "training", "none"
        elif rows is None:
            yield "training", "unknown: the recipe takes all rows there are; give plan.rows=ROWS_PER_CLIENT"
        else:
            of = f"{rows:,} rows of {row.input_tokens} + {row.target_tokens} tokens"
            epochs = self.outline.config.client.epochs
            yield "training, one client", f"{duration(seconds.client)} ({of}, {epochs} epochs)"
            yield "training, all clients", f"{duration(seconds.clients)} on {self._devices()}"
        if hardware.client_mbps is not None:
            yield "transfer per round", duration(seconds.transfer)
            yield "transfer of the proxy", f"{duration(seconds.proxy)}, once"
        yield "merging", duration(seconds.merge)
        yield "a round", duration(seconds.round)
        known = "measured here" if hardware.tflops == MEASURE else "plan.tflops"
        taken = [f"{seconds.tflops:.3g} TFLOP/s per device ({known})"] if seconds.client else []
        if hardware.client_mbps is not None:
            taken.append(f"links {hardware.client_mbps:g} (client) and {hardware.server_mbps:g} Mbit/s (server)")
        taken.append(f"merging {hardware.merge_gb_per_s:g} GB/s")
        uncounted = "evaluation, healing, distillation and re-alignment are not counted"
        yield "taken for this", f"{', '.join(taken)}; {uncounted}"


def plan(arguments: Sequence[str]) -> Plan:
    """Return the plan of a recipe given as ``recipe=NAME key=value ... plan.key=value ...``.

    Raises:
        ConfigError: If the recipe or an override is wrong.
        ModelError: If the target's shape is not to be had.
    """
    hardware, rest = Hardware.split(arguments)
    outline = Outline.of(check(load_config(rest), here=False))
    traffic = Traffic.of(outline)
    memory = needs(outline, traffic, RowLength.of(hardware, outline))
    return Plan(outline, hardware, traffic, tuple(memory), Seconds.of(outline, traffic, hardware))


def _placed(need: Need) -> str:
    """Return in words what of a need lies on accelerators."""
    if not need.device:
        return ""
    if need.devices > 1:
        return f", {size(need.device // need.devices)} of it on each of {need.devices} accelerators where there are any"
    return f", {size(need.device)} of it on an accelerator where there is one"


def _parts(parts: Mapping[str, int]) -> str:
    """Return in words what a message is made of, where that is more than one thing."""
    present = [f"{name.replace('_', ' ')} {size(value)}" for name, value in parts.items() if value]
    return f": {', '.join(present)}" if len(present) > 1 else ""
