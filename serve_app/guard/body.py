"""What a request may ask for, checked before anything is made of it.

``check_body`` parses the body of a completion once and refuses what would cost an engine more
than a request should: deep JSON, a great many sequences, log probabilities of a whole
vocabulary, patterns that compile for ever, templates and addresses chosen by the client. What is
only wrong (a temperature of 9) is left to vLLM, whose message is as good.

Every refusal is an ``InvalidRequest`` that names the key, the value and the limit; texts of the
request are never repeated in it.

Usage, in the edge::

    body = check_body(raw, request.url.path, limits)    # raw is at most max_body_bytes long
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.guard.document import check_shape, parse_object
from serve_app.guard.limits import Limits, printable, refuse, refuse_length, show
from serve_app.guard.structure import check_structure

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

# Keys that reach past the request: into memory, files, networks or the scheduler.
_REFUSED = {
    "audio": "answers are text",
    "ec_transfer_params": "it belongs to the engines",
    "kv_transfer_params": "it belongs to the engines",
    "media_io_kwargs": "media are not taken",
    "mm_processor_kwargs": "media are not taken",
    "prompt_embeds": "prompts are text or token ids",
    "use_beam_search": "it holds many sequences for each request; use n",
    "vllm_xargs": "it belongs to the engines",
}
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "length_penalty",
)
_NAMES = ("model", "user", "request_id", "session_id", "prompt_cache_key", "cache_salt")
_TOKEN_IDS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
# The parts that vLLM reads as text, and where their text is.
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MEDIA = re.compile(r"image|audio|video|file|url|embed|media", re.IGNORECASE)
_INT64 = 2**63


def check_body(raw: bytes, route: str, limits: Limits) -> dict[str, Any]:
    """Parse the body of a POST to ``route`` and return it. Raises ``InvalidRequest``."""
    body = parse_object(raw, limits)
    for key, reason in _REFUSED.items():
        if body.get(key) not in (None, False):
            refuse(key, f"The key {key} is not taken here: {reason}.")
    _check_names_and_numbers(body, limits)
    if route == CHAT:
        _check_chat(body, limits)
        prompts = 1
    else:
        prompts = _check_prompt(body, limits)
    _check_sequences(body, prompts, limits)
    _check_output(body, limits)
    _check_logprobs(body, route, limits)
    _check_token_choice(body, limits)
    check_structure(body, limits)
    return body


# --- the prompt -----------------------------------------------------------------------------


def _check_chat(body: Mapping[str, Any], limits: Limits) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list):
        refuse("messages", f"The key messages must be a list, but is {show(messages)}.")
    if not 1 <= len(messages) <= limits.messages:
        refuse(
            "messages",
            f"The key messages has {len(messages)} items, but must have 1 to {limits.messages}.",
        )
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", limits)
    _check_template(body, limits)
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        refuse("modalities", 'The key modalities may only be ["text"]: answers are text.')


def _check_message(message: Any, where: str, limits: Limits) -> None:
    if not isinstance(message, dict):
        refuse(where, f"The key {where} must be an object, but is {show(message)}.")
    role = message.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= 64:
        refuse(
            f"{where}.role",
            f"The key {where}.role must be a string of 1 to 64 characters, but is {show(role)}.",
        )
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"{where}.content[{number}]")
    elif content is not None and not isinstance(content, str):
        refuse(
            f"{where}.content",
            f"The key {where}.content must be a string or a list of parts, but is {show(content)}.",
        )
    _check_calls(message.get("tool_calls"), f"{where}.tool_calls", limits)


def _check_calls(calls: Any, where: str, limits: Limits) -> None:
    """Tool calls of earlier turns. Their arguments are JSON in a string, which vLLM parses."""
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        refuse(where, f"The key {where} must be a list of objects, but is {show(calls)}.")
    for call in calls:
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                check_shape(arguments.encode("utf-8", "surrogatepass"), limits)
            except InvalidRequest as error:
                refuse(where, f"The arguments in {where} are refused: {error}")


def _check_part(part: Any, where: str) -> None:
    """Text alone is taken. vLLM tells media by the keys of a part, whatever its type says."""
    if isinstance(part, str):
        return
    if not isinstance(part, dict):
        refuse(where, f"The key {where} must be an object, but is {show(part)}.")
    kind = part.get("type")
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None or any(_MEDIA.search(key) for key in part):
        refuse(
            where,
            f"The key {where} is not a part of plain text: images, audio, video, files and their "
            "addresses are not taken.",
        )
    if not isinstance(part.get(field), str):
        refuse(
            f"{where}.{field}",
            f"The key {where}.{field} must be a string, but is {show(part.get(field))}.",
        )


def _check_template(body: Mapping[str, Any], limits: Limits) -> None:
    if body.get("chat_template") is not None and not limits.chat_template:
        refuse(
            "chat_template",
            "The key chat_template is not taken here: the model's own template is used.",
        )
    kwargs = body.get("chat_template_kwargs")
    if kwargs is None:
        return
    if not isinstance(kwargs, dict):
        refuse(
            "chat_template_kwargs",
            f"The key chat_template_kwargs must be an object, but is {show(kwargs)}.",
        )
    for name in kwargs.keys() - limits.chat_template_kwargs:
        allowed = ", ".join(sorted(limits.chat_template_kwargs)) or "none"
        refuse(
            "chat_template_kwargs",
            f"The key chat_template_kwargs has {printable(name)}; taken here: {allowed}.",
        )


def _check_prompt(body: Mapping[str, Any], limits: Limits) -> int:
    """Check a completion's prompt and return the number of prompts in it."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return 1
    if not isinstance(prompt, list) or not prompt:
        refuse(
            "prompt",
            "The key prompt must be a string, a list of strings, or token ids, not empty, "
            f"but is {show(prompt)}.",
        )
    kinds = set(map(type, prompt))
    if kinds == {int}:
        _check_token_ids("prompt", prompt)
        return 1
    if len(prompt) > limits.prompts:
        refuse(
            "prompt",
            f"The key prompt has {len(prompt)} prompts, but the limit is {limits.prompts}.",
        )
    for index, item in enumerate(prompt):
        if kinds == {list} and item and set(map(type, item)) == {int}:
            _check_token_ids(f"prompt[{index}]", item)
        elif kinds != {str} or not item:
            refuse(
                f"prompt[{index}]",
                "The items of the key prompt must be all strings or all lists of token ids, "
                f"not empty, but prompt[{index}] is {show(item)}.",
            )
    return len(prompt)


