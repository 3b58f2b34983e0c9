"""Measure one attention plan on one vLLM engine: ``python -m serve_app.quality.run RESULT``.

A process of its own for each plan, started by ``local-attention quality``: an engine gives its
memory back for certain only when its process ends. Standard input has a ``grid.Job`` as
JSON; ``RESULT`` is written whole or not at all, and holds ``result`` or ``refused``.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve_app.config import CPU_KV_CACHE, explain
from serve_app.demo.needles import Generator, Prompt
from serve_app.errors import ConfigError, LocalAttentionError
from serve_app.pattern import LocalAttention
from serve_app.quality.grid import ANSWER_TOKENS, Answer, Band, Job, Result, bands
from serve_app.quality.results import STEP

_LENGTH_TRIES = 8  # looks at a prompt's tokens before the nearest length will do
_CLOSE_ENOUGH = 0.97  # of the length asked for
_TOKEN_CHARACTERS = 12  # more than any tokenizer's average: no more of a text is read
_DECODED = 32  # tokens over which the time of one is taken
_DECODE_REPEATS = 3


def measure(job: Job) -> Result:
    """Everything about one plan. Raises ``ConfigError`` where the engine refuses it."""
    from vllm import SamplingParams

    _begin("loading")
    llm, plan = _load(job)
    tokenizer = llm.get_tokenizer()
    greedy = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0)
    texts = list(_texts(job, tokenizer))
    _begin("perplexity")
    perplexity = list(_perplexity(llm, texts, job.max_model_len))
    _begin("retrieval")
    answers = list(_answers(llm, tokenizer, job, greedy))
    _begin("agreement")
    continuations = _continuations(llm, texts, greedy)
    _begin("decode")
    return Result(
        plan=plan,
        block_size=int(llm.llm_engine.vllm_config.cache_config.block_size),
        text_tokens=max(map(len, texts)),
        perplexity=perplexity,
        answers=answers,
        continuations=continuations,
        decode_ms=_decode_ms(llm, texts[0], job),
    )


def _begin(step: str) -> None:
    print(f"{STEP}{step}", flush=True)


def _load(job: Job) -> tuple[Any, str]:
    """The engine, and the plan that it runs in words, which is the one asked for."""
    from vllm import LLM

    from serve_app.local_attention.plan import plan_in_force

    args = dict(job.engine_args)
    if "kv_cache_memory_bytes" not in args:
        os.environ.setdefault(*CPU_KV_CACHE)
    if job.pattern:
        additional = {**args.get("additional_config", {}), "local_attention": job.pattern}
        args["additional_config"] = additional
    llm = LLM(model=job.model, max_model_len=job.max_model_len, disable_log_stats=False, **args)
    plan = plan_in_force(llm.llm_engine.vllm_config)
    if job.pattern and (
        plan is None or plan.rules != LocalAttention(**job.pattern).rules(len(plan.rules))
    ):
        raise LocalAttentionError(
            f"vLLM runs {plan or 'no plan'}, which is not what was asked for."
        )
    return llm, str(plan or "the model as it is")


def _texts(job: Job, tokenizer: Any) -> Iterator[list[int]]:
    """Up to ``job.sequences`` stretches of the text, each as long as the engine takes and begun as
    the tokenizer begins a text.
    """
    longest = job.max_model_len - 1
    size = _TOKEN_CHARACTERS * longest * job.sequences
    if job.text is None:
        text = Generator(job.seed, held_out=True).prompt(size).text
    else:
        with Path(job.text).open(encoding="utf-8") as file:
            text = file.read(size)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    head = tokenizer.encode("")
    each = longest - len(head)
    if len(tokens) < 2:
        raise ConfigError(f"{job.text} has no text to measure.")
    for index in range(job.sequences):
        stretch = tokens[index * each : (index + 1) * each]
        if index == 0 or len(stretch) > each // 2:
            yield [*head, *stretch]


def _perplexity(llm: Any, texts: Sequence[list[int]], longest: int) -> Iterator[Band]:
    """Each band of distances from the start that the texts reach."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = [_generate(llm, [text], params)[0] for text in texts]  # one at a time: logits are big
    for low, high in bands(longest):
        nats = [
            -output.prompt_logprobs[position][token].logprob
            for output, text in zip(outputs, texts, strict=True)
            for position, token in enumerate(text[:high])
            if position >= max(1, low)
        ]
        if nats:
            yield Band(low=low, high=high, tokens=len(nats), nats=sum(nats) / len(nats))


