"""Write docs/numbers.md, and the transcript and the table of README.md, from the recorded results.

python -m bench.numbers
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

from bench.compile import DEPTHS, PHASES
from bench.record import RESULTS
from tools.report import table as report_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NUMBERS = ROOT / "docs" / "numbers.md"
SHOWN = (  # the rows of the README
    "decode B=1",
    "decode B=8",
    "prefill 512",
    "prefill 1800",
    "train step 1 x 1024",
    "train step 1 x 512, small",
)
MIB = 2**20
PAYS = 1.2  # times as long some row takes without a C++ kernel, or else it goes


def recorded(name: str) -> dict | None:
    """bench/results/NAME.json, None where there is no such record."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False) + "\n"


# --------------------------------------------------------------------------------------------------
# README.md


def transcript() -> str:
    """The recorded run, shortened, and the seconds of the first run beside those of this one."""
    text = re.sub(r"(compiling|loading)[^\n]*\n", "", (RESULTS / "transcript.txt").read_text())
    lines = text.splitlines()
    cpu = recorded("cpu")
    cold, warm = cpu["start cold"], cpu["start warm"]
    beside = paragraph(
        f"That is a second run: its text is complete after {warm['text_s']:.1f} s. In the first,",
        f"text comes eagerly, from {cold['ttft_s']:.1f} s on, and is complete after",
        f"{cold['text_s']:.0f} s; compiled code is ready after {cold['wall_s']:.0f} s and is kept.",
    )
    return "\n".join(["```", *lines[:12], "...", *lines[-6:], "```", "", beside])


def cpu_table(cpu: dict, rows: tuple[str, ...] | None = None) -> str:
    """Rows of the CPU suite that Transformers takes part in; None: all."""
    head = ["CPU, fp32, same weights", "Transformers eager", "this, eager", "this, compiled"]
    lines = []
    for key, case in cpu.items():
        if not isinstance(case, dict) or "ours compiled" not in case:
            continue
        if rows is not None and key not in rows:
            continue
        theirs = min(v["ms"] for k, v in case.items() if k.startswith("transformers eager"))
        eager = f"{case['ours eager']['ms']:.1f} ms" if "ours eager" in case else ""
        compiled = f"{case['ours compiled']['ms']:.2f} ms"
        lines.append([key, f"{theirs:.1f} ms", eager, compiled, f"{case['ratio']:.1f}"])
    return markdown_table([*head, "ratio"], lines)


def updated(text: str) -> str:
    """README text with its transcript and its table rewritten."""
    contents = {"transcript": transcript(), "table": cpu_table(recorded("cpu"), SHOWN)}
    for name, content in contents.items():
        begin, end = rf"<!-- {name}: python -m bench\.numbers -->\n", rf"<!-- end of {name} -->\n"
        block = re.compile(f"({begin}).*?({end})", re.DOTALL)
        text, found = block.subn(lambda match, new=content: match[1] + new + match[2], text)
        if found != 1:
            raise ValueError(f"README.md: {found} blocks <!-- {name}: ... -->, not one")
    return text


# --------------------------------------------------------------------------------------------------
# docs/numbers.md, section by section


def cpu_suite(cpu: dict) -> str:
    env, threads = cpu["environment"], cpu["threads"]
    dates = {date for key, date in cpu["dates"].items() if not key.startswith("start")}
    slow = cpu["transformers compiled decode, CPU seconds of the first tokens"]
    how = paragraph(
        f"Least CPU time of 5 alternating rounds on {threads} thread (wall time where a row names",
        f"more), {env['cpu']}, torch {env['torch']}, transformers {env['transformers']},",
        f"{' and '.join(sorted(dates))}.",
        "Small is a model of 56 M parameters with random weights; all else is measured with the",
        "embedded one. Transformers runs with the fastest of its expert implementations and",
        f"compiles anew for every decoded token: {', '.join(f'{s:.0f}' for s in slow)} CPU",
        "seconds for the first three.",
    )
    return f"""## CPU, beside Transformers (`python -m bench.cpu`)

{cpu_table(cpu)}
{how}
![ratios](../bench/results/cpu.svg)
"""


