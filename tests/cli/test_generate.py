"""Contracts of generate.py: streams, sampling, no recompiles, clear errors, true reports."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import generate as G
from compile_config import CompileConfig
from generation import engine as engine_module
from generation import sampling as S
from generation.engine import Engine
from generation.session import StreamSession
from model import ModelArgs, Transformer
from testing import Margins, clear_choices, hf_model, randomize, rms
from tools import torch_private

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "assets" / "tiny"
KEYS = {
    "request": ["seed", "dtype", "device", "preset", "threads", "act_quant", "versions"],
    "rows": ["prompt_tokens", "tokens", "text", "stop_reason", "accepted_per_step"],
    "seconds": ["tok_per_s", "ttft_s", "ttft_warm_s", "compile_s"],
    "compile": ["compiled_as", "graphs", "graphs_loaded", "breaks", "recompiles"],
    "ahead": ["switched_at", "eager_tokens", "compiled_tokens"],
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return randomize(Transformer(ModelArgs.debug()), seed=1)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    """The model as an fp32 checkpoint without a tokenizer."""
    path = tmp_path_factory.mktemp("random") / "v4"
    checkpoint.save(model, path, dtype=torch.float32)
    return str(path)


def ids_of(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(2, 256, (length,), generator=random).tolist()


def comma(ids: list[int]) -> str:
    return ",".join(map(str, ids))


def greedy_by_transformers(hf, prompt: list[int], count: int) -> tuple[list[int], list[bool]]:
    """The most likely continuation; for each token whether every choice had a clear margin."""
    ids, sure = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            with Margins(hf) as margins:
                logits = hf(torch.tensor([ids])).logits[0, -1]
            top = logits.topk(2).values
            sure.append(
                bool(clear_choices(margins.smallest())[0, -1]) and float(top[0] - top[1]) > 1e-3
            )
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :], sure


def clear(tokens: list[int], sure: list[bool]) -> tuple[list[int], int]:
    """The tokens before the first one that a rounding could change, and how many they are."""
    count = next((i for i, ok in enumerate(sure) if not ok), len(sure))
    assert count >= 6  # enough to tell
    return tokens[:count], count


def run(capsys, command: str, *argv: str, code: int = 0):
    """main(command --json) -> its JSON object; with another code, the one line of its message."""
    capsys.readouterr()
    assert G.main([*command.split(), *argv, "--json"]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    if code:
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1 and not captured.out, captured
        return lines[0]
    return json.loads(captured.out.strip().splitlines()[-1])


def eager(model, rows: int = 1, max_seq_len: int = 512) -> Engine:
    """An engine on a copy of the model."""
    return Engine(copy.deepcopy(model), "eager", max_batch_size=rows, max_seq_len=max_seq_len)


def ahead_of_host(model, rows: int = 1) -> Engine:
    """The same, with eight decode steps between two reads, as on a GPU."""
    engine = eager(model, rows)
    engine.steps_per_sync, engine.max_rewind = 8, 15
    engine.model.reset_caches()  # so that the next stream makes caches for this rewind
    return engine


def collect(engine: Engine, prompts: list[list[int]], count: int, **settings) -> list[list[int]]:
    """The first `count` tokens of every row."""
    rows = [[] for _ in prompts]
    for row, token in engine.stream(prompts, max_new_tokens=count, **settings):
        rows[row].append(token)
    return rows


# --------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize("length", (1, 37, 300))
def test_greedy_tokens_equal_transformers(capsys, model, folder, length):
    prompt = ids_of(length)
    expected, sure = greedy_by_transformers(hf_model(model), prompt, 12)
    flags = "--max-new-tokens 12 --no-compile --ignore-eos --max-seq-len 512"
    result = run(capsys, f"--checkpoint {folder} --prompt-ids {comma(prompt)} {flags}")
    expected, count = clear(expected, sure)
    assert result["tokens"][:count] == expected
    assert result["prompt_tokens"] == length
    assert result["stop_reason"] == "length" and result["text"] is None


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(model):
    prompts = [ids_of(n) for n in (1, 5, 130, 290)]
    alone = [collect(eager(model), [prompt], 10)[0] for prompt in prompts]
    assert collect(eager(model, rows=4), prompts, 10) == alone
    assert collect(ahead_of_host(model, rows=4), prompts, 10) == alone


@pytest.mark.parametrize("build", (eager, ahead_of_host))
def test_rows_that_end_early_leave_the_others_alone(model, build):
    prompts = [ids_of(n) for n in (9, 40, 70)]
    alone = [collect(eager(model), [prompt], 12)[0] for prompt in prompts]
    eos_id = alone[1][2]  # ends the second row, and others that meet it
    ended = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in alone]
    assert len({len(row) for row in ended}) > 1
    engine = build(model, rows=3)
    assert collect(engine, prompts, 12, eos_id=eos_id) == ended
    # they hold what they were fed: going on feeds the last token and the new ones
    longer = [prompt + row + ids_of(3, 1) for prompt, row in zip(prompts, ended, strict=True)]
    assert collect(engine, longer, 6) == collect(eager(model, rows=3), longer, 6)
    ran_on = 0 if build is eager else 2  # rows whose last token was fed before the host knew it
    assert engine.stats["fed_tokens"] == 3 * 4 - ran_on


@pytest.mark.parametrize("build", (eager, ahead_of_host))
def test_any_of_several_tokens_ends_a_row(model, build):
    prompts = [ids_of(n) for n in (9, 40)]
    alone = [collect(eager(model), [prompt], 12)[0] for prompt in prompts]
    ends = (alone[0][6], alone[1][2])
    ended = [row[: 1 + min(row.index(x) for x in ends if x in row)] for row in alone]
    engine = build(model, rows=2)
    assert collect(engine, prompts, 12, eos_id=ends) == ended
    longer = [prompt + row + ids_of(3, 1) for prompt, row in zip(prompts, ended, strict=True)]
    assert collect(engine, longer, 6) == collect(eager(model, rows=2), longer, 6)
    session = StreamSession(
        eager(model, rows=2), None, dict(max_new_tokens=12, eos_id=ends), io.StringIO()
    )
    session.run(prompts)
    assert session.tokens == ended and session.stop_reason == ["eos", "eos"]


@pytest.mark.parametrize(
    "change, fed",
    (("continues", 21), ("goes back a little", 20), ("goes back far", 120), ("starts anew", 60)),
)
def test_a_later_prompt_reuses_what_the_cache_holds(model, change, fed):
    """A second turn feeds only what is new, or rewinds, or starts again: as a fresh cache gives."""
    engine, first = eager(model), ids_of(150)
    answer = collect(engine, [first], 6)[0]
    second = {
        "continues": first + answer + ids_of(20, 1),
        "goes back a little": first + answer[:2] + ids_of(20, 1),
        "goes back far": first[:100] + ids_of(20, 1),
        "starts anew": ids_of(60, 2),
    }[change]
    assert collect(engine, [second], 6) == collect(eager(model), [second], 6)
    assert engine.stats["fed_tokens"] == fed
    assert collect(engine, [first], 6)[0] == answer


def test_short_prompts_replace_each_other(model):
    """Within what a row may be set back, so only the record of its tokens tells them apart."""
    engine = eager(model)
    for seed in (0, 1, 0, 1):
        assert collect(engine, [ids_of(4, seed)], 2) == collect(eager(model), [ids_of(4, seed)], 2)


def test_rewinding_again_and_again_stays_within_what_the_caches_hold(model, monkeypatch):
    """Each step back is small, all together are deep: the furthest position that was fed counts."""
    logits, sample = [], S.sample
    monkeypatch.setattr(S, "sample", lambda x, *rest: logits.append(x) or sample(x, *rest))
    engine = eager(model)
    ids = ids_of(400)
    fed = []
    for length in (400, 393, 386, 379, 372, 371):
        collect(engine, [ids[:length]], 1)
        reused = logits[-1]
        fed.append(engine.stats["fed_tokens"])
        collect(eager(model), [ids[:length]], 1)
        assert rms(reused, logits[-1]) < 1e-5
    assert fed == [400, 1, 386, 1, 372, 1]  # every second step back is too deep


def test_steps_run_ahead_of_the_host_are_rewound(model):
    """With several decode steps between reads, a row may be fed more than was wanted."""
    engine, ids = ahead_of_host(model), ids_of(300)
    assert collect(engine, [ids], 2) == collect(eager(model), [ids], 2)
    for length in (294, 299, 301):
        again = (ids + ids_of(9, 3))[:length]
        assert collect(engine, [again], 10) == collect(eager(model), [again], 10)


# --------------------------------------------------------------------------------------------------
# Engine: leaving early, shared models, limits


class Failure(Exception):
    pass


@contextlib.contextmanager
def failing(engine: Engine, where: str, call: int, error: type[BaseException]):
    """Raise in call number `call` of a phase ("prefill" or "decode") of the engine.

    where: "prefill before", nothing has run; "prefill inside", some layers have written caches;
    "prefill after", the caches are written and the engine does not know; likewise "decode ...".
    """
    name, moment = where.split()
    attribute = f"_{name}_phase"
    phase, calls = getattr(engine, attribute), itertools.count(1)

    def hook(*_):
        raise error

    def run(*args):
        if next(calls) != call:
            return phase(*args)
        if moment == "inside":
            handle = engine.model.layers[2].register_forward_pre_hook(hook)
            try:
                return phase(*args)
            finally:
                handle.remove()
        if moment == "after":
            phase(*args)
        raise error

    setattr(engine, attribute, run)
    try:
        with pytest.raises(error):
            yield
    finally:
        setattr(engine, attribute, phase)


def assert_like_fresh(engine: Engine, model, prompts: list[list[int]]) -> None:
    """Whatever comes next, the prompts cut, continued or others: tokens are a fresh engine's."""
    caches = [buffer.clone() for buffer in engine.model.buffers()]
    rows = copy.deepcopy((engine.cached_tokens, engine.high_water))
    generations = engine.model.cache_generation, engine._generation
    for change in ("cut by 1", "cut by 12", "the same", "continued", "others"):
        after = {
            "cut by 1": [prompt[:-1] for prompt in prompts],
            "cut by 12": [prompt[:-12] for prompt in prompts],
            "the same": prompts,
            "continued": [prompt + ids_of(30, 8) for prompt in prompts],
            "others": [ids_of(40, 9) for _ in prompts],
        }[change]
        for buffer, cache in zip(engine.model.buffers(), caches, strict=True):
            buffer.copy_(cache)
        engine.cached_tokens, engine.high_water = copy.deepcopy(rows)
        engine.model.cache_generation, engine._generation = generations
        assert collect(engine, after, 4) == collect(eager(model, len(prompts)), after, 4), change


