"""Contracts of generate.py: greedy equals Transformers, sampling equals softmax, no recompiles, clear errors, true reports."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import generate as G
from compile_config import PRESETS, CompileConfig
from model import ModelArgs, Transformer
from testing import Margins, hf_model, judged, randomize, rms
from tools import stats

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "assets" / "tiny"
KEYS = (
    "prompt_tokens tokens text stop_reason tok_per_s ttft_s ttft_warm_s compile_s graphs breaks recompiles accepted_per_step seed "
    "dtype device preset threads act_quant versions"
).split()


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
    return torch.randint(
        2, 256, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)
    ).tolist()


def greedy_by_transformers(hf, prompt: list[int], count: int) -> tuple[list[int], list[bool]]:
    """The most likely continuation, and for each token whether every choice on the way had a clear margin."""
    ids, sure = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            with Margins(hf) as margins:
                logits = hf(torch.tensor([ids])).logits[0, -1]
            top = logits.topk(2).values
            sure.append(bool(judged(margins.of())[0, -1]) and float(top[0] - top[1]) > 1e-3)
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :], sure


def clear(tokens: list[int], sure: list[bool]) -> tuple[list[int], int]:
    """The tokens before the first one that a rounding could change, and how many they are: enough to tell."""
    count = next((i for i, ok in enumerate(sure) if not ok), len(sure))
    assert count >= 6
    return tokens[:count], count


def run(capsys, *argv, code: int = 0):
    """main(argv --json) -> its JSON object; with a code other than 0, the one line of its message."""
    capsys.readouterr()
    assert G.main([*argv, "--json"]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    if code:
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1 and not captured.out, captured
        return lines[0]
    return json.loads(captured.out.strip().splitlines()[-1])


def eager(model, batch=1, max_seq_len=512, **kw) -> G.Generator:
    """On a model of its own: generators of one model would share its caches."""
    return G.Generator(copy.deepcopy(model), PRESETS["eager"], batch, max_seq_len, **kw)


GREEDY = G.Sampling.of(0.0, 256, 1.0, 0, "cpu")


def collect(
    generator: G.Generator, prompts: list[list[int]], count: int, how=GREEDY
) -> list[list[int]]:
    """The first `count` tokens of every row."""
    rows = [[] for _ in prompts]

    def done(row, token):
        rows[row].append(token)
        return len(rows[row]) == count

    generator(prompts, how, done)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize("length", (1, 37, 300))
def test_greedy_tokens_equal_transformers(capsys, model, folder, length):
    prompt = ids_of(length)
    expected, sure = greedy_by_transformers(hf_model(model), prompt, 12)
    result = run(
        capsys,
        "--checkpoint",
        folder,
        "--prompt-ids",
        ",".join(map(str, prompt)),
        "--max-new-tokens",
        "12",
        "--no-compile",
        "--ignore-eos",
        "--max-seq-len",
        "512",
    )
    expected, count = clear(expected, sure)
    assert result["tokens"][:count] == expected
    assert (
        result["prompt_tokens"] == length
        and result["stop_reason"] == "length"
        and result["text"] is None
    )


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(model):
    prompts = [ids_of(n) for n in (1, 5, 130, 290)]
    batch = collect(eager(model, batch=4), prompts, 10)
    assert batch == [collect(eager(model), [prompt], 10)[0] for prompt in prompts]


def test_rows_that_end_early_leave_the_others_alone(model):
    prompts, counts, rows = [ids_of(n) for n in (9, 40, 70)], (2, 12, 5), [[] for _ in range(3)]

    def done(row, token):
        rows[row].append(token)
        return len(rows[row]) == counts[row]

    eager(model, batch=3)(prompts, GREEDY, done)
    assert rows == [
        collect(eager(model), [prompt], count)[0] for prompt, count in zip(prompts, counts)
    ]


@pytest.mark.parametrize(
    "change", ("continues", "goes back a little", "goes back far", "starts anew")
)
def test_a_later_prompt_reuses_what_the_cache_holds(model, change):
    """A second turn feeds only what is new, or rewinds, or starts again, and gives what a fresh cache gives."""
    generator, first = eager(model), ids_of(150)
    answer = collect(generator, [first], 6)[0]
    second = {
        "continues": first + answer + ids_of(20, 1),
        "goes back a little": first + answer[:2] + ids_of(20, 1),
        "goes back far": first[:100] + ids_of(20, 1),
        "starts anew": ids_of(60, 2),
    }[change]
    fed = []
    prefill = generator.prefill
    generator.prefill = lambda tokens, pos, lengths, *how: (
        fed.append(int(lengths.sum())),
        prefill(tokens, pos, lengths, *how),
    )[1]
    assert collect(generator, [second], 6) == collect(eager(model), [second], 6)
    assert (
        sum(fed)
        == {"continues": 21, "goes back a little": 20, "goes back far": 120, "starts anew": 60}[
            change
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    ((1.0, None, None), (0.5, None, None), (1.3, 5, None), (1.0, None, 0.7), (0.7, 6, 0.8)),
)
def test_sampling_follows_the_softmax(temperature, top_k, top_p):
    """20000 draws over 12 tokens, across positions and seeds: chi-square below its 99.9 % quantile (about 31 for 11 degrees)."""
    V, N = 12, 20000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    p = (logits / temperature).softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.zeros(V, dtype=torch.bool)
    total = 0.0
    for rank, token in enumerate(order):
        keep[token] = (top_k is None or rank < top_k) and (top_p is None or total < top_p)
        total += float(p[token])
    p = p.masked_fill(~keep, 0) / p[keep].sum()
    how = G.Sampling.of(temperature, top_k or V, top_p or 1.0, 7, "cpu")
    for pos in (
        torch.arange(N),
        torch.full((N,), 5),
    ):  # over positions, and over rows at one position
        drawn = (
            torch.cat(
                [
                    G.sample(logits.expand(1, V), at[None], how, bool(top_k or top_p))
                    for at in pos[:2000]
                ]
            )
            if pos[0] != pos[1]
            else G.sample(logits.expand(N, V), pos, how, bool(top_k or top_p))
        )
        counts = torch.bincount(drawn, minlength=V).float()
        assert counts[~keep].sum() == 0
        assert chi_square(counts[keep], p[keep]) < 31.3
    # neighbouring positions are independent: the joint counts of two of them follow the product
    pairs = G.sample(logits.expand(N, V), torch.arange(N), how, bool(top_k or top_p))
    joint = (
        torch.bincount(pairs[:-1] * V + pairs[1:], minlength=V * V)
        .float()
        .view(V, V)[keep][:, keep]
    )
    degrees = joint.numel() - 1
    assert (
        chi_square(joint.flatten(), (p[keep][:, None] * p[keep]).flatten())
        < degrees + 5 * (2 * degrees) ** 0.5
    )


def test_temperature_zero_is_greedy_and_top_k_one_too():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    pos = torch.arange(5)
    for how, filtered in (
        (G.Sampling.of(0.0, 50, 1.0, 1, "cpu"), False),
        (G.Sampling.of(0.0, 9, 0.9, 1, "cpu"), True),
        (G.Sampling.of(2.0, 1, 1.0, 1, "cpu"), True),
    ):
        assert torch.equal(G.sample(logits, pos, how, filtered), logits.argmax(-1))


def test_noise_depends_on_seed_row_and_position():
    noise = {
        (seed, at): G.gumbel(torch.tensor(seed), torch.tensor([at, at]), 64)
        for seed in (0, 1, 1 << 40)
        for at in (0, 1)
    }
    rows = [row for pair in noise.values() for row in pair]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert torch.equal(G.gumbel(torch.tensor(1), torch.tensor([1, 1]), 64), noise[1, 1]) and all(
        r.isfinite().all() for r in rows
    )


def test_the_seed_repeats_a_run_and_changes_it(capsys, folder):
    argv = (
        "--checkpoint",
        folder,
        "--prompt-ids",
        "5,6,7",
        "--no-compile",
        "--temperature",
        "1",
        "--max-new-tokens",
        "20",
        "--seed",
    )
    first, again, other = (run(capsys, *argv, seed)["tokens"] for seed in ("3", "3", "4"))
    assert first == again != other


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


def test_compiled_generation_does_not_recompile(model):
    """Ragged batch of 4: prompts of 1 to 1500 tokens, 300 decoded tokens, two conversations, another temperature and seed."""
    torch._dynamo.reset()
    compiled = G.Generator(model, PRESETS["default"], 4, 2048, eos=None)
    slow, hf = eager(model, 4, 2048), hf_model(model)
    first = [ids_of(n) for n in (1, 40, 700, 1500)]
    rows = collect(compiled, first, 300)
    assert [row[:40] for row in rows] == collect(slow, first, 40)
    for prompt, row in zip(first[:3], rows):
        expected, count = clear(*greedy_by_transformers(hf, prompt, 12))
        assert row[:count] == expected
    second = [prompt + row + ids_of(30, 5) for prompt, row in zip(first, rows)]
    assert collect(compiled, second, 20) == collect(slow, second, 20)
    third = [ids_of(n, 9) for n in (3, 2, 260, 1)]
    how = G.Sampling.of(0.9, 256, 1.0, 11, "cpu")
    assert collect(compiled, third, 20, how) == collect(slow, third, 20, how)
    assert compiled.count.breaks == 0 and compiled.count.recompiles == 0
    kinds = 4  # layer kinds of the debug model; prefill runs one graph each, one before and one after, decode is one graph
    assert compiled.count.graphs == kinds + 2 + 1 and compiled.compile_s > 0


def test_one_row_does_not_recompile_either(model):
    """Prompts of 1 to 1500 tokens one after the other, 300 decoded tokens, then a second turn; AOT graphs without codegen."""
    torch._dynamo.reset()
    compiled, slow = (
        G.Generator(model, CompileConfig(backend="aot_eager"), 1, 2048),
        eager(model, 1, 2048),
    )
    for n in (1, 40, 700, 1500):
        assert collect(compiled, [ids_of(n)], 3) == collect(slow, [ids_of(n)], 3)
    row = collect(compiled, [ids_of(1500)], 300)[0]
    assert row[:3] == collect(slow, [ids_of(1500)], 3)[0]
    assert len(collect(compiled, [ids_of(1500) + row + ids_of(20, 7)], 5)[0]) == 5
    assert (
        compiled.count.breaks == 0
        and compiled.count.recompiles == 0
        and compiled.count.graphs == 4 + 2 + 1
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "argv, says",
    [
        (("--prompt-ids", ""), "empty"),
        (("--prompt-ids", "1,x"), "--prompt-ids"),
        (("--prompt-ids", "1,256"), "256"),
        (("--prompt-ids", "-1"), "-1"),
        (("--prompt-ids", "1", "--max-seq-len", "99999"), "--max-seq-len"),
        (("--prompt-ids", ",".join(["7"] * 64), "--max-seq-len", "64"), "--max-seq-len"),
        (("--prompt", "x"), "tokenizer"),
        (("--prompt-ids", "1", "--prompt", "x"), "choose one"),
        (("--prompt-ids", "1", "--interactive"), "choose one"),
        (("--prompt-ids", "1", "--chat"), "--chat"),
        (("--prompt-ids", "1", "--thinking"), "--chat"),
        (("--prompt-ids", "1", "--temperature", "-1"), "--temperature"),
        (("--prompt-ids", "1", "--temperature", "nan"), "--temperature"),
        (("--prompt-ids", "1", "--top-k", "0"), "--top-k"),
        (("--prompt-ids", "1", "--top-p", "1.5"), "--top-p"),
        (("--prompt-ids", "1", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt-ids", "1", "--seed", "-3"), "--seed"),
        (("--prompt-ids", "1", "--stop", "x"), "tokenizer"),
        (("--prompt-ids", "1", "--compile", "cudagraphs", "--device", "cpu"), "CUDA"),
        (("--prompt-ids", "1", "--compile", "default", "--no-compile"), "--no-compile"),
        (
            ("--checkpoint", "deepseek-ai/DeepSeek-V4-Flash"),
            "hf download deepseek-ai/DeepSeek-V4-Flash",
        ),
        (
            ("--checkpoint", "https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro/"),
            "hf download deepseek-ai/DeepSeek-V4-Pro --local-dir",
        ),
        (("--checkpoint", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--checkpoint", str(ROOT / "ops")), "config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, folder, argv, says):
    argv = argv if "--checkpoint" in argv else ("--checkpoint", folder, *argv)
    assert says in run(capsys, *argv, code=2)


@pytest.mark.parametrize(
    "argv",
    (
        ["--no-such-flag"],
        ["--compile", "fastest"],
        ["--device", "tpu"],
        ["--max-new-tokens", "many"],
    ),
)
def test_unknown_flags_and_values_are_one_line_and_exit_code_2(capsys, argv):
    assert argv[0] in run(capsys, *argv, code=2)


def test_rewinding_again_and_again_stays_within_what_the_caches_hold(model, monkeypatch):
    """Each step back is small, all together are deep: the rings count from the furthest position that was fed."""
    logits, sample = [], G.sample
    monkeypatch.setattr(
        G, "sample", lambda scores, *rest: logits.append(scores) or sample(scores, *rest)
    )
    generator, ids, fed = eager(model), ids_of(400), []
    for length in (400, 393, 386, 379, 372, 371):
        collect(generator, [ids[:length]], 1)
        reused = logits[-1]
        fed.append(generator.fed_tokens)
        collect(eager(model), [ids[:length]], 1)
        assert rms(reused, logits[-1]) < 1e-5
    assert fed == [400, 1, 386, 1, 372, 1]  # every second step back is too deep


def test_steps_run_ahead_of_the_host_are_rewound(model):
    """With a burst of decode steps between reads, a row may be fed more than was wanted."""
    generator, ids = eager(model), ids_of(300)
    generator.burst = 8
    assert collect(generator, [ids], 2) == collect(eager(model), [ids], 2)
    for length in (294, 299, 301):
        again = (ids + ids_of(9, 3))[:length]
        assert collect(generator, [again], 10) == collect(eager(model), [again], 10)


def test_a_generator_wants_one_prompt_a_row(model):
    for prompts in ([[1]], [[1], []], [[1], [2], [3]]):
        with pytest.raises(ValueError, match="2 rows"):
            collect(eager(model, batch=2), prompts, 1)


def test_reasoning_of_earlier_turns_is_left_out():
    flags, tokenizer = G.parse(["--chat", "--thinking", "--interactive"]), G.load_tokenizer(TINY)
    ids = G.encode(flags, tokenizer, G.render(flags, ["hi", "because</think>A", "more"]))
    assert "because" not in (text := tokenizer.decode(ids)) and "A" in text


def test_an_interrupt_keeps_what_was_written(capsys, monkeypatch, tmp_path):
    """Every row's text so far is printed, and the exit code is 130."""
    file, decode, calls = tmp_path / "prompts.txt", G.compile_decode, []
    file.write_text("HAMLET.\nO\n\nKING.\nWho\n")

    def interrupted(*args):
        phase = decode(*args)

        def call(*args):
            calls.append(args)
            if len(calls) > 30:
                raise KeyboardInterrupt
            return phase(*args)

        call.name = "decode"
        return call

    monkeypatch.setattr(G, "compile_decode", interrupted)
    assert (
        G.main(["--checkpoint", str(TINY), "--no-compile", "--prompts", str(file), "--ignore-eos"])
        == 130
    )
    texts = capsys.readouterr().out
    assert len(texts) > 4 * 30  # four rows of 30 tokens; one row would be far less


