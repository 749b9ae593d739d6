"""What `plphp models NAME` prints: the card of one model, and whether it fits."""

from plphp_cli.card import ModelCard
from plphp_cli.models.weights import WHOLE
from plphp_cli.reports.columns import pairs, paragraph, rule
from plphp_cli.units import NOT_AVAILABLE, format_bytes, format_count, format_percent

# Of the device's memory: what is left beside weights and cache must also hold a prefill.
_TIGHT = 0.9
# Characters of a cell, and of a message of another library.
_CELL, _LONGEST = 48, 300


def card_report(card: ModelCard, width: int) -> str:
    """What one model would take."""
    lines = [rule(card.name, width), *pairs(_facts(card), width), ""]
    lines += paragraph(verdict(card), width)
    for note in (*_image_note(card), *card.notes):
        lines += paragraph(f"note: {note}", width, "      ")
    return "\n".join(lines)


def verdict(card: ModelCard) -> str:
    """Whether the model fits, in a sentence that says what to try."""
    fit = card.fit
    need = (
        f"{format_bytes(fit.needed_bytes)} for weights and {format_count(fit.context_tokens)} tokens of cache"
    )
    if fit.fits is None or fit.memory_bytes is None:
        return f"Whether it fits is not known, since the memory of {fit.device} is not: it needs {need}."
    owner = "this machine" if fit.device == "cpu" else fit.device
    memory = f"{format_bytes(fit.memory_bytes)} of {owner}"
    if not fit.fits:
        lacking = format_bytes(fit.needed_bytes - fit.memory_bytes)
        smaller = "" if card.dtype in ("bfloat16", "float16") else "--dtype bfloat16, "
        return (
            f"It does not fit the {memory}: it needs {need}, {lacking} more. Try {smaller}a smaller "
            "--context, another --device or a smaller model."
        )
    tight = fit.needed_bytes > _TIGHT * fit.memory_bytes
    how = "barely fits" if tight else "fits"
    return f"It {how} the {memory}: it needs {need}. A prefill takes some more."


def _facts(card: ModelCard) -> list[tuple[str, str]]:
    image = card.image
    proof = "fewer settings, without the real processor" if card.brief else "all settings"
    size = f"{image.width}x{image.height}"
    family = "none, and not proven" if card.family is None else f"{card.family}; proven on {proof}"
    facts = [
        ("model type", card.model_type),
        ("family", family),
        ("parameters", _count(card.parameters)),
        ("weights", f"{format_bytes(card.weight_bytes)} in {card.dtype}{_stored(card)}"),
        ("  read per step", format_bytes(card.step_bytes)),
        ("decoder layers", ", ".join(f"{count} {kind}" for kind, count in card.layers.items())),
        ("heads", f"{card.attention_heads} query, {card.kv_heads} KV, of width {card.head_dim}"),
        ("cache per token", format_bytes(card.kv_bytes_per_token)),
    ]
    if card.revision is not None:
        facts.insert(0, ("revision", card.revision))
    if card.sliding_bytes_per_token:
        window = (
            "" if card.sliding_tokens is None else f", at most {format_count(card.sliding_tokens)} tokens"
        )
        facts.append(("  sliding layers", f"{format_bytes(card.sliding_bytes_per_token)} more{window}"))
    if image.unknown is not None:
        facts.append((f"image of {size}", f"{NOT_AVAILABLE}: {_clause(image.unknown, card.name)}"))
    else:
        tokens = f"{format_count(image.vision_tokens)} vision tokens, {format_bytes(image.kv_bytes)} of cache"
        facts.append((f"image of {size}", tokens))
    context, most = card.fit.context_tokens, card.max_context
    longest = "" if most is None else f" (the model was made for {format_count(most)})"
    facts.append((f"cache of {format_count(context)} tokens", format_bytes(card.fit.kv_bytes) + longest))
    facts.append(("  share of a step", f"{format_percent(card.kv_share_of_step)} of the bytes it reads"))
    return facts


def _clause(reason: str, name: str) -> str:
    """The beginning of a message, without the model's name, that fits into a cell."""
    short = reason.replace(f" of {name}", "").removeprefix(f"{name} ").partition(": ")[0].partition(" (")[0]
    return short if len(short) <= _CELL else f"{short[: _CELL - 3]}..."


def _image_note(card: ModelCard) -> list[str]:
    """Why the vision tokens are not known, in full, and what to do."""
    image = card.image
    if image.unknown is None:
        return []
    why = image.unknown if len(image.unknown) <= _LONGEST else f"{image.unknown[: _LONGEST - 3]}..."
    return [f"vision tokens are not known: {why}" + (f": {image.hint}" if image.hint else "")]


def _stored(card: ModelCard) -> str:
    stored = "" if card.stored_bytes is None else f"; {format_bytes(card.stored_bytes)} as stored"
    return stored if card.weights_state == WHOLE else f"{stored} ({card.weights_state})"


def _count(parameters: int) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} billion"
    return f"{parameters / 1e6:.2f} million"