def _answers(llm: Any, tokenizer: Any, job: Job, greedy: Any) -> Iterator[Answer]:
    """Each question, and whether what is said names its code.

    Contexts end anywhere in the last quarter of their length: were they all a whole number of
    chunks, every answer would begin a chunk, which does not see the question.
    """
    generator, draw = Generator(job.seed, held_out=True), random.Random(job.seed)
    asked = [
        (length, depth, *_prompt(generator, tokenizer, length - draw.randrange(length // 4), depth))
        for length in job.lengths
        for depth in job.depths
        for _ in range(job.questions)
    ]
    outputs = _generate(llm, [tokens for *_, tokens in asked], greedy)
    for (length, depth, prompt, tokens), output in zip(asked, outputs, strict=True):
        said = output.outputs[0].text
        yield Answer(
            length=length,
            depth=depth,
            tokens=len(tokens),
            right=_is_right(prompt, said, chat=bool(_template(tokenizer))),
            said=said,
        )


def _is_right(prompt: Prompt, said: str, *, chat: bool) -> bool:
    """A chat model answers; any other goes on writing after the code, which is first then."""
    if chat:
        return prompt.right(said)
    code = re.search(r"\d+", said)
    return code is not None and code[0] == prompt.needle.code


def _prompt(
    generator: Generator, tokenizer: Any, length: int, depth: float
) -> tuple[Prompt, list[int]]:
    """A question whose prompt has ``length`` tokens or a few fewer, template included."""
    characters, best = length, None
    for _ in range(_LENGTH_TRIES):
        prompt = generator.prompt(characters, depth=depth)
        tokens = _render(tokenizer, prompt)
        if len(tokens) <= length and (best is None or len(tokens) > len(best[1])):
            best = prompt, tokens
        if best is not None and len(best[1]) >= _CLOSE_ENOUGH * length:
            break
        characters = max(120, int(characters * 0.99 * length / len(tokens)))
    if best is None:
        raise ConfigError(
            f"No question fits {length} tokens with this model's chat template; raise --lengths."
        )
    return best


def _render(tokenizer: Any, prompt: Prompt) -> list[int]:
    """As a chat where the model has a template, else as a text to be continued."""
    if not _template(tokenizer):
        return list(tokenizer.encode(f"{prompt.text}\nThe access code of {prompt.needle.name} is"))
    messages = [{"role": "user", "content": prompt.text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _template(tokenizer: Any) -> str | None:
    return getattr(tokenizer, "chat_template", None)


def _continuations(llm: Any, texts: Sequence[list[int]], greedy: Any) -> list[list[int]]:
    """What greedy decoding writes after a quarter, a half and three quarters of each text."""
    params = greedy.clone()
    params.ignore_eos = True
    prompts = [text[: len(text) * part // 4] for text in texts for part in (1, 2, 3)]
    outputs = _generate(llm, [prompt for prompt in prompts if prompt], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _decode_ms(llm: Any, text: list[int], job: Job) -> float:
    """Milliseconds for one token of one sequence that is nearly as long as the engine takes."""
    from vllm import SamplingParams

    prompt = text[: job.max_model_len - _DECODED - 1]
    params = SamplingParams(max_tokens=_DECODED + 1, temperature=0, ignore_eos=True)
    runs = [_generate(llm, [prompt], params)[0].metrics for _ in range(_DECODE_REPEATS)]
    seconds = [float(run.last_token_ts - run.first_token_ts) / _DECODED for run in runs]
    return 1000 * statistics.median(seconds)


def _generate(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[Any]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return list(llm.generate(asked, params, use_tqdm=False))


def _refusal(error: BaseException | None) -> str | None:
    """Why an engine cannot be configured so, if that is what an error came from.

    What this package says comes first. pydantic, which validates vLLM's configuration, keeps the
    error of a validator in a dictionary.
    """
    refused = None
    while error is not None:
        if isinstance(error, ConfigError):
            return str(error)
        if isinstance(error, ValidationError):
            for item in error.errors():
                if said := _refusal(item.get("ctx", {}).get("error")):
                    return said
            refused = explain(error).removeprefix("the file: ")
        error = error.__cause__ or error.__context__
    return refused


def main(result: str) -> None:
    # Whatever ends the command ends its engine: a GPU's memory must not stay taken.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    job = Job(**json.load(sys.stdin))
    try:
        answer: dict[str, Any] = {"result": measure(job)}
    except (RuntimeError, ValueError) as error:
        said = _refusal(error)
        if said is None:
            raise
        answer = {"refused": said}
    partial = Path(result).with_suffix(".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
