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

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from serve_app.errors import InvalidRequest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest values that are taken. Lengths of texts are characters."""

    # As a field of the configuration: an unknown key is refused, not ignored.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    # the document
    depth: int = 64
    strings: int = 100_000
    containers: int = 100_000  # objects and lists
    values: int = 2_000_000  # all values; a prompt of token ids has many
    # what is asked for
    messages: int = 2048
    prompts: int = 256
    sequences: int = 64  # n for all prompts of a request together
    n: int = 16
    output_tokens: int = 2**20
    logprobs: int = 20  # vLLM's own default
    stops: int = 4  # vLLM's own
    stop_length: int = 256
    logit_bias: int = 1024
    token_ids: int = 1024  # stop_token_ids, allowed_token_ids, logprob_token_ids
    bad_words: int = 128
    name_length: int = 1024  # model, user, and other names
    # what is compiled
    tools: int = 128
    choices: int = 1024
    regex_length: int = 1024
    regex_states: int = 10_000  # after its repetitions are written out
    grammar_length: int = 16_384
    repeats: int = 1000  # of one repetition in a grammar
    schema_length: int = 262_144  # of all tools together, too
    schema_nodes: int = 20_000
    schema_states: int = 100_000  # after its lengths and counts are written out
    # off by default
    chat_template: bool = False
    chat_template_kwargs: frozenset[str] = frozenset()  # the names that are taken


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

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRUCTURE = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes
_REPEAT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_COUNTED = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def check_body(raw: bytes, route: str, limits: Limits) -> dict[str, Any]:
    """Parse the body of a POST to ``route`` and return it. Raises ``InvalidRequest``."""
    body = _parse_object(raw, limits)
    for key, reason in _REFUSED.items():
        if body.get(key) not in (None, False):
            _refuse(key, f"The key {key} is not taken here: {reason}.")
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
    _check_structure(body, limits)
    return body


# --- the document ---------------------------------------------------------------------------


def _parse_object(raw: bytes, limits: Limits) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(None, f"The body is not valid UTF-8 at byte {error.start}.")
    _check_shape(raw, limits)
    body = _parse(text)
    if not isinstance(body, dict):
        _refuse(None, f"The body must be a JSON object, but is {_show(body)}.")
    if _SURROGATE.search(raw):
        for key, value in body.items():
            _check_surrogates(key, value)
    return body


def _parse(text: str) -> Any:
    try:
        return json.loads(
            text,
            parse_float=_finite,
            parse_constant=_no_constant,
            object_pairs_hook=_distinct,
        )
    except json.JSONDecodeError as error:
        _refuse(None, f"The JSON is not valid at character {error.pos}: {error.msg}.")
    except ValueError:  # Python's own limit on the digits of a number
        _refuse(None, "The JSON has a whole number of more than 4300 digits.")


def _check_shape(raw: bytes, limits: Limits) -> None:
    """Depth and counts, without parsing: every pass runs in C and is linear in the body."""
    if _is_plain(raw, limits):
        return
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    if (strings := bare.count(b'"') // 2) > limits.strings:
        _refuse(None, f"The JSON has {strings} strings, but the limit is {limits.strings}.")
    outside = b"".join(bare.split(b'"')[::2])
    if (values := outside.count(b",") + 1) > limits.values:
        _refuse(None, f"The JSON has {values} values, but the limit is {limits.values}.")
    brackets = outside.translate(_STEPS, _STRUCTURE)
    if (containers := (len(brackets) + 1) // 2) > limits.containers:
        _refuse(
            None,
            f"The JSON has {containers} objects and lists, but the limit is {limits.containers}.",
        )
    depth = 0
    for step in memoryview(brackets).cast("b"):
        depth += step
        if depth > limits.depth:
            _refuse(None, f"The JSON is nested deeper than the limit of {limits.depth} levels.")


def _is_plain(raw: bytes, limits: Limits) -> bool:
    """Whether no limit could be passed even if all marks inside of texts counted."""
    return (
        raw.count(b"[") + raw.count(b"{") <= min(limits.depth, limits.containers)
        and raw.count(b'"') // 2 <= limits.strings
        and raw.count(b",") < limits.values
    )


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse(None, "The JSON has a number that is too large for a float.")
    return value


def _no_constant(name: str) -> NoReturn:
    _refuse(None, f"The JSON has the value {name}, which is not JSON.")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. A key that comes twice could mean one thing here and another to the engine."""
    value = dict(pairs)
    if len(value) != len(pairs):
        key = _printable(Counter(key for key, _ in pairs).most_common(1)[0][0])
        _refuse(key, f"The key {key} comes twice in one object.")
    return value