def _check_token_ids(where: str, ids: list[int]) -> None:
    least, most = min(ids), max(ids)
    if least < 0 or most >= 2**31:
        refuse(
            where,
            f"The key {where} has the token id {show(least if least < 0 else most)}, but token "
            f"ids are between 0 and {2**31 - 1}.",
        )


# --- what is asked for ----------------------------------------------------------------------


def _check_names_and_numbers(body: Mapping[str, Any], limits: Limits) -> None:
    for key in _NAMES:
        _text(body, key, limits.name_length)
    for key in _NUMBERS:
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            refuse(key, f"The key {key} must be a number, but is {show(value)}.")
    _integer(body, "seed", -_INT64, _INT64 - 1)
    _integer(body, "truncate_prompt_tokens", -1, _INT64 - 1)
    _integer(body, "stream_interval", 1, 1024)
    _boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        refuse(
            "stream_options",
            f"The key stream_options must be an object, but is {show(options)}.",
        )


def _check_sequences(body: Mapping[str, Any], prompts: int, limits: Limits) -> None:
    n = _integer(body, "n", 1, limits.n) or 1
    best_of = _integer(body, "best_of", 1, limits.n) or n
    if best_of < n:
        refuse("best_of", f"The key best_of is {best_of}, but must be at least n, which is {n}.")
    if (sequences := best_of * prompts) > limits.sequences:
        refuse(
            "n",
            f"The request asks for {sequences} sequences ({best_of} for each of {prompts} "
            f"prompts), but the limit is {limits.sequences}.",
        )


