"""V4's chat format: conversations to prompts, answers to messages (docs/v4.md#prompt-format).

V4 ships no chat template: the format is defined by the official `encoding_dsv4.py`. The formats of
later releases (-0731, Vision, V4.1) differ and are refused by name.

A rendered prompt begins with the BOS token, so it is encoded without adding another one.
"""

from __future__ import annotations

import json
import re

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
FIELDS = {  # of a message, by role, besides role, content, task, and mask, which is for training
    "system": ("tools", "response_format"),
    "user": (),
    "assistant": ("reasoning_content", "reasoning", "tool_calls", "wo_eos"),
    "tool": ("tool_call_id", "name"),
    "developer": ("tools", "response_format"),
    "latest_reminder": (),
}
ROLES = tuple(FIELDS)

# The texts below are the model's training format: every byte counts.
REASONING_EFFORT_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n%s"
)

CALLS, CALLS_END = f"\n\n<{DSML}tool_calls>", re.compile(rf"\s*</{DSML}tool_calls>")
NAME, VALUE = rf'((?:(?!{DSML})[^"\n])+)', rf"((?:(?!{DSML}).)*)"  # neither holds markup
INVOKE, INVOKE_END = re.compile(rf'\s*<{DSML}invoke name="{NAME}">\s*'), f"</{DSML}invoke>"
PARAMETER = re.compile(
    rf'<{DSML}parameter name="{NAME}" string="(true|false)">{VALUE}</{DSML}parameter>\s*', re.DOTALL
)


def encode_messages(
    messages: list[dict],
    *,
    thinking: bool = False,
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    bos: bool = True,
) -> str:
    """The prompt of a conversation in the OpenAI format (docs/v4.md#prompt-format).

    Message fields: role, content; on system and developer also tools and response_format; on
    assistant also reasoning_content (or reasoning, vLLM's name), tool_calls and wo_eos (an answer
    to be continued); on tool also tool_call_id; task (see TASKS) asks for a quick classification
    after a message. Other fields are refused unless they are empty.

    reasoning_effort  when thinking: None, "high" (both plain) or "max"
    drop_thinking     leave out reasoning and developer messages before the last user turn;
                      conversations with tools always keep them

    ValueError, one line, for messages that the format cannot express.
    """
    if reasoning_effort not in (None, "high", "max"):
        raise ValueError(
            f"reasoning_effort {reasoning_effort!r} is not one of V4's: None, 'high' or 'max' "
            "('low' and others belong to the -0731 and V4.1 encoders)"
        )
    turns = _turns(messages)
    drop = thinking and drop_thinking and not any(turn.get("tools") for turn in turns)
    if drop:
        last = _last_user(turns)
        turns = [turn for i, turn in enumerate(turns) if turn["role"] != "developer" or i >= last]
    last = _last_user(turns)
    prompt = [BOS] if bos else []
    if thinking and reasoning_effort == "max":
        prompt.append(REASONING_EFFORT_MAX)
    for i, turn in enumerate(turns):
        role = turn["role"]
        if role == "assistant":
            # The answer to a task is bare. Dropped reasoning was closed by the user turn before it.
            answers_task = i > 0 and turns[i - 1].get("task")
            if thinking and not (drop and i <= last) and not answers_task:
                prompt += [turn.get("reasoning_content") or "", END_THINK]
            prompt += [turn.get("content") or "", _calls_text(turn)]
            if not turn.get("wo_eos"):
                prompt.append(EOS)
        else:
            prefix = {"system": "", "latest_reminder": REMINDER}.get(role, USER)
            prompt += [prefix, _content_text(turn)]
        if i + 1 == len(turns) or turns[i + 1]["role"] in ("assistant", "latest_reminder"):
            prompt += _answer_prefix(turn, thinking, thinking and not (drop and i < last))
    return "".join(prompt)


def _answer_prefix(turn: dict, thinking: bool, thinks_here: bool) -> list[str]:
    """The tokens after a turn that ask the assistant to speak."""
    task = turn.get("task")
    if task == "action":
        return [ASSISTANT, THINK if thinking else END_THINK, TASKS[task]]
    if task:
        return [TASKS[task]]
    if turn["role"] in ("user", "developer"):
        return [ASSISTANT, THINK if thinks_here else END_THINK]
    return []


