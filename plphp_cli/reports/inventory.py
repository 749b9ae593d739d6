"""What `plphp models` prints: the families with what is proven for each, and the local hub cache."""

from plphp_cli.inventory import Inventory
from plphp_cli.reports.columns import pairs, paragraph, rule, table
from plphp_cli.units import format_bytes

_INVARIANTS = (
    "Each is held to the method's invariants at toy size, on its true architecture, with one image and with "
    "several of different sizes: rate 1 is bit-identical, a cut equals the masked reference, the first token "
    "is the unpruned one, the model is restored. * on fewer settings, and without the real processor."
)
_APART = (
    "per image: `yes` where --scope image always works, `partly` where it takes a processor that tells how "
    "many tokens each image got."
)
_EXTRA = "extra: `vision` where the processor needs torchvision: pip install 'plphp-cli[vision]'"


def inventory_report(inventory: Inventory, width: int) -> str:
    """The families with what is proven for each, and the models in the local hub cache."""
    rows = [("family", "model types", "proven with", "per image", "extra")]
    for family in inventory.families:
        types = ", ".join(name + ("*" if name in family.brief else "") for name in family.types)
        apart = "yes" if family.images_told_apart else "partly"
        rows.append((family.title, types, family.traits, apart, "vision" if family.torchvision else "-"))
    room = max(width, 76) - len("per image") - len("vision") - 8
    kinds = max(len(name) + 1 for family in inventory.families for name in family.types)
    names = max(17, room * 3 // 10)
    kinds = max(kinds, names)
    widths = [names, kinds, room - names - kinds, len("per image"), len("vision")]
    lines = [rule("families", width), *table(rows, widths), ""]
    lines += [*paragraph(_INVARIANTS, width), *paragraph(_APART, width)]
    here = "not installed here" if inventory.torchvision is None else f"{inventory.torchvision} here"
    lines += paragraph(f"{_EXTRA} ({here}).", width)
    lines += ["", rule("refused by name, beside every type that is not listed", width)]
    lines += pairs(list(inventory.refused.items()), width)
    lines += ["", rule("in the local hub cache", width), *_cached(inventory, width)]
    return "\n".join(lines)


def _cached(inventory: Inventory, width: int) -> list[str]:
    if not inventory.cached:
        return paragraph(f"no models in {inventory.cache_folder}", width)
    rows = [("model", "on disk", "family")]
    for model in inventory.cached:
        kind = f" ({model.model_type})" if model.model_type and not model.proven else ""
        rows.append((model.name, format_bytes(model.bytes), model.verdict + kind))
    name = min(max(len(row[0]) for row in rows), max(width - 44, 20))
    total = sum(model.bytes or 0 for model in inventory.cached)
    widths = [name, 10, max(width - name - 14, 16)]
    return [*table(rows, widths), *paragraph(f"{format_bytes(total)} in {inventory.cache_folder}", width)]
