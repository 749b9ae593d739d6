"""One point of the benchmark: the arms on caches of one length, what of them does not fit, and prefill."""

import gc

import torch
from transformers import DynamicCache

from plphp_cli.attention import prune
from plphp_cli.models import decoder_weight_bytes, is_out_of_memory
from plphp_cli.models.dummy import dummy_prompt
from plphp_cli.profiling.machine import memory_bytes
from plphp_cli.profiling.peaks import measure_peaks
from plphp_cli.profiling.schedule import alternated
from plphp_cli.profiling.statistics import median
from plphp_cli.profiling.timing import PathArm, StockArm, Timer, time_decode, time_pruning, time_stock
from plphp_cli.pruning import FixedRates, retained
from plphp_cli.synthetic import synthetic_prefilled

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

    def bytes_of(self, side):
        """What all sequences of a side hold, by arithmetic: also where they do not fit."""
        prompt, rates = self.prompt, self.rates if side == PRUNED else [1.0]
        layers = self.loaded.model.config.get_text_config(decoder=True).num_hidden_layers
        kept = sum(retained(rates[index % len(rates)], prompt.vision_tokens) for index in range(layers))
        tokens = layers * (prompt.prompt_tokens - prompt.vision_tokens) + kept
        return tokens * self.batch * kv_token_bytes(self.loaded) // layers

    def fill(self, side):
        if side == STOCK:
            self.fill_stock()
            return True
        self.rows.pop(side, None)
        rates = self.rates if side == PRUNED else None
        self.rows[side] = [
            synthetic_prefilled(self.loaded, self.prompt, rates, self.new_tokens, seed)
            for seed in range(self.batch)
        ]
        held = sum(layer.held_bytes for row in self.rows[side] for layer in row.state.layers)
        assert held == self.bytes_of(side)
        return True

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
        rows = self.rows[side_of(arm)]
        compiler = self.compiler if arm in (COMPILED, COMPILED_UNPRUNED) else None
        with prune(self.loaded.model, None):
            sample = time_decode(self.loaded, rows, self.new_tokens, self.timer, compiler)
        for row in rows:
            assert row.take_back(self.new_tokens - 1)
        return sample.decode_s

    def run(self, arms, repeats):
        """Samples of the arms in turns, and those that ended for want of memory: the others go on."""
        lost = set()
        for side in dict.fromkeys(map(side_of, arms)):
            lost |= self.make(side, arms)
        samples = {arm: [] for arm in arms if arm not in lost}
        for repeat, arm in alternated(arms, repeats + 1):
            if arm in lost:
                continue
            seconds = guarded(lambda arm=arm: self.seconds(arm))
            if seconds is None:
                # What it left half way is made anew for the others of its side.
                lost |= {arm} | self.make(side_of(arm), [a for a in arms if a not in {*lost, arm}])
                for gone in lost:
                    samples.pop(gone, None)
            elif repeat:
                samples[arm].append(seconds)
        self.rows, self.stock = {}, None
        free()
        return samples, [arm for arm in arms if arm in lost]

    def make(self, side, arms):
        """The caches of a side; returns those of its arms that are lost because they do not fit."""
        of_side = {arm for arm in arms if side_of(arm) == side}
        if not of_side or guarded(lambda: self.fill(side)):
            return set()
        return of_side


def side_of(arm):
    """Whose caches an arm decodes from."""
    return PRUNED if arm in (PRUNED, COMPILED) else STOCK if arm == STOCK else UNPRUNED


def guarded(work):
    """What `work` returns; None where memory ended, all of which is free again."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Here, where the error no longer holds what it met.
    free()
    return None


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decode_point(point, arms, repeats):
    """Samples of each arm, the arms that do not fit even apart, and those that took no turn with `pruned`."""
    full = point.bytes_of(UNPRUNED)
    room = (memory_bytes(point.loaded.device) or 0) * 0.85
    together = STOCK not in arms or 2.5 * full + decoder_weight_bytes(point.loaded) < room
    groups = [arms] if together else [[arm for arm in arms if arm != STOCK], [STOCK]]
    groups = [group for whole in groups for group in split(point, whole, full, room) if group]
    samples, lost, apart = {}, [], []
    for group in groups:
        found, gone = point.run(group, repeats)
        samples |= found
        for side in dict.fromkeys(map(side_of, gone)):
            again = [arm for arm in gone if side_of(arm) == side]
            found, still = point.run(again, repeats) if len(again) < len(group) else ({}, again)
            samples |= found
            lost += still
            apart += found
    apart += [arm for group in groups if PRUNED not in group for arm in group]
    return samples, lost, apart


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


def prefill_point(point, repeats, limit_s):
    """TTFT from inputs on the device, pruning's share, peaks; None where a prefill takes over the limit.

    An arm that does not fit has None in place of its figures.
    """
    loaded, prompt, count = point.loaded, point.prompt, point.new_tokens
    layers = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    policy = FixedRates({index: point.rates[index % len(point.rates)] for index in range(layers)})
    arms = {
        PRUNED: PathArm(loaded, prompt, policy, count, point.timer),
        UNPRUNED: PathArm(loaded, prompt, None, count, point.timer),
        STOCK: StockArm(loaded, prompt, count, point.timer),
    }
    samples = {name: [] for name in arms}
    for repeat, name in alternated(list(arms), repeats + 1):
        if name not in samples:
            continue
        taken = guarded(arms[name].prefill)
        arms[name].drop()
        if taken is None:
            del samples[name]
        elif not repeat and taken.prefill_s > limit_s:
            return None
        elif repeat:
            samples[name].append(taken.first_token_s)
    shares = []
    for _ in range(4):
        taken = guarded(lambda: time_pruning(loaded, prompt, policy, count, point.timer))
        shares += [] if taken is None else [taken[0] / taken[1]]
    peaks = {}
    for name in (PRUNED, UNPRUNED):
        free()
        own = policy if name == PRUNED else None
        taken = guarded(lambda name=name, own=own: measure_peaks(loaded, prompt, name, own, 2))
        peaks[name] = None if taken is None else taken.prefill_decoder_bytes
    return {
        "ttft_s": {name: median(samples.get(name, [])) for name in arms},
        "ttft_samples_s": samples,
        "prune_share_of_prefill": median(shares[1:]),
        "prune_shares": shares,
        "peak_decoder_bytes": peaks,
        "peak_ratio": peaks[PRUNED] / peaks[UNPRUNED] if all(peaks.values()) else None,
    }