def _check_surrogates(key: str, value: Any) -> None:
    for text in (key, *_texts(value)):
        try:
            text.encode()
        except UnicodeEncodeError:
            name = _printable(key)
            _refuse(name, f"The key {name} holds half of a surrogate pair, which is not text.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)


# --- the prompt -----------------------------------------------------------------------------


def _check_chat(body: Mapping[str, Any], limits: Limits) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list):
        _refuse("messages", f"The key messages must be a list, but is {_show(messages)}.")
    if not 1 <= len(messages) <= limits.messages:
        _refuse(
            "messages",
            f"The key messages has {len(messages)} items, but must have 1 to {limits.messages}.",
        )
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", limits)
    _check_template(body, limits)
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        _refuse("modalities", 'The key modalities may only be ["text"]: answers are text.')


def _check_message(message: Any, where: str, limits: Limits) -> None:
    if not isinstance(message, dict):
        _refuse(where, f"The key {where} must be an object, but is {_show(message)}.")
    role = message.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= 64:
        _refuse(
            f"{where}.role",
            f"The key {where}.role must be a string of 1 to 64 characters, but is {_show(role)}.",
        )
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"{where}.content[{number}]")
    elif content is not None and not isinstance(content, str):
        _refuse(
            f"{where}.content",
            f"The key {where}.content must be a string or a list of parts, "
            f"but is {_show(content)}.",
        )
    _check_calls(message.get("tool_calls"), f"{where}.tool_calls", limits)


def _check_calls(calls: Any, where: str, limits: Limits) -> None:
    """Tool calls of earlier turns. Their arguments are JSON in a string, which vLLM parses."""
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        _refuse(where, f"The key {where} must be a list of objects, but is {_show(calls)}.")
    for call in calls:
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                _check_shape(arguments.encode("utf-8", "surrogatepass"), limits)
            except InvalidRequest as error:
                _refuse(where, f"The arguments in {where} are refused: {error}")


def _check_part(part: Any, where: str) -> None:
    """Text alone is taken. vLLM tells media by the keys of a part, whatever its type says."""
    if isinstance(part, str):
        return
    if not isinstance(part, dict):
        _refuse(where, f"The key {where} must be an object, but is {_show(part)}.")
    kind = part.get("type")
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None or any(_MEDIA.search(key) for key in part):
        _refuse(
            where,
            f"The key {where} is not a part of plain text: images, audio, video, files and their "
            "addresses are not taken.",
        )
    if not isinstance(part.get(field), str):
        _refuse(
            f"{where}.{field}",
            f"The key {where}.{field} must be a string, but is {_show(part.get(field))}.",
        )


def _check_template(body: Mapping[str, Any], limits: Limits) -> None:
    if body.get("chat_template") is not None and not limits.chat_template:
        _refuse(
            "chat_template",
            "The key chat_template is not taken here: the model's own template is used.",
        )
    kwargs = body.get("chat_template_kwargs")
    if kwargs is None:
        return
    if not isinstance(kwargs, dict):
        _refuse(
            "chat_template_kwargs",
            f"The key chat_template_kwargs must be an object, but is {_show(kwargs)}.",
        )
    for name in kwargs.keys() - limits.chat_template_kwargs:
        allowed = ", ".join(sorted(limits.chat_template_kwargs)) or "none"
        _refuse(
            "chat_template_kwargs",
            f"The key chat_template_kwargs has {_printable(name)}; taken here: {allowed}.",
        )


