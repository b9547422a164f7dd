"""The fault table over hosts: network namespaces as hosts, real Nginx at both ends of each link, simulated replicas.
With --engines, hosts have Docker engines of their own and all is done by a user's commands; with --real, on the model.

    python -m lab.hosts                  all rows; writes docs/benchmarks/hosts.md
    python -m lab.hosts --engines        hosts with engines, simulated replicas in containers; writes hosts-engines.md
    python -m lab.hosts --real           the same with the real model, in half an hour; writes hosts-real.md
    python -m lab.hosts --only power     some rows
    python -m lab.hosts --quick          those of the test suite

Needs root, or a user who may make namespaces (`unshare --user --map-root-user`). Hosts with engines need root, what
`make up` made here, and 7 GB of disk in .cache/hosts, where images stay for the next time; without openssh-server no
host reaches the other by ssh. --real needs 8 GB of free memory.
Exit 1 when a row is wrong, 3 where there are no such hosts.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import httpx
import typer

from lab.chaos.__main__ import HEAD, cells, console, show, tell
from lab.chaos.rows import PATIENCE, Row
from lab.hosts import real, rows
from lab.hosts.fleet import bare_nginx
from lab.hosts.machines import MachineError, alone
from lab.hosts.network import NoNamespacesError, network
from lab.report import DOCS, provenance, table
from lab.sim.gateway import nginx_version
from stack.shell import ROOT

FAR = " and ".join(f"{count} on {name}" for name, count in rows.FAR.items())
INTRO = f"""# Faults between hosts

Written by `python -m lab.hosts`. Hosts are network namespaces. Real Nginx is at both ends of each link, with the files
of `nginx/link/` and certificates as `make host` makes them. Replicas are simulated: {rows.HERE} on the gateway's host,
{FAR}. The fault hits gpu-b. 16 clients on the gateway's host send streams; a request that
gets no token for {PATIENCE:.0f} s is lost. Begun means that a token had come. Times count from the fault (route
changed) and from its end (served again). Each row is on a fleet of its own.
"""

ENGINES = f"""# Faults between hosts with engines of their own

Written by `python -m lab.hosts {{option}}`. Hosts are network namespaces with a Docker engine, processes and a checkout
of their own; all is done by the commands that [the page](../hosts.md) names. {{replicas}} gw has the gateway and
{real.NEAR}, gpu-b has {real.FAR}. A power cut ends all processes of a host at once, with its cable cut. 3 clients send
streams; a request that gets no token for {PATIENCE:.0f} s is lost. Begun means that a token had come. Times count from
the fault (route changed) and from its end (served again), unless the note says otherwise. The rows come one after the
other on the same fleet. After the gateway's host was off, clients ask again once its /ready says 200.
"""
REPLICAS = {
    "--real": "Images and model are the real ones, on CPUs; a replica that starts anew has its model to load.",
    "--engines": "All containers are real but for what is in a replica's: that is simulated.",
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Only the rows of the test suite.")] = False,
    only: Annotated[str, typer.Option(help="Only rows whose name has this in it.")] = "",
    engines: Annotated[bool, typer.Option("--engines", help="Hosts with engines of their own.")] = False,
    with_model: Annotated[bool, typer.Option("--real", help="The same, with real replicas.")] = False,
) -> None:
    """Plays the faults, prints the table, and writes it to docs/benchmarks when it is whole."""
    if engines or with_model:
        play_on_engines(only, quick=quick, with_model=with_model)
        return
    found = []
    try:
        bare_nginx()
        with network(list(rows.FAR)) as spaces:
            for case in rows.CASES:
                if case.chosen(only, quick):
                    with console.status(case.name):
                        found.append(asyncio.run(rows.play(case, spaces)))
                    tell(found[-1])
    except (NoNamespacesError, FileNotFoundError) as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(3) from None
    show(found)
    if not only and not quick:
        text = f"{INTRO}\n{provenance([nginx_version()])}\n{table(HEAD, [cells(row) for row in found])}"
        DOCS.mkdir(parents=True, exist_ok=True)
        path = DOCS / "hosts.md"
        path.write_text(text)
        console.print(f"written: {path.relative_to(ROOT)}", highlight=False)
    if any(row.wrong for row in found):
        raise typer.Exit(1)


def play_on_engines(only: str, *, quick: bool, with_model: bool) -> None:
    """The same on hosts with engines of their own."""
    found: list[Row] = []
    try:
        bare_nginx()
        with alone(), network(real.NAMES) as spaces, real.Lab(spaces, simulated=not with_model) as lab:
            with console.status("two hosts"):
                lab.begin()
                lab.join()
                lab.check_seen()
                lab.check_status()
            for case in real.CASES:
                if case.chosen(only, quick):
                    with console.status(case.name):
                        found.append(asyncio.run(real.play(case, lab)))
                    tell(found[-1])
            lab.down()
    except (NoNamespacesError, FileNotFoundError) as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(3) from None
    except (AssertionError, TimeoutError, OSError, MachineError, httpx.HTTPError) as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(1) from None
    finally:
        show(found)
    option = "--real" if with_model else "--engines"
    if not only and not quick:
        intro = ENGINES.format(option=option, replicas=REPLICAS[option])
        said = table(["joining, and leaving", ""], [list(line) for line in lab.said])
        faults = table(HEAD, [cells(row) for row in found])
        path = DOCS / f"hosts{option[1:]}.md"
        path.write_text(f"{intro}\n{provenance([nginx_version()])}\n{said}\n{faults}")
        console.print(f"written: {path.relative_to(ROOT)}", highlight=False)
    if any(row.wrong for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
