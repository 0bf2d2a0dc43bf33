"""A client's training speed against Hugging Face's Trainer with PEFT, in one run on the same proxy and rows.

    python -m benchmarks.client_step                 # 640 rows, 40 steps a side
    python -m benchmarks.client_step --rows 160      # a quick look

The three sides take turns step by step, so that whatever else the machine does falls on all of them alike. Each gets
its own copy of the proxy, the same tokens, float32, batch 16, AdamW, gradient norm 1, LoRA on all seven projections.
"""

# ruff: noqa: E402 (the number of threads is set before torch is imported)
import argparse
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=640, help="training rows, a quarter from each task")
parser.add_argument("--blocks", type=int, default=22, help="blocks of the proxy, the first ones of the target")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--json", type=Path, help="write the figures here")
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch: each side runs in its own Python thread
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads that spin at barriers make timings on a shared machine worthless, for every side.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedproxy.data.assets import resolve
from fedproxy.data.batching import ShuffledBatches
from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import Example, tokenise
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.losses import answer_nll
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.strategies.trainable import Trainable

TASKS = ("arc_easy", "openbookqa", "csqa", "socialiqa")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LR, BATCH = 1e-3, 16


class Turns:
    """Lets one side work at a time and adds up what each takes."""

    def __init__(self, sides: list[str]) -> None:
        self.waiting = list(sides)
        self.condition = threading.Condition()
        self.wall, self.cpu = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
        self.started = (0.0, 0.0)

    def take(self, side: str) -> None:
        """Wait for the side's turn and start its clock."""
        with self.condition:
            self.condition.wait_for(lambda: self.waiting[0] == side)
            self.started = (time.perf_counter(), time.process_time())

    def give(self, side: str, *, done: bool = False) -> None:
        """Stop the side's clock and let the next one work."""
        with self.condition:
            self.wall[side] += time.perf_counter() - self.started[0]
            self.cpu[side] += time.process_time() - self.started[1]
            self.waiting.remove(side)
            if not done:
                self.waiting.append(side)
            self.condition.notify_all()

    def next(self, side: str) -> None:
        """End a step: give the turn and wait for the next."""
        self.give(side)
        self.take(side)


