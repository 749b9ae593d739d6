"""Decoding at true size with dummy weights: stock, unpruned, pruned, compiled. No part of the test suite.

    python tests/benchmarks/decoding.py --shape llava-onevision-0.5b --vision-tokens 7290 --batch 1 4

Built on what `plphp profile` measures with: every arm decodes as many tokens from caches of the same lengths
(synthetic keys and values), arms take turns, `unpruned` runs once more as an A/A control, and ratios are of
pairs. `stock` is plain `model.generate` on an uncut cache. Arms that do not fit into memory together run
apart; one that does not fit alone says so in its row. Prints a Markdown table, a row per point; `--json FILE`
keeps raw samples.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from points import (
    COMPILED,
    COMPILED_UNPRUNED,
    CONTROL,
    PRUNED,
    STOCK,
    UNPRUNED,
    Point,
    decode_point,
    free,
    guarded,
    kv_token_bytes,
    prefill_point,
    side_of,
)

from plphp_cli.decoding import step_compiler
from plphp_cli.environment import cpu_model, package_version
from plphp_cli.models import decoder_weight_bytes
from plphp_cli.models.dummy import load_dummy
from plphp_cli.profiling.machine import measure_machine
from plphp_cli.profiling.statistics import MIN_PAIRS, compare, median
from plphp_cli.units import format_bytes

ARMS = (STOCK, UNPRUNED, PRUNED, COMPILED, COMPILED_UNPRUNED, CONTROL)
DEFAULT_ARMS = [STOCK, UNPRUNED, PRUNED, COMPILED, CONTROL]
DOES_NOT_FIT = "does not fit"
RATIOS = {
    "pruned vs stock": (STOCK, PRUNED),
    "unpruned vs stock": (STOCK, UNPRUNED),
    "pruned vs unpruned": (UNPRUNED, PRUNED),
    "compiled vs stock": (STOCK, COMPILED),
    "compiled: pruned vs unpruned": (COMPILED_UNPRUNED, COMPILED),
}


def ratio(samples, over, under):
    if not samples.get(over) or not samples.get(under):
        return None
    both = samples.get(UNPRUNED) and samples.get(CONTROL)
    control = (samples[UNPRUNED], samples[CONTROL]) if both else None
    return compare(samples[over], samples[under], control)


def shown(found):
    if found is None:
        return "N/A"
    # An interval of a few pairs is narrow by chance alone.
    interval = f" ({found.low:.2f} to {found.high:.2f})" if len(found.ratios) >= MIN_PAIRS else ""
    return f"{found.median:.2f}x{interval}"


def ratios_of(arms):
    """The ratios whose arms are run."""
    return {name: both for name, both in RATIOS.items() if set(both) <= set(arms)}


def report(args, bandwidth, point, samples, lost, apart):
    loaded = point.loaded
    weights = decoder_weight_bytes(loaded)
    tokens = point.batch * (args.new_tokens - 1)
    extra = args.new_tokens / 2 * kv_token_bytes(loaded) * point.batch
    rows = {}
    for arm in shown_arms(args):
        seconds = median(samples.get(arm, []))
        held = point.bytes_of(PRUNED if side_of(arm) == PRUNED else UNPRUNED)
        step = None if not seconds else seconds / (args.new_tokens - 1)
        rows[arm] = {
            "tokens_per_s": None if not seconds else tokens / seconds,
            "step_s": step,
            "kv_bytes": held,
            "share_of_bound": (weights + held + extra) / bandwidth / step if step and bandwidth else None,
            "failed": DOES_NOT_FIT if arm in lost else None,
        }
    ratios = {name: ratio(samples, *both) for name, both in ratios_of(args.arms).items()}
    return {
        "shape": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "vision_tokens": point.prompt.vision_tokens,
        "batch": point.batch,
        "weight_bytes": weights,
        "arms": rows,
        "ratios": {name: None if found is None else asdict(found) for name, found in ratios.items()},
        "samples_s": samples,
        "apart": apart,
        "compile": asdict(point.compiler.stats) if point.compiler else None,
        "line": line(loaded, point, rows, ratios),
    }


def shown_arms(args):
    return [arm for arm in args.arms if arm != CONTROL]


def header(args):
    """The first two lines of the table."""
    cells = ["shape", "dtype", "vision tokens", "batch", *shown_arms(args)]
    cells += ["KV held, unpruned / pruned", *ratios_of(args.arms)]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def line(loaded, point, rows, ratios):
    cells = [loaded.name, str(loaded.dtype).removeprefix("torch."), f"{point.prompt.vision_tokens:,}"]
    cells.append(str(point.batch))
    for row in rows.values():
        rate = row["tokens_per_s"]
        share = row["share_of_bound"]
        text = row["failed"] or ("N/A" if rate is None else f"{rate:.1f}")
        cells.append(text if share is None else f"{text} ({share:.0%})")
    cells.append(f"{format_bytes(point.bytes_of(UNPRUNED))} / {format_bytes(point.bytes_of(PRUNED))}")
    cells += [shown(found) for found in ratios.values()]
    return "| " + " | ".join(cells) + " |"


def options(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["llava-onevision-0.5b"])
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[7290])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layer-rates", type=float, nargs="+", default=[0.7, 0.4, 0.1])
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, metavar="ARM", default=DEFAULT_ARMS, help=", ".join(ARMS)
    )
    parser.add_argument("--prefill", action="store_true", help="TTFT, pruning's share and peaks too")
    parser.add_argument("--limit-s", type=float, default=120.0, help="longest prefill to repeat")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    if CONTROL in args.arms and UNPRUNED not in args.arms:
        parser.error("control is the unpruned arm once more: name unpruned, too")
    return args


def main(words=None):
    args = options(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    found = []
    print(header(args), flush=True)
    for shape in args.shape:
        for dtype in args.dtype:
            loaded = guarded(partial(load_dummy, shape, dtype=dtype, device=args.device))
            if loaded is None:
                no_weights(args, shape, dtype)
                continue
            machine = measure_machine(loaded.device, loaded.dtype)
            compiler = step_compiler(loaded) if any("compiled" in arm for arm in args.arms) else None
            for vision_tokens in args.vision_tokens:
                for number, batch in enumerate(args.batch):
                    point = Point(loaded, vision_tokens, batch, args.layer_rates, args.new_tokens, compiler)
                    found.append(measure(args, machine, point, args.prefill and not number))
                    print(found[-1]["line"], flush=True)
                    if args.json:
                        whole = {"machine": circumstances(), "points": found}
                        args.json.write_text(json.dumps(whole, indent=1))
            del loaded, compiler, point
            free()


def no_weights(args, shape, dtype):
    """A row per point of a shape whose weights alone do not fit."""
    for tokens in args.vision_tokens:
        for batch in args.batch:
            cells = [shape, dtype, f"{tokens:,}", str(batch), *[DOES_NOT_FIT] * len(shown_arms(args))]
            cells += ["N/A"] * (1 + len(ratios_of(args.arms)))
            print("| " + " | ".join(cells) + " |", flush=True)


def measure(args, machine, point, with_prefill):
    """The record of one point; what prefill came to is told beside the table."""
    with torch.no_grad():
        prefill = prefill_point(point, args.repeats, args.limit_s) if with_prefill else None
        record = report(
            args, machine.bandwidth_bytes_per_s, point, *decode_point(point, args.arms, args.repeats)
        )
    if prefill is not None:
        told = {name: value for name, value in prefill.items() if "samples" not in name}
        print(f"prefill at {point.prompt.vision_tokens}: {json.dumps(told)}", file=sys.stderr, flush=True)
    return record | {
        "prefill": prefill,
        "bandwidth_bytes_per_s": machine.bandwidth_bytes_per_s,
        "rate_operations_per_s": machine.operations_per_s,
    }


def circumstances():
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "command": " ".join(sys.argv[1:]),
    }


if __name__ == "__main__":
    main()
