"""The training script: masks, the weights that it writes, and that it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.demo import model as demo
from serve_app.demo import train
from serve_app.demo.shape import PATTERNS, Shape, rules_of
from serve_app.local_attention.plan import make_plan
from serve_app.pattern import FULL, LayerRule

SMALL = Shape(layers=2, hidden=64, intermediate=64, offsets=((1, 2, 3, 4),))


def llama(shape: Shape, *rules: LayerRule, seed: int = 0) -> train.Llama:
    model = train.Llama(shape, rules or (FULL,) * shape.layers)
    train.initialise(model, seed)
    return model


@pytest.mark.parametrize(
    "rule",
    [
        LayerRule("sliding_attention", 5),
        LayerRule("sliding_attention", 5, 2),
        LayerRule("chunked_attention", 6),
    ],
)
def test_a_mask_is_the_patterns(rule: LayerRule) -> None:
    mask = train._mask(rule, 20, torch.device("cpu"))
    assert mask is not None
    expected = [[rule.sees(i, j) for j in range(20)] for i in range(20)]
    assert mask.tolist() == expected


def test_lower_heads_begin_by_looking_at_their_offsets() -> None:
    model = llama(Shape())
    tokens = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    attention = model.model.layers[0].self_attn
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    turn = train._turns(model.shape, 300, x.device)
    q, k = (
        train._rotate(projection(x).view(1, 300, -1, 32).transpose(1, 2), turn)
        for projection in (attention.q_proj, attention.k_proj)
    )
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32)
    causal = torch.ones(300, 300).tril().bool()
    looked_at = scores.masked_fill(~causal, -torch.inf).argmax(-1)[0, :, 200:]
    for head, offset in enumerate(model.shape.offsets[0]):
        back = torch.arange(200, 300) - looked_at[head]
        assert (back == offset).float().mean() > 0.9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Some seconds of training, through the command's own path."""
    out = tmp_path_factory.mktemp("trained") / "model"
    options = ["--out", str(out), "--steps", "10", "--longest", "256", "--device", "cpu"]
    report = train.train(train.parse([*options, "--batch-tokens", "512", "--count", "4"]))
    return out, report


def test_the_loss_falls() -> None:
    recipe = train.Recipe(stages=((128, 1.0),), batch_tokens=512)
    trainer = train.Trainer(llama(SMALL), recipe, minutes=1, device="cpu", steps_asked=40)
    losses = [loss for _, _, loss in trainer.run()]
    assert trainer.tokens == 512 * trainer.steps == 512 * 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_report_says_what_was_trained(trained: tuple[Path, dict[str, Any]]) -> None:
    out, report = trained
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["tokens"] == 512 * report["steps"] == 5120
    assert list(report["accuracy"]) == ["256"]
    assert (out / "model.safetensors").stat().st_size < 8_000_000


def test_transformers_computes_the_same_logits(trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = trained
    theirs, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = train.Llama(Shape(), (FULL,) * 4)
    train.load(ours, out)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(out).encode("The access code " * 40)])
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours(tokens), atol=2e-4)


def test_a_run_can_begin_with_the_weights_of_another(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    start, _ = trained
    options = ["--out", str(tmp_path / "m"), "--start", str(start), "--attention", "chunked-3-1"]
    options += ["--steps", "1", "--longest", "256", "--device", "cpu", "--count", "2"]
    report = train.train(train.parse([*options, "--batch-tokens", "256"]))
    assert report["start"] == start.name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["attention_chunk_size"] == 256
    assert config["layer_types"] == ["chunked_attention"] * 3 + ["full_attention"]


def test_an_answer_counts_only_if_every_token_of_it_is_the_likeliest() -> None:
    model = llama(SMALL)
    prompt = train.Generator(0).prompt(200)
    answer = [*prompt.answer.encode(), demo.EOS]
    start = 199

    class Oracle:
        wrong: int | None = None

        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*tokens.shape, demo.VOCABULARY)
            for i, token in enumerate(answer):
                logits[0, start + i, 65 if i == self.wrong else token] = 1
            return logits

    oracle: Any = Oracle()
    assert train.right(oracle, [prompt], "cpu") == [True]
    oracle.wrong = len(answer) - 2
    assert train.right(oracle, [prompt], "cpu") == [False]
    assert train.right(model, [prompt], "cpu") == [False]


@pytest.mark.parametrize("attention", list(PATTERNS))
def test_a_written_config_asks_for_the_plan_that_was_trained(attention: str) -> None:
    shape = Shape()
    plan = make_plan(demo.config(shape, attention), environment={})
    assert plan is not None
    assert plan.rules == rules_of(shape, attention)
    assert make_plan(demo.config(shape, "full"), environment={}) is None