def _check_prompt(body: Mapping[str, Any], limits: Limits) -> int:
    """Check a completion's prompt and return the number of prompts in it."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return 1
    if not isinstance(prompt, list) or not prompt:
        _refuse(
            "prompt",
            "The key prompt must be a string, a list of strings, or token ids, not empty, "
            f"but is {_show(prompt)}.",
        )
    kinds = set(map(type, prompt))
    if kinds == {int}:
        _check_token_ids("prompt", prompt)
        return 1
    if len(prompt) > limits.prompts:
        _refuse(
            "prompt",
            f"The key prompt has {len(prompt)} prompts, but the limit is {limits.prompts}.",
        )
    for index, item in enumerate(prompt):
        if kinds == {list} and item and set(map(type, item)) == {int}:
            _check_token_ids(f"prompt[{index}]", item)
        elif kinds != {str} or not item:
            _refuse(
                f"prompt[{index}]",
                "The items of the key prompt must be all strings or all lists of token ids, "
                f"not empty, but prompt[{index}] is {_show(item)}.",
            )
    return len(prompt)


def _check_token_ids(where: str, ids: list[int]) -> None:
    least, most = min(ids), max(ids)
    if least < 0 or most >= 2**31:
        _refuse(
            where,
            f"The key {where} has the token id {_show(least if least < 0 else most)}, but token "
            f"ids are between 0 and {2**31 - 1}.",
        )


# --- what is asked for ----------------------------------------------------------------------


def _check_names_and_numbers(body: Mapping[str, Any], limits: Limits) -> None:
    for key in _NAMES:
        _text(body, key, limits.name_length)
    for key in _NUMBERS:
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            _refuse(key, f"The key {key} must be a number, but is {_show(value)}.")
    _integer(body, "seed", -_INT64, _INT64 - 1)
    _integer(body, "truncate_prompt_tokens", -1, _INT64 - 1)
    _integer(body, "stream_interval", 1, 1024)
    _boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        _refuse(
            "stream_options",
            f"The key stream_options must be an object, but is {_show(options)}.",
        )


def _check_sequences(body: Mapping[str, Any], prompts: int, limits: Limits) -> None:
    n = _integer(body, "n", 1, limits.n) or 1
    best_of = _integer(body, "best_of", 1, limits.n) or n
    if best_of < n:
        _refuse("best_of", f"The key best_of is {best_of}, but must be at least n, which is {n}.")
    if (sequences := best_of * prompts) > limits.sequences:
        _refuse(
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
        _refuse(
            "min_tokens",
            f"The key min_tokens is {min_tokens}, but max_tokens is not given; give both.",
        )
    if most is not None and min_tokens > most:
        _refuse(
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
            _refuse(key, f"The key {key} must be a list of token ids, but is {_show(ids)}.")
        if len(ids) > limits.token_ids:
            _refuse(
                key, f"The key {key} has {len(ids)} items, but the limit is {limits.token_ids}."
            )
        _check_token_ids(key, ids)
    _check_logit_bias(body.get("logit_bias"), limits)


def _check_texts(body: Mapping[str, Any], key: str, count: int, length: int) -> None:
    """A list of at most ``count`` strings, or one string, of 1 to ``length`` characters."""
    value = body.get(key)
    if value is None:
        return
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        _refuse(key, f"The key {key} must be a string or a list of strings, but is {_show(value)}.")
    if len(texts) > count:
        _refuse(key, f"The key {key} has {len(texts)} items, but the limit is {count}.")
    for text in texts:
        if not 1 <= len(text) <= length:
            _refuse(
                key,
                f"The key {key} has a string of {len(text)} characters, but must have strings of "
                f"1 to {length}.",
            )


def _check_logit_bias(bias: Any, limits: Limits) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        _refuse("logit_bias", f"The key logit_bias must be an object, but is {_show(bias)}.")
    if len(bias) > limits.logit_bias:
        _refuse(
            "logit_bias",
            f"The key logit_bias has {len(bias)} entries, but the limit is {limits.logit_bias}.",
        )
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            _refuse(
                "logit_bias",
                f"The key logit_bias has the key {_printable(token)}, which is not a token id.",
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 100:
            _refuse(
                "logit_bias",
                f"The key logit_bias[{token}] is {_show(value)}, but must be between -100 and 100.",
            )


# --- what is compiled -----------------------------------------------------------------------


def _check_structure(body: Mapping[str, Any], limits: Limits) -> None:
    """Schemas, patterns and grammars: they are compiled on the engine's processors."""
    for key in ("tools", "functions"):
        _check_tools(body.get(key), key, limits)
    form = body.get("response_format")
    if form is not None:
        if not isinstance(form, dict):
            _refuse(
                "response_format", f"The key response_format must be an object, not {_show(form)}."
            )
        _check_schema(form, "response_format", limits)
    wanted = body.get("structured_outputs")
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        _refuse(
            "structured_outputs",
            f"The key structured_outputs must be an object, but is {_show(wanted)}.",
        )
    _check_structured_outputs(wanted, limits)


