"""What one rank of `test_parallel.py` runs, and what one process alone: the same work, whatever the ranks."""

import sys

import torch
from families import as_prompt, load
from runs import CUT
from toys import Family
from transformers import AutoModelForImageTextToText

from plphp_cli import models, parallel
from plphp_cli.attention import prune
from plphp_cli.prefilling import advance, prefill

NEW_TOKENS = 6


def results(name, model):
    """Of each prompt of a family: greedy tokens, their logits, and what each layer kept and holds."""
    family = Family(name, model, load(name).prompts)
    found = []
    for inputs in family.prompts:
        with torch.no_grad(), prune(model, CUT) as pruner:
            run = prefill(family.loaded, as_prompt(inputs), pruner, NEW_TOKENS)
            layers, rows = pruner.layers, [run.logits]
            while len(rows) < NEW_TOKENS:
                rows.append(advance(family.loaded, run, rows[-1].argmax()[None, None])[-1])
        stored = [getattr(run.cache.layers[layer.index], "allocated_bytes", None) for layer in layers]
        found.append({"logits": torch.stack(rows), "layers": layers, "stored": stored})
    return found


def main(out, folders):
    """Run every family that was saved in `folders`; write what this rank found into `out`."""
    found = {}
    for folder in folders:
        name = folder.rpartition("/")[2]
        model = AutoModelForImageTextToText.from_pretrained(folder, **parallel.load_options()).eval()
        found[name] = results(name, model)
        found[f"{name} gathered"] = parallel.gathered(model, found[name][0]["layers"])
    found["weights"] = models.decoder_weight_bytes(models.load("builtin", device="cpu"))
    torch.save(found, f"{out}/{parallel.rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    parallel.leave()
