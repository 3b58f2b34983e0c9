"""Train the demo model from scratch: ``python -m serve_app.demo.train --out DIR``.

The model learns to answer questions about codes hidden in its context (``needles``). What makes so
small a model learn that in minutes:

1. Every sequence asks for as many codes as fit, so that it holds dozens of retrievals, not one.
2. Contexts begin at 256 tokens and double up to 8,192 (``Recipe.stages``).
3. Half of the circuit is known beforehand: to look a name up, each position must hold the bytes
   before it. Heads of the lower layers therefore begin with their attention on fixed offsets
   (``_look_back``); training is free to move it. The top layer begins without a preference and
   learns to look up, so it is the one that must see everything when the others are local.

The weights are ``transformers``' Llama in safetensors; ``report.json`` beside them has the steps
and the held-out accuracy by context length.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.demo import model as demo
from serve_app.demo.needles import Generator, Prompt
from serve_app.demo.shape import EPSILON, PATTERNS, Shape, rules_of
from serve_app.pattern import FULL, LayerRule

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
UNIT = 0.12  # spread of the residual stream at first, small enough for tied embeddings


SIZES = {
    "small": Shape(),  # 0.6M parameters; what is shipped
    "medium": Shape(hidden=256, intermediate=512, head_dim=64),  # 2.4M
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. ``stages`` are pairs of a context in tokens and its share of the time."""

    stages: tuple[tuple[int, float], ...] = (
        (256, 0.2),
        (512, 0.2),
        (1024, 0.2),
        (2048, 0.2),
        (4096, 0.1),
        (8192, 0.1),
    )
    batch_tokens: int = 8192
    learning_rate: float = 2e-3
    text_weight: float = 0.1  # of the loss on all that is not an answer
    warmup: float = 0.02  # of the time
    weight_decay: float = 0.01


class Attention(nn.Module):
    def __init__(self, shape: Shape, rule: LayerRule) -> None:
        super().__init__()
        self.rule, self.head_dim = rule, shape.head_dim
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, turn), _rotate(k, turn)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(seen.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, rule: LayerRule) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, EPSILON)
        self.self_attn = Attention(shape, rule)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, EPSILON)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """``transformers``' Llama with a rule for each layer; parameters bear the same names."""

    def __init__(self, shape: Shape, rules: Sequence[LayerRule]) -> None:
        super().__init__()
        self.shape, self.rules = shape, tuple(rules)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(demo.VOCABULARY, shape.hidden)
        self.model.layers = nn.ModuleList(Layer(shape, rule) for rule in rules)
        self.model.norm = nn.RMSNorm(shape.hidden, EPSILON)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of what follows each of ``tokens``."""
        length, device = tokens.shape[1], tokens.device
        turn = _turns(self.shape, length, device)
        masks = {rule: _mask(rule, length, device) for rule in set(self.rules)}
        x = self.model.embed_tokens(tokens)
        for layer, rule in zip(self.model.layers, self.rules, strict=True):
            x = layer(x, turn, masks[rule])
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def _turns(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, head_dim) of each position's angles."""
    angles = torch.outer(torch.arange(length, device=device).float(), _frequencies(shape, device))
    angles = torch.cat((angles, angles), 1)
    return angles.cos(), angles.sin()


def _frequencies(shape: Shape, device: torch.device | None = None) -> Tensor:
    half = shape.head_dim // 2
    return shape.theta ** (-torch.arange(half, device=device).float() / half)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, -1)
    return (x * turn[0] + torch.cat((-high, low), -1) * turn[1]).to(x.dtype)


