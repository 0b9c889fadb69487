"""Compare fused_rnn with torch.nn (cuDNN) on an NVIDIA GPU.

    python benchmarks/gpu/measure.py                              every row, the most informative first
    python benchmarks/gpu/measure.py --budget 100                 as many of them as fit into 100 seconds
    python benchmarks/gpu/measure.py --only b64_h256 --cell lstm --dtype bfloat16
    python benchmarks/gpu/measure.py --baselines                  torch.nn alone, and which kernels it runs
    python benchmarks/gpu/measure.py --errors                     compare results only
    python benchmarks/gpu/measure.py --facts                      what machine this is

Rows are written as they are measured, one JSON object a line; a picture and a table of means follow at the end. The
exit status is 1 if a result of fused_rnn is wrong. --baselines and --facts do not need fused_rnn. How a row is measured
is in timing.py; benchmarks/gpu_run.sh builds, tests and measures in one command.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.timing import CLASSES, DTYPES, MODES, NORMAL, QUICK, GpuMethod, GpuRow, is_alive, measure
from harness.measurement import FUSED, TORCH, geometric_mean
from harness.shapes import GROUPS, Shape, named, parse_shape

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "benchmarks" / "gpu"
SHAPES = (
    *GROUPS["gpu"],
    Shape("b32_h160", T=512, B=32, I=160, H=160, L=1),
    Shape("b64_h192", T=512, B=64, I=192, H=192, L=1),
    Shape("b64_h512_bi", T=256, B=64, I=512, H=512, L=1, bidirectional=True),
    Shape("b16_h512_l2", T=256, B=16, I=512, H=512, L=2),
)
FIRST = ("b64_h256", "b16_h512", "b64_h1024", "b1_h1024", "b256_h512", "b16_h768", "b64_h2048", "b64_h512_l3")
"""The shapes that say most about the kernels, one of each regime; the others follow."""
PACKED = ("b64_h256", "b16_h512")  # also measured as packed sequences
FIRST_CELLS = ("lstm", "gru", "rnn")
MOST_LISTED = 16  # lines of a list in the summary, so that its end stays on the screen
PACKAGES = ("torch", "nvidia-cudnn-cu13", "setuptools", "wheel", "pybind11", "ninja", "pytest", "matplotlib")
GPU_QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
)
SHORT = {"bfloat16": "bf16", "float16": "f16", "tf32": "tf32", "float32": "f32"}
COLOURS = {"rnn": "#d95f02", "lstm": "#0b4f8a", "gru": "#1b9e77"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU here")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.facts:
        text = json.dumps(facts(), indent=1)
        (options.output / "gpu_facts.json").write_text(text + "\n", encoding="utf-8")
        print(text)
        return
    try:
        rows = wanted_rows(options)
    except ValueError as error:
        parser.error(str(error))
    libraries = {TORCH: torch.nn}
    if not options.baselines:
        import fused_rnn  # not needed by --baselines and --facts

        libraries[FUSED] = fused_rnn
    method = GpuMethod(
        device=torch.device(options.device),
        libraries=libraries,
        backend=options.backend,
        pace=QUICK if options.quick else NORMAL,
        kernels=options.baselines,
        timed=not options.errors,
    )
    machine = describe_machine(method)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run stopped at a time limit still prints its summary
    name = "gpu_baselines" if options.baselines else "gpu_errors" if options.errors else "gpu_grid"
    with (options.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        append(file, {"record": "run", **machine, "arguments": sys.argv[1:]})
        lines, left = measure_rows(rows, method, options.budget, file)
        append(file, {"record": "end", "not_reached": [str(row) for row in left]})
    if method.timed and not options.baselines:
        draw(lines, machine, options.output / f"{name}.png")
    print_summary(lines, left, machine)
    if any(line.get("wrong") for line in lines) or not is_alive(method.device):
        sys.exit(1)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the shapes with these names")
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,B,I,H,L[,bi]", help="instead of ours")
    parser.add_argument("--cell", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="tf32: float32, with TF32 on")
    parser.add_argument("--backend", choices=("auto", "fused", "torch"), default="auto", help="of fused_rnn's modules")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop before it is over")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--baselines", action="store_true", help="torch.nn alone, with the names of its kernels")
    kinds.add_argument("--errors", action="store_true", help="compare results, time nothing")
    kinds.add_argument("--facts", action="store_true", help="print what machine this is, and write it")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="default: build/benchmarks/gpu")
    # Lets this program be tried without a GPU.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser


def wanted_rows(options: argparse.Namespace) -> list[GpuRow]:
    """The requested rows in diagonal order: every shape, dtype and cell early, the rarest combinations last.

    Raises:
        ValueError: a name is no shape's.
    """
    shapes = options.shape or (named(SHAPES, options.only) if options.only else list(SHAPES))
    shapes = sorted(shapes, key=lambda shape: FIRST.index(shape.name) if shape.name in FIRST else len(FIRST))
    kinds = [(shape, False) for shape in shapes]
    kinds += [(shape, True) for shape in shapes if shape.name in PACKED]
    cells = [cell for cell in FIRST_CELLS if cell in options.cell]
    dtypes = [dtype for dtype in DTYPES if dtype in options.dtype]
    modes = [mode for mode in MODES if mode in options.mode]
    ranked = [
        (kind + 4 * dtype + 3 * cell, GpuRow(kinds[kind][0], cells[cell], dtypes[dtype], mode, kinds[kind][1]))
        for kind, dtype, cell, mode in product(range(len(kinds)), range(len(dtypes)), range(len(cells)), modes)
    ]
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def measure_rows(
    rows: Sequence[GpuRow], method: GpuMethod, budget: float, file: TextIO
) -> tuple[list[dict[str, Any]], list[GpuRow]]:
    """Measure the rows that fit into the budget, writing each line at once; returns the lines and the rows left out."""
    began, longest = perf_counter(), 0.0
    lines: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        start = perf_counter()
        if number and start - began + longest > budget:
            return lines, list(rows[number:])
        try:
            lines.append(measure(row, method))
        except KeyboardInterrupt:
            return lines, list(rows[number:])
        append(file, {"record": "row", **lines[-1]})
        print(f"{number + 1:>3}/{len(rows)} {row!s:<46} {one_line(lines[-1])}", flush=True)
        if not is_alive(method.device):
            print("The device does not answer any more: the rows after this one are left out.")
            return lines, list(rows[number + 1 :])
        if number:  # the first row also loads libraries
            longest = max(longest, perf_counter() - start)
    return lines, []


def append(file: TextIO, record: dict[str, Any]) -> None:
    """Write one line to the file before the next row starts, so that a stopped run keeps it."""
    file.write(json.dumps(record, default=str) + "\n")
    file.flush()


# The machine and the versions


def describe_machine(method: GpuMethod) -> dict[str, str]:
    """The GPU and the versions; harness/machine.py describes a CPU and needs fused_rnn."""
    on_gpu = method.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "torch_version": torch.__version__,
        "cuda_version": str(torch.version.cuda),
        "cudnn_version": str(torch.backends.cudnn.version()),
        "fused_rnn_version": method.libraries[FUSED].__version__ if FUSED in method.libraries else "",
        "git_commit": git_commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def git_commit() -> str:
    """GPU_RUN_COMMIT (for copies of the tree without git), else the commit of the git repository, else ""."""
    if commit := os.environ.get("GPU_RUN_COMMIT"):
        return commit
    git = ROOT / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text().strip()[:12]
        packed_refs = (git / "packed-refs").read_text().splitlines()
        return next((line[:12] for line in packed_refs if line.endswith(f" {name}")), "")
    except OSError:
        return ""


def facts() -> dict[str, Any]:
    """The settings of the device, which are read and never changed."""
    found: dict[str, Any] = {"record": "facts", "python": platform.python_version(), "cpus": os.cpu_count()}
    found |= {"packages": {name: installed_version(name) for name in PACKAGES}}
    found |= {"cuda_version": torch.version.cuda, "cudnn_version": torch.backends.cudnn.version()}
    found |= {"nvcc": output_of("nvcc", "--version").splitlines()[-2:], "git_commit": git_commit()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
        names += ("shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "regs_per_multiprocessor")
        found |= {name: getattr(properties, name, None) for name in names}
        found["tf32"] = {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
    values = output_of("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader").split(", ")
    found["nvidia_smi"] = dict(zip(GPU_QUERY.split(","), values, strict=False))
    return found


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    """The output of a command, or "" if there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# Reports