def memory(cpu: dict) -> str:
    forward = cpu["memory of a forward over 2048"]
    rows = [["a forward over 2048 tokens", forward["ours_bytes"], forward["transformers_bytes"]]]
    prefix = "memory of a train step "
    for key, case in cpu.items():
        if key.startswith(prefix):
            ours, theirs = case["ours compiled_bytes"], case["transformers eager, grouped_mm_bytes"]
            rows.append([f"a training step of {key.removeprefix(prefix)}", ours, theirs])
    cells = [[name, *(f"{size / MIB:.0f} MiB" for size in sizes)] for name, *sizes in rows]
    cache = cpu["cache at 128k, Flash"]
    flash = paragraph(
        f"Flash at 128k tokens of context caches {cache['bytes_per_token']:,.0f} bytes a token,",
        f"{cache['v3_ratio']:.1f} times less than V3's latent attention at that depth.",
    )
    return f"""## Memory

Peak memory added to what is held before:

{markdown_table(["", "this", "Transformers"], cells)}
{flash}"""


def experts(cpu: dict) -> str:
    prefix = "experts in "
    rows = [
        [key.removeprefix(prefix), f"{case['times']:.2f}"]
        for key, case in cpu.items()
        if key.startswith(prefix)
    ]
    head = ["compiled step", "times as long with the experts traced, not behind an opaque op"]
    return f"""## Experts

{markdown_table(head, rows)}"""


def kernels(record: dict) -> str:
    rows = []
    for kernel, cases in record["kernels"].items():
        for row, case in cases.items():
            times = [f"{case[side]['ms']:.2f} ms" for side in ("off", "on")]
            compiling = f"{case['compile_times']:.2f}" if "compile_times" in case else ""
            rows.append([f"`{kernel}`", row, *times, f"{case['times']:.2f}", compiling])
    head = ["C++ kernel", "row, end to end", "without it", "with all", "times as long without"]
    head.append("times as long to compile")
    libraries = {path.stem: path.read_text() for path in (ROOT / "ops" / "cpu").glob("*.cpp")}
    sources = "".join(libraries.values())
    kernels = [
        name for name in record["kernels"] if name not in libraries or f" {name}(" in sources
    ]
    removed = [f"`{kernel}`" for kernel in kernels if f" {kernel}(" not in sources]
    how = paragraph(
        f"Each switched off in turn, {record['rounds']} alternating rounds. A kernel stays only if",
        f"some row takes {PAYS:.1f} times as long without it, to run or to compile into an empty",
        "cache, alone or with the others of its library (`hc`); removed since, for that:",
        f"{', '.join(removed) or 'none'}.",
    )
    return f"""## C++ kernels on CPU (`python -m bench.cpu kernels`)

{how}
{markdown_table(head, rows)}"""


def start(cpu: dict) -> str:
    generating, training = [], []
    for state in ("cold", "warm"):
        case = cpu[f"start {state}"]
        seconds = (case[key] for key in ("ttft_s", "text_s", "wall_s", "cpu_s"))
        made = f"{case['eager_tokens']} / {case['compiled_tokens']}"
        load = f"{case['load_average_before']:.1f}"
        generating.append([state, *(f"{s:.1f} s" for s in seconds), made, load])
        case = cpu[f"start training {state}"]
        seconds = (case[key] for key in ("first_step_s", "last_step_s", "wall_s", "cpu_s"))
        made = f"{case['eager_steps']} / {case['compiled_steps']}"
        load = f"{case['load_average_before']:.1f}"
        training.append([state, *(f"{s:.1f} s" for s in seconds), made, load])
    head = [
        "compile cache",
        "first token",
        "text complete",
        "end",
        "CPU",
        "tokens eager / compiled",
    ]
    train_head = ["compile cache", "first step", "last step", "end", "CPU"]
    train_head += ["steps eager / compiled", "load average before"]
    took = cpu["imports"]
    text = paragraph(
        f"`import torch` takes {took['torch_s']:.1f} s of it, the project's own imports",
        f"{took['ours_s']:.1f} s, loading the embedded model {took['load_s']:.1f} s.",
    )
    return f"""## Start, {cpu["dates"]["start warm"]}

`python generate.py`, seconds from its start; a cold run ends when everything is compiled:

{markdown_table([*head, "load average before"], generating)}
{text}
`python train_step.py`, 40 steps; a cold run ends when everything is compiled:

{markdown_table(train_head, training)}"""


