"""Runs the service: `python -m app --config shardkit.toml --port 8000`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError

from app.main import create_app
from app.settings import Settings
from shardkit import AsyncCluster, set_aside
from shardkit.errors import ConfigurationError

N_PORTS = 50
"""How many ports after a taken one are tried."""

HEAD_TIMEOUT = 15
STOP_TIMEOUT = 10
USAGE = 2


def main(
    config: Annotated[Path | None, typer.Option(help="the cluster's shardkit.toml")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="port; the next free one when taken")] = None,
) -> None:
    """Serve the photo service until interrupted."""
    try:
        settings = Settings.read(os.environ, config=config, host=host, port=port)
        AsyncCluster.from_file(settings.config)  # refuse a wrong file in one line; opens nothing
    except (ConfigurationError, ValidationError) as error:
        typer.echo(f"error: {_one_line(error)}", err=True)
        raise typer.Exit(USAGE) from None
    listener = listen(settings.host, settings.port)
    chosen = listener.getsockname()[1]
    if settings.port not in {0, chosen}:
        typer.echo(f"port {settings.port} is taken, using {chosen}")
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    typer.echo(f"serving on http://{shown}:{chosen}/")
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            server_header=False,
            timeout_keep_alive=HEAD_TIMEOUT,
            timeout_graceful_shutdown=STOP_TIMEOUT,
            log_level="warning",
        )
    )
    set_aside()
    with listener:
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket on a port or the next free one after it.

    Args:
        host: address to listen on.
        port: first choice; 0 takes any.

    Raises:
        OSError: none of the ports tried is free, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last: OSError | None = None
    for candidate in range(port, min(port + N_PORTS, 65_536)):
        # The protocol is named because asyncio turns Nagle's algorithm off for nothing else.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            last = error
        else:
            return listener
    raise last or OSError(f"no port {port}")


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return str(error)


if __name__ == "__main__":
    typer.run(main)
