import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "Question: Which of these is red? Answer: a ripe tomato. The sky is blue in the morning, grass is green, snow is "
    "white. Where would you put a cup? on the table, under the bed, in the oven. She went home because it was late."
)
ARC = [
    ("Which of these is red?", ["a ripe tomato", "the sky", "grass", "snow in the morning"], 0),
    ("Where would you put a cup?", ["in the oven", "under the bed", "on the table"], 2),
    ("Which of these is white?", ["grass", "snow", "a tomato", "the late sky"], 1),
    ("Why did she go home?", ["it was late", "snow is white", "the bed is red", "grass"], 0),
    ("What is blue?", ["the sky", "the table", "a cup", "the oven"], 0),
    ("What is green?", ["snow", "grass"], 1),
]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer, so that a word may be several tokens and a space belongs to the next word."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture
def model(tokenizer):
    """Random weights large enough that answers depend on every earlier token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder with hand-made questions in lm-eval's own columns, and no hub."""
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arc = [
        {"id": str(i), "question": question, "choices": {"text": texts, "label": list("ABCD")[: len(texts)]},
         "answerKey": "ABCD"[gold]}
        for i, (question, texts, gold) in enumerate(ARC)
    ]  # fmt: skip
    write_rows(tmp_path / "qa" / "arc_easy" / "train.jsonl", arc[::-1])
    write_rows(tmp_path / "qa" / "arc_easy" / "validation.jsonl", arc[:2])
    write_rows(tmp_path / "qa" / "arc_easy" / "test.jsonl", arc[:5])
    cloze = [{**row, "query": f"Question: {row['question']}\nAnswer:"} for row in arc]
    write_rows(tmp_path / "qa" / "csqa" / "train.jsonl", cloze)
    write_rows(tmp_path / "qa" / "csqa" / "validation.jsonl", cloze[1:])
    boolq = {"passage": "Grass is green.", "question": "is grass red", "label": 0, "idx": 0}
    write_rows(
        tmp_path / "qa" / "boolq" / "validation.jsonl", [boolq, {**boolq, "question": "is it green", "label": 1}]
    )
    sentence = "The cup would not fit in the bed because the _ was late."
    winogrande = [{"sentence": sentence, "option1": "cup", "option2": "bed", "answer": answer} for answer in "21"]
    for split in ("train", "validation"):
        write_rows(tmp_path / "qa" / "winogrande" / f"{split}.jsonl", winogrande)
    return tmp_path


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
