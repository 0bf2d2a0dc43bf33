"""Whether the devices of a client and what the recipe does with them go together."""

from fedproxy.config import RunConfig
from fedproxy.errors import ConfigError
from fedproxy.modules.devices import ClientDevices


def check_devices(config: RunConfig) -> ClientDevices:
    """Return the devices that train one client.

    Raises:
        ConfigError: If they do not go together with the machine, with each other or with the recipe's rules.
    """
    devices = ClientDevices.of(config.trainer)
    rows = config.client.batch_size
    if rows < devices.count:
        raise ConfigError(
            f"client.batch_size must be at least the {devices.count} devices that share a batch "
            f"(trainer.devices={config.trainer['devices']}), got {rows}"
        )
    if devices.strategy == "fsdp":
        _check_sharded(config)
    return devices


def _check_sharded(config: RunConfig) -> None:
    """Refuse what needs a whole model on one device."""
    rule, term = config.aggregator, config.regularizer
    if rule.moves_base:
        key, why = f"aggregator.name={rule.name}", "moves the frozen weights"
    elif rule.needs_extras:
        key, why = f"aggregator.name={rule.name}", "needs statistics of each row's gradient"
    elif not term.coordinatewise:
        key, why = f"regularizer.name={term.name}", "is not declared a sum over coordinates (coordinatewise)"
    else:
        return
    raise ConfigError(f"{key} {why}, which trainer.strategy=fsdp cannot do on spread weights; use trainer.strategy=ddp")
