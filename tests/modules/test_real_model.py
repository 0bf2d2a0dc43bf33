"""The training path on SmolLM2 and real questions."""

import json

import pytest
import torch

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import tokenise
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.strategies.trainable import Trainable

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def rows():
    from fedproxy.data.assets import resolve

    documents = [json.loads(line) for line in (resolve("asset:qa") / "csqa" / "train.jsonl").open()][:32]
    gold = [d["choices"]["text"][d["choices"]["label"].index(d["answerKey"])] for d in documents]
    return [
        Row(document["query"], f" {answer}", "csqa", f"csqa/train/{index}")
        for index, (document, answer) in enumerate(zip(documents, gold, strict=True))
    ]


def load():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedproxy.data.assets import resolve

    folder = resolve("asset:smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = model.model.layers[:4]  # enough for the arithmetic, and quick
    model.config.num_hidden_layers = 4
    return model, AutoTokenizer.from_pretrained(folder)


def test_two_steps_equal_peft_and_transformers_own(rows, tmp_path):
    from peft import PeftModel

    model, tokenizer = load()
    examples = tokenise(rows, tokenizer, max_input_tokens=256, max_target_tokens=64)
    assert tokenizer.decode(examples[0].input_ids) == rows[0].prompt + rows[0].target

    def loader():
        return ExampleDataModule(
            examples, 16, pad_id=tokenizer.pad_token_id, generator=torch.Generator().manual_seed(0)
        )

    options = {"r": 8, "alpha": 16, "modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
    trainable = Trainable.by_name("lora")(**options).attach(model, torch.Generator().manual_seed(0))
    trainable.save_adapter(tmp_path)
    start = trainable.state()
    module = CausalLMModule(model, lr=1e-3, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu"}, max_grad_norm=1.0), module, loader())

    # The reference: PEFT's layers, the model's own loss over all logits, PyTorch's plain AdamW.
    reference = PeftModel.from_pretrained(load()[0], tmp_path, is_trainable=True)
    tuned = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(tuned.values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for batch in loader().train_dataloader():
        loss = reference(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert module.task_loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    # Adam moves a coordinate by up to lr whatever the size of its gradient, so rounding can flip tiny ones: compare
    # the whole change.
    mine = torch.cat([(trainable.state()[name] - start[name]).flatten() for name in start])
    theirs = torch.cat(
        [(tuned[name.replace(".weight", ".default.weight")].detach() - start[name]).flatten() for name in start]
    )
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.999
    assert mine.norm() == pytest.approx(theirs.norm().item(), rel=1e-3)
