"""Decoding at true size with dummy weights: stock, unpruned, pruned, compiled. No part of the test suite.

    python tests/benchmarks/decoding.py --shape llava-onevision-0.5b --vision-tokens 7290 --batch 1 4

Built on what `plphp profile` measures with: every arm decodes as many tokens from caches of the same lengths
(synthetic keys and values), arms take turns, `unpruned` runs once more as an A/A control, and ratios are of
pairs. `stock` is plain `model.generate` on an uncut cache. Prints a Markdown row per point; `--json FILE`
keeps raw samples.
"""

import argparse
import gc
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import DynamicCache

from plphp_cli.attention import prune
from plphp_cli.decoding import step_compiler
from plphp_cli.environment import cpu_model, package_version
from plphp_cli.models import decoder_weight_bytes, is_out_of_memory
from plphp_cli.models.dummy import dummy_prompt, load_dummy
from plphp_cli.profiling.machine import measure_machine, memory_bytes
from plphp_cli.profiling.peaks import measure_peaks
from plphp_cli.profiling.schedule import alternated
from plphp_cli.profiling.statistics import compare, median
from plphp_cli.profiling.timing import PathArm, StockArm, Timer, time_decode, time_pruning, time_stock
from plphp_cli.pruning import FixedRates
from plphp_cli.synthetic import synthetic_prefilled
from plphp_cli.units import format_bytes

STOCK, UNPRUNED, PRUNED, CONTROL = "stock", "unpruned", "pruned", "control"
COMPILED, COMPILED_UNPRUNED = "pruned, compiled", "unpruned, compiled"


class Point:
    """One point: so many vision tokens and sequences of one model."""

    def __init__(self, loaded, vision_tokens, batch, rates, new_tokens, compiler):
        self.loaded, self.batch, self.new_tokens = loaded, batch, new_tokens
        self.rates, self.compiler = rates, compiler
        self.prompt = dummy_prompt(loaded, vision_tokens, images=4)
        self.timer = Timer(loaded.device)
        self.rows = {}
        self.stock = None

    def held_bytes(self, arm):
        return sum(layer.held_bytes for row in self.rows[arm] for layer in row.state.layers)

    def fill(self, *arms):
        for arm in arms:
            rates = self.rates if arm == PRUNED else None
            self.rows[arm] = [
                synthetic_prefilled(self.loaded, self.prompt, rates, self.new_tokens, seed)
                for seed in range(self.batch)
            ]

    def fill_stock(self):
        """An uncut cache of transformers' own, without the last prompt token."""
        text = self.loaded.model.config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (self.batch, text.num_key_value_heads, self.prompt.prompt_tokens - 1, width)
        self.stock = DynamicCache(config=text)
        for index in range(text.num_hidden_layers):
            keys, values = (
                torch.empty(shape, device=self.loaded.device, dtype=self.loaded.dtype).normal_()
                for _ in range(2)
            )
            self.stock.update(keys, values, index)

    def seconds(self, arm):
        """One decode; the caches are as before after it."""
        if arm == STOCK:
            inputs = {"input_ids": self.prompt.inputs["input_ids"]}
            sample = time_stock(
                self.loaded.model, inputs, self.stock, self.batch, self.new_tokens, self.timer
            )
            self.stock.crop(-self.new_tokens)
            return sample.decode_s
        rows = self.rows[PRUNED if arm in (PRUNED, COMPILED) else UNPRUNED]
        compiler = self.compiler if arm in (COMPILED, COMPILED_UNPRUNED) else None
        with prune(self.loaded.model, None):
            sample = time_decode(self.loaded, rows, self.new_tokens, self.timer, compiler)
        for row in rows:
            assert row.take_back(self.new_tokens - 1)
        return sample.decode_s

    def run(self, arms, repeats):
        samples = {arm: [] for arm in arms}
        for repeat, arm in alternated(arms, repeats + 1):
            seconds = self.seconds(arm)
            if repeat:
                samples[arm].append(seconds)
        return samples


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decode_point(point, arms, repeats):
    """Samples of each arm, and why an arm has none."""
    samples, failed = {}, {}
    tool = [arm for arm in arms if arm != STOCK]
    full = point.prompt.prompt_tokens * point.batch * kv_token_bytes(point.loaded)
    room = (memory_bytes(point.loaded.device) or 0) * 0.85
    together = STOCK in arms and 2.5 * full + decoder_weight_bytes(point.loaded) < room
    groups = [arms] if together else [tool, [a for a in arms if a == STOCK]]
    groups = [group for whole in groups for group in split(point, whole, full, room)]
    for group in filter(None, groups):
        try:
            needed = {PRUNED if arm in (PRUNED, COMPILED) else UNPRUNED for arm in group if arm != STOCK}
            point.fill(*sorted(needed))
            if STOCK in group:
                point.fill_stock()
            samples |= point.run(group, repeats)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed |= dict.fromkeys(group, "out of memory")
        held = {arm: point.held_bytes(arm) for arm in point.rows}
        point.sizes = {**getattr(point, "sizes", {}), **held}
        point.rows, point.stock = {}, None
        free()
    return samples, failed, together


