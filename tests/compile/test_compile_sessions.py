"""Nothing recompiles in whole sessions with Dynamo's guards; a guard that fails is named."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import RecompileError

from compile_config import CompileConfig, compile_train_step
from generation.sampling import Sampling, sample
from model import ModelArgs, Transformer
from testing import randomize, rms
from training.optim import Optimizer
from training.stages import learning_rate

pytestmark = pytest.mark.compile
BATCH, CHUNK = 4, 64


@pytest.fixture
def strict():
    """A recompile raises, naming the guard that failed."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def build() -> Transformer:
    model = randomize(Transformer(ModelArgs.debug()), seed=1).eval()
    model.setup_caches(BATCH, 512)
    return model


def tokens_of(T: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (BATCH, T), generator=torch.Generator().manual_seed(seed))


def phase(model: Transformer, logits: str, filtered: bool = False):
    """Model and sampling as one function, compiled with its guards on."""

    def run(tokens, pos, lengths, *sampling):
        scores = model(tokens, pos, lengths, logits=logits)
        prompt = torch.arange(BATCH)
        return scores, sample(scores[:, -1], prompt, pos + lengths, Sampling(*sampling), filtered)

    return torch.compile(run, backend="eager", fullgraph=True, dynamic=False)


SESSIONS = {  # name -> (new tokens, logits, [(positions, lengths)])
    "prompt lengths": (
        CHUNK,
        "last",
        [([0] * 4, [1, 2, 63, 64]), ([0] * 4, [5, 64, 64, 3]), ([64, 64, 0, 0], [64, 0, 0, 17])],
    ),
    "every boundary": (
        1,
        "all",
        [([p, max(0, p - 3), p + 120, p + 250], [1] * 4) for p in range(12)]
        + [([511, 510, 509, 128], [1] * 4)],
    ),
    "ragged rows": (
        1,
        "all",
        [([3, 127, 128, 0], lengths) for lengths in ([1] * 4, [0, 1, 0, 1], [0] * 4)],
    ),
    "rewinds": (
        4,
        "all",
        [([40 + at, 130 + at, at, 255], [4, 4, 2, 1]) for at in (0, 4, 8, 1, 5, 3)],
    ),
    "two conversations": (
        CHUNK,
        "last",
        [
            ([0] * 4, [64] * 4),
            ([64] * 4, [64] * 4),
            ([0] * 4, [9, 8, 64, 1]),
            ([9, 8, 64, 1], [1] * 4),
        ],
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_compiles_once(strict, name):
    T, logits, calls = SESSIONS[name]
    run, model = phase(model := build(), logits), model
    eager = build()
    for i, (pos, lengths) in enumerate(calls):
        sampling = Sampling.of(
            0.1 * i, 5 + i, 1 - 0.05 * i, i, "cpu"
        )  # another temperature, top-k, top-p and seed each time
        at, lengths = torch.tensor(pos), torch.tensor(lengths)
        with torch.no_grad():
            got, token = run(tokens_of(T, i), at, lengths, *sampling)
            expected = eager(tokens_of(T, i), at, lengths, logits=logits)
        valid = (
            torch.arange(got.shape[1]) < lengths[:, None]
            if logits == "all"
            else lengths[:, None] > 0
        )
        assert not valid.any() or rms(got[valid], expected[valid]) <= 1e-5
        assert ((token >= 0) & (token < 256)).all()


def test_filtered_sampling_compiles_once(strict):
    run = phase(build(), "all", filtered=True)
    with torch.no_grad():
        for i in range(6):
            run(
                tokens_of(1, i),
                torch.full((BATCH,), i),
                torch.ones(BATCH, dtype=torch.int64),
                *Sampling.of(i / 3, 1 + 9 * i, 1 - i / 9, i, "cpu"),
            )


def test_training_compiles_once(strict):
    """Fifty steps: scheduled rates, other documents in every row, one to three micro-batches."""
    model = randomize(Transformer(ModelArgs.debug()), seed=1).train()
    step = compile_train_step(
        model, Optimizer(model), CompileConfig(backend="eager", region="model"), micro_batch=2
    )
    generator = torch.Generator().manual_seed(0)
    for i in range(50):
        tokens = torch.randint(0, 256, (2 + i % 3 * 2, 33), generator=generator)
        docs = torch.randint(0, 2, (len(tokens), 32), generator=generator).cumsum(1)
        docs[:, 32 - i % 5 :] = -1
        losses = step(tokens[:, :-1], tokens[:, 1:], docs, torch.tensor(learning_rate(i, 50, 1e-3)))
        assert losses["loss"].isfinite()


def test_the_optimizer_compiles_once(strict):
    model = randomize(Transformer(ModelArgs.debug()), seed=1).train()
    optimizer = Optimizer(model)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True, dynamic=False)
    for i in range(4):
        model(
            torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(i))
        ).square().mean().backward()
        step(torch.tensor(learning_rate(i, 4, 1e-3)))


def test_the_failing_guard_is_named(strict):
    """A Python-int position is what this suite is for: the message says which value changed."""
    model = build()
    decode = torch.compile(
        lambda tokens, at: model(tokens, torch.full((BATCH,), at)),
        backend="eager",
        fullgraph=True,
        dynamic=False,
    )
    with torch.no_grad(), pytest.raises(RecompileError, match=r"at == 3"):
        for at in (3, 4):
            decode(tokens_of(1, at), at)
