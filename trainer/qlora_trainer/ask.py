"""Asks a model directory a question, or a whole golden set: `python -m qlora_trainer.ask --model DIR --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qlora_trainer.environment import prepare_process, quiet_libraries


def main(arguments: list[str] | None = None) -> int:
    """Print the model's most likely answer, or its exact match on a golden set."""
    parser = argparse.ArgumentParser(prog="python -m qlora_trainer.ask", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="a model directory")
    parser.add_argument("--adapter", type=Path, help="a PEFT directory to put on it")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--prompt", help="what to ask; as a chat message where the model has a chat template")
    question.add_argument("--golden", type=Path, help="a file of examples: print the exact match over it")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    prepare_process()

    from qlora_trainer.evaluation import answers
    from qlora_trainer.examination import answers_to
    from qlora_trainer.scores import exact_match

    quiet_libraries()
    model, tokenizer = load(options.model, options.adapter)
    if options.golden:
        examples = golden_examples(options.golden)
        given = answers_to(model, tokenizer, examples)
        right = int(sum(exact_match(text, e.expected) for text, e in zip(given, examples, strict=True)))
        sys.stdout.write(f"exactMatch {right / len(examples):.4f} ({right} of {len(examples)})\n")
    else:
        prompt = prompt_for(tokenizer, options.prompt)
        sys.stdout.write(answers(model, tokenizer, [prompt], options.max_new_tokens)[0].strip() + "\n")
    return 0


def load(directory: Path, adapter: Path | None) -> tuple[Any, Any]:
    """A plain model in its stored type, with its tokenizer, ready to answer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", use_safetensors=True, **options)
    model = model.to(device)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), tokenizer


def prompt_for(tokenizer: Any, text: str) -> list[int]:
    """Tokens of one question."""
    if not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


def golden_examples(path: Path) -> list[Any]:
    """The examples of a file that lies here."""
    from qlora_trainer.data import read_file

    return read_file(path)


if __name__ == "__main__":
    sys.exit(main())