def split(point, group, full, room):
    """Arms that fit together; each side alone where both do not."""
    if STOCK in group or 1.5 * full + decoder_weight_bytes(point.loaded) < room:
        return [group]
    cut = [arm for arm in group if arm in (PRUNED, COMPILED)]
    return [cut, [arm for arm in group if arm not in cut]]


def kv_token_bytes(loaded):
    text = loaded.model.config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * width * loaded.dtype.itemsize


def ratio(samples, over, under):
    if not samples.get(over) or not samples.get(under):
        return None
    control = (samples[UNPRUNED], samples[CONTROL]) if CONTROL in samples else None
    return compare(samples[over], samples[under], control)


def shown(found):
    return "N/A" if found is None else f"{found.median:.2f}x ({found.low:.2f} to {found.high:.2f})"


def prefill_point(point, repeats, limit_s):
    """TTFT from inputs on the device, pruning's share, peaks; None where a prefill takes over the limit."""
    loaded, prompt, count = point.loaded, point.prompt, point.new_tokens
    layers = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    policy = FixedRates({index: point.rates[index % len(point.rates)] for index in range(layers)})
    arms = {
        PRUNED: PathArm(loaded, prompt, policy, count, point.timer),
        UNPRUNED: PathArm(loaded, prompt, None, count, point.timer),
        STOCK: StockArm(loaded, prompt, count, point.timer),
    }
    if arms[PRUNED].prefill().prefill_s > limit_s:
        return None
    samples = {name: [] for name in arms}
    for repeat, name in alternated(list(arms), repeats + 1):
        taken = arms[name].prefill()
        arms[name].drop()
        if repeat:
            samples[name].append(taken.first_token_s)
    shares = []
    for _ in range(4):
        prune_s, prefill_s = time_pruning(loaded, prompt, policy, count, point.timer)
        shares.append(prune_s / prefill_s)
    peaks = {}
    for name in (PRUNED, UNPRUNED):
        free()
        taken = measure_peaks(loaded, prompt, name, policy if name == PRUNED else None, 2)
        peaks[name] = taken.prefill_decoder_bytes
    return {
        "ttft_s": {name: median(values) for name, values in samples.items()},
        "ttft_samples_s": samples,
        "prune_share_of_prefill": median(shares[1:]),
        "prune_shares": shares,
        "peak_decoder_bytes": peaks,
        "peak_ratio": peaks[PRUNED] / peaks[UNPRUNED],
    }


