"""Records a terminal session, and takes a picture of a report, for the first page of the docs and the README.

Run `python docs/record.py` after the output of the recorded commands has changed. The script runs the session in a
temporary folder on the simulated backend, and writes what the terminal showed to docs/assets/session.svg. It then opens
the campaign's report in Chromium, and saves the picture as docs/assets/report.png. The times and energies are
simulated, as the pages that show the pictures state; everything else comes from a real run.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
COLUMNS = 110
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARM = """\
model: any
dataset: {{name: sample, sample_size: 60}}
batching: {{batch_size: {batch}}}
backend: {{name: simulated, sleep: false, decode_s_per_token: {step_s}, noise: 0.02}}
energy: {{name: simulated, power_w: 250}}
"""
ARMS = {"one": ARM.format(batch=1, step_s=0.01), "eight": ARM.format(batch=8, step_s=0.03)}
# Each command, and the beginning of the first line of its output that is shown. The lines that report the end of a
# campaign's cell are shown in any case.
SESSION = (
    ("lem config validate one.yaml eight.yaml", ""),
    ("lem campaign one.yaml eight.yaml --campaign-name batches --cycles 5 --yes", "Campaign batches: 10 of 10"),
    ("lem results report --campaign batches -o batches.html", ""),
)
CELL_ENDED = ": completed exp_"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
LINE_PX, CHARACTER_PX, MARGIN_PX, TITLE_PX = 19, 8.4, 16, 34
TYPING_S, LINE_S, CELL_S = 1.2, 0.08, 0.5


def shown(command: str, folder: Path) -> list[str]:
    """Run a command in a terminal; return the lines that remain on the screen, without colors."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(command, shell=True, cwd=folder, stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    output = b""
    while chunk := _read(parent):
        output += chunk
    os.close(parent)
    if process.wait() != 0:
        raise SystemExit(f"`{command}` failed:\n{output.decode()}")
    lines = CONTROL.sub("", output.decode()).replace("\r\n", "\n").split("\n")
    # After a carriage return, the next text overwrites the line, so only the last version remains.
    return [line.split("\r")[-1].rstrip() for line in lines if line.strip()]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the program has ended
        return b""


def recorded(folder: Path) -> list[tuple[bool, str]]:
    """Run the session; return its lines, each with a flag that is true if the line is a typed command."""
    lines: list[tuple[bool, str]] = []
    for command, beginning in SESSION:
        lines.append((True, command))
        output = shown(command, folder)
        begins = next(number for number, line in enumerate(output) if line.startswith(beginning))
        lines += [(False, line) for line in output[:begins] if CELL_ENDED in line]
        lines += [(False, line) for line in output[begins:]]
    return lines


def drawing(lines: list[tuple[bool, str]]) -> str:
    """Return an SVG in which the lines appear one after another and then stay visible."""
    wrapped = [(typed, part) for typed, line in lines for part in _wrapped(line)]
    width, height = COLUMNS * CHARACTER_PX + 2 * MARGIN_PX, len(wrapped) * LINE_PX + TITLE_PX + 2 * MARGIN_PX
    at_s, times = 0.0, []
    for typed, text in wrapped:
        at_s += TYPING_S if typed else CELL_S if CELL_ENDED in text else LINE_S
        times.append(at_s)
    colors = ("#ff5f57", "#febc2e", "#28c840")
    dots = (f'<circle cx="{20 + 20 * i}" cy="18" r="6" fill="{color}"/>' for i, color in enumerate(colors))
    texts = []
    for number, ((typed, text), begin_s) in enumerate(zip(wrapped, times, strict=True)):
        y = TITLE_PX + MARGIN_PX + (number + 0.7) * LINE_PX
        prompt = '<tspan class="p">$ </tspan>' if typed else ""
        delay = f"animation-delay:{begin_s:.2f}s"
        texts.append(f'<text x="{MARGIN_PX}" y="{y:.0f}" style="{delay}">{prompt}{escape(text)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">\n'
        "<title>A terminal: two configurations are compared with lem campaign</title>\n"
        "<style>text{font:14px ui-monospace,Menlo,Consolas,monospace;fill:#e6e6e6;white-space:pre;"
        "animation:show 0.01s both}.p{fill:#8ae28a}@keyframes show{from{opacity:0}to{opacity:1}}"
        "@media (prefers-reduced-motion:reduce){text{animation:none}}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#1b1e26"/>\n'
        + "".join(dots)
        + "\n"
        + "\n".join(texts)
        + "\n</svg>\n"
    )


def _wrapped(line: str) -> list[str]:
    room = COLUMNS - 2
    return [line[i : i + room] for i in range(0, len(line), room)] or [""]


def photograph(page: Path, picture: Path) -> None:
    """Take a picture of a report's answer and first charts in Chromium."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("there is no Chromium; install it, for example with: apt-get install chromium")
    # Hide the parts between the answer and the charts, and the name of the temporary folder.
    shown = page.with_name("shown.html")
    style = "<style>#trust, #experiments, header .quiet { display: none }</style>"
    shown.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{style}</head>", 1), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=15000",
               "--blink-settings=preferredColorScheme=1", "--window-size=1000,1100",
               f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture}")  # fmt: skip
    subprocess.run([browser, *options, shown.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> None:
    """Record the session and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arm, text in ARMS.items():
            (folder / f"{arm}.yaml").write_text(text)
        lines = recorded(folder)
        (ASSETS / "session.svg").write_text(drawing(lines), encoding="utf-8")
        photograph(folder / "batches.html", ASSETS / "report.png")
    for file in ("session.svg", "report.png"):
        print(f"{ASSETS / file}: {(ASSETS / file).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