def test_prompt_files_that_hold_nothing_are_refused(capsys, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\xff")
    for file, says in (
        (empty, "no prompt"),
        (binary, "UTF-8"),
        (tmp_path / "missing.txt", "cannot be read"),
    ):
        assert says in run(capsys, "--checkpoint", str(TINY), "--prompts", str(file), code=2)


def test_without_a_compiler_it_runs_eagerly_and_says_so(capsys, monkeypatch, folder):
    monkeypatch.setattr(stats, "missing_cpu_toolchain", lambda: "a C++ compiler")
    assert (
        G.main(["--checkpoint", folder, "--prompt-ids", "5,6", "--max-new-tokens", "2", "--json"])
        == 0
    )
    captured = capsys.readouterr()
    assert "a C++ compiler" in captured.err and json.loads(captured.out)["preset"] == "eager"
    assert "a C++ compiler" in run(
        capsys, "--checkpoint", folder, "--prompt-ids", "5", "--compile", "regional", code=2
    )


def test_the_report_has_every_key_of_the_contract(capsys, folder):
    result = run(
        capsys,
        "--checkpoint",
        folder,
        "--prompt-ids",
        "5,6",
        "--no-compile",
        "--max-new-tokens",
        "8",
    )
    assert not [key for key in KEYS if key not in result]
    assert (
        result["accepted_per_step"] is None
        and result["graphs"] == result["breaks"] == 0
        and result["recompiles"] is None
    )
    assert (
        0 < result["ttft_warm_s"] < result["ttft_s"]
        and result["tok_per_s"] > 0
        and result["threads"] == torch.get_num_threads()
    )


def test_the_context_ends_generation(capsys, folder):
    result = run(
        capsys,
        "--checkpoint",
        folder,
        "--prompt-ids",
        ",".join(map(str, ids_of(30))),
        "--no-compile",
        "--ignore-eos",
        "--max-seq-len",
        "40",
        "--max-new-tokens",
        "99",
    )
    assert result["stop_reason"] == "context" and len(result["tokens"]) == 10


def test_eos_ends_a_row_unless_ignored(model):
    """With the most likely token declared to be EOS, the row ends there, in the graph too; without, it goes on."""
    prompt = ids_of(20)
    tokens = collect(eager(model), [prompt], 8)[0]
    eos = tokens[3]
    before = tokens.index(eos)
    generator, lengths = eager(model, eos=eos), []
    decode = generator.decode
    generator.decode = lambda token, pos, length, *how: (
        lengths.append(out := decode(token, pos, length, *how)),
        out,
    )[1]
    collect(generator, [prompt], 8)
    assert [int(out[2]) for out in lengths][:before] == [1] * (before - 1) + [0]
    for ignored, reason in ((False, "eos"), (True, "length")):
        flags = G.parse(["--prompt-ids", "1", "--max-new-tokens", "8"] + ["--ignore-eos"] * ignored)
        runner = G.Run(flags, eager(model), None, None if ignored else eos, io.StringIO())
        runner([prompt], GREEDY)
        assert runner.stop == [reason] and runner.tokens[0] == (
            tokens if ignored else tokens[: before + 1]
        )


def test_prompts_of_a_file_run_as_one_batch_and_text_stops(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("HAMLET.\nO, that this too too solid flesh would melt\n\nI\n")
    argv = (
        "--checkpoint",
        str(TINY),
        "--no-compile",
        "--max-new-tokens",
        "40",
        "--prompts",
        str(file),
    )
    result = run(capsys, *argv)
    assert len(result["prompt_tokens"]) == len(result["tokens"]) == len(result["text"]) == 3
    text = result["text"][0]
    assert len(text) > 20
    stop = text[8:11]
    stopped = run(capsys, *argv, "--stop", stop)
    assert stopped["stop_reason"][0] == "stop" and stopped["text"][0] == text[: text.index(stop)]


def test_interactive_turns_continue_the_conversation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("KING.\nWho comes here?\n\nSpeak.\n"))
    result = run(
        capsys, "--checkpoint", str(TINY), "--interactive", "--no-compile", "--max-new-tokens", "12"
    )
    assert len(result["tokens"]) == 3 and all(len(tokens) == 12 for tokens in result["tokens"])
    assert result["prompt_tokens"][0] + 12 < result["prompt_tokens"][1] < result["prompt_tokens"][2]
    assert result["fed_tokens"] < result["prompt_tokens"][2] - result["prompt_tokens"][1] + 4
    # what the second turn saw, asked at once
    tokenizer = G.load_tokenizer(TINY)
    ids = (
        tokenizer.encode("KING.\n", bos=True)
        + result["tokens"][0]
        + tokenizer.encode("Who comes here?\n")
    )
    assert len(ids) == result["prompt_tokens"][1]
    again = run(
        capsys,
        "--checkpoint",
        str(TINY),
        "--prompt-ids",
        ",".join(map(str, ids)),
        "--no-compile",
        "--max-new-tokens",
        "12",
    )
    assert again["tokens"] == result["tokens"][1]


@pytest.mark.parametrize("chat", (False, True))
@pytest.mark.parametrize("seed", range(3))
def test_turns_append_to_the_cache_however_their_text_would_be_split(
    capsys, monkeypatch, seed, chat
):
    """Sampled tokens are rarely the tokenizer's own split of their text; the next turn is fed alone all the same."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("KING.\nWho comes here?\nSpeak.\n"))
    fed, prompts = [], []
    feed = G.Generator._feed
    monkeypatch.setattr(
        G.Generator,
        "_feed",
        lambda self, *args: (
            prompts.append(args[0][0]),
            feed(self, *args),
            fed.append(self.fed_tokens),
        )[1],
    )
    result = run(
        capsys,
        "--checkpoint",
        str(TINY),
        "--interactive",
        "--no-compile",
        "--max-new-tokens",
        "100",
        "--temperature",
        "1.5",
        "--seed",
        str(seed),
        *["--chat"] * chat,
    )
    assert len(fed) == 3 and all(n < 40 for n in fed[1:]), (fed, result["prompt_tokens"])
    said = G.load_tokenizer(TINY).decode(prompts[1])
    assert (
        result["text"][0] in said and said.split(result["text"][0])[1].count("Who comes here?") == 1
    )
    ids = [G.load_tokenizer(TINY).encode(text) for text in result["text"]]
    assert any(a != b for a, b in zip(ids, result["tokens"]))  # or this test would show nothing


def test_chat_is_rendered_in_v4s_format(capsys):
    result = run(
        capsys,
        "--checkpoint",
        str(TINY),
        "--chat",
        "--system",
        "Be brief.",
        "--prompt",
        "Who is there?",
        "--no-compile",
        "--max-new-tokens",
        "4",
    )
    tokenizer = G.load_tokenizer(TINY)
    expected = tokenizer.encode(
        G.encode_messages(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Who is there?"},
            ]
        )
    )
    assert result["prompt_tokens"] == len(expected) and expected.count(tokenizer.bos_id) == 1


def test_the_embedded_model_writes_english_from_the_shell():
    """The whole command in a process of its own: text streams to standard output, statistics to standard error."""
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