def _check_tools(tools: Any, key: str, limits: Limits) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        _refuse(key, f"The key {key} must be a list of objects, but is {_show(tools)}.")
    if len(tools) > limits.tools:
        _refuse(key, f"The key {key} has {len(tools)} items, but the limit is {limits.tools}.")
    _check_schema(tools, key, limits)


def _check_structured_outputs(wanted: Mapping[str, Any], limits: Limits) -> None:
    for key in ("regex", "whitespace_pattern"):
        if (pattern := wanted.get(key)) is not None:
            _check_regex(pattern, f"structured_outputs.{key}", limits)
    _check_grammar(wanted.get("grammar"), limits)
    _check_choice(wanted.get("choice"), limits)
    for key in ("json", "structural_tag"):
        value = wanted.get(key)
        where = f"structured_outputs.{key}"
        if isinstance(value, str):
            value = _parse_schema(value, where, limits)
        if value is not None:
            _check_schema(value, where, limits)


def _parse_schema(text: str, where: str, limits: Limits) -> Any:
    """A schema that comes as JSON in a string."""
    if len(text) > limits.schema_length:
        _refuse_length(where, len(text), limits.schema_length)
    try:
        _check_shape(text.encode("utf-8", "surrogatepass"), limits)
        return _parse(text)
    except InvalidRequest as error:
        _refuse(where, f"The schema in {where} is refused: {error}")


def _check_grammar(grammar: Any, limits: Limits) -> None:
    where = "structured_outputs.grammar"
    if grammar is None:
        return
    if not isinstance(grammar, str):
        _refuse(where, f"The key {where} must be a string, but is {_show(grammar)}.")
    if len(grammar) > limits.grammar_length:
        _refuse_length(where, len(grammar), limits.grammar_length)
    for match in _REPEAT.finditer(grammar):
        if any(_number(count) > limits.repeats for count in match.groups()):
            _refuse(
                where,
                f"The key {where} repeats something {_show_text(match.group())} times, but the "
                f"limit is {limits.repeats}.",
            )


def _check_choice(choice: Any, limits: Limits) -> None:
    where = "structured_outputs.choice"
    if choice is None:
        return
    if not isinstance(choice, list) or not all(isinstance(text, str) for text in choice):
        _refuse(where, f"The key {where} must be a list of strings, but is {_show(choice)}.")
    if len(choice) > limits.choices:
        _refuse(where, f"The key {where} has {len(choice)} items, the limit is {limits.choices}.")
    if (length := sum(map(len, choice))) > limits.schema_length:
        _refuse_length(where, length, limits.schema_length)


def _check_schema(schema: Any, where: str, limits: Limits) -> None:
    """Size, count, and what lengths and counts multiply to; references stay inside."""
    nodes, length = 0, 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, times = stack.pop()
        nodes += 1
        if isinstance(value, str):
            length += len(value)
        elif isinstance(value, list):
            stack.extend((item, times) for item in value)
        elif isinstance(value, dict):
            length += sum(map(len, value))
            times *= _repetitions(value)
            if times > limits.schema_states:
                _refuse(
                    where,
                    f"The lengths and counts of the schema in {where} multiply to {_show(times)}, "
                    f"but the limit is {limits.schema_states}.",
                )
            _check_keywords(value, where, limits)
            stack.extend((item, times) for item in value.values())
        if nodes + len(stack) > limits.schema_nodes:
            _refuse(
                where, f"The key {where} has more values than the limit of {limits.schema_nodes}."
            )
        if length > limits.schema_length:
            _refuse_length(where, length, limits.schema_length)


