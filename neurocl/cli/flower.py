"""``neurocl federated server``, ``client`` and ``keys``: the same runs over several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from neurocl.cli import federated
from neurocl.cli.options import JsonOption, QuietOption

NETWORK = "Network"

ServedData = Annotated[str, typer.Option(help="The data set to take part with; others are refused.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Plain text, also over a network.", rich_help_panel=NETWORK)
]


def _file(text: str) -> typer.models.OptionInfo:
    found: typer.models.OptionInfo = typer.Option(help=text, rich_help_panel=NETWORK, show_default=False)
    return found


def server(
    method: Annotated[str | None, typer.Option(help="See `neurocl federated methods`.", show_default="fedavg")] = None,
    dataset: federated.DatasetOption = None,
    clients: federated.ClientsOption = None,
    beta: federated.BetaOption = None,
    rounds: federated.RoundsOption = None,
    local_epochs: federated.EpochsOption = None,
    lr: federated.LrOption = None,
    config: federated.ConfigOption = None,
    assignments: federated.SetOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.", show_default="0")] = None,
    secure_sum: federated.SecureSumOption = False,
    address: Annotated[
        str, typer.Option(help="Where clients connect, HOST:PORT.", rich_help_panel=NETWORK)
    ] = "127.0.0.1:8443",
    ca: Annotated[Path | None, _file("Certificate of who signed --cert.")] = None,
    cert: Annotated[Path | None, _file("The server's certificate.")] = None,
    key: Annotated[Path | None, _file("The private key of --cert.")] = None,
    auth: Annotated[Path | None, _file("Folder with client-NUMBER.pub: nobody else may take part.")] = None,
    insecure: InsecureOption = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for clients.", rich_help_panel=NETWORK)] = 600.0,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/...")] = None,
    resume: federated.ResumeOption = None,
    smoke: federated.SmokeOption = False,
    data_dir: federated.DataOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a method over clients on other machines, each of which runs `neurocl federated client`."""
    from neurocl.federated.flower.processes import Address
    from neurocl.federated.flower.server import Security, serving

    security = Security(ca, cert, key, auth)
    say = None if quiet else lambda line: typer.echo(line, err=True)
    connect = serving(Address.parse(address), security, insecure=insecure, patience=wait, say=say)
    own: dict[str, Any] = {"method": method, "seed": seed, "secure_sum": {} if secure_sum else None}
    flags = federated.flags_of(dataset, clients, beta, rounds, local_epochs, lr, None, data_dir)
    flags |= {name: value for name, value in own.items() if value is not None}
    if resume is not None:
        federated.refuse_changes(flags, config=config, set=assignments, smoke=smoke, out=out)
    settings = None if resume else federated.config_of(config, flags, assignments, smoke)
    federated.run_and_print(settings, out, resume, connect, as_json=as_json, quiet=quiet)


def client(
    number: Annotated[int, typer.Option("--client", min=0, help="Number of this client, from 0.", show_default=False)],
    server: Annotated[str, typer.Option(help="The server's HOST:PORT.")] = "127.0.0.1:8443",
    dataset: ServedData = "digits",
    data_dir: federated.DataOption = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder for what this client keeps.", show_default="runs/client-NUMBER")
    ] = None,
    backbone: Annotated[
        Path | None,
        typer.Option(help="Folder with the network, if the server starts from one.", show_default=False),
    ] = None,
    secure_sum: Annotated[
        bool, typer.Option("--secure-sum", help="Refuse servers that would see this client's replies by themselves.")
    ] = False,
    root_certificates: Annotated[Path | None, _file("Who signed the server's certificate.")] = None,
    auth_key: Annotated[Path | None, _file("This client's private key.")] = None,
    insecure: InsecureOption = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.", envvar="NEUROCL_THREADS")] = 1,
    quiet: QuietOption = False,
) -> None:
    """Take part in the runs of a server with the data of this machine, until stopped with Ctrl-C."""
    from neurocl.devices import resolve_device
    from neurocl.federated.flower.client import Own
    from neurocl.federated.flower.node import join
    from neurocl.federated.flower.processes import Address

    federated.check_dataset(dataset)
    chosen = str(resolve_device(device))
    join(
        Own(
            client=number,
            dataset=dataset,
            data_dir=data_dir,
            backbone=backbone,
            secure_sum=secure_sum,
            device=chosen,
            threads=threads,
        ),
        Address.parse(server),
        store or Path("runs") / f"client-{number}",
        root_certificates=root_certificates,
        key=auth_key,
        insecure=insecure,
        say=None if quiet else lambda line: typer.echo(line, err=True),
    )


def keys(
    folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    clients: Annotated[int, typer.Option(min=1, help="Number of clients.")] = 5,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address of the server; several times if need be.", show_default="this machine"),
    ] = None,
) -> None:
    """Make certificates and keys to begin with: an authority, a server's certificate, a key pair for every client."""
    from neurocl.federated.flower.keys import make_keys

    for path in make_keys(folder, clients, host or ()):
        typer.echo(str(path))
    typer.echo(
        f"Server: --ca {folder}/ca.crt --cert {folder}/server.crt --key {folder}/server.key --auth {folder}/clients",
        err=True,
    )
    typer.echo(
        "Client N: --root-certificates ca.crt --auth-key client-N.key; it needs these two files and no other",
        err=True,
    )
