"""Packs what a bug report needs into one archive, without secrets: versions, settings, what `make doctor` says, and the
last hour's logs and metrics. Sends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from diagnosis import pack
from diagnosis.findings import now
from diagnosis.looks import diagnose
from diagnosis.scrub import Scrubber, known_secrets
from stack.access import one_line
from stack.console import console, step
from stack.shell import ROOT


def main(
    out: Annotated[Path, typer.Option(help="Folder for the archive.")] = ROOT / "dist",
) -> None:
    """Pack versions, settings, logs and metrics of the last hour for a bug report, without secrets. Sends nothing."""
    with one_line():
        with step("Looking at everything") as shown:
            diagnosis, seen = diagnose(shown.say)
            shown.result = diagnosis.verdict
        with step("Gathering") as shown:
            environments = [service.environment for service in seen.config.services.values()]
            scrubber = Scrubber(known_secrets(environments))
            report = pack.gather(seen, diagnosis, scrubber, shown.say)
            shown.result = f"{report.bytes() / pack.MIB:.1f} MiB"
        at = now()
        archive = out / f"vllm-fleet-report-{at:%Y-%m-%dT%H%M%S}.tar.gz"
        pack.write(report, archive, at)
        for part in report.parts:
            console.print(
                f"  [bold]{escape(part.name)}[/] {escape(part.what)} [dim]{escape(part.cut)}[/]", soft_wrap=True
            )
        size = archive.stat().st_size / pack.MIB
        console.print(f"{escape(str(archive))}: {size:.1f} MiB. Nothing was sent anywhere.", soft_wrap=True)
        console.print(
            "It holds no keys, tokens, passwords, prompts or answers, and names nobody who sent a request. It does hold"
            " names of models and settings. Look into it before you send it: its README.txt says what there is.",
            soft_wrap=True,
        )


if __name__ == "__main__":
    typer.run(main)