def _repetitions(schema: Mapping[str, Any]) -> int:
    """How often a compiler may write out what is below a schema."""
    counts = (schema.get(key) for key in _COUNTED)
    return max(1, *(int(count) for count in counts if isinstance(count, int | float)), 1)


def _check_keywords(schema: Mapping[str, Any], where: str, limits: Limits) -> None:
    if isinstance(pattern := schema.get("pattern"), str):
        _check_regex(pattern, where, limits)
    if isinstance(patterns := schema.get("patternProperties"), dict):
        for pattern in patterns:
            _check_regex(pattern, where, limits)
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        _refuse(where, f"The schema in {where} refers to another document, which is not taken.")


def _check_regex(pattern: Any, where: str, limits: Limits) -> None:
    if not isinstance(pattern, str):
        _refuse(where, f"The pattern in {where} must be a string, but is {_show(pattern)}.")
    if len(pattern) > limits.regex_length:
        _refuse(
            where,
            f"The pattern in {where} has {len(pattern)} characters, but the limit is "
            f"{limits.regex_length}.",
        )
    if regex_states(pattern) > limits.regex_states:
        _refuse(
            where,
            f"The pattern in {where} has more than {limits.regex_states} states once its "
            "repetitions are written out.",
        )


def regex_states(pattern: str) -> int:
    """Roughly the characters of a pattern after ``x{3}`` is written out as ``xxx``.

    Reads what decides size (groups, classes, escapes, repetitions) and takes the rest as it is;
    whether the pattern is valid is for the engine to say.
    """
    totals = [0]  # of each open group
    last = 0  # states of what a repetition would repeat
    at = 0
    while at < len(pattern):
        step = 1
        character = pattern[at]
        if character == "(":
            totals.append(0)
            last = 0
        elif character == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        elif match := _REPEAT.match(pattern, at):
            step = match.end() - at
            times = max(map(_number, match.groups()))
            totals[-1] += last * (times - 1) if times else 0
            last *= max(1, times)
        elif character not in "?*+|^$":
            step = _atom_length(pattern, at)
            last = 1
            totals[-1] += 1
        at += step
    return sum(totals)


def _atom_length(pattern: str, at: int) -> int:
    """Characters of one escape, class or plain character."""
    if pattern[at] == "\\":
        return 2
    if pattern[at] != "[":
        return 1
    end = at + 1
    if pattern[end : end + 1] == "^":
        end += 1
    end += 1  # a bracket that comes first stands for itself
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end + 1 - at


def _number(digits: str) -> int:
    return int(digits[:10]) if digits else 0


# --- words ----------------------------------------------------------------------------------


def _text(body: Mapping[str, Any], key: str, length: int) -> None:
    value = body.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        _refuse(key, f"The key {key} must be a string, but is {_show(value)}.")
    if len(value) > length:
        _refuse_length(key, len(value), length)


def _boolean(body: Mapping[str, Any], key: str) -> None:
    """True or false and nothing that vLLM would take for one, such as 1 or "yes"."""
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        _refuse(key, f"The key {key} must be true or false, but is {_show(value)}.")


def _integer(body: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(key, f"The key {key} must be a whole number, but is {_show(value)}.")
    if not least <= value <= most:
        _refuse(key, f"The key {key} is {_show(value)}, but must be between {least} and {most}.")
    return value


def _show(value: Any) -> str:
    """A value in words, without the texts of a request."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)} items"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a whole number of more than 18 digits"
    return json.dumps(value)


def _show_text(text: str) -> str:
    return text if len(text) <= 32 else text[:32] + "..."


def _printable(key: str) -> str:
    """A key of the request, fit for a message."""
    return _show_text(key).encode("ascii", "backslashreplace").decode()


def _refuse_length(where: str, length: int, limit: int) -> NoReturn:
    _refuse(where, f"The key {where} has {length} characters, but the limit is {limit}.")


def _refuse(param: str | None, message: str) -> NoReturn:
    raise InvalidRequest(message, param=param)