def _turns(messages: list[dict]) -> list[dict]:
    """The messages, checked, with runs of user and tool messages merged into user turns.

    A user turn has `parts`, pairs (order, text): order is None for text, and the number of the
    call that it answers for a tool result.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    turns, calls = [], None
    for i, message in enumerate(messages):
        _check(message, f"messages[{i}]")
        role, turn = message["role"], dict(message)
        if message.get("reasoning"):  # vLLM's name
            turn["reasoning_content"] = message["reasoning"]
        if role == "assistant":
            calls = [call.get("id") for call in message.get("tool_calls") or []]
        elif role == "tool":
            key = message.get("tool_call_id")
            if not calls or key and all(calls) and key not in calls:
                raise ValueError(
                    f"messages[{i}] (tool): answers no call of an assistant message before it; "
                    "keep the assistant message with its tool_calls, and their ids"
                )
            result = "\n\n".join(_texts(message["content"]))
            order = calls.index(key) if key in calls else 0
            turn |= {"role": "user", "parts": [(order, f"<tool_result>{result}</tool_result>")]}
        elif role == "user":
            turn["parts"] = [(None, text) for text in _texts(message["content"])]
        previous = turns[-1] if turns else {}
        ends_with_task = role == "user" and previous.get("task")
        if previous.get("role") == turn["role"] == "user" and not ends_with_task:
            previous["parts"] += turn["parts"]
            previous["task"] = previous.get("task") or turn.get("task")
        else:
            turns.append(turn)
    return turns


def _check(message, where: str) -> None:
    """ValueError for a message that the format cannot express, or would lose without a word."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise ValueError(f"{where}: unknown role {role!r}; V4 has {', '.join(ROLES)}")
    role, task = message["role"], message.get("task")
    where = f"{where} ({role})"
    _check_content(message, where)
    for key in ("reasoning_content", "reasoning"):
        if not isinstance(message.get(key), (str, type(None))):
            raise ValueError(f"{where}: {key} is not text; give a string")
    if message.get("reasoning") and message.get("reasoning_content"):
        raise ValueError(f"{where}: has both reasoning_content and reasoning; give one")
    if task is not None and task not in TASKS:
        raise ValueError(f"{where}: unknown task {task!r}; V4 has {', '.join(TASKS)}")
    for key in ("tools", "response_format"):
        if message.get(key) and role not in ("system", "developer"):
            raise ValueError(
                f"{where}: {key} would not be rendered; put it on a system or developer message"
            )
    known = "role", "content", "task", "mask", *FIELDS[role]
    unknown = next((key for key, value in message.items() if value and key not in known), None)
    if unknown:
        raise ValueError(
            f"{where}: {unknown} would not be rendered; leave it out: this role has "
            f"{', '.join(known)}"
        )
    for tool in message.get("tools") or []:
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise ValueError(f"{where}: an entry of tools has no function; use the OpenAI format")
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        fields = function if isinstance(function, dict) else {}
        has_name = isinstance(fields.get("name"), str)
        if not has_name or not isinstance(fields.get("arguments"), (str, dict)):
            raise ValueError(
                f"{where}: an entry of tool_calls has no function with name and arguments "
                "(JSON text)"
            )


def _check_content(message: dict, where: str) -> None:
    role, content = message["role"], message.get("content")
    optional = {"assistant": ("tool_calls", "reasoning_content", "reasoning")}
    optional["system"] = ("tools", "response_format")
    if content is None and not any(message.get(key) for key in optional.get(role, ())):
        raise ValueError(f"{where}: content is missing; give a string")
    if role == "developer" and not content:
        raise ValueError(f"{where}: content is empty; give this role a text")
    if not isinstance(content, list) or role not in ("user", "tool"):
        if not isinstance(content, (str, type(None))):
            raise ValueError(f"{where}: content is a {type(content).__name__}; give one string")
        return
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None or kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f'{where}: a content part is not {{"type": "text", "text": ...}}')
        if kind != "text" and role == "user":
            raise ValueError(
                f"{where}: V4 reads text only, not {kind!r}; images need the Vision or V4.1 encoder"
            )


