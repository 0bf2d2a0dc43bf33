"""FedProxy: federated fine-tuning of large language models through proxy models."""

__version__ = "0.2.0"
