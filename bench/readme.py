"""Write the numbers of README.md from the recorded results.

python -m bench.readme         rewrites the parts between the markers
"""

from __future__ import annotations

import json
import re
import sys

from bench.compile import DEPTHS, PHASES
from bench.record import RESULTS
from tools.report import table

README = RESULTS.parent.parent / "README.md"


def transcript() -> str:
    """The recorded first run: the beginning of its text, and its statistics."""
    lines = re.sub(
        r"(compiling|loading)[^\n]*\n", "", (RESULTS / "transcript.txt").read_text()
    ).splitlines()
    return "\n".join(["```", *lines[:18], "...", *lines[-6:], "```", ""])


def numbers() -> str:
    """The Markdown between the markers."""
    cpu, embedded, dense = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("cpu", "embedded", "dense")
    )
    env, lines = (
        cpu["environment"],
        [
            "| CPU, fp32, same weights | Transformers eager | this, eager | this, compiled | ratio |",
            "|---|---|---|---|---|",
        ],
    )
    for key, case in cpu.items():
        if isinstance(case, dict) and "ours compiled" in case:
            theirs = min(v["ms"] for k, v in case.items() if k.startswith("transformers eager"))
            own = f"{case['ours eager']['ms']:.1f} ms" if "ours eager" in case else ""
            lines.append(
                f"| {key} | {theirs:.1f} ms | {own} | {case['ours compiled']['ms']:.2f} ms | {case['ratio']:.1f} |"
            )
    cold, warm, cache = cpu["start cold"], cpu["start warm"], cpu["cache at 128k, Flash"]
    experts = {
        key.removeprefix("experts in "): case["times"]
        for key, case in cpu.items()
        if key.startswith("experts")
    }
    memory = cpu["memory of a forward over 2048"]
    added = {
        key.removeprefix("memory of a train step "): [
            n / 2**20 for name, n in case.items() if name.startswith(("ours", "transformers"))
        ]
        for key, case in cpu.items()
        if key.startswith("memory of a train step")
    }
    steps = "".join(
        f";\na training step of {key}: {ours:.0f} and {theirs:.0f} MiB"
        for key, (ours, theirs) in added.items()
    )
    train, size = embedded["training"], embedded["bytes"] / 1e6
    deep, flash = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("compile", "report_flash")
    )
    depths = "\n".join(
        f"| {phase} | "
        + " | ".join(
            f"{deep[f'{phase}, {n} layers']['compile_cold_s']:.0f} s, {deep[f'{phase}, {n} layers']['compile_warm_s']:.1f} s"
            for n in DEPTHS
        )
        + f" | {deep[f'{phase}, 43 to 12 layers']:.2f} |"
        for phase in PHASES
        if f"{phase}, 43 to 12 layers" in deep
    )
    return (
        "\n".join(lines)
        + f"""

Least CPU time of {5} alternating rounds on {cpu["threads"]} thread (wall time where a row names more), {env["cpu"]}, torch {env["torch"]}, transformers {env["transformers"]},
{env["date"]}; load average at the end {env["load_average"][0]:.1f}. Small is a model of 56 M parameters with random weights;
all else is measured with the embedded one. Transformers runs with the fastest of its expert implementations and
compiles anew for every decoded token: {", ".join(f"{s:.0f}" for s in cpu["transformers compiled decode, CPU seconds of the first tokens"])} CPU seconds
for the first three. A forward over 2048 tokens adds {memory["ours_bytes"] / 2**20:.0f} MiB to the peak memory, Transformers' {memory["transformers_bytes"] / 2**20:.0f} MiB{steps}.
With the experts traced rather than behind an opaque op, compiled steps take {", ".join(f"{times:.2f} times as long ({key})" for key, times in experts.items())}.

`python generate.py` prints its first token {cold["ttft_s"]:.0f} s after the process starts when nothing is compiled yet (load average before:
{cold["load_average_before"]:.1f}) and {warm["ttft_s"]:.1f} s when the compile cache is warm ({warm["load_average_before"]:.1f}); it compiles {cold["graphs"]} graphs with {cold["breaks"]} breaks and
{cold["recompiles"]} recompiles, in {cold["compile_s"]:.0f} s cold and {warm["compile_s"]:.0f} s warm. Flash at 128k tokens of context caches
{cache["bytes_per_token"]:,.0f} bytes a token, {cache["v3_ratio"]:.1f} times less than V3's latent attention at that depth.

The embedded model ({size:.2f} MB, {embedded["parameters"] / 1e6:.1f} M parameters, {embedded["active_parameters"] / 1e6:.1f} M active) was trained for {train["tokens"] / 1e6:.2f} M tokens in {train["minutes"]:.0f} minutes
on {train["threads"]} thread. On the held-out {100 * embedded["held_out_share"]:.0f} % of the text it takes {embedded["act_quant_held_out_nats_per_char"]:.3f} nats per character as stored; a plain dense
transformer of equal active size, trained by the same loop for the same tokens, takes {dense["held_out_nats_per_char"]:.3f}. Its MTP block proposes the
backbone's own next choice {100 * embedded["draft_acceptance"]:.0f} % of the time.

Compile seconds by depth, embedded width, preset regional, cold and warm; the last column is cold, 43 layers to 12:

| phase | {" | ".join(f"{n} layers" for n in DEPTHS)} | ratio |
|---|---|---|---|---|
{depths}

`python compile_config.py report --config flash --full`, every layer traced on fake tensors on this machine:

```
{table(flash)}
```
"""
    )


def updated(text: str) -> str:
    """README text with its transcript and numbers rewritten."""
    for name, content in (("transcript", transcript()), ("numbers", numbers())):
        begin, end = f"<!-- {name}: python -m bench.readme -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    return text


def main() -> int:
    README.write_text(updated(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