def read_rows(count: int) -> list[Row]:
    """Return the first training rows of each task."""
    rows = []
    for task in TASKS:
        with (resolve("asset:qa") / task / "train.jsonl").open() as file:
            for index, line in zip(range(count // len(TASKS)), file, strict=False):
                rows.append(render(task, index, json.loads(line)))
    return rows


def render(task: str, index: int, document: dict) -> Row:
    """Return a document in the cloze form."""
    if task == "socialiqa":
        prompt, answer = document["query"], document["answer" + "ABC"[int(document["label"]) - 1]]
    else:
        question = document.get("question") or document["question_stem"]
        prompt, choices = f"Question: {question}\nAnswer:", document["choices"]
        answer = choices["text"][choices["label"].index(document["answerKey"])]
    return Row(prompt, f" {answer}", task, f"{task}/train/{index}")


def load_proxy() -> torch.nn.Module:
    """Return the target's first blocks as a model."""
    model = AutoModelForCausalLM.from_pretrained(resolve("asset:smollm2-135m"), dtype=torch.float32)
    model.model.layers = model.model.layers[: options.blocks]
    model.config.num_hidden_layers = options.blocks
    return model


def attach(model: torch.nn.Module):
    """Put LoRA on every projection."""
    lora = Trainable.by_name("lora")(r=options.rank, alpha=2 * options.rank, modules=MODULES)
    return lora.attach(model, torch.Generator().manual_seed(0))


def prepare_ours(examples: list[Example], pad_id: int, turns: Turns) -> Callable[[], None]:
    """Load our side; the result trains it for one epoch."""
    trainable = attach(load_proxy())

    class EndOfStep(lightning.Callback):
        def on_train_batch_end(self, *_) -> None:
            turns.next("fedproxy")

    def run() -> None:
        turns.take("fedproxy")
        loader = ExampleDataModule(examples, BATCH, pad_id=pad_id, generator=torch.Generator().manual_seed(0))
        module = CausalLMModule(trainable.model, lr=LR, parameters=trainable.parameters())
        fit(make_trainer({"accelerator": "cpu"}, max_grad_norm=1.0, callbacks=[EndOfStep()]), module, loader, seed=0)
        turns.give("fedproxy", done=True)

    return run


def prepare_transformers(side: str, sampling: str, examples: list[Example], tokenizer, turns: Turns):
    """Load a side of Hugging Face's Trainer; the result trains it for one epoch."""
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=list(MODULES), task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_proxy(), config)
    data = [
        {"input_ids": ids, "labels": [-100] * example.spans[0][0] + ids[example.spans[0][0] :]}
        for example in examples
        for ids in [list(example.input_ids)]
    ]
    arguments = TrainingArguments(
        output_dir=f"/tmp/{side.replace(' ', '_')}",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy=sampling,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            turns.next(side)

    def run() -> None:
        turns.take(side)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[EndOfStep()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        turns.give(side, done=True)

    return run


def compare(examples: list[Example], tokenizer) -> Turns:
    """Train the three sides, step by step in turns."""
    turns = Turns(["fedproxy", "trainer", "trainer grouped"])
    runs = [
        prepare_ours(examples, tokenizer.pad_token_id, turns),
        prepare_transformers("trainer", "random", examples, tokenizer, turns),
        prepare_transformers("trainer grouped", "group_by_length", examples, tokenizer, turns),
    ]
    threads = [threading.Thread(target=run, daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return turns


def break_down(examples: list[Example], pad_id: int, steps: int = 10) -> dict[str, float]:
    """Return seconds of a step by part; the parts of each batch are measured one after the other.

    ``products`` are the body's matrix products alone, on the same shapes: what its speed is measured against.
    """
    proxy = load_proxy()
    weights = [layer.weight for layer in proxy.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    widths = {width for weight in weights for width in weight.shape}
    trainable = attach(proxy)
    model, parameters = trainable.model.train(), list(trainable.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    seconds = dict.fromkeys(("step", "body", "products", "head", "optimiser", "framework"), 0.0)

    @contextmanager
    def timed(part: str, sign: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[part] += sign * (time.perf_counter() - started)

    loader = ExampleDataModule(examples, BATCH, pad_id=pad_id, generator=torch.Generator().manual_seed(0))
    batches = list(islice(loader.train_dataloader(), steps))
    for batch in batches[:1] + batches:
        if batch is batches[0]:
            seconds = dict.fromkeys(seconds, 0.0)  # the first batch is run twice, once to warm up
        with timed("step"):
            answer_nll(*answer_logits(model, batch)).mean().backward()
        with timed("optimiser"):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        answers = batch["labels"] != -100
        with trainable.disabled(), timed("body"):
            embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        states = {width: torch.randn(batch["input_ids"].numel(), width) for width in widths}
        with timed("products"), torch.no_grad():
            for weight in weights:
                outputs, inputs = weight.shape
                torch.nn.functional.linear(states[inputs], weight)  # forward
                torch.mm(states[outputs], weight)  # gradient of the inputs
        with timed("head"):
            picked = hidden.detach()[answers].requires_grad_()
            answer_nll(model.lm_head(picked), batch["labels"][answers]).mean().backward()

    class WithoutModel(CausalLMModule):
        """Takes the time of model and optimiser off the clock that runs during the fit."""

        def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
            with timed("framework", -1):
                return super().training_step(batch, batch_idx)

        def backward(self, loss: torch.Tensor) -> None:
            with timed("framework", -1):
                loss.backward()

    loader = ShuffledBatches(batches, torch.Generator().manual_seed(0))
    with timed("framework"):
        module = WithoutModel(model, lr=LR, parameters=trainable.parameters())
        fit(make_trainer({"accelerator": "cpu"}, max_grad_norm=1.0), module, loader, seed=0)
    seconds["framework"] -= seconds["optimiser"]
    seconds["LoRA branches"] = seconds.pop("step") - seconds["body"] - seconds["head"]
    return {part: value / len(batches) for part, value in seconds.items()}


def main() -> None:
    """Print the comparison and the parts of a step."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m"))
    examples = tokenise(read_rows(options.rows), tokenizer, max_input_tokens=256, max_target_tokens=64)
    tokens = sum(len(example.input_ids) for example in examples)
    print(f"{len(examples)} rows, {tokens} tokens, {options.blocks} blocks, batch {BATCH}, {options.threads} threads")
    turns = compare(examples, tokenizer)
    figures: dict[str, float] = {"rows": len(examples)}
    for side, wall in turns.wall.items():
        figures |= {f"{side} examples/s": len(examples) / wall, f"{side} CPU s": turns.cpu[side]}
        print(f"{side:16s} {wall:7.1f} s  {len(examples) / wall:6.2f} examples/s  {turns.cpu[side]:7.1f} CPU s")
    for side in ("trainer", "trainer grouped"):
        figures[f"ratio to {side}"] = turns.wall[side] / turns.wall["fedproxy"]
        cpu = turns.cpu[side] / turns.cpu["fedproxy"]
        print(f"fedproxy / {side}: {figures[f'ratio to {side}']:.2f} x examples per second ({cpu:.2f} x by CPU time)")
    print("where a step's time goes (ten batches again, part by part):")
    parts = break_down(examples, tokenizer.pad_token_id)
    products = parts.pop("products")
    total = sum(parts.values())
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        figures[f"share {part}"] = seconds / total
        print(f"  {part:14s} {1e3 * seconds:7.0f} ms  {seconds / total:5.1%}")
    figures["MFU of body"] = products / parts["body"]
    print(f"body: {products / parts['body']:.0%} MFU; its matrix products alone take {1e3 * products:.0f} ms here")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
