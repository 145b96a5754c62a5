"""`python -m runtime serve`: a model for many clients, over HTTP."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.base.text_file import read_text
from runtime.cli.options import add_json, add_model, count
from runtime.cli.output import note, print_json
from runtime.cli.parser import Parser
from runtime.cli.running import add_loading, add_sampling, open_noted
from runtime.errors import UserError
from runtime.options import RunOptions
from runtime.text.sampling import Sampling

if TYPE_CHECKING:
    from runtime.serve.serving import Address

_KEY = "LAZYNEURON_API_KEY"
_LOCAL = ("127.0.0.1", "::1", "localhost")


def configure_parser(parser: Parser) -> None:
    """Options of `serve`."""
    add_model(parser)
    group = parser.add_argument_group("listening")
    group.add_argument(
        "--host", action="append", metavar="ADDRESS", help="to listen on (127.0.0.1); again for another one"
    )
    group.add_argument("--port", type=_port, default=8080, metavar="N", help="0 for any that is free (8080)")
    group.add_argument("--uds", type=Path, metavar="PATH", help="listen on a Unix socket instead")
    group.add_argument("--parallel", type=count, default=4, metavar="N", help="answers computed at once, at most (4)")
    group.add_argument(
        "--n-cells",
        type=count,
        metavar="N",
        help="tokens kept of all requests together (--n-ctx for each of --parallel, at most 4 GiB)",
    )
    group.add_argument(
        "--queue", type=_not_negative, default=64, metavar="N", help="requests that may wait for that (64)"
    )
    group.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for answers to end when the server is to (30)"
    )
    group.add_argument(
        "--deterministic", action="store_true", help="answers do not depend on company, to the last bit; slower"
    )
    group.add_argument("--ping-seconds", type=float, default=15.0, metavar="S", help="of silence in a stream (15)")
    group = parser.add_argument_group("clients")
    group.add_argument("--alias", metavar="NAME[,NAME]", help="names of the model (the file's)")
    group.add_argument("--strict-model", action="store_true", help="refuse requests that name another model")
    group.add_argument("--api-key", action="append", metavar="KEY", help=f"ask for it; also from ${_KEY}")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="ask for one of these, a line each")
    group.add_argument("--cors-origin", action="append", metavar="ORIGIN", help="let web pages of it in; * all")
    group.add_argument("--allowed-host", action="append", metavar="NAME", help="another name of the server; * any")
    group.add_argument("--no-page", dest="page", action="store_false", help="serve no chat page at /")
    group.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja template in place of the model's")
    add_sampling(parser, "of requests that do not say: none, or 16 in /v1/completions")
    add_loading(parser)
    add_json(parser)


def serve(
    model: Path,
    host: list[str] | None = None,
    port: int = 8080,
    uds: Path | None = None,
    parallel: int = 4,
    n_cells: int | None = None,
    queue: int = 64,
    drain_seconds: float = 30.0,
    deterministic: bool = False,
    ping_seconds: float = 15.0,
    alias: str | None = None,
    strict_model: bool = False,
    api_key: list[str] | None = None,
    api_key_file: Path | None = None,
    cors_origin: list[str] | None = None,
    allowed_host: list[str] | None = None,
    page: bool = True,
    chat_template: Path | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    run: RunOptions | None = None,
    as_json: bool = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's and llama.cpp's servers do, to many clients at once."""
    try:
        from runtime.serve.serving import Listening, serve  # noqa: PLC0415  (an extra, which may not be installed)
        from runtime.serve.settings import Settings  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"`serve` needs the package {error.name}", 'pip install "lazyneuron[server]"') from None
    names = [name.strip() for name in (alias or model.stem).split(",")]
    settings = Settings(
        names[0],
        tuple(names[1:]),
        _keys(api_key or [], api_key_file),
        max_tokens,
        sampling or Sampling(),
        read_text(chat_template).text if chat_template else None,
        strict_model,
        tuple(cors_origin or ()),
        tuple(allowed_host or ()),
        page,
        ping_seconds,
    )
    hosts = tuple(host or _LOCAL[:1])
    if not settings.keys and not uds and not set(hosts) <= set(_LOCAL):
        note("note: no --api-key: whoever reaches this machine can use the server")

    def ready(addresses: list[Address], _: object) -> None:
        _tell(addresses, settings.name, as_json)

    options = replace(run or RunOptions(), deterministic=deterministic, sequences=parallel, n_cells=n_cells)
    load = functools.partial(open_noted, model, options)
    ending = serve(load, settings, Listening(hosts, port, uds, drain_seconds), parallel, queue, ready)
    if ending.loading:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.status)
    if ending.status:
        raise SystemExit(ending.status)


def _tell(addresses: list[Address], name: str, as_json: bool) -> None:
    first = addresses[0]
    if as_json:
        uds = str(first.uds) if first.uds else None
        where = {"address": str(first), "addresses": [str(one) for one in addresses]}
        told = {"host": first.host, "port": first.port, "uds": uds, "model": name, "pid": os.getpid()}
        print_json({**where, **told})
    else:
        print(f"{name} is served at {' and '.join(str(one) for one in addresses)}", flush=True)


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys: of the command line, of the environment, of a file."""
    keys = [*given]
    if os.environ.get(_KEY):
        keys.append(os.environ[_KEY])
    if file:
        lines = [line.strip() for line in read_text(file).text.splitlines()]
        if not any(lines):
            raise UserError(f"`{file}`: has no keys, expected one in each line")
        keys += [line for line in lines if line]
    return tuple(keys)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number}, expected 0 to 65535")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}, expected 0 or more")
    return number
