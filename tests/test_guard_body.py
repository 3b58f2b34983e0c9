"""Bad requests: each is refused with a full sentence, quickly, and good ones pass unchanged.

The bodies and the check of a refusal are also for the other tests of ``guard``.
"""

from __future__ import annotations

import gc
import json
import re
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import InvalidRequest
from serve_app.guard.body import CHAT, COMPLETIONS, check_body
from serve_app.guard.limits import Limits

LIMITS = Limits()
USER = {"role": "user", "content": "hello"}


def chat(**extra: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], **extra}).encode()


def completion(**extra: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello", **extra}).encode()


def message(**extra: Any) -> bytes:
    return chat(messages=[{**USER, **extra}])


def part(**fields: Any) -> bytes:
    return message(content=[{"type": "text", "text": "look"}, fields])


# What is wrong, the body, the key at fault, and words of the sentence.
CHATS = [
    ("no messages", b"{}", "messages", "must be a list, but is missing"),
    ("messages null", chat(messages=None), "messages", "must be a list"),
    ("messages a string", chat(messages="hello"), "messages", "a string of 5 characters"),
    ("messages an object", chat(messages={"0": USER}), "messages", "must be a list"),
    ("messages empty", chat(messages=[]), "messages", "has 0 items"),
    ("2,049 messages", chat(messages=[USER] * 2049), "messages", "has 2049 items"),
    ("a message a string", chat(messages=["hi"]), "messages[0]", "must be an object"),
    ("no role", chat(messages=[{"content": "a"}]), "messages[0].role", "but is missing"),
    ("role a number", message(role=1), "messages[0].role", "but is 1"),
    ("role too long", message(role="u" * 65), "messages[0].role", "1 to 64 characters"),
    ("content a number", message(content=3.5), "messages[0].content", "but is 3.5"),
    ("content an object", message(content={}), "messages[0].content", "a list of parts"),
    ("a part a number", message(content=[1]), "messages[0].content[0]", "must be an object"),
    ("text null", part(type="text", text=None), "messages[0].content[1].text", "missing"),
    ("no type", part(text="a"), "messages[0].content[1]", "plain text"),
    ("type a list", part(type=[], text="a"), "messages[0].content[1]", "plain text"),
    (
        "an image's address",
        part(type="image_url", image_url={"url": "http://10.0.0.1/"}),
        "messages[0].content[1]",
        "images, audio, video, files",
    ),
    ("an address without a type", part(image_url="http://a/"), "messages[0].content[1]", "images"),
    (
        "an address in a text",
        part(type="text", text="a", image_url="file:///etc/passwd"),
        "messages[0].content[1]",
        "images",
    ),
    ("audio", part(type="input_audio", input_audio={}), "messages[0].content[1]", "audio"),
    ("video", part(type="video_url", video_url={}), "messages[0].content[1]", "video"),
    ("a file", part(type="file", file={"file_id": "1"}), "messages[0].content[1]", "files"),
    ("embeddings", part(type="image_embeds", image_embeds="A"), "messages[0].content[1]", "images"),
    ("tool calls an object", message(tool_calls={}), "messages[0].tool_calls", "list of objects"),
    (
        "arguments too deep",
        message(tool_calls=[{"function": {"name": "f", "arguments": "[" * 10_000}}]),
        "messages[0].tool_calls",
        "nested deeper",
    ),
    ("a template", chat(chat_template="{{ 7 * 7 }}"), "chat_template", "not taken"),
    (
        "template arguments",
        chat(chat_template_kwargs={"chat_template": "x"}),
        "chat_template_kwargs",
        "has chat_template; taken here: none",
    ),
    ("template arguments a list", chat(chat_template_kwargs=[]), "chat_template_kwargs", "object"),
    ("spoken answers", chat(modalities=["text", "audio"]), "modalities", "text"),
    ("a voice", chat(audio={"voice": "a"}), "audio", "not taken"),
    ("media options", chat(media_io_kwargs={"image": {}}), "media_io_kwargs", "media"),
    ("media arguments", chat(mm_processor_kwargs={"a": 1}), "mm_processor_kwargs", "media"),
    ("KV transfer", chat(kv_transfer_params={"a": 1}), "kv_transfer_params", "engines"),
    ("engine arguments", chat(vllm_xargs={"a": 1}), "vllm_xargs", "engines"),
    ("beam search", chat(use_beam_search=True), "use_beam_search", "use n"),
    ("logprobs a number", chat(logprobs=5), "logprobs", "true or false, but is 5"),
    ("top_logprobs 21", chat(logprobs=True, top_logprobs=21), "top_logprobs", "between 0 and 20"),
    ("top_logprobs of all", chat(logprobs=True, top_logprobs=-1), "top_logprobs", "is -1"),
    ("prompt_logprobs of all", chat(prompt_logprobs=-1), "prompt_logprobs", "is -1"),
]
BOTH = [
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "is 0, but must be between 1 and 1048576"),
    ("max_tokens -1", {"max_tokens": -1}, "max_tokens", "is -1"),
    ("max_tokens 2**20 + 1", {"max_tokens": 2**20 + 1}, "max_tokens", "is 1048577"),
    ("max_tokens 10**30", {"max_tokens": 10**30}, "max_tokens", "more than 18 digits"),
    ("max_tokens a float", {"max_tokens": 1.5}, "max_tokens", "a whole number, but is 1.5"),
    ("max_tokens a string", {"max_tokens": "9"}, "max_tokens", "a string of 1 characters"),
    ("max_tokens true", {"max_tokens": True}, "max_tokens", "but is true"),
    ("max_completion_tokens 0", {"max_completion_tokens": 0}, "max_completion_tokens", "is 0"),
    ("min_tokens alone", {"min_tokens": 9}, "min_tokens", "max_tokens is not given"),
    ("min_tokens, null", {"min_tokens": 9, "max_tokens": None}, "min_tokens", "not given"),
    ("min above max", {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most max_tokens"),
    ("min_tokens -1", {"min_tokens": -1}, "min_tokens", "is -1"),
    ("n 0", {"n": 0}, "n", "is 0, but must be between 1 and 16"),
    ("n 10,000", {"n": 10_000}, "n", "is 10000"),
    ("n a float", {"n": 2.0}, "n", "a whole number"),
    ("best_of 17", {"best_of": 17}, "best_of", "is 17"),
    ("best_of below n", {"n": 4, "best_of": 2}, "best_of", "at least n"),
    ("5 stops", {"stop": list("abcde")}, "stop", "has 5 items, but the limit is 4"),
    ("a long stop", {"stop": ["a" * 257]}, "stop", "257 characters"),
    ("an empty stop", {"stop": ""}, "stop", "0 characters"),
    ("stop a number", {"stop": 1}, "stop", "a string or a list of strings"),
    ("stop of numbers", {"stop": [1]}, "stop", "a string or a list of strings"),
    ("129 bad words", {"bad_words": ["a"] * 129}, "bad_words", "129 items"),
    ("token ids text", {"stop_token_ids": ["a"]}, "stop_token_ids", "token ids"),
    ("1,025 ids", {"allowed_token_ids": [1] * 1025}, "allowed_token_ids", "1025 items"),
    ("a negative id", {"logprob_token_ids": [-1]}, "logprob_token_ids", "token id -1"),
    ("bias a list", {"logit_bias": [1]}, "logit_bias", "must be an object"),
    (
        "1,025 biases",
        {"logit_bias": {str(token): 1 for token in range(1025)}},
        "logit_bias",
        "has 1025 entries",
    ),
    ("bias of a word", {"logit_bias": {"cat": 1}}, "logit_bias", "cat, which is not a token"),
    ("bias of -1", {"logit_bias": {"-1": 1}}, "logit_bias", "-1, which is not"),
    ("bias 101", {"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    ("bias null", {"logit_bias": {"1": None}}, "logit_bias", "is missing"),
    ("temperature text", {"temperature": "hot"}, "temperature", "must be a number"),
    ("top_p a list", {"top_p": [1]}, "top_p", "must be a number"),
    ("seed 2**63", {"seed": 2**63}, "seed", "between -9223372036854775808"),
    ("stream text", {"stream": "yes"}, "stream", "true or false"),
    ("stream 1", {"stream": 1}, "stream", "true or false"),
    ("stream_options a list", {"stream_options": []}, "stream_options", "an object"),
    ("a model of 2,000", {"model": "m" * 2000}, "model", "2000 characters"),
    ("model a list", {"model": ["m"]}, "model", "must be a string"),
    ("user a number", {"user": 5}, "user", "must be a string"),
    ("truncate -2", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "is -2"),
    ("embeddings as prompt", {"prompt_embeds": "AAAA"}, "prompt_embeds", "token ids"),
]
PROMPTS = [
    ("no prompt", completion(prompt=None), "prompt", "but is missing"),
    ("an empty prompt", completion(prompt=""), "prompt", "not empty"),
    ("no prompts", completion(prompt=[]), "prompt", "not empty"),
    ("prompt a number", completion(prompt=5), "prompt", "but is 5"),
    ("prompt an object", completion(prompt={}), "prompt", "an object"),
    ("text and ids", completion(prompt=["a", 1]), "prompt[0]", "all strings or all lists"),
    ("an empty prompt of two", completion(prompt=["a", ""]), "prompt[1]", "not empty"),
    ("empty ids", completion(prompt=[[1], []]), "prompt[1]", "not empty"),
    ("ids true", completion(prompt=[True]), "prompt[0]", "but prompt[0] is true"),
    ("ids floats", completion(prompt=[[1.0]]), "prompt[0]", "token ids"),
    ("a negative id", completion(prompt=[1, -5]), "prompt", "token id -5"),
    ("an id past 31 bits", completion(prompt=[[2**31]]), "prompt[0]", "2147483648"),
    ("257 prompts", completion(prompt=["a"] * 257), "prompt", "257 prompts"),
    ("65 sequences", completion(prompt=["a"] * 13, n=5), "n", "65 sequences"),
    ("logprobs 21", completion(logprobs=21), "logprobs", "is 21"),
    ("logprobs of all", completion(logprobs=-1), "logprobs", "is -1"),
    ("logprobs true", completion(logprobs=True), "logprobs", "a whole number"),
]
CASES = [
    *((name, CHAT, raw, param, words) for name, raw, param, words in CHATS),
    *((name, COMPLETIONS, raw, param, words) for name, raw, param, words in PROMPTS),
    *((name, CHAT, chat(**extra), param, words) for name, extra, param, words in BOTH),
    *(
        (f"{name}, to complete", COMPLETIONS, completion(**extra), param, words)
        for name, extra, param, words in BOTH
    ),
]


def test_the_suite_is_large_enough() -> None:
    assert len(CASES) >= 60


def check_refused(route: str, raw: bytes, param: str | None, words: str) -> None:
    """Refused at once, with a full sentence that says ``words`` of the key ``param``."""
    gc.disable()  # a collection takes as long as all that the tests before have left behind
    try:
        began = time.process_time()
        with pytest.raises(InvalidRequest) as caught:
            check_body(raw, route, LIMITS)
        assert time.process_time() - began < 0.1
    finally:
        gc.enable()
    error = caught.value
    assert error.param == param
    assert words in str(error)
    assert re.fullmatch(r"(The|A|An) .*\.", str(error), re.DOTALL), "a full sentence"
    assert len(str(error)) < 400
    json.dumps(error.body()).encode()


@pytest.mark.parametrize(
    ("route", "raw", "param", "words"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_refused(route: str, raw: bytes, param: str | None, words: str) -> None:
    check_refused(route, raw, param, words)


GOOD = [
    (CHAT, chat()),
    (CHAT, chat(max_tokens=None, n=None, stop=None, logit_bias=None, tools=None, stream=None)),
    (CHAT, chat(max_tokens=1, n=16, stop=["a"] * 4, logit_bias={"0": -100, "7": 2.5}, seed=-5)),
    (CHAT, chat(logprobs=True, top_logprobs=20, min_tokens=5, max_completion_tokens=5)),
    (CHAT, chat(messages=[USER] * 2048)),
    (CHAT, part(type="text", text="a", cache_control={"type": "ephemeral"})),
    (CHAT, message(content=["plain", {"type": "input_text", "text": "b"}])),
    (CHAT, message(role="assistant", content=None, tool_calls=[
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    ])),
    (CHAT, chat(kv_transfer_params=None, use_beam_search=False, modalities=["text"])),
    (COMPLETIONS, completion()),
    (COMPLETIONS, completion(prompt=["a", "b"], n=2, best_of=4)),
    (COMPLETIONS, completion(prompt=[0, 1, 2**31 - 1])),
    (COMPLETIONS, completion(prompt=[[1, 2], [3]])),
    (COMPLETIONS, completion(prompt=list(range(500_000)))),
    (COMPLETIONS, completion(echo=True, max_tokens=0, logprobs=5)),
    (COMPLETIONS, completion(unknown={"any": [1, None, True, 1.5e300]})),
]  # fmt: skip


@pytest.mark.parametrize(("route", "raw"), GOOD)
def test_good_requests_pass_unchanged(route: str, raw: bytes) -> None:
    assert check_body(raw, route, LIMITS) == json.loads(raw)


def test_limits_open_what_is_off_by_default() -> None:
    raw = chat(chat_template="{{ messages }}", chat_template_kwargs={"enable_thinking": False})
    open_ = Limits(chat_template=True, chat_template_kwargs=frozenset({"enable_thinking"}))
    assert check_body(raw, CHAT, open_)["chat_template"] == "{{ messages }}"
    with pytest.raises(InvalidRequest, match="taken here: enable_thinking"):
        check_body(chat(chat_template_kwargs={"tools": 1}), CHAT, open_)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "pattern"]) | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KEYS = [
    *("messages", "prompt", "tools", "functions", "structured_outputs", "response_format", "n"),
    *("max_tokens", "min_tokens", "stop", "logit_bias", "logprobs", "top_logprobs", "best_of"),
    *("stop_token_ids", "chat_template_kwargs", "stream", "model", "seed", "modalities", "echo"),
]


@settings(max_examples=400, deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(KEYS), VALUES), route=st.sampled_from([CHAT, COMPLETIONS])
)
def test_any_json_is_taken_or_refused_but_never_breaks(body: dict[str, Any], route: str) -> None:
    raw = json.dumps({"messages": [USER], "prompt": "a", **body}).encode()
    with suppress(InvalidRequest):
        assert isinstance(check_body(raw, route, LIMITS), dict)
