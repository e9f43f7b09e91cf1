"""Prefill, decode, verify and rewinding through the caches equal the training forward."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

from model import Transformer
from testing import positions, random_model, random_tokens, rms, small

TOLERANCE = 1e-5
REWIND = 8
ARGS = {
    "flash-like": small(swiglu_limit=1.5),
    "pro-like": small(
        n_layers=4, n_hash_layers=3, compress_ratios=(128, 4, 128, 4, 0), index_topk=8
    ),
    "other-ratios": small(n_layers=3, compress_ratios=(16, 4, 3, 0), window_size=10),
}


@functools.cache
def case(config: str, batch: int, length: int):
    """A model, random tokens [batch, length], and the logits of the training forward."""
    model = random_model(ARGS[config])
    tokens = random_tokens(batch, length, seed=100 + batch)
    with torch.no_grad():
        return model, tokens, model(tokens)


def caches(model) -> dict[str, torch.Tensor]:
    """All cache buffers, by name."""
    names = ("ring.rows", "entries")
    return {name: b for name, b in model.named_buffers() if name.endswith(names)}


@torch.no_grad()
def feed(model, tokens, schedule, start=None) -> list[torch.Tensor]:
    """Feed rows of tokens in calls of given lengths, from position `start` [B]; -> logits per row.

    schedule: for each call T, the tokens per row, and lengths [B], how many of them are valid.
    """
    pos = torch.zeros(len(tokens), dtype=torch.int64) if start is None else start.clone()
    out = [[] for _ in tokens]
    for T, lengths in schedule:
        slot = torch.arange(T)
        columns = (pos[:, None] + slot).clamp(max=tokens.shape[1] - 1)
        # Padding is not even a token.
        new = torch.where(slot < lengths[:, None], tokens.gather(1, columns), -7)
        logits = model(new, pos, lengths)
        for row, n in enumerate(lengths.tolist()):
            out[row].append(logits[row, :n])
        pos = pos + lengths
    return [torch.cat(rows) for rows in out]


@pytest.mark.parametrize("chunk", (1, 7, 64, 256))
@pytest.mark.parametrize("config", ARGS)
def test_prefill_in_chunks_equals_the_training_forward(config, chunk):
    """The last chunk is padded; chunks are longer and shorter than rings and windows."""
    model, tokens, expected = case(config, 2, 397)
    model.setup_caches(2, 512, REWIND)
    schedule = [(chunk, torch.full((2,), min(chunk, 397 - c))) for c in range(0, 397, chunk)]
    for row, logits in enumerate(feed(model, tokens, schedule)):
        assert rms(logits, expected[row]) <= TOLERANCE


# Around ends of windows and of compressed entries, with rewinds across them.
BOUNDARIES = (
    *(1, 2, 3, 4, 5, 7, 8, 9),
    *(119, 120, 121, 124, 125, 126, 127, 128, 129, 130, 131, 132, 135, 136, 137, 138, 143, 144),
    *(248, 251, 252, 253, 254, 255, 256, 257, 258, 260, 263, 264, 265, 271, 272, 273),
)


@pytest.mark.parametrize(
    "config, shift",
    [("flash-like", s) for s in range(REWIND + 1)] + [("pro-like", 3), ("other-ratios", 5)],
)
def test_decode_after_rewinding_equals_the_training_forward(config, shift):
    """Every row goes up to its boundary, twice drafts wrong tokens and is set back, then continues.

    Over the shifts every boundary is set back to 0 to max_rewind below its highest position, by
    verify calls and by tokens.
    """
    rows = len(BOUNDARIES)
    model, tokens, expected = case(config, rows, 300)
    model.setup_caches(rows, 512, REWIND)
    pos = positions(*BOUNDARIES)
    feed(model, tokens, [(256, pos.clamp(max=256)), (256, pos - pos.clamp(max=256))])

    # Tokens drafted by one verify call; the first of them is fed again.
    drafted = (torch.arange(rows) + shift) % (REWIND + 1) + 1
    wrong = (tokens.roll(1, 0) + 1) % 256
    feed(model, wrong, [(REWIND + 1, drafted)], pos)

    # Then some shorter draft, token by token, from none to all but one.
    again = (drafted * 5) % drafted.clamp(min=2)
    feed(model, wrong.flip(1), [(1, (again > i).long()) for i in range(REWIND + 1)], pos)

    ones = torch.ones(rows, dtype=torch.int64)
    schedule = [(1, ones)] * 6 + [(4, 4 * ones)] * 4
    for row, logits in enumerate(feed(model, tokens, schedule, pos)):
        p = BOUNDARIES[row]
        moved = rms(logits, expected[row, p : p + 22])
        assert moved <= TOLERANCE, f"at {p}, {int(drafted[row])} tokens drafted"


def test_a_row_may_walk_back_in_steps_below_its_highest_position():
    """Rewinds of 3, 3 and 2 without feeding enough to recover: 8 below the highest in the end."""
    model, tokens, expected = case("flash-like", 2, 397)
    model.setup_caches(2, 512, REWIND)
    feed(model, tokens, [(256, positions(256, 256)), (9, positions(9, 9))])
    with torch.no_grad():
        for p in (261, 258, 256):  # the highest is 264
            model(tokens[:, 7:8], positions(p, p))
    schedule = [(1, positions(1, 1))] * 40
    for row, logits in enumerate(feed(model, tokens, schedule, positions(256, 256))):
        assert rms(logits, expected[row, 256:296]) <= TOLERANCE


@pytest.mark.parametrize("config", ARGS)
def test_ragged_batch_equals_its_rows_alone(config):
    """Rows advance by different lengths, some stand still; lengths differ mod 4 and mod 128."""
    rows = 5
    model, tokens, expected = case(config, rows, 397)
    model.setup_caches(rows, 512, REWIND)
    first = positions(1, 130, 0, 255, 66)
    schedule = [(256, first)]
    total = first.clone()
    generator = torch.Generator().manual_seed(0)
    for T in (1, 4, 4, 1, 9, 1, 1, 64, 4, 1, 130, 1, 1, 4):
        lengths = torch.randint(0, T + 1, (rows,), generator=generator).minimum(397 - total)
        schedule.append((T, lengths))
        total += lengths
    logits = feed(model, tokens, schedule)
    alone = Transformer(ARGS[config])
    alone.load_state_dict(model.state_dict())
    alone.setup_caches(1, 512, REWIND)
    for row in range(rows):
        n = int(total[row])
        assert rms(logits[row], expected[row, :n]) <= TOLERANCE
        one = slice(row, row + 1)
        (single,) = feed(alone, tokens[one], [(T, lengths[one]) for T, lengths in schedule])
        assert rms(logits[row], single) <= TOLERANCE


@pytest.mark.parametrize("length", (1, 2, 3))
@pytest.mark.parametrize("config", ARGS)
def test_short_prompt_after_a_long_conversation_equals_a_fresh_model(config, length):
    model, tokens, _ = case(config, 2, 397)
    model.setup_caches(2, 512, REWIND)
    feed(model, tokens, [(256, positions(256, 200)), (64, positions(64, 64))])
    other = (tokens + 5) % 256
    with torch.no_grad():
        expected = model(other[:, : length + 20])
    schedule = [(length, positions(length, length))] + [(1, positions(1, 1))] * 20
    logits = feed(model, other, schedule)
    for row in range(2):
        assert rms(logits[row], expected[row]) <= TOLERANCE


@pytest.mark.parametrize("config", ARGS)
def test_positions_past_the_context_are_dropped(config):
    """They overwrite nothing: setting the row back continues as if they had never been fed."""
    model, tokens, expected = case(config, 2, 397)
    model.setup_caches(2, 258, REWIND)
    feed(model, tokens, [(250, positions(250, 250))])
    with torch.no_grad():
        before = {name: b.clone() for name, b in caches(model).items()}
        model(tokens[:, :64], positions(258, 300))
        for name, b in caches(model).items():
            assert torch.equal(b[:, :-1], before[name][:, :-1]), name  # all but the trash slot
        model(tokens[:, :16], positions(252, 250))  # only the first 6 and 8 fit
    schedule = [(8, positions(8, 8))]
    for row, logits in enumerate(feed(model, tokens, schedule, positions(250, 250))):
        assert rms(logits, expected[row, 250:258]) <= TOLERANCE


def test_a_frozen_row_keeps_its_caches():
    model, tokens, _ = case("flash-like", 2, 397)
    model.setup_caches(2, 512, REWIND)
    feed(model, tokens, [(200, positions(200, 131))])
    before = {name: b[1].clone() for name, b in caches(model).items()}
    feed(model, tokens, [(8, positions(8, 0)), (1, positions(1, 0))], positions(200, 131))
    for name, b in caches(model).items():
        assert torch.equal(b[1, :-1], before[name][:-1]), name


def test_smaller_batches_use_the_first_rows():
    model, tokens, expected = case("flash-like", 2, 397)
    model.setup_caches(4, 512)
    logits = feed(model, tokens, [(256, positions(256, 256))])[1]
    assert rms(logits, expected[1, :256]) <= TOLERANCE


@torch.no_grad()
def test_logits_last_none_and_hidden():
    model, tokens, expected = case("flash-like", 2, 397)
    model.setup_caches(2, 512)
    lengths = positions(37, 64)
    last = model(tokens[:, :64], positions(0, 0), lengths, logits="last")
    assert last.shape == (2, 1, 256)
    assert rms(last[:, 0], expected[positions(0, 1), lengths - 1]) <= TOLERANCE
    assert rms(model(tokens, logits="last"), expected[:, -1:]) <= TOLERANCE
    none, hidden = model(tokens, logits=None, return_hidden=True)
    assert none is None and hidden.shape == (2, 397, 4, 64)
    logits = model.head_input(hidden) @ model.head.weight.T
    assert rms(logits, expected) <= TOLERANCE
    out, again = model(tokens, return_hidden=True)
    assert torch.equal(again, hidden) and rms(out, expected) <= TOLERANCE


def test_reset_caches_empties_every_cache_in_place():
    model, tokens, _ = case("flash-like", 2, 397)
    model.setup_caches(2, 512)
    feed(model, tokens, [(256, positions(256, 256))])
    used = [b for name, b in caches(model).items() if "mtp" not in name]
    # Every attention has a ring, every compressor a ring and entries.
    assert len(used) == 4 + 5 + 5
    assert all(b.any() for b in used)
    addresses = [b.data_ptr() for b in used]
    model.reset_caches()
    assert not any(b.any() for b in used)
    assert addresses == [b.data_ptr() for b in used]


def test_bf16_model_keeps_compressor_state_in_fp32():
    model = random_model(ARGS["flash-like"], seed=0).to(torch.bfloat16)
    model.setup_caches(1, 256)
    attn = model.layers[1].attn
    assert attn.ring.rows.dtype == attn.compressor.entries.dtype == torch.bfloat16
    for compressor in (attn.compressor, attn.indexer.compressor):
        assert compressor.ring.rows.dtype == torch.float32


def test_quantised_activations_decode_as_they_prefill():
    """On a model without discrete choices; values that round the other way move logits a little."""
    model = random_model(small(n_hash_layers=4, index_topk=256, act_quant=True))
    tokens = random_tokens(1, 150, seed=3)
    model.setup_caches(1, 256)
    with torch.no_grad():
        expected = model(tokens)
        plain = Transformer(small(n_hash_layers=4, index_topk=256))
        plain.load_state_dict(model.state_dict())
        assert rms(plain(tokens), expected) > 0.02  # quantisation does something
    (logits,) = feed(model, tokens, [(64, positions(64))] + [(1, positions(1))] * 86)
    assert rms(logits, expected[0]) < 5e-3


def call_beyond_the_batch(model, tokens):
    model.setup_caches(1, 64)
    model(tokens, positions(0, 0))


def call_with_documents_and_positions(model, tokens):
    model.setup_caches(2, 64)
    model(tokens, positions(0, 0), doc_ids=tokens)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, t: m(t, lengths=positions(1, 1)), "lengths needs input_pos"),
        (lambda m, t: m(t, positions(0, 0)), "setup_caches"),
        (call_beyond_the_batch, "exceeds max_batch_size 1"),
        (call_with_documents_and_positions, "exclude each other"),
        (lambda m, t: m(t, logits="some"), "'all', 'last' or None"),
        (lambda m, t: m.setup_caches(2, 64, -1), "max_rewind non-negative"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(Transformer(ARGS["flash-like"]), torch.zeros(2, 8, dtype=torch.int64))


def test_caches_are_constants_to_autograd():
    """With gradients on, caches keep no graph: a later call backpropagates by itself.

    And the model can be copied.
    """
    model, tokens, expected = case("flash-like", 2, 397)
    model.setup_caches(2, 512)
    model(tokens[:, :20], positions(0, 0)).sum().backward()
    logits = model(tokens[:, 20:21], positions(20, 20))
    logits.sum().backward()
    assert rms(logits, expected[:, 20:21]) <= TOLERANCE
    assert not any(b.requires_grad for b in model.buffers())
    model.zero_grad(set_to_none=True)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        logits = again(tokens[:, 21:22], positions(21, 21))
    assert rms(logits, expected[:, 21:22]) <= TOLERANCE


def test_caches_set_up_in_inference_mode_serve_any_mode():
    model, tokens, expected = case("flash-like", 2, 397)
    with torch.inference_mode():
        model.setup_caches(2, 512)
        model(tokens[:, :20], positions(0, 0))
    logits = feed(model, tokens, [(20, positions(20, 20)), (1, positions(1, 1))])[0]
    assert rms(logits, expected[0, :21]) <= TOLERANCE


@torch.no_grad()
def test_a_meta_model_given_its_weights_computes():
    model, tokens, expected = case("flash-like", 2, 397)
    with torch.device("meta"):
        other = Transformer(ARGS["flash-like"])
    other.load_state_dict(model.state_dict(), assign=True)
    assert rms(other(tokens), expected) <= TOLERANCE
