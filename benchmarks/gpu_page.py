"""The results of `gpu.py` as one HTML page that needs nothing else."""

from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; width: 100% }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.yes { color: #0a6b2d } .no { color: #b00020; font-weight: 600 } .unknown { color: #777 }
svg { display: block } svg text { font-size: 12px }
"""
TOLD = {True: ("yes", "pass"), False: ("no", "FAIL"), None: ("unknown", "not measured")}
GB = 1e9


def page(result: dict) -> str:
    """The page, of what `gpu.py` has written to its JSON so far."""
    device = result["device"]
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    title = f"Custom Diffusion on {device['name']}{memory}"
    tiny = "<p><b>Tiny models, to try the script: the numbers say nothing.</b></p>" if result["tiny"] else ""
    peer = ", ".join(result["peers"]) or "none given, so nothing is compared"
    sections = [
        f"<h1>{escape(title)}</h1>{tiny}",
        f"<p>{result['date']}, {result['seconds']:.0f} s. Python {result['python']}, {escape(versions)}. "
        f"Reference script: {escape(peer)}. Random weights of the real sizes.</p>",
        section("What was asked", bars_table(result["bars"])),
        section("What holds", checks_table(result["checks"])),
        section("Runs", runs_table(result["runs"])),
        section("Steps a second by batch size, latents cached", batch_chart(result["runs"])),
        *[
            section(f"One step, kernel by kernel: {escape(run['name'])}", profile_tables(run["profile"]))
            for run in result["runs"]
            if run["profile"]
        ],
        section("Stages", table(("stage", "became", "seconds"), stages(result["stages"]))),
    ]
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>{"".join(sections)}</html>\n'


def section(heading: str, content: str) -> str:
    return f"<h2>{heading}</h2>{content}" if content else ""


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """Rows of HTML; a cell that is a number stands to the right."""
    if not rows:
        return ""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for row in rows:
        cells = [f'<td class="number">{cell}</td>' if cell[:1].isdigit() else f"<td>{cell}</td>" for cell in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def told(passed: bool | None) -> str:
    kind, word = TOLD[passed]
    return f'<span class="{kind}">{word}</span>'


def bars_table(bars: list[dict]) -> str:
    rows = [[told(b["passed"]), escape(b["name"]), number(b["measured"]), escape(b["wanted"])] for b in bars]
    return table(("", "what", "measured", "wanted"), rows)


def checks_table(checks: list[dict]) -> str:
    return table(("", "check", "seen"), [[told(c["passed"]), escape(c["name"]), escape(c["seen"])] for c in checks])


def runs_table(runs: list[dict]) -> str:
    heads = (
        "run",
        "batch",
        "px",
        "precision",
        "steps/s",
        "GB allocated",
        "reserved",
        "first step, s",
        "whole run, s",
        "flags",
    )
    rows = [
        [
            escape(run["name"]),
            f"{run['batch_size']} + {run['batch_size']}",
            str(run["resolution"]),
            run["precision"],
            number(1 / run["seconds_a_step"]) if run["seconds_a_step"] else escape(run["status"]),
            number(run["allocated_bytes"] / GB),
            number(run["reserved_bytes"] / GB),
            number(run["first_step_seconds"]),
            f"{run['wall_seconds']:.1f} of {run['steps']} steps",
            escape(" ".join(flag for flag in run["flags"] if flag.startswith("--") and flag not in ALWAYS)),
        ]
        for run in runs
    ]
    return table(heads, rows)


ALWAYS = ("--real_prior", "--modifier_token=<new1>", "--hflip")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def stages(stages: list[dict]) -> list[list[str]]:
    return [[escape(stage["name"]), escape(stage["status"]), f"{stage['seconds']:.0f}"] for stage in stages]


def batch_chart(runs: list[dict]) -> str:
    """Images a second as horizontal bars."""
    rows = [run for run in runs if run["name"].startswith("batch ") and run["seconds_a_step"]]
    if not rows:
        return ""
    rates = [2 * run["batch_size"] / run["seconds_a_step"] for run in rows]
    lines = []
    for index, (run, rate) in enumerate(zip(rows, rates)):
        top, width = 26 * index, 520 * rate / max(rates)
        label = f"{rate:.1f} images/s, {1 / run['seconds_a_step']:.2f} steps/s, {run['allocated_bytes'] / GB:.1f} GB"
        lines.append(
            f'<text x="0" y="{top + 15}">{run["batch_size"]} + {run["batch_size"]}</text>'
            f'<rect x="60" y="{top + 2}" width="{width:.0f}" height="18" fill="#8ab4d8"/>'
            f'<text x="66" y="{top + 15}">{label}</text>'
        )
    return f'<svg width="100%" height="{26 * len(rows)}" viewBox="0 0 900 {26 * len(rows)}" role="img">{"".join(lines)}</svg>'


def profile_tables(profile: dict) -> str:
    """Kinds of work, then the longest kernels, in milliseconds a step."""
    whole = profile["device_ms"]
    rows = [[escape(kind), f"{ms:.2f}", f"{100 * ms / whole:.0f} %"] for kind, ms in profile["kinds_ms"].items()]
    rows.append(
        [
            "nothing: the device waits for the CPU",
            f"{profile['idle_ms']:.2f}",
            f"{100 * profile['idle_ms'] / whole:.0f} %",
        ]
    )
    rows.append(
        [
            "the CPU waits for the device",
            f"{profile['cpu_waits_ms']:.2f}",
            f"{100 * profile['cpu_waits_ms'] / whole:.0f} %",
        ]
    )
    longest = [[f"<code>{escape(name)}</code>", f"{ms:.2f}"] for name, ms in profile["longest_ms"].items()]
    return (
        f"<p>{whole:.1f} ms a step, {profile['launches']:.0f} kernels.</p>"
        + table(("work", "ms", "of the step"), rows)
        + table(("longest", "ms"), longest)
    )
