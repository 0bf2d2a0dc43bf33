"""Whether the devices of a client and what the recipe does with them go together."""

from fedproxy.config import RunConfig
from fedproxy.errors import ConfigError
from fedproxy.models.quantized import check_quantization
from fedproxy.modules.devices import ClientDevices, one_device, training_device
from fedproxy.strategies.trainable.lora import Lora


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
    config.client.optimizer.check(training_device(one_device(config.trainer)).type, devices.strategy)
    if devices.strategy == "fsdp":
        _check_sharded(config)
    if config.client.quantization != "none":
        _check_quantized(config, devices)
    return devices


def _check_sharded(config: RunConfig) -> None:
    """Refuse what needs a whole model on one device."""
    rule, term, trained = config.aggregator, config.regularizer, config.trainable
    if isinstance(trained, Lora) and (trained.parameters or trained.dora):
        key, why = trained.key, "puts its change into weights as they are used"
    elif "base_change" in rule.parts:
        key, why = f"aggregator.name={rule.name}", "moves the frozen weights"
    elif "statistics" in rule.parts:
        key, why = f"aggregator.name={rule.name}", "needs statistics of each row's gradient"
    elif not term.coordinatewise:
        key, why = f"regularizer.name={term.name}", "is not declared a sum over coordinates (coordinatewise)"
    else:
        return
    raise ConfigError(f"{key} {why}, which trainer.strategy=fsdp cannot do on spread weights; use trainer.strategy=ddp")


def _check_quantized(config: RunConfig, devices: ClientDevices) -> None:
    """Refuse what reads or moves weights that are quantised."""
    rule, trained, bits = config.aggregator, config.trainable, config.client.quantization
    if trained.lora_scaling is None and trained.trains:
        key = trained.key
    elif {"base_change", "statistics"} & set(rule.parts):
        key = f"aggregator.name={rule.name}"
    elif any(config.realignment.reads):
        key = f"realignment.name={config.realignment.name}"
    elif devices.strategy == "fsdp":
        key = "trainer.strategy=fsdp"
    else:
        check_quantization(bits, training_device(one_device(config.trainer)).type)
        return
    raise ConfigError(f"{key} needs the proxy's own weights, which client.quantization={bits} rounds; set it to none")
