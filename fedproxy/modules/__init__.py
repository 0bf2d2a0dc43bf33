"""LightningModules for tuning and distillation, with their data, callbacks, losses and the Trainer factory."""
