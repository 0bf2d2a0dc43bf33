"""What transformers calls the keys and values that a model keeps."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""Name of them, as an argument and in an output: ``cache`` from transformers 5.24 on."""