@pytest.mark.parametrize("error", (KeyboardInterrupt, Failure))
@pytest.mark.parametrize("moment", ("before", "inside", "after"))
@pytest.mark.parametrize(
    "phase, call", (("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 3))
)
def test_an_error_anywhere_leaves_the_engine_consistent(model, phase, call, moment, error):
    prompts = [ids_of(300), ids_of(20)]
    build = ahead_of_host if error is Failure else eager
    engine = build(model, rows=2)
    collect(engine, [ids_of(60, 4), ids_of(33, 4)], 5)  # rows of an earlier conversation
    with failing(engine, f"{phase} {moment}", call, error):
        collect(engine, prompts, 30)
    assert_like_fresh(engine, model, prompts)


@pytest.mark.parametrize("phase, fed", (("prefill", 300 - 256), ("decode", 1)))
def test_tokens_that_were_fed_are_not_fed_again_after_an_interrupt(model, phase, fed):
    """A prompt goes on from the last chunk that was fed whole, an answer from its last token."""
    engine, prompt = eager(model), ids_of(300)
    with failing(engine, f"{phase} before", 2, KeyboardInterrupt):
        collect(engine, [prompt], 9)
    engine.high_water[0] = len(engine.cached_tokens[0])  # it failed before it wrote anything
    assert collect(engine, [prompt], 9) == collect(eager(model), [prompt], 9)
    assert engine.stats["fed_tokens"] == fed


@pytest.mark.parametrize("build", (eager, ahead_of_host))
@pytest.mark.parametrize("count", (1, 2, 7))
def test_leaving_a_stream_early_keeps_what_was_fed(model, build, count):
    """By break, and by close() while it waits."""
    prompts = [ids_of(150), ids_of(21)]
    full = collect(eager(model, rows=2), prompts, 14)
    for leave in ("break", "close"):
        engine = build(model, rows=2)
        stream, rows = engine.stream(prompts, max_new_tokens=14), [[], []]
        for i, (row, token) in enumerate(stream):
            rows[row].append(token)
            if i == 2 * count:  # a token more of the first row than of the second
                break
        assert rows == [full[0][: count + 1], full[1][:count]]
        if leave == "close":
            stream.close()
            assert_like_fresh(engine, model, prompts)
        else:
            longer = [prompt + row for prompt, row in zip(prompts, rows, strict=True)]
            rest = [full[0][count + 1 : count + 5], full[1][count : count + 4]]
            assert collect(engine, longer, 4) == rest
            assert engine.stats["fed_tokens"] == 2  # the last token of each row


def test_a_stream_starts_with_its_first_token(model):
    """Streams that nobody iterates over change nothing."""
    engine, prompt = eager(model), ids_of(50)
    first = collect(engine, [prompt], 5)
    engine.stream([ids_of(20)], max_new_tokens=3)
    engine.stream([ids_of(20)], max_new_tokens=3).close()
    assert collect(engine, [prompt], 5) == first and engine.stats["fed_tokens"] == 1


@pytest.mark.parametrize("sizes", (((1, 512), (1, 512)), ((1, 512), (3, 256))))
def test_two_engines_over_one_model_notice_each_other(model, sizes):
    shared = copy.deepcopy(model)
    a, b = (Engine(shared, "eager", max_batch_size=n, max_seq_len=m) for n, m in sizes)
    expected = {n: collect(eager(model), [ids_of(n)], 6) for n in (40, 47, 90)}
    for engine, n in ((a, 40), (b, 90), (a, 40), (b, 47), (b, 90), (a, 47), (a, 47)):
        assert collect(engine, [ids_of(n)], 6) == expected[n]
    assert a.stats["fed_tokens"] == 1  # nobody else had come between
    assert collect(b, [ids_of(47)], 6) == expected[47] and b.stats["fed_tokens"] == 47


@pytest.mark.parametrize("change", ("reset", "setup", "setup smaller", "to", "float"))
def test_caches_that_were_emptied_or_replaced_are_noticed(model, change):
    engine, prompt = eager(model), ids_of(90)
    first = collect(engine, [prompt], 6)
    {
        "reset": engine.model.reset_caches,
        "setup": lambda: engine.model.setup_caches(*engine.model.cache_size),
        "setup smaller": lambda: engine.model.setup_caches(1, 64),
        "to": lambda: engine.model.to("cpu"),
        "float": engine.model.float,
    }[change]()
    assert collect(engine, [prompt], 6) == first and engine.stats["fed_tokens"] == 90


@pytest.mark.parametrize("change", ("another engine", "another stream", "reset", "to"))
def test_a_stream_whose_caches_were_taken_says_so(model, change):
    engine = eager(model)
    stream = engine.stream([ids_of(30)], max_new_tokens=9)
    next(stream)
    if change == "another engine":
        Engine(engine.model, "eager", max_batch_size=1, max_seq_len=512)
    elif change == "another stream":
        collect(engine, [ids_of(20)], 3)
    elif change == "reset":
        engine.model.reset_caches()
    else:
        engine.model.to("cpu")
    with pytest.raises(RuntimeError, match="finish or close"):
        next(stream)
    assert_like_fresh(engine, model, [ids_of(30)])


def test_fewer_prompts_than_rows_leave_the_other_rows_alone(model):
    prompts = [ids_of(n) for n in (60, 20, 90)]
    engine = eager(model, rows=4)
    rows = collect(engine, prompts, 5)
    assert rows == [collect(eager(model), [prompt], 5)[0] for prompt in prompts]
    other = ids_of(33, 2)
    assert collect(engine, [other], 5) == collect(eager(model), [other], 5)
    longer = [other, prompts[1] + rows[1], prompts[2] + rows[2]]
    assert collect(engine, longer, 5) == collect(eager(model, rows=3), longer, 5)
    assert engine.stats["fed_tokens"] == 3


@pytest.mark.parametrize("build", (eager, ahead_of_host))
def test_the_context_ends_a_stream(model, build):
    """Rows give at most max_seq_len - len(prompt) tokens, those of a larger context."""
    prompts, engine = [ids_of(30), ids_of(39), ids_of(12)], build(model, rows=3)
    engine.max_seq_len = 40
    engine.model.reset_caches()
    rows = collect(engine, prompts, 99)
    assert engine.model.cache_size[1] == 40
    assert [len(row) for row in rows] == [10, 1, 28]
    larger = collect(eager(model, rows=3), prompts, 28)
    assert rows == [full[: len(row)] for full, row in zip(larger, rows, strict=True)]
    assert collect(engine, prompts, 3) == [row[:3] for row in rows]


def test_impossible_streams_are_refused_before_anything_runs(model):
    with pytest.raises(ValueError, match="context is 2048"):
        Engine(model, "eager", max_batch_size=1, max_seq_len=2049)
    with pytest.raises(ValueError, match="fastest.*choose from auto, eager"):
        Engine(model, "fastest", max_batch_size=1, max_seq_len=64)
    engine = eager(model, rows=2, max_seq_len=64)
    kept = collect(engine, [ids_of(9)], 2)
    for prompts, says in (
        ([], "no prompt"),
        ([[1], []], "empty"),
        ([[1], [2], [3]], "2 rows.*max_batch_size"),
        ([ids_of(64)], "64 tokens.*raise max_seq_len"),
        ([[256]], "256.*vocabulary"),
        ([[-1]], "-1.*vocabulary"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.stream(prompts, max_new_tokens=1)
    for wrong in (
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(seed=-1),
        dict(seed=1 << 63),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine.stream([[1]], **{"max_new_tokens": 1, **wrong})
    assert len(collect(engine, [ids_of(63)], 9)[0]) == 1  # a prompt may leave room for one token
    assert collect(engine, [ids_of(9)], 2) == kept


# --------------------------------------------------------------------------------------------------
# Sampling


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    ((1.0, None, None), (0.5, None, None), (1.3, 5, None), (1.0, None, 0.7), (0.7, 6, 0.8)),
)
def test_sampling_follows_the_softmax(temperature, top_k, top_p):
    """Draws over 12 tokens: chi-square below its 99.9 % quantile (about 31 for 11 degrees)."""
    V, N = 12, 20000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    p = (logits / temperature).softmax(-1)
    keep = torch.zeros(V, dtype=torch.bool)
    total = 0.0
    for rank, token in enumerate(p.argsort(descending=True)):
        keep[token] = (top_k is None or rank < top_k) and (top_p is None or total < top_p)
        total += float(p[token])
    p = p.masked_fill(~keep, 0) / p[keep].sum()
    sampling = S.Sampling.of(temperature, top_k or V, top_p or 1.0, 7, "cpu")

    def draw(prompt, pos):
        scores = logits.expand(len(pos), V)
        return S.sample(scores, prompt, pos, sampling, bool(top_k or top_p))

    index = torch.arange(N)
    for drawn in (
        torch.cat([draw(torch.zeros(1, dtype=torch.int64), pos[None]) for pos in index[:2000]]),
        draw(torch.zeros(N, dtype=torch.int64), index),  # over positions of one prompt
        draw(index, torch.full((N,), 5)),  # over prompts at one position
    ):
        counts = torch.bincount(drawn, minlength=V).float()
        assert counts[~keep].sum() == 0
        assert chi_square(counts[keep], p[keep]) < 31.3
    # neighbouring prompts and positions are independent: joint counts follow the product
    drawn = draw(index, index)
    pairs = drawn[:-1] * V + drawn[1:]
    joint = torch.bincount(pairs, minlength=V * V).float().view(V, V)[keep][:, keep]
    degrees = joint.numel() - 1
    product = (p[keep][:, None] * p[keep]).flatten()
    assert chi_square(joint.flatten(), product) < degrees + 5 * (2 * degrees) ** 0.5


def test_temperature_zero_is_greedy_and_top_k_one_too():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    index = torch.arange(5)
    for sampling, filtered in (
        (S.Sampling.of(0.0, 50, 1.0, 1, "cpu"), False),
        (S.Sampling.of(0.0, 9, 0.9, 1, "cpu"), True),
        (S.Sampling.of(2.0, 1, 1.0, 1, "cpu"), True),
    ):
        drawn = S.sample(logits, index, index, sampling, filtered)
        assert torch.equal(drawn, logits.argmax(-1))


def test_noise_depends_on_seed_prompt_and_position():
    def noise(seed, prompt, pos):
        return S.gumbel(torch.tensor(seed), torch.tensor(prompt), torch.tensor(pos), 64)

    rows = [
        noise(seed, [prompt], [pos])[0]
        for seed in (0, 1, 1 << 40)
        for prompt in (0, 1)
        for pos in (0, 1)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert all(row.isfinite().all() for row in rows)
    # not on the row of the batch, nor on the rows beside it
    batch = noise(1, [1, 0, 1], [1, 0, 0])
    assert torch.equal(batch, torch.stack([rows[7], rows[4], rows[6]]))


def test_a_prompts_tokens_depend_on_its_index_alone(model):
    """Not on the prompts beside it, on the engine's rows, nor on what was drawn before."""
    prompts = [ids_of(n) for n in (20, 7, 40)]
    settings = dict(temperature=1.0, top_k=200, seed=5)
    engine = eager(model, rows=3)
    rows = collect(engine, prompts, 8, **settings)
    assert collect(engine, [prompts[0], ids_of(5), prompts[2]], 8, **settings)[::2] == rows[::2]
    assert collect(eager(model), prompts[:1], 8, **settings) == rows[:1]
    same = collect(eager(model, rows=2), [prompts[0], prompts[0]], 8, **settings)
    assert same[0] == rows[0] != same[1]


def test_the_seed_repeats_a_run_and_changes_it(capsys, folder):
    command = (
        f"--checkpoint {folder} --prompt-ids 5,6,7 --no-compile --temperature 1 "
        "--max-new-tokens 20 --seed"
    )
    first, again, other = (run(capsys, command, seed)["tokens"] for seed in ("3", "3", "4"))
    assert first == again != other


# --------------------------------------------------------------------------------------------------
# Compiled


def test_compiled_generation_does_not_recompile(model):
    """Ragged batch of 4: prompts of 1 to 1500 tokens, 300 decoded, two conversations, sampling."""
    torch._dynamo.reset()
    compiled = Engine(copy.deepcopy(model), "default", max_batch_size=4, max_seq_len=2048)
    slow, hf = eager(model, 4, 2048), hf_model(model)
    first = [ids_of(n) for n in (1, 40, 700, 1500)]
    rows = collect(compiled, first, 300)
    assert [row[:40] for row in rows] == collect(slow, first, 40)
    for prompt, row in zip(first[:3], rows, strict=False):
        expected, count = clear(*greedy_by_transformers(hf, prompt, 12))
        assert row[:count] == expected
    second = [prompt + row + ids_of(30, 5) for prompt, row in zip(first, rows, strict=True)]
    assert collect(compiled, second, 20) == collect(slow, second, 20)
    third = [ids_of(n, 9) for n in (3, 2, 260)]  # fewer than rows
    settings = dict(temperature=0.9, seed=11, eos_id=7)
    assert collect(compiled, third, 20, **settings) == collect(slow, third, 20, **settings)
    stats = compiled.stats
    assert stats["breaks"] == 0 and stats["recompiles"] == 0 and stats["compile_s"] > 0
    # prefill: one graph for each of four kinds of layers, one before and one after; decode: one
    assert stats["graphs"] == 4 + 2 + 1


def test_one_row_does_not_recompile_either(model):
    """Prompts of 1 to 1500 tokens one after the other, 300 decoded tokens, then a second turn."""
    torch._dynamo.reset()
    config = CompileConfig(backend="aot_eager")  # AOT graphs without code generation
    compiled = Engine(copy.deepcopy(model), config, max_batch_size=1, max_seq_len=2048)
    slow = eager(model, 1, 2048)
    for n in (1, 40, 700, 1500):
        assert collect(compiled, [ids_of(n)], 3) == collect(slow, [ids_of(n)], 3)
    row = collect(compiled, [ids_of(1500)], 300)[0]
    assert row[:3] == collect(slow, [ids_of(1500)], 3)[0]
    assert len(collect(compiled, [ids_of(1500) + row + ids_of(20, 7)], 5)[0]) == 5
    stats = compiled.stats
    assert stats["breaks"] == 0 and stats["recompiles"] == 0 and stats["graphs"] == 4 + 2 + 1


def test_top_k_joins_and_leaves_compiled_sampling(model):
    """Filtered sampling is a graph of its own, made when it is first asked for."""
    torch._dynamo.reset()
    compiled = Engine(
        copy.deepcopy(model), CompileConfig(backend="eager"), max_batch_size=1, max_seq_len=64
    )
    slow, prompts = eager(model, max_seq_len=64), [ids_of(9)]
    for settings in (dict(), dict(top_k=3), dict(top_p=0.5), dict(), dict(top_k=3)):
        settings |= dict(temperature=1.5, seed=2)
        assert collect(compiled, prompts, 6, **settings) == collect(slow, prompts, 6, **settings)
    assert compiled.stats["graphs"] == 2 * (4 + 2 + 1) and compiled.stats["recompiles"] == 0


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "command, says",
    [
        ("--prompt-ids=", "empty"),
        ("--prompt-ids 1,x", "--prompt-ids"),
        ("--prompt-ids 1,256", "256"),
        ("--prompt-ids -1", "-1"),
        ("--prompt-ids 1 --max-seq-len 99999", "--max-seq-len"),
        (f"--prompt-ids {comma([7] * 64)} --max-seq-len 64", "--max-seq-len"),
        ("--prompt x", "tokenizer"),
        ("--prompt-ids 1 --prompt x", "choose one"),
        ("--prompt-ids 1 --interactive", "choose one"),
        ("--prompt-ids 1 --chat", "--chat"),
        ("--prompt-ids 1 --thinking", "--chat"),
        ("--prompt-ids 1 --temperature -1", "--temperature"),
        ("--prompt-ids 1 --temperature nan", "--temperature"),
        ("--prompt-ids 1 --top-k 0", "--top-k"),
        ("--prompt-ids 1 --top-p 1.5", "--top-p"),
        ("--prompt-ids 1 --max-new-tokens 0", "--max-new-tokens"),
        ("--prompt-ids 1 --seed -3", "--seed"),
        ("--prompt-ids 1 --stop x", "tokenizer"),
        ("--prompt-ids 1 --act-quant maybe", "--act-quant"),
        ("--prompt-ids 1 --compile cudagraphs --device cpu", "CUDA"),
        ("--prompt-ids 1 --compile default --no-compile", "--no-compile"),
        ("--checkpoint deepseek-ai/DeepSeek-V4-Flash", "hf download deepseek-ai/DeepSeek-V4-Flash"),
        (
            "--checkpoint https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro/",
            "hf download deepseek-ai/DeepSeek-V4-Pro --local-dir",
        ),
        ("--checkpoint /nowhere/at/all", "/nowhere/at/all"),
        (f"--checkpoint {ROOT / 'ops'}", "config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, folder, command, says):
    command = command if "--checkpoint" in command else f"--checkpoint {folder} {command}"
    assert says in run(capsys, command, code=2)


@pytest.mark.parametrize(
    "command", ("--no-such-flag", "--compile fastest", "--device tpu", "--max-new-tokens many")
)
def test_unknown_flags_and_values_are_one_line_and_exit_code_2(capsys, command):
    assert command.split()[0] in run(capsys, command, code=2)


def test_reasoning_of_earlier_turns_is_left_out():
    flags, tokenizer = G.parse(["--chat", "--thinking", "--interactive"]), G.load_tokenizer(TINY)
    ids = G.encode(flags, tokenizer, G.render(flags, ["hi", "because</think>A", "more"]))
    assert "because" not in (text := tokenizer.decode(ids)) and "A" in text


def test_an_interrupt_keeps_what_was_written(capsys, monkeypatch, tmp_path):
    """Every row's text so far is printed, and the exit code is 130."""
    file = tmp_path / "prompts.txt"
    decode = engine_module.compile_decode
    calls = []
    file.write_text("HAMLET.\nO\n\nKING.\nWho\n")

    def interrupted(*args):
        phase = decode(*args)

        def call(*args):
            calls.append(args)
            if len(calls) > 30:
                raise KeyboardInterrupt
            return phase(*args)

        return call

    monkeypatch.setattr(engine_module, "compile_decode", interrupted)
    command = f"--checkpoint {TINY} --no-compile --prompts {file} --ignore-eos"
    assert G.main(command.split()) == 130
    texts = capsys.readouterr().out
    assert len(texts) > 4 * 30  # four rows of 30 tokens; one row would be far less


def test_lines_of_a_prompt_file_end_at_newlines_only(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffone\u2028two\fthree\x85four\n\nfive\r\n", encoding="utf-8", newline="")
    assert G.read_lines(str(file)) == ["one\u2028two\fthree\x85four", "five"]


def test_prompt_files_that_hold_nothing_are_refused(capsys, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\xff")
    for file, says in (
        (empty, "no prompt"),
        (binary, "UTF-8"),
        (tmp_path / "missing.txt", "cannot be read"),
    ):
        assert says in run(capsys, f"--checkpoint {TINY} --prompts {file}", code=2)


def test_a_preset_without_its_compiler_is_refused(capsys, monkeypatch, folder):
    monkeypatch.setattr(torch_private, "missing_cpu_toolchain", lambda: "a C++ compiler")
    command = f"--checkpoint {folder} --prompt-ids 5,6 --max-new-tokens 2"
    assert "a C++ compiler" in run(capsys, f"{command} --compile regional", code=2)


def test_the_report_has_every_key_of_the_contract(capsys, folder):
    command = f"--checkpoint {folder} --prompt-ids 5,6 --no-compile --max-new-tokens 8"
    result = run(capsys, command)
    assert not [key for keys in KEYS.values() for key in keys if key not in result]
    assert result["accepted_per_step"] is None and result["recompiles"] is None
    assert result["graphs"] == result["graphs_loaded"] == result["breaks"] == 0
    assert result["preset"] == result["compiled_as"] == "eager"
    assert 0 < result["ttft_warm_s"] < result["ttft_s"] and result["tok_per_s"] > 0
    assert result["threads"] == torch.get_num_threads()


def test_a_step_reads_the_experts_that_its_tokens_choose(model):
    """Of 8 experts a row reads 2, two rows 2 + 6/8 2 = 3.5 on average; no embedding, no MTP."""
    total = experts = 0
    for name, p in model.named_parameters():
        if name.startswith("layers.") and name.endswith(("experts.w13", "experts.w2")):
            experts += p.nbytes
        elif not name.startswith(("embed.", "mtp.")):
            total += p.nbytes
    for rows, share in ((1, 2 / 8), (2, 3.5 / 8)):
        assert abs(G.active_bytes(model, rows) - (total + share * experts)) <= 1


@pytest.mark.parametrize(
    "flags, expected",
    (("", False), ("--act-quant on", True), ("--weights native", True))
    + (("--weights native --act-quant off", False),),
)
def test_act_quant_follows_the_flag_then_the_weights(capsys, flags, expected):
    """Whether the model quantises activations is on the card and in the report."""
    command = f"--checkpoint {TINY} --no-compile --prompt x --max-new-tokens 2 {flags}"
    G.main([*command.split(), "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["act_quant"] is expected
    assert f"act_quant {'on' if expected else 'off'}" in captured.err


def test_the_context_ends_generation(capsys, folder):
    flags = "--no-compile --ignore-eos --max-seq-len 40 --max-new-tokens 99"
    result = run(capsys, f"--checkpoint {folder} --prompt-ids {comma(ids_of(30))} {flags}")
    assert result["stop_reason"] == "context" and len(result["tokens"]) == 10


def test_eos_ends_a_row_unless_ignored(model):
    """With the most likely token declared to be EOS, the row ends there, in the graph too."""
    prompt = ids_of(20)
    tokens = collect(eager(model), [prompt], 8)[0]
    eos_id = tokens[3]
    before = tokens.index(eos_id)
    engine, lengths = eager(model), []
    decode = engine._decode_phase

    def watched(*args):
        result = decode(*args)
        lengths.append(int(result[2]))
        return result

    engine._decode_phase = watched
    assert collect(engine, [prompt], 8, eos_id=eos_id) == [tokens[: before + 1]]
    assert lengths == [1] * (before - 1) + [0]
    lengths.clear()
    assert collect(engine, [prompt], 8, eos_id=(1 << 40, eos_id)) == [tokens[: before + 1]]
    assert lengths == [1] * (before - 1) + [0]
    for end, reason, expected in ((eos_id, "eos", tokens[: before + 1]), (None, "length", tokens)):
        settings = dict(max_new_tokens=8, eos_id=end)
        session = StreamSession(eager(model), None, settings, io.StringIO())
        session.run([prompt])
        assert session.stop_reason == [reason] and session.tokens == [expected]


def test_prompts_of_a_file_run_as_one_batch_and_text_stops(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("HAMLET.\nO, that this too too solid flesh would melt\n\nI\n")
    command = f"--checkpoint {TINY} --no-compile --max-new-tokens 40 --prompts {file}"
    result = run(capsys, command)
    assert len(result["prompt_tokens"]) == len(result["tokens"]) == len(result["text"]) == 3
    text = result["text"][0]
    assert len(text) > 20
    stop = text[8:11]
    stopped = run(capsys, command, "--stop", stop)
    assert stopped["stop_reason"][0] == "stop" and stopped["text"][0] == text[: text.index(stop)]
    assert stopped["decoded"] == sum(len(tokens) - 1 for tokens in stopped["tokens"])


def test_interactive_turns_continue_the_conversation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("KING.\nWho comes here?\n\nSpeak.\n"))
    result = run(capsys, f"--checkpoint {TINY} --interactive --no-compile --max-new-tokens 12")
    assert len(result["tokens"]) == 3 and all(len(tokens) == 12 for tokens in result["tokens"])
    first, second, third = result["prompt_tokens"]
    assert first + 12 < second < third
    assert result["fed_tokens"] < third - second + 4
    # the ids that the second turn saw, in one prompt
    tokenizer = G.load_tokenizer(TINY)
    question = tokenizer.encode("Who comes here?\n")
    ids = tokenizer.encode("KING.\n", bos=True) + result["tokens"][0] + question
    assert len(ids) == second
    command = f"--checkpoint {TINY} --no-compile --max-new-tokens 12 --prompt-ids"
    assert run(capsys, command, comma(ids))["tokens"] == result["tokens"][1]


@pytest.mark.parametrize("chat", (False, True))
@pytest.mark.parametrize("seed", range(2))
def test_turns_append_to_the_cache_however_their_text_would_be_split(
    capsys, monkeypatch, seed, chat
):
    """Sampled tokens are rarely the tokenizer's own split of their text; turns are fed alone."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("KING.\nWho comes here?\nSpeak.\n"))
    fed, prompts = [], []
    prefill = Engine._prefill

    def watched(self, rows, *args):
        prompts.append(rows[0])
        token = prefill(self, rows, *args)
        fed.append(self.stats["fed_tokens"])
        return token

    monkeypatch.setattr(Engine, "_prefill", watched)
    flags = f"--max-new-tokens 100 --temperature 1.5 --seed {seed} {'--chat' * chat}"
    result = run(capsys, f"--checkpoint {TINY} --interactive --no-compile {flags}")
    assert len(fed) == 3 and all(n < 40 for n in fed[1:]), (fed, result["prompt_tokens"])
    tokenizer = G.load_tokenizer(TINY)
    before, answer, after = tokenizer.decode(prompts[1]).partition(result["text"][0])
    assert answer and after.count("Who comes here?") == 1
    split = [tokenizer.encode(text) for text in result["text"]]
    assert split != result["tokens"]  # or this test would show nothing


def test_chat_is_rendered_in_v4s_format(capsys):
    command = f"--checkpoint {TINY} --chat --no-compile --max-new-tokens 4"
    result = run(capsys, command, "--system", "Be brief.", "--prompt", "Who is there?")
    tokenizer = G.load_tokenizer(TINY)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is there?"},
    ]
    expected = tokenizer.encode(G.encode_messages(messages))
    assert result["prompt_tokens"] == len(expected) and expected.count(tokenizer.bos_id) == 1


def test_the_embedded_model_writes_english_from_the_shell():
    """The command in a process of its own: text on standard output, statistics on the other."""
    done = subprocess.run(
        [sys.executable, "generate.py", "--no-compile", "--max-new-tokens", "80"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(G.PROMPT) and "tok/s" in done.stderr
    words = done.stdout[len(G.PROMPT) :].replace("\n", " ").split()
    known = set((ROOT / "data" / "shakespeare.txt").read_text().split())
    assert len(words) > 15 and sum(word in known for word in words) > 0.7 * len(words)
