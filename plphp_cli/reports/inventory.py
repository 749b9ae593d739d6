"""What `plphp models` prints: the families with what is proven for each, and the local hub cache."""

from plphp_cli.inventory import CachedModel, Inventory
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
_REFUSED = (
    "A model is refused by the assumption of the method that fails on it. `plphp models --refused` names "
    "every type with its reason, `plphp models NAME` that of one model."
)


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
    lines += ["", *_refused(inventory, width)]
    lines += ["", rule("in the local hub cache", width), *_cached(inventory, width)]
    return "\n".join(lines)


def _refused(inventory: Inventory, width: int) -> list[str]:
    """Every refused type where they are known, by reason; else the kinds of models that are refused."""
    if inventory.refused_types is None:
        lines = [rule("refused, before any weights are fetched", width), *paragraph(_REFUSED, width)]
        for assumption in inventory.assumptions:
            lines += paragraph(f"- {assumption}", width, "  ")
        return [*lines, "By name, whatever the config says:", *pairs(list(inventory.refused.items()), width)]
    by_reason: dict[str, list[str]] = {}
    for each in inventory.refused_types:
        by_reason.setdefault(each.reason, []).append(each.model_type)
    lines = [rule("refused, before any weights are fetched, as the default config is", width)]
    for reason, types in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines += paragraph(f"{reason}:", width)
        lines += [f"  {line}" for line in paragraph(", ".join(types), width - 2)]
    return lines


def _cached(inventory: Inventory, width: int) -> list[str]:
    if not inventory.cached:
        return paragraph(f"no models in {inventory.cache_folder}", width)
    rows = [("model", "on disk", "weights", "family, or why it is refused")]
    rows += [
        (model.name, format_bytes(model.bytes), model.weights, _about(model)) for model in inventory.cached
    ]
    state = max(len(row[2]) for row in rows)
    room = width - 10 - state - 3 * 2
    name = min(max(len(row[0]) for row in rows), max(room // 2, 20))
    lines = table(rows, [name, 10, state, max(room - name, 16)])
    for model in inventory.cached:
        if model.problem is not None:
            lines += paragraph(f"note: {model.problem}", width, "      ")
    total = sum(model.bytes or 0 for model in inventory.cached)
    return [*lines, *paragraph(f"{format_bytes(total)} in {inventory.cache_folder}", width)]


def _about(model: CachedModel) -> str:
    """The verdict, without the name that stands beside it."""
    for said in (f"{model.name}: ", f"{model.name} is "):
        if model.verdict.startswith(said):
            return model.verdict.removeprefix(said)
    return model.verdict.replace(f" of {model.name}", "")
