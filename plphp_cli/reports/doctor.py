"""What `plphp doctor` prints: plain text that can be pasted into a bug report as it is."""

from plphp_cli.doctor import ABSENT, FAILS, WORKS, DoctorRecord, Part
from plphp_cli.probe import NVML, TORCH
from plphp_cli.reports.columns import pairs, paragraph, rule
from plphp_cli.units import NOT_AVAILABLE, format_bytes, format_seconds


def doctor_report(record: DoctorRecord, width: int) -> str:
    """The environment, what was tried, and each problem with its hint."""
    lines = [rule("plphp doctor", width), *pairs(_machine(record), width)]
    lines += ["", rule("packages", width), *pairs(_packages(record), width)]
    lines += ["", rule("devices", width), *pairs(_devices(record), width)]
    lines += ["", rule("hub", width), *pairs(_hub(record), width)]
    lines += [
        "",
        rule("tried", width),
        *pairs([(part.name, _outcome(part, record)) for part in record.parts], width),
    ]
    lines += ["", rule("problems", width)]
    for number, problem in enumerate(record.problems, 1):
        lines += paragraph(f"{number}. {problem.text}", width, "   ")
        lines += [f"   {line}" for line in paragraph(f"hint: {problem.hint}", width - 3, "   ")]
    if not record.problems:
        lines.append("none found")
    lines += ["", f"usable: {'yes' if record.usable else 'NO'}"]
    return "\n".join(lines)


def _machine(record: DoctorRecord) -> list[tuple[str, str]]:
    threads = record.part(TORCH).found.get("threads")
    return [
        ("plphp-cli", record.plphp),
        ("Python", record.python),
        ("platform", record.platform),
        ("CPU", record.cpu or NOT_AVAILABLE),
        ("cores, threads", f"{_known(record.usable_cores)} usable, {_known(threads)} of torch"),
        ("memory", format_bytes(record.memory_bytes)),
    ]


def _packages(record: DoctorRecord) -> list[tuple[str, str]]:
    torch = record.part(TORCH).found
    rows = []
    for name, version in record.packages.items():
        shown = version or "not installed"
        if name == "torch" and torch:
            build = (
                "CUDA " + torch["cuda"] if torch.get("cuda") else "ROCm" if torch.get("hip") else "CPUs alone"
            )
            shown += f", built for {build}"
        rows.append((name, shown))
    return rows


def _devices(record: DoctorRecord) -> list[tuple[str, str]]:
    rows = []
    for one in record.part(TORCH).found.get("devices", ()):
        memory = (
            f", {format_bytes(one['free_bytes'])} of {format_bytes(one['memory_bytes'])} free"
            if ("memory_bytes" in one)
            else ""
        )
        ability = f", compute {one['capability']}" if "capability" in one else ""
        bfloat16 = "" if one.get("bfloat16", True) else ", no bfloat16"
        rows.append((one["device"], f"{one['name']}{memory}{ability}{bfloat16}"))
    if not rows:
        rows.append(("torch", "the CPU alone" if record.part(TORCH).state == WORKS else NOT_AVAILABLE))
    seen = {True: "yes", False: "no", None: NOT_AVAILABLE}[record.gpus_seen]
    nvml = record.part(NVML)
    driver = (
        f"driver {nvml.found['driver']}, {', '.join(nvml.found['devices'])}" if nvml.state == WORKS else "no"
    )
    return [*rows, ("NVIDIA GPU here", seen), ("NVML", driver)]


def _hub(record: DoctorRecord) -> list[tuple[str, str]]:
    hub = record.hub
    rows = [
        (
            "cache",
            f"{hub.folder or NOT_AVAILABLE}, {format_bytes(hub.bytes) if hub.bytes is not None else 'empty'}",
        ),
        ("disk left", format_bytes(hub.free_bytes)),
        ("offline", "yes: nothing is downloaded" if hub.offline else "no"),
    ]
    return rows + list(record.variables.items())


def _outcome(part: Part, record: DoctorRecord) -> str:
    if part.name == NVML and part.state == FAILS and record.gpus_seen is False:
        return "not here, as there is no NVIDIA GPU"
    took = "" if part.seconds is None else f", {format_seconds(part.seconds)}"
    if part.state == WORKS:
        return f"works{took}"
    if part.state == ABSENT:
        return "not installed"
    return part.state + (f": {part.error}" if part.error else "")


def _known(count: int | None) -> str:
    return NOT_AVAILABLE if count is None else str(count)