def one_line(line: dict[str, Any]) -> str:
    parts = []
    for side in (TORCH, FUSED):
        if side in line:
            parts.append(f"{side} {line[f'{side} us_per_step']:.2f} us/step")
    if f"{TORCH} ratio" in line:
        parts.append(f"ratio {line[f'{TORCH} ratio']:.2f} ({line['way']})")
    for what in ("error", "gradient error"):
        errors = [scientific(line[f"{side} {what}"]) for side in (TORCH, FUSED) if f"{side} {what}" in line]
        parts += [f"{what} {' '.join(errors)}"] if errors else []
    if line.get("kernels"):
        parts.append(line["kernels"][0]["name"][:50])
    parts += ["WRONG"] * bool(line.get("wrong")) + [line["notes"]] * bool(line["notes"])
    return ", ".join(parts)


def scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def print_summary(lines: Sequence[dict[str, Any]], left: Sequence[GpuRow], machine: dict[str, str]) -> None:
    """Print the means first and the rows that need attention after them, on about two screens."""
    print("\n{device}, torch {torch_version}, cuDNN {cudnn_version}, fused_rnn {git_commit}".format(**machine))
    measured = [line for line in lines if f"{TORCH} ratio" in line and not line.get("wrong")]
    print_steps(lines)
    if measured:
        print_means(measured)
    behind = sorted((line for line in measured if line[f"{TORCH} ratio"] < 1), key=lambda line: line[f"{TORCH} ratio"])
    print_list("below 1.0", [f"{title(line)}: {line[f'{TORCH} ratio']:.2f}" for line in behind])
    longest: dict[str, list[str]] = {}
    for line in lines:
        for kernel in line.get("kernels", [])[:1]:
            longest.setdefault(kernel["name"], []).append(title(line))
    print_list("longest-running kernel", [f"{name}: {len(at)} rows ({at[0]})" for name, at in longest.items()])
    wrong = [line for line in lines if line.get("wrong")]
    print_list("not as accurate as torch.nn", [f"{title(line)}: {one_line(line)}" for line in wrong])
    print_list("notes", list(dict.fromkeys(f"{line['notes']} ({title(line)})" for line in lines if line["notes"])))
    if left:
        names = list(dict.fromkeys(row.name for row in left))
        print(f"Not reached: {len(left)} rows of {len(names)} shapes ({', '.join(names)}); first of them: {left[0]}")
    print(f"{len(lines)} rows measured, {len(wrong)} wrong")


