"""What `plphp calibrate` found, as lines for a terminal."""

from rich.text import Text

from plphp_cli.calibration import CalibrationRecord
from plphp_cli.units import format_number

_BAR = 20


def calibration_report(record: CalibrationRecord) -> list[Text]:
    """A row a layer (gamma as a bar, need), the finding in a sentence, and the config."""
    config = record.config
    most = max((need for need in record.need if need is not None), default=0.0) or 1.0
    lines = [
        Text(f"{record.model}: gamma and need per layer over {record.prompts} prompts", "bold"),
        Text(f"{'layer':>5}  {'gamma':<{_BAR + 6}}  {'need, nats per token':<{_BAR + 8}}", "dim"),
    ]
    for index, (gamma, need) in enumerate(zip(record.gamma, record.need, strict=True)):
        exempt = "  exempt" if index in config.skip_layers else ""
        row = (
            f"{index:>5}  {format_number(gamma, 3):>5} {_bar(gamma, 1.0)}  "
            f"{format_number(need, 4):>7} {_bar(need, most)}"
        )
        lines.append(Text((row + exempt).rstrip()))
    skipped = ", ".join(map(str, config.skip_layers)) or "none"
    lines += [
        Text(record.finding),
        Text(
            f"calibrated: alpha = {config.alpha:.4f}, beta = {config.beta:.4f}, layers never cut: {skipped}; "
            f"r = {config.r:g} and delta_r = {config.delta_r:g} are as given"
        ),
    ]
    return lines


def _bar(value: float | None, full: float) -> str:
    return ("█" * round(_BAR * (value or 0.0) / full)).ljust(_BAR)