def _last_user(turns: list[dict]) -> int:
    users = [i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")]
    return max(users, default=-1)


def _texts(content: str | list) -> list[str]:
    """A string, or the texts of OpenAI content parts; parts of other types are named."""
    if isinstance(content, str):
        return [content]
    return [
        part["text"] if part.get("type") == "text" else f"[Unsupported {part.get('type')}]"
        for part in content
    ]


def _content_text(turn: dict) -> str:
    """Body of a turn that the assistant did not write, with tool results in the calls' order."""
    if "parts" in turn:
        results = [part for part in turn["parts"] if part[0] is not None]
        in_order = iter(sorted(results, key=lambda part: part[0]))
        texts = [text if order is None else next(in_order)[1] for order, text in turn["parts"]]
        return "\n\n".join(texts)
    sections = [turn.get("content") or ""]
    if turn.get("tools"):
        sections.append(TOOLS % "\n".join(_json(tool["function"]) for tool in turn["tools"]))
    if turn.get("response_format"):
        sections.append(RESPONSE_FORMAT % _json(turn["response_format"]))
    return "\n\n".join(sections)


def _calls_text(turn: dict) -> str:
    """The DSML block of an assistant turn, empty without calls."""
    invokes = []
    for function in (call["function"] for call in turn.get("tool_calls") or []):
        arguments = function["arguments"]
        if isinstance(arguments, str):
            parsed = _parse_json(arguments)
            arguments = parsed if isinstance(parsed, dict) else {"arguments": arguments}
        head = f'<{DSML}invoke name="{function["name"]}">'
        parameters = []
        for key, value in arguments.items():
            is_string = isinstance(value, str)
            text = value if is_string else _json(value)
            flag = "true" if is_string else "false"
            parameters.append(
                f'<{DSML}parameter name="{key}" string="{flag}">{text}</{DSML}parameter>'
            )
        invokes.append("\n".join([head, "\n".join(parameters), INVOKE_END]))
    return "\n".join([CALLS, *invokes, f"</{DSML}tool_calls>"]) if invokes else ""


def parse_response(text: str, thinking: bool = False) -> dict:
    """An answer as fields of an assistant message: reasoning_content, content, tool_calls.

    `text` continues a prompt of `encode_messages` with the same `thinking`; it ends at the first
    EOS, if any. Calls are in the OpenAI format, arguments as JSON text. Nothing raises: reasoning
    that was cut off before `</think>` is still reasoning, and parts of a DSML block that do not
    parse stay in content as they were written.
    """
    text = text.partition(EOS)[0]
    reasoning = ""
    if thinking:
        reasoning, closed, answer = text.partition(END_THINK)
        if not closed:
            reasoning, mark, block = text.partition(CALLS)
            answer = mark + block
        text = answer
    content, mark, block = text.partition(CALLS)
    calls, at = _parse_calls(block)
    end = CALLS_END.match(block, at)
    if calls or end:
        mark, block = "", block[end.end() if end else at :]
    return {"reasoning_content": reasoning, "content": content + mark + block, "tool_calls": calls}


def _parse_calls(block: str) -> tuple[list[dict], int]:
    """The well-formed invokes at the start of a DSML block, and where they end."""
    calls, end = [], 0
    while head := INVOKE.match(block, end):
        arguments, inside = {}, head.end()
        while (item := PARAMETER.match(block, inside)) and item[1] not in arguments:
            name, is_string, value = item.groups()
            is_json = is_string == "false" and _parse_json(value) is not _INVALID
            arguments[name] = value if is_json else _json(value)
            inside = item.end()
        if not block.startswith(INVOKE_END, inside):
            break
        # The values are JSON text already, and keep their spelling.
        fields = ", ".join(f"{_json(name)}: {value}" for name, value in arguments.items())
        function = {"name": head[1], "arguments": f"{{{fields}}}"}
        calls.append({"type": "function", "function": function})
        end = inside + len(INVOKE_END)
    return calls, end


_INVALID = object()


def _parse_json(text: str):
    """Its value, or _INVALID; NaN and Infinity, which Python's reader takes, are no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(constant: str):
    raise ValueError(constant)


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)