def report(args, loaded, bandwidth, point, samples, failed, together):
    weights = decoder_weight_bytes(loaded)
    tokens = point.batch * (args.new_tokens - 1)
    extra = args.new_tokens / 2 * kv_token_bytes(loaded) * point.batch
    rows = {}
    for arm in args.arms:
        if arm == CONTROL:
            continue
        seconds = median(samples.get(arm, []))
        side = PRUNED if arm in (PRUNED, COMPILED) else UNPRUNED
        held = point.sizes.get(side)
        read = None if held is None else weights + held + extra
        step = None if not seconds else seconds / (args.new_tokens - 1)
        rows[arm] = {
            "tokens_per_s": None if not seconds else tokens / seconds,
            "step_s": step,
            "kv_bytes": held,
            "share_of_bound": None if step is None or read is None else read / bandwidth / step,
            "failed": failed.get(arm),
        }
    ratios = {
        "pruned vs stock": ratio(samples, STOCK, PRUNED),
        "unpruned vs stock": ratio(samples, STOCK, UNPRUNED),
        "pruned vs unpruned": ratio(samples, UNPRUNED, PRUNED),
        "compiled vs stock": ratio(samples, STOCK, COMPILED),
        "compiled: pruned vs unpruned": ratio(samples, COMPILED_UNPRUNED, COMPILED),
    }
    return {
        "shape": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "vision_tokens": point.prompt.vision_tokens,
        "batch": point.batch,
        "weight_bytes": weights,
        "arms": rows,
        "ratios": {name: None if found is None else asdict(found) for name, found in ratios.items()},
        "samples_s": samples,
        "stock_in_turn": together,
        "compile": asdict(point.compiler.stats) if point.compiler else None,
        "line": line(loaded, point, rows, ratios),
    }


def line(loaded, point, rows, ratios):
    cells = [loaded.name, str(loaded.dtype).removeprefix("torch."), f"{point.prompt.vision_tokens:,}"]
    cells.append(str(point.batch))
    for row in rows.values():
        rate = row["tokens_per_s"]
        share = row["share_of_bound"]
        text = row["failed"] or ("N/A" if rate is None else f"{rate:.1f}")
        cells.append(text if share is None else f"{text} ({share:.0%})")
    sizes = point.sizes
    cells.append(f"{format_bytes(sizes.get(UNPRUNED))} / {format_bytes(sizes.get(PRUNED))}")
    cells += [shown(found) for found in ratios.values()]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["llava-onevision-0.5b"])
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[7290])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layer-rates", type=float, nargs="+", default=[0.7, 0.4, 0.1])
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arms", nargs="+", default=[STOCK, UNPRUNED, PRUNED, COMPILED, CONTROL])
    parser.add_argument("--prefill", action="store_true", help="TTFT, pruning's share and peaks too")
    parser.add_argument("--limit-s", type=float, default=120.0, help="longest prefill to repeat")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = []
    arms = [arm for arm in args.arms if arm != CONTROL]
    print(f"| shape | dtype | vision tokens | batch | {' | '.join(arms)} | KV held | ratios |", flush=True)
    for shape in args.shape:
        for dtype in args.dtype:
            loaded = load_dummy(shape, dtype=dtype, device=args.device)
            machine = measure_machine(loaded.device, loaded.dtype)
            bandwidth = machine.bandwidth_bytes_per_s
            compiler = step_compiler(loaded) if any("compiled" in arm for arm in args.arms) else None
            for vision_tokens in args.vision_tokens:
                for number, batch in enumerate(args.batch):
                    point = Point(loaded, vision_tokens, batch, args.layer_rates, args.new_tokens, compiler)
                    with torch.no_grad():
                        prefill = None
                        if args.prefill and not number:
                            prefill = prefill_point(point, args.repeats, args.limit_s)
                        samples, failed, together = decode_point(point, args.arms, args.repeats)
                    record = report(args, loaded, bandwidth, point, samples, failed, together)
                    record |= {"prefill": prefill, "bandwidth_bytes_per_s": bandwidth}
                    record["rate_operations_per_s"] = machine.operations_per_s
                    found.append(record)
                    print(record["line"], flush=True)
                    if prefill is not None:
                        shown_prefill = {k: v for k, v in prefill.items() if "samples" not in k}
                        print(
                            f"prefill of {shape} at {vision_tokens}: {json.dumps(shown_prefill)}", flush=True
                        )
                    if args.json:
                        args.json.write_text(
                            json.dumps({"machine": circumstances(), "points": found}, indent=1)
                        )
            del loaded, compiler
            free()


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
