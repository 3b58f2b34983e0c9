"""Generated chats that hide access codes in filler and ask for them, of exact token lengths.

A fact is ``The access code of <name> is <digits>.``; a question is ``What is the access code of
<name>?``, the form that ``load_tests`` asks in; the answer is the fact again. One token is one byte
(``serve_app.demo.model``), so a length in tokens is a length in bytes.

Training and held-out data share no name, no code and no filler sentence's form. Held out are the
names and the filler of ``load_tests`` too, so that what a load test asks was never trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from serve_app.demo.model import BOS, BYTES, EOS, SPECIAL_TOKENS

USER, ASSISTANT = (BYTES + SPECIAL_TOKENS.index(token) for token in ("<|user|>", "<|assistant|>"))
SPECIALS = 3  # <|bos|>, <|user|> and <|assistant|> around a prompt of one turn
HELD_OUT_SHARE = 8  # one name and one code in so many is held out

# What begins a syllable, its vowel and what ends it.
_SYLLABLES = (
    " b br c ch d f g gr h j k l m n p r s sh st t th tr v w y z",
    "a e i o u ai ea ia io oo",
    "  n r l s m ck nd x t",
)
_ONSETS, _VOWELS, _ENDS = (part.split(" ") for part in _SYLLABLES)
LOAD_TEST_NAMES = ("Ada", "Boris", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana", "Ivan", "Jana")

_WORDS = {
    "adjective": "old quiet green narrow bright heavy early distant broken gentle hollow wooden "
    "cold silver empty crowded little northern painted rusty silent steep warm yellow",
    "noun": "river garden letter engine market bridge window harbour lantern orchard ladder train "
    "valley kettle violin carpet chimney compass ferry blanket hammer island mirror basket",
    "verb": "waits turns stands rests begins changes leans returns drifts settles trembles shines "
    "stops vanishes appears sleeps wakes cracks hums falls",
    "place": "mill square station corner gate shore tower road bakery school well forest theatre "
    "canal church quarry library stable meadow lighthouse",
    "person": "baker teacher sailor farmer doctor clerk painter guard miller tailor pilot nurse "
    "captain gardener student writer smith fisher",
    "action": "carries finds paints repairs sells forgets counts borrows cleans watches measures "
    "hides opens closes buys loses",
    "time": "morning evening winter summer night autumn Sunday Monday afternoon spring",
}
_FORMS = (
    "Every {time} the {person} {action} a {adjective} {noun}. ",
    "A {adjective} {noun} {verb} near the {place}. ",
    "The {person} {action} the {noun}, and the {noun} {verb}. ",
    "In the {time}, nobody at the {place} {action} the {noun}. ",
    "Behind the {place} stands a {noun} with {count} {noun}s. ",
    "It was {time} when the {person} came to the {adjective} {place}. ",
    "Two {person}s met at the {place} and talked about the {noun}. ",
    "Since {year}, the {place} has had a {adjective} {noun}. ",
    "Some say that the {noun} {verb}; the {person} does not. ",
    "Why the {noun} {verb}, only the {person} knows. ",
    "Page {count} tells of a {person} and a {adjective} {noun}. ",
    "From the {place} one sees {count} {adjective} roofs. ",
)
_HELD_OUT_FORMS = (
    "The {adjective} {noun} {verb} by the {place}. ",  # load_tests' filler
    "When the {noun} {verb}, each {person} looks at the {place}. ",
    "Not one {person} in {count} {action} such a {noun}. ",
    "Beside a {adjective} {place}, {year} began with a {noun}. ",
)
# Facts of the same form about the same people that the question does not ask for.
_OTHER_FACTS = ("locker number", "badge number", "room number", "access level")


@dataclass(frozen=True, slots=True)
class Needle:
    """A name and its code; ``what`` is ``access code`` save for distractors."""

    name: str
    code: str
    what: str = "access code"

    @property
    def fact(self) -> str:
        return f"The {self.what} of {self.name} is {self.code}."

    @property
    def question(self) -> str:
        return f"What is the {self.what} of {self.name}?"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question over a context. ``depth`` is where its fact begins, 0 first and 1 last."""

    text: str
    needle: Needle
    depth: float

    @property
    def answer(self) -> str:
        return self.needle.fact

    def right(self, said: str) -> bool:
        """Whether an answer names this code and no other."""
        digits = "".join(c if c.isdigit() else " " for c in said).split()
        return digits == [self.needle.code]

    def tokens(self) -> list[int]:
        """The prompt as the chat template renders it, up to the assistant's turn."""
        return [BOS, USER, *self.text.encode(), ASSISTANT]


@dataclass(frozen=True, slots=True)
class Chat:
    """A whole conversation: ``tokens`` and, of equal length, whether each is an answer's."""

    tokens: npt.NDArray[np.int16]
    answers: npt.NDArray[np.bool_]


