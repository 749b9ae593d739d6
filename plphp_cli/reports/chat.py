"""What `plphp run --chat` says about a turn: how it began, and what it came to."""

from plphp_cli.chat.records import CONTINUED, EACH_TURN, ChatRecord, TurnRecord
from plphp_cli.units import (
    NOT_AVAILABLE,
    format_bytes,
    format_number,
    format_percent,
    format_rate,
    format_seconds,
)


def begun_line(turn: TurnRecord) -> str:
    """How a turn's cache came about."""
    prompt = f"{turn.prompt_tokens:,} tokens, {turn.vision_tokens:,} vision"
    if turn.how == CONTINUED:
        return f"continued on the cut cache: {turn.fed_tokens:,} new of {prompt}"
    return f"started over from the full prompt ({turn.why}): {prompt}"


def turn_line(turn: TurnRecord) -> str:
    """What a turn came to, its quality apart."""
    parts = [
        f"{len(turn.token_ids)} tokens ({turn.stop_reason or NOT_AVAILABLE})",
        f"TTFT {format_seconds(turn.ttft_s)}",
    ]
    if turn.decode_tokens_per_s is not None:
        parts.append(format_rate(turn.decode_tokens_per_s))
    held, full = turn.kv_bytes_held, turn.kv_bytes_full
    parts.append(f"KV cache {format_bytes(held)} of {format_bytes(full)}")
    return "; ".join(parts)


def quality_lines(turn: TurnRecord) -> list[str]:
    """What a turn's cut costs against the unpruned full prompt; and what its own would, had it one."""
    found = turn.quality
    if found is None:
        return ["quality: N/A"]
    if not found.positions:
        return ["the unpruned answer is one token, which no cut changes"]
    lines = [f"{_cost(found.kl_mean, found.top1_agreement)} along the unpruned answer"]
    if turn.how == CONTINUED:
        anew = _cost(found.kl_mean_cut_anew, found.top1_agreement_cut_anew)
        lines.append(f"{anew} if cut for this question")
    return lines


def closing_line(record: ChatRecord) -> str | None:
    """What the turns that continued lost in all, by a cut that was made for an earlier question."""
    if record.recut == EACH_TURN:
        return None
    judged = [turn.quality for turn in record.turns if turn.how == CONTINUED and turn.quality is not None]
    pairs = [
        (one.positions, one.kl_mean, one.kl_mean_cut_anew)
        for one in judged
        if one.kl_mean is not None and one.kl_mean_cut_anew is not None
    ]
    count = sum(positions for positions, _, _ in pairs)
    if not count:
        return None
    lost = sum(positions * mean for positions, mean, _ in pairs) / count
    anew = sum(positions * mean for positions, _, mean in pairs) / count
    return (
        f"{len(pairs)} of {len(record.turns)} turns continued on a cut made for an earlier question: "
        f"KL {format_number(lost, 4)} nats a token, {format_number(anew, 4)} had each been cut anew"
    )


def _cost(nats: float | None, agreement: float | None) -> str:
    return f"KL {format_number(nats, 4)} nats a token, top-1 agreement {format_percent(agreement)}"