def embedded_model(embedded: dict, dense: dict) -> str:
    train, size = embedded["training"], embedded["bytes"] / 1e6
    parameters, active = (embedded[key] / 1e6 for key in ("parameters", "active_parameters"))
    ours = embedded["act_quant_held_out_nats_per_char"]
    text = paragraph(
        f"{size:.2f} MB, {parameters:.1f} M parameters, {active:.1f} M active; trained for",
        f"{train['tokens'] / 1e6:.2f} M tokens in {train['minutes']:.0f} minutes on",
        f"{train['threads']} thread. On the held-out {100 * embedded['held_out_share']:.0f} % of",
        f"the text it takes {ours:.3f} nats per character as stored; a plain dense transformer of",
        "equal active size, trained by the same loop for the same tokens, takes",
        f"{dense['held_out_nats_per_char']:.3f}. Its MTP block proposes the backbone's own next",
        f"choice {100 * embedded['draft_acceptance']:.0f} % of the time.",
    )
    return f"""## The embedded model (`python -m bench.embedded`, `bench.dense`)

{text}"""


def depths(record: dict) -> str:
    rows = []
    for phase in PHASES:
        cells = []
        for layers in DEPTHS:
            case = record[f"{phase}, {layers} layers"]
            cells.append(f"{case['compile_cold_s']:.0f} s, {case['compile_warm_s']:.1f} s")
        rows.append([phase, *cells, f"{record[f'{phase}, 43 to 12 layers']:.2f}"])
    head = ["phase", *(f"{layers} layers" for layers in DEPTHS), "ratio"]
    return f"""## Compile seconds by depth (`python -m bench.compile`)

Embedded width, preset regional, cold and warm; the last column is cold, 43 layers to 12:

{markdown_table(head, rows)}"""


def flash_report(record: dict) -> str:
    return f"""## The compile report of Flash

`python compile_config.py report --config flash --full`, every layer traced on fake tensors:

```
{report_table(record)}
```
"""


def soak() -> str:
    """Long proofs, one line each; "" where none is recorded."""
    rows = []
    for path in sorted(RESULTS.glob("soak_*.json")):
        record = json.loads(path.read_text())
        date = record["environment"]["date"]
        rows.append([f"`{record['name']}`", record["proved"], f"{record['minutes']:.1f}", date])
    if not rows:
        return ""
    return f"""## Long proofs (`python -m bench.soak NAME`)

{markdown_table(["name", "holds", "minutes", "date"], rows)}"""


def page() -> str:
    """docs/numbers.md."""
    cpu = recorded("cpu")
    switched = recorded("cpu_kernels")
    sections = [
        "# Numbers\n\nGenerated from `bench/results/` by `python -m bench.numbers`.\n",
        cpu_suite(cpu),
        memory(cpu),
        experts(cpu),
        kernels(switched) if switched else "",
        start(cpu),
        embedded_model(recorded("embedded"), recorded("dense")),
        depths(recorded("compile")),
        flash_report(recorded("report_flash")),
        soak(),
    ]
    return "\n".join(section for section in sections if section)


def main() -> int:
    README.write_text(updated(README.read_text()))
    NUMBERS.parent.mkdir(exist_ok=True)
    NUMBERS.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