def _mask(rule: LayerRule, length: int, device: torch.device) -> Tensor | None:
    """What each query sees, as ``pattern`` says it; None for plain causal attention."""
    if rule == FULL or rule.span + rule.sinks >= length:
        return None
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    if rule.kind == "chunked_attention":
        return (key <= query) & (key // rule.span == query // rule.span)
    return (key <= query) & ((key > query - rule.span) | (key < rule.sinks))


@torch.no_grad()
def initialise(model: Llama, seed: int) -> None:
    """Draw every weight from ``seed``; projections keep their input's scale.

    The first feature of the residual stream is the same for every token and is written by nothing:
    it is what heads that look at an offset, whatever stands there, can hold on to.
    """
    shape, draw = model.shape, torch.Generator().manual_seed(seed)

    def fill(weight: Tensor, scale: float = 1.0) -> None:
        spread = scale / math.sqrt(weight.shape[1])
        weight.copy_(torch.randn(weight.shape, generator=draw) * spread)

    embedding = model.model.embed_tokens.weight
    fill(embedding, UNIT * math.sqrt(shape.hidden))
    constant = math.sqrt(shape.hidden / 8)
    embedding[:, 0] = 0
    embedding *= UNIT * math.sqrt(shape.hidden) / embedding.norm(dim=1, keepdim=True)
    embedding[:, 0] = UNIT * constant
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        back = index < len(shape.offsets)
        for part in (attention.q_proj, attention.k_proj):
            fill(part.weight, 0.02 if back else 1.0)
        for part in (attention.v_proj, mlp.gate_proj, mlp.up_proj):
            fill(part.weight)
        attention.v_proj.weight[:, 0] = 0
        fill(mlp.down_proj.weight, UNIT / 2)
        mlp.down_proj.weight[0] = 0
        if back:
            _look_back(attention, shape, shape.offsets[index], constant / math.sqrt(1.1 + index))
            fill(attention.o_proj.weight, UNIT)
        else:  # what is looked at is said again
            groups = shape.heads // shape.kv_heads
            values = attention.v_proj.weight.view(shape.kv_heads, shape.head_dim, shape.hidden)
            copies = values.repeat_interleave(groups, 0).flatten(0, 1).T
            attention.o_proj.weight.copy_(UNIT * copies)
        attention.o_proj.weight[0] = 0


def _look_back(attention: Attention, shape: Shape, offsets: Sequence[int], constant: float) -> None:
    """Make head ``h`` attend ``offsets[h]`` tokens back, by the constant feature alone.

    With ``k = u`` and ``q = u`` turned back by the offset, rotary positions make the score
    ``sum(u_i^2 cos((distance - offset) w_i))``, which is largest at the offset.
    """
    half, sharpness = shape.head_dim // 2, 20.0  # gap to the neighbours: about half of it
    frequencies = _frequencies(shape)
    strength = frequencies**0.25 * (frequencies > 0.005)
    scale = math.sqrt(sharpness * math.sqrt(shape.head_dim)) / constant
    key = torch.cat((strength, torch.zeros(half))) * scale
    for head in range(shape.kv_heads):
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        attention.k_proj.weight[rows, 0] = key
    for head, offset in enumerate(offsets):
        angle = frequencies * offset
        query = torch.cat((strength * angle.cos(), -strength * angle.sin())) * scale
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        attention.q_proj.weight[rows, 0] = query


def loss_of(logits: Tensor, tokens: Tensor, answers: Tensor, text_weight: float) -> Tensor:
    """Mean over answers' tokens, plus ``text_weight`` times the mean over the others."""
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    asked = answers[:, 1:].flatten().float()
    rest = 1 - asked
    return (each * asked).sum() / asked.sum() + text_weight * (each * rest).sum() / rest.sum()


class Chats(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of chats of one length; every worker draws its own."""

    def __init__(self, length: int, rows: int, seed: int) -> None:
        self.length, self.rows, self.seed = length, rows, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        generator = Generator(hash((self.seed, self.length, number)))
        while True:
            chats = [generator.chat(self.length) for _ in range(self.rows)]
            yield (
                torch.stack([torch.from_numpy(chat.tokens) for chat in chats]),
                torch.stack([torch.from_numpy(chat.answers) for chat in chats]),
            )


@torch.no_grad()
def right(model: Llama, prompts: Sequence[Prompt], device: str) -> list[bool]:
    """Whether greedy decoding gives each answer to the letter. The prompts' lengths are equal.

    One pass: the greedy answer is the right one if and only if, after each part of the right
    answer, the next token of it is the likeliest.
    """
    answers = [[*prompt.answer.encode(), demo.EOS] for prompt in prompts]
    longest = max(map(len, answers))
    rows = [
        prompt.tokens() + answer + [demo.PAD] * (longest - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    likeliest = model(torch.tensor(rows, device=device)).argmax(-1).tolist()
    start = len(prompts[0].tokens()) - 1
    return [
        row[start : start + len(answer)] == answer
        for row, answer in zip(likeliest, answers, strict=True)
    ]


def accuracy(
    model: Llama, device: str, *, lengths: Sequence[int] = LENGTHS, count: int = 100, seed: int = 1
) -> dict[str, float]:
    """Held-out share of exact answers by context length, at even depths, among other codes."""
    result = {}
    for length in lengths:
        generator = Generator(seed, held_out=True)
        prompts = [
            generator.prompt(length, depth=(i + 0.5) / count, facts=6, note=i % 2 == 0)
            for i in range(count)
        ]
        rows = max(1, 16384 // length)
        said = [
            answer
            for i in range(0, count, rows)
            for answer in right(model, prompts[i : i + rows], device)
        ]
        result[str(length)] = sum(said) / count
    return result


@dataclass
class Trainer:
    """One run of so many minutes, evaluation not counted; or of ``steps_asked``, if that is given,
    which ends with the same weights on the same machine."""

    model: Llama
    recipe: Recipe
    minutes: float
    device: str
    seed: int = 0
    workers: int = 0
    steps_asked: int | None = None
    steps: int = 0
    tokens: int = 0
    spent_s: float = 0.0

    def run(self) -> Iterator[tuple[float, int, float]]:
        """Train; yields the share done, the context and the loss, after each step."""
        parameters = list(self.model.parameters())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        until = 0.0
        for length, share in self.recipe.stages:
            until += share
            rows = max(1, self.recipe.batch_tokens // length)
            loader = torch.utils.data.DataLoader(
                Chats(length, rows, self.seed),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=8 if self.workers else None,
            )
            batches = iter(loader)
            while (done := self._done()) < min(until, 1.0):
                started = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(done)
                loss = self._step(*next(batches))
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.steps += 1
                self.tokens += rows * length
                value = loss.item() if self.steps % 20 == 0 or self.device == "cpu" else math.nan
                self.spent_s += time.monotonic() - started
                yield done, length, value

    def _done(self) -> float:
        if self.steps_asked is not None:
            return self.steps / self.steps_asked
        return self.spent_s / (60 * self.minutes)

    def _rate(self, done: float) -> float:
        """A linear warm-up, then a cosine down to a twentieth."""
        rise = min(1.0, (done + 1e-3) / self.recipe.warmup)
        fall = 0.5 * (1 + math.cos(math.pi * done))
        return self.recipe.learning_rate * rise * (0.05 + 0.95 * fall)

    def _step(self, tokens: Tensor, answers: Tensor) -> Tensor:
        tokens = tokens.to(self.device, torch.long, non_blocking=True)
        answers = answers.to(self.device, non_blocking=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(tokens)
        loss = loss_of(logits, tokens, answers, self.recipe.text_weight)
        loss.backward()
        return loss.detach()


def save(model: Llama, directory: Path, attention: str, report: Mapping[str, Any]) -> None:
    """Write the model in bfloat16, as ``transformers`` and vLLM load it, and its report."""
    from safetensors.torch import save as serialised

    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    data = serialised(weights, metadata={"format": "pt"})
    demo.write(directory, demo.config(model.shape, attention), data, report)


def load(model: Llama, directory: Path) -> None:
    """Read the weights that ``save`` wrote."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(directory / "model.safetensors"))


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, save now and then and at the end, and evaluate what was saved."""
    shape = SIZES[options.size]
    recipe = Recipe(batch_tokens=options.batch_tokens)
    if options.longest:
        recipe = dataclasses.replace(recipe, stages=_up_to(recipe.stages, options.longest))
    model = Llama(shape, rules_of(shape, options.attention))
    if options.start is None:
        initialise(model, options.seed)
    else:
        load(model, options.start)
    model.to(options.device)
    trainer = Trainer(
        model, recipe, options.minutes, options.device, options.seed, options.workers, options.steps
    )
    last = time.monotonic()
    for done, length, loss in trainer.run():
        if not math.isnan(loss) and time.monotonic() - last > options.every:
            last = time.monotonic()
            print(
                f"{done:4.0%}  context {length:5}  step {trainer.steps:6}  "
                f"{trainer.tokens / 1e6:8.1f}M tokens  loss {loss:.4f}",
                flush=True,
            )
            save(model, options.out, options.attention, _report(options, trainer))
    save(model, options.out, options.attention, _report(options, trainer))
    load(model, options.out)  # what was rounded to bfloat16 is what is measured
    report = _report(options, trainer)
    longest = recipe.stages[-1][0]
    lengths = [length for length in LENGTHS if length <= longest]
    report["accuracy"] = accuracy(model, options.device, lengths=lengths, count=options.count)
    save(model, options.out, options.attention, report)
    return report


def _up_to(stages: Sequence[tuple[int, float]], longest: int) -> tuple[tuple[int, float], ...]:
    """The stages up to a context, over the whole time."""
    kept = [stage for stage in stages if stage[0] <= longest]
    whole = sum(share for _, share in kept)
    return tuple((length, share / whole) for length, share in kept)


def _report(options: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    return {
        "attention": options.attention,
        "start": None if options.start is None else options.start.name,
        "seed": options.seed,
        "minutes": trainer.spent_s / 60,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.steps,
        "tokens": trainer.tokens,
        "shape": dataclasses.asdict(trainer.model.shape),
        "recipe": dataclasses.asdict(trainer.recipe),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m serve_app.demo.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write the model")
    parser.add_argument("--attention", choices=["full", *PATTERNS], default="full")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--start", type=Path, help="a directory whose weights to begin with")
    parser.add_argument("--minutes", type=float, default=2 if cuda else 120)
    parser.add_argument("--steps", type=int, help="so many steps, instead of minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=0, help="the longest context in tokens")
    parser.add_argument("--batch-tokens", type=int, default=65536 if cuda else 2048)
    parser.add_argument("--workers", type=int, default=12 if cuda else 0, help="data processes")
    parser.add_argument("--count", type=int, default=100, help="questions asked at each length")
    parser.add_argument("--every", type=float, default=30, help="seconds between lines and saves")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    report = train(options)
    for length, share in report["accuracy"].items():
        print(f"context {length:>5}  exact answers {share:.0%}")


if __name__ == "__main__":
    main()