def print_steps(lines: Sequence[dict[str, Any]]) -> None:
    """Print microseconds per step of the LSTM, torch.nn before fused_rnn, one line per shape."""
    lines = [line for line in lines if line["cell"] == FIRST_CELLS[0] and TORCH in line]
    conditions = [key for key in product(DTYPES, MODES) if any((line["dtype"], line["mode"]) == key for line in lines)]
    found = {(line["row"], line["dtype"], line["mode"]): line for line in lines}
    headings = [f"{SHORT[dtype]} {mode[:5]}" for dtype, mode in conditions]
    if lines:
        print(f"{'us/step, LSTM':<18}" + "".join(f"{heading:>14}" for heading in headings))
    for name in list(dict.fromkeys(line["row"] for line in lines))[:MOST_LISTED]:
        shown = []
        for condition in conditions:
            line = found.get((name, *condition), {})
            times = [line[f"{side} us_per_step"] for side in (TORCH, FUSED) if f"{side} us_per_step" in line]
            shown.append(" ".join(f"{each:.2f}" if each < 100 else f"{each:.0f}" for each in times) or "-")
        print(f"{name[:18]:<18}" + "".join(f"{text:>14}" for text in shown))


def print_means(lines: Sequence[dict[str, Any]]) -> None:
    """Print geometric means of the ratios by dtype and mode, and the difference between the two passes."""
    print(f"{'torch.nn / fused_rnn':<24}" + "".join(f"{name:>8}" for name in (*CLASSES, "all", "rows", "<1", "noise")))
    for dtype, mode in product(DTYPES, MODES):
        group = [line for line in lines if line["dtype"] == dtype and line["mode"] == mode]
        if not group:
            continue
        means = [mean_ratio(line for line in group if line["cell"] == cell) for cell in CLASSES]
        behind = sum(line[f"{TORCH} ratio"] < 1 for line in group)
        noise = sorted(max(line[f"{side} noise"] for side in (TORCH, FUSED)) for line in group)[len(group) // 2]
        shown = [*means, mean_ratio(group), str(len(group)), str(behind), f"{noise:.1%}"]
        print(f"{dtype + ', ' + mode:<24}" + "".join(f"{value:>8}" for value in shown))


def mean_ratio(lines: Iterable[dict[str, Any]]) -> str:
    mean = geometric_mean([line[f"{TORCH} ratio"] for line in lines])
    return "-" if mean is None else f"{mean:.2f}"


def print_list(heading: str, entries: Sequence[str]) -> None:
    if not entries:
        return
    print(f"{heading} ({len(entries)}):")
    for entry in entries[:MOST_LISTED]:
        print(f"  {entry[:200]}")
    if len(entries) > MOST_LISTED:
        print(f"  and {len(entries) - MOST_LISTED} more")


def title(line: dict[str, Any]) -> str:
    return f"{line['row']}, {line['cell']}, {line['dtype']}, {line['mode']}"


def draw(lines: Sequence[dict[str, Any]], machine: dict[str, str], path: Path) -> None:
    """Draw every ratio as a dot, one panel per dtype and mode; does nothing without matplotlib."""
    lines = [line for line in lines if f"{TORCH} ratio" in line]
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    if not lines:
        return
    names = list(dict.fromkeys(line["row"] for line in lines))
    dtypes = [dtype for dtype in DTYPES if any(line["dtype"] == dtype for line in lines)]
    modes = [mode for mode in MODES if any(line["mode"] == mode for line in lines)]
    size = (max(3.2 * len(dtypes) + 2, 7), (0.28 * len(names) + 0.8) * len(modes) + 1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(modes), len(dtypes), squeeze=False, sharex=True, sharey=True)
    for (i, mode), (j, dtype) in product(enumerate(modes), enumerate(dtypes)):
        axes = panels[i][j]
        group = [line for line in lines if line["dtype"] == dtype and line["mode"] == mode]
        axes.axvline(1, color="#f4a582", linewidth=2, zorder=0)
        for line in group:
            y = names.index(line["row"]) + 0.24 * (list(CLASSES).index(line["cell"]) - 1)
            axes.plot(line[f"{TORCH} ratio"], y, "o", color=COLOURS[line["cell"]], markersize=4)
        axes.set_title(f"{dtype}, {mode}: mean {mean_ratio(group)}", fontsize=9)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    dots = [panels[0][0].plot([], [], "o", color=colour, label=cell)[0] for cell, colour in COLOURS.items()]
    figure.legend(handles=dots, loc="outside right upper", fontsize=9)
    figure.suptitle("time of torch.nn / fused_rnn: right of the line, fused_rnn is faster", fontsize=11)
    figure.supxlabel(
        "{device}, torch {torch_version}, cuDNN {cudnn_version}, fused_rnn {git_commit}".format(**machine), fontsize=7
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