class Generator:
    """Draws prompts and chats from ``seed``, of the training or of the held-out data."""

    def __init__(self, seed: int, *, held_out: bool = False, filler_bytes: int = 200_000) -> None:
        self._draw = random.Random(f"{seed}/{held_out}")
        self._held_out = held_out
        self._filler_bytes = filler_bytes

    def prompt(
        self, tokens: int, *, depth: float | None = None, facts: int = 4, note: bool = False
    ) -> Prompt:
        """A prompt of exactly ``tokens`` tokens, special tokens included.

        ``facts`` are as many codes as fit, the asked one included; ``note`` begins the text with
        a number, as load tests do. Raises ``ValueError`` where not even one fact fits.
        """
        draw = self._draw
        depth = draw.random() if depth is None else depth
        opening = f"Note {draw.randrange(10**12):012d}. " if note else ""
        asked = self._needle()
        end = f"\n{asked.question}"
        room = tokens - SPECIALS - len(opening) - len(end) - len(asked.fact) - 1
        if room < 0:
            raise ValueError(f"{tokens} tokens do not hold a fact and a question")
        others = self._others(asked, min(facts - 1, room // 60))
        filler = self._filler(room - sum(len(other.fact) + 1 for other in others))
        cuts = [*((draw.random(), other) for other in others), (depth, asked)]
        body = _insert(filler, cuts)
        return Prompt(opening + body + end, asked, body.index(asked.fact) / max(1, len(body)))

    def chat(self, tokens: int) -> Chat:
        """A conversation of exactly ``tokens`` tokens that asks for as many codes as it can."""
        draw = self._draw
        room = tokens - 2
        most = max(1, (room - 20) // 110)
        asked = _distinct(self._needle() for _ in range(draw.randint((most + 1) // 2, most)))
        turns = [(needle.question, needle.fact) for needle in asked]
        used = sum(len(q) + len(a) + 3 for q, a in turns) + sum(len(a) + 1 for _, a in turns)
        while used > room:
            question, answer = turns.pop()
            asked.pop()
            used -= len(question) + 2 * len(answer) + 4
        others = self._others(asked[0], draw.randint(0, 1 + (room - used) // 150), asked)
        other_bytes = sum(len(other.fact) + 1 for other in others)
        if used + other_bytes > room:
            others, other_bytes = [], 0
        filler = self._filler(room - used - other_bytes)
        body = _insert(filler, [(draw.random(), needle) for needle in [*asked, *others]])
        draw.shuffle(turns)
        return _assemble(body + "\n", turns, tokens)

    def _needle(self, what: str = "access code") -> Needle:
        return Needle(self._name(), self._code(), what)

    def _others(self, asked: Needle, count: int, taken: Sequence[Needle] = ()) -> list[Needle]:
        """Facts that must not be answered with; one in four is about the asked name itself."""
        draw = self._draw
        names = {asked.name, *(needle.name for needle in taken)}
        others: list[Needle] = []
        for _ in range(max(0, count)):
            if draw.random() < 0.25:
                name = draw.choice(taken).name if taken else asked.name
                others.append(Needle(name, self._code(), draw.choice(_OTHER_FACTS)))
            elif (other := self._needle()).name not in names:
                names.add(other.name)
                others.append(other)
        return others

    def _name(self) -> str:
        draw = self._draw
        if self._held_out and draw.random() < 0.3:
            return draw.choice(LOAD_TEST_NAMES)
        while True:
            syllables = (
                draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_ENDS)
                for _ in range(draw.choice((1, 2, 2, 3)))
            )
            name = "".join(syllables).capitalize()
            if 3 <= len(name) <= 10 and name not in LOAD_TEST_NAMES and self._is_mine(name):
                return name

    def _code(self) -> str:
        while True:
            digits = self._draw.choice((4, 4, 4, 5, 6))
            code = f"{self._draw.randrange(10**digits):0{digits}d}"
            if self._is_mine(code):
                return code

    def _is_mine(self, word: str) -> bool:
        return (zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0) == self._held_out

    def _filler(self, length: int) -> str:
        """Sentences from a random place of the store, the last one cut to fit."""
        if length <= 0:
            return ""
        store, starts = self._store
        begin = starts[self._draw.randrange(len(starts))]
        text = store[begin : begin + length]
        while len(text) < length:
            text += store[: length - len(text)]
        return text

    @cached_property
    def _store(self) -> tuple[str, list[int]]:
        """Filler made once, and where its sentences begin."""
        words = {kind: text.split() for kind, text in _WORDS.items()}
        forms = _HELD_OUT_FORMS if self._held_out else _FORMS
        pieces, starts, length = [], [], 0
        while length < self._filler_bytes:
            sentence = self._sentence(self._draw.choice(forms), words)
            starts.append(length)
            pieces.append(sentence)
            length += len(sentence)
        return "".join(pieces), starts

    def _sentence(self, form: str, words: dict[str, list[str]]) -> str:
        draw = self._draw
        chosen = {kind: draw.choice(choices) for kind, choices in words.items()}
        return form.format(**chosen, count=draw.randint(2, 99), year=draw.randint(1700, 2030))


def _distinct(needles: Iterable[Needle]) -> list[Needle]:
    """Those of different names."""
    return list({needle.name: needle for needle in needles}.values())


def _insert(filler: str, facts: Sequence[tuple[float, Needle]]) -> str:
    """The filler with each fact put before the sentence that begins nearest its depth."""
    pieces, done = [], 0
    for depth, needle in sorted(facts, key=lambda pair: pair[0]):
        at = filler.rfind(". ", 0, round(depth * len(filler)) + 1) + 2
        at = max(done, at if at > 1 else 0)
        pieces += [filler[done:at], needle.fact, " "]
        done = at
    return "".join([*pieces, filler[done:]])


def _assemble(body: str, turns: Sequence[tuple[str, str]], tokens: int) -> Chat:
    ids, answers = [BOS], [False]

    def say(text: bytes, *, answer: bool) -> None:
        ids.extend(text)
        answers.extend([answer] * len(text))

    for index, (question, answer) in enumerate(turns):
        ids.append(USER)
        answers.append(False)
        say((body if index == 0 else "").encode() + question.encode(), answer=False)
        ids.append(ASSISTANT)
        answers.append(False)
        say(answer.encode(), answer=True)
        ids.append(EOS)
        answers.append(True)
    assert len(ids) == tokens, (len(ids), tokens)
    return Chat(np.array(ids, np.int16), np.array(answers, np.bool_))
