"""Makes the quickstart's base model: a small language model of dictionary English, trained on definitions.txt.

It learns to define words and to name a wider one, as text and in chat, and has never seen the task of train.jsonl: the
fine-tune teaches that.
A Llama of 3.4M parameters with a byte-level BPE tokenizer and a chat template, saved as any hub model is (sharded bf16
safetensors). Same seed, same machine: same model.

    python make_base.py OUT [--seed 0] [--text definitions.txt]
"""

import argparse
import hashlib
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
BLOCK = 256  # tokens of a training sequence
BATCH = 4  # sequences of an optimizer step
LEARNING_RATE = 3e-3
FINAL_GAIN = 3.0  # of the norm before the head, at the start
HELD_OUT = 100  # one line of this many is kept from training

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, END_OF_TEXT, TURN_START, TURN_END)  # in the order of their ids, 0 to 3

# ChatML; the generation block marks what an answer-only loss is taken over, its end mark included
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries trained on `texts`, with chat template and special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model() -> LlamaForCausalLM:
    """An untrained Llama, fp32; every linear layer's width is a multiple of 64, NF4's block."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.0625,  # 1 / sqrt(hidden_size)
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL.index(TURN_END),
            pad_token_id=SPECIAL.index(PAD),
        )
    )
    # Fine-tuning freezes head and final norm: with a gain of 1 they bound the logits so tightly that no adapter can
    # make eight answers likely at once (measured: the loss of the answer's first token stayed at 3.5, ln 8 is 2.1)
    torch.nn.init.constant_(model.model.norm.weight, FINAL_GAIN)
    return model


def documents(lines: list[str], tokenizer: PreTrainedTokenizerFast, order: random.Random) -> Iterator[str]:
    """Each line `word | wider word | meaning` once: as text, or as a chat asking for the meaning or the wider word."""
    for line in lines:
        word, wider, meaning = line.split(" | ")
        form = order.random()
        if form < 0.25:
            yield f"{word}: {meaning}{END_OF_TEXT}"
            continue
        if form < 0.5:
            question, answer = f"Define the word {word}.", meaning
        else:
            question, answer = f"Find a wider word. {meaning}", wider
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield str(tokenizer.apply_chat_template(chat, tokenize=False))


def blocks(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """`texts` end to end as token ids, cut into rows of `BLOCK`."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = len(ids) // BLOCK
    return torch.tensor(ids[: rows * BLOCK]).view(rows, BLOCK)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of `batch`, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def pretrain(model: LlamaForCausalLM, train: torch.Tensor, steps: int, seed: int) -> None:
    """AdamW with warm-up and cosine decay over `steps` batches of rows drawn in a seeded order; prints as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(train), generator=shuffle) for _ in range(math.ceil(steps * BATCH / len(train)))]
    )
    start = said = time.monotonic()
    model.train()
    for step in range(steps):
        loss = loss_of(model, train[order[step * BATCH : (step + 1) * BATCH]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (now := time.monotonic()) - said >= 3 or step + 1 == steps:
            said = now
            left = (now - start) / (step + 1) * (steps - step - 1)
            print(f"base model: step {step + 1}/{steps}, loss {loss.item():.3f}, about {left:.0f} s left", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", type=Path, help="the directory to make; one that exists is replaced when the model is done"
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=Path(__file__).parent / "definitions.txt",
        help="`word | wider word | meaning` lines",
    )
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # two are far slower on a busy machine, and sum in another order
    torch.manual_seed(arguments.seed)
    lines = arguments.text.read_text(encoding="utf-8").splitlines()
    held_out = [line for line in lines if int(hashlib.sha256(line.encode()).hexdigest(), 16) % HELD_OUT == 0]
    kept = sorted(set(lines) - set(held_out))
    order = random.Random(arguments.seed)
    order.shuffle(kept)
    tokenizer = make_tokenizer(kept)
    model = make_model()
    train = blocks(documents(kept, tokenizer, order), tokenizer)
    unseen = blocks(documents(held_out, tokenizer, order), tokenizer)
    print(f"base model: {model.num_parameters() / 1e6:.1f}M parameters, {train.numel()} tokens of text", flush=True)

    pretrain(model, train, math.ceil(arguments.epochs * len(train) / BATCH), arguments.seed)

    model.eval()
    with torch.no_grad():
        print(f"base model: loss on held-out text {loss_of(model, unseen).item():.3f}", flush=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=[SPECIAL.index(TURN_END), SPECIAL.index(END_OF_TEXT)],
        pad_token_id=SPECIAL.index(PAD),
    )
    unfinished = arguments.out.with_name(f".{arguments.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.bfloat16().save_pretrained(unfinished, max_shard_size="4MB")  # two shards: read as large models are
    tokenizer.save_pretrained(unfinished)
    for file in unfinished.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone; whoever trains on it is another user
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    unfinished.rename(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
