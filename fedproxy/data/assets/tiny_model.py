"""A generated Llama: six small random blocks and a tokenizer trained on the generated texts."""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset
from fedproxy.data.assets.tiny_tasks import TASKS, sentences, task_rows
from fedproxy.seeding import derive_seed

_BOS, _EOS, _PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_VOCABULARY = 512
_POSITIONS = 256

# How strongly each block writes into the residual stream. As in trained models the middle counts least: Block Influence
# then tells blocks apart, and a model without its weakest blocks is close to the whole one.
_GAINS = (1.0, 0.5, 0.15, 0.1, 0.2, 0.7)


def make_model(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the model and its tokenizer as a from_pretrained folder; option ``seed``."""
    seed = asset.options["seed"]
    with redirect_stderr(io.StringIO()):  # transformers' progress bar
        tokenizer = _tokenizer(seed)
        tokenizer.save_pretrained(out)
        _model(tokenizer, seed).save_pretrained(out)


def _tokenizer(seed: int) -> Any:
    """Train a byte-level BPE on all generated texts: nearly every word is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    splits = [rows for name in TASKS for rows in task_rows(name, seed).values()]
    texts = [f"{row['query']} {choice}" for rows in splits for row in rows for choice in row["choices"]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *sentences(500, seed)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD, model_max_length=_POSITIONS
    )


def _model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=len(_GAINS),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_POSITIONS,
        initializer_range=0.125,  # 1 / sqrt(hidden size): every linear map keeps the scale of its input
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny model"))
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.div_(config.initializer_range)  # unit scale, as the norms expect
        for block, gain in zip(model.model.layers, _GAINS, strict=True):
            block.self_attn.o_proj.weight.mul_(gain)
            block.mlp.down_proj.weight.mul_(gain)
    return model.eval()
