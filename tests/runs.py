"""How a toy family is run by a setting: the settings, and the answers that laws compare."""

import math
from weakref import WeakKeyDictionary

import torch
from families import as_prompt

from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.prefilling import advance, prefill
from plphp_cli.pruning import FixedRates, LayerOnlyPolicy, RandomPolicy, UniformPolicy

NEW_TOKENS = 8
WHOLE = PLPHPConfig(r=1, delta_r=0)
CUT = PLPHPConfig(alpha=0.6, beta=0.3)
SETTINGS = {
    "cut": CUT,
    "everything goes": PLPHPConfig(r=0, delta_r=0),
    "each image its share": PLPHPConfig(r=0.5, delta_r=0.2, scope="image", head_reduce="max"),
    "first layer whole": CUT.replace(skip_layers=[0]),
    "one layer only": FixedRates({1: 0.0}),
    "layer-only": LayerOnlyPolicy(CUT),
    "uniform": UniformPolicy(0.3),
    "random": RandomPolicy(0.3, seed=1),
}


def settings_of(family):
    """The settings that a family can be cut by."""
    return {
        name: setting
        for name, setting in SETTINGS.items()
        if (family.tells_images or getattr(setting, "scope", "prompt") == "prompt")
        and (family.settings is None or name in family.settings)
    }


def answer(model, inputs, **options):
    """Greedy tokens [T] and raw logits [T, vocab] of the model's own `generate`."""
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[0, inputs["input_ids"].shape[1] :], torch.cat(output.logits)


_RUNS = WeakKeyDictionary()


def pruned_answer(family, number, name):
    """Tokens, logits and layers of the family's prompt `number` by a named setting; run once per model."""
    runs = _RUNS.setdefault(family.model, {})
    if (number, name) not in runs:
        with prune(family.model, SETTINGS[name]) as pruner:
            runs[number, name] = (*answer(family.model, family.prompts[number]), pruner.layers)
    return runs[number, name]


def full_layers(states):
    return [state for state in states if state.prunable]


def in_turn(family, prompts):
    """Logits [T, vocab] of several prompts, decoded one token at a time in turn."""
    with prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(inputs), pruner, NEW_TOKENS) for inputs in prompts]
        logits = [[run.logits] for run in runs]
        eos = family.model.generation_config.eos_token_id
        for _ in range(NEW_TOKENS - 1):
            for run, rows in zip(runs, logits, strict=True):
                scores = rows[-1].clone()
                if eos is not None:
                    scores[eos] = -math.inf
                rows.append(advance(family.loaded, run, scores.argmax()[None, None])[-1])
    return [torch.stack(rows) for rows in logits]


def forced_logits(family, inputs, policy, tokens):
    """Logits [T, vocab] along given tokens, with a prefill of its own."""
    with prune(family.model, policy) as pruner:
        run = prefill(family.loaded, as_prompt(inputs), pruner, NEW_TOKENS)
        rows = [advance(family.loaded, run, token[None, None])[-1] for token in tokens[:-1]]
    return torch.stack([run.logits, *rows])