def _check_output(body: Mapping[str, Any], limits: Limits) -> None:
    least = 0 if body.get("echo") is True else 1  # a score of the prompt generates nothing
    _integer(body, "max_tokens", least, limits.output_tokens)
    _integer(body, "max_completion_tokens", 1, limits.output_tokens)
    min_tokens = _integer(body, "min_tokens", 0, limits.output_tokens) or 0
    most = body.get("max_completion_tokens")
    most = body.get("max_tokens") if most is None else most
    if min_tokens and most is None:
        refuse(
            "min_tokens",
            f"The key min_tokens is {min_tokens}, but max_tokens is not given; give both.",
        )
    if most is not None and min_tokens > most:
        refuse(
            "min_tokens",
            f"The key min_tokens is {min_tokens}, but must be at most max_tokens, which is {most}.",
        )


def _check_logprobs(body: Mapping[str, Any], route: str, limits: Limits) -> None:
    if route == CHAT:
        _boolean(body, "logprobs")
        _integer(body, "top_logprobs", 0, limits.logprobs)
    else:
        _integer(body, "logprobs", 0, limits.logprobs)
    _integer(body, "prompt_logprobs", 0, limits.logprobs)


def _check_token_choice(body: Mapping[str, Any], limits: Limits) -> None:
    _check_texts(body, "stop", limits.stops, limits.stop_length)
    _check_texts(body, "bad_words", limits.bad_words, limits.stop_length)
    for key in _TOKEN_IDS:
        ids = body.get(key)
        if not ids:
            continue
        if not isinstance(ids, list) or set(map(type, ids)) != {int}:
            refuse(key, f"The key {key} must be a list of token ids, but is {show(ids)}.")
        if len(ids) > limits.token_ids:
            refuse(key, f"The key {key} has {len(ids)} items, but the limit is {limits.token_ids}.")
        _check_token_ids(key, ids)
    _check_logit_bias(body.get("logit_bias"), limits)


def _check_texts(body: Mapping[str, Any], key: str, count: int, length: int) -> None:
    """A list of at most ``count`` strings, or one string, of 1 to ``length`` characters."""
    value = body.get(key)
    if value is None:
        return
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        refuse(key, f"The key {key} must be a string or a list of strings, but is {show(value)}.")
    if len(texts) > count:
        refuse(key, f"The key {key} has {len(texts)} items, but the limit is {count}.")
    for text in texts:
        if not 1 <= len(text) <= length:
            refuse(
                key,
                f"The key {key} has a string of {len(text)} characters, but must have strings of "
                f"1 to {length}.",
            )


def _check_logit_bias(bias: Any, limits: Limits) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        refuse("logit_bias", f"The key logit_bias must be an object, but is {show(bias)}.")
    if len(bias) > limits.logit_bias:
        refuse(
            "logit_bias",
            f"The key logit_bias has {len(bias)} entries, but the limit is {limits.logit_bias}.",
        )
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            refuse(
                "logit_bias",
                f"The key logit_bias has the key {printable(token)}, which is not a token id.",
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 100:
            refuse(
                "logit_bias",
                f"The key logit_bias[{token}] is {show(value)}, but must be between -100 and 100.",
            )


# --- kinds of values -------------------------------------------------------------------------


def _text(body: Mapping[str, Any], key: str, length: int) -> None:
    value = body.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        refuse(key, f"The key {key} must be a string, but is {show(value)}.")
    if len(value) > length:
        refuse_length(key, len(value), length)


def _boolean(body: Mapping[str, Any], key: str) -> None:
    """True or false and nothing that vLLM would take for one, such as 1 or "yes"."""
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        refuse(key, f"The key {key} must be true or false, but is {show(value)}.")


def _integer(body: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(key, f"The key {key} must be a whole number, but is {show(value)}.")
    if not least <= value <= most:
        refuse(key, f"The key {key} is {show(value)}, but must be between {least} and {most}.")
    return value
