"""Starts PgBouncer in transaction mode in front of a PostgreSQL server, for the programs beside it."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy

START_SECONDS = 10.0
CONFIGURATION = """
[databases]
{database} = {server}

[pgbouncer]
pool_mode = transaction
default_pool_size = {pool}
max_client_conn = 5000
listen_addr =
listen_port = {port}
unix_socket_dir = {folder}
auth_type = any
ignore_startup_parameters = extra_float_digits
logfile = {folder}/log
pidfile = {folder}/pid
"""


def program() -> str | None:
    """Where PgBouncer is; None if it is not installed (Debian: the package `pgbouncer`)."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def pooled(url: str, pool: int = 20) -> Iterator[str]:
    """The URL of a PgBouncer that leads to the database at `url`, with so many connections to the server.

    Every user is let in without a password. Raises RuntimeError if it does not start.
    """
    found = program()
    if found is None:
        raise RuntimeError("pgbouncer is not installed: `apt install pgbouncer`")
    parsed = sqlalchemy.make_url(url)
    fields = {
        "host": parsed.query.get("host") or parsed.host,
        "port": parsed.port or 5432,
        "dbname": parsed.database,
        "user": parsed.username,
        "password": parsed.password,
    }
    server = " ".join(f"{name}={value}" for name, value in fields.items() if value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pgbouncer.ini"
        text = CONFIGURATION.format(database=parsed.database, server=server, pool=pool, port=port, folder=folder)
        file.write_text(text, encoding="utf-8")
        command = [found, "-q", str(file)]
        if os.geteuid() == 0:  # it refuses to run as root, and a socket may be in a folder of the server's own user
            Path(folder).chmod(0o777)
            host = Path(str(fields["host"]))
            command += ["-u", host.owner() if host.is_dir() else "nobody"]
        process = subprocess.Popen(command)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (Path(folder) / f".s.PGSQL.{port}").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("pgbouncer did not start: see what it printed")
                time.sleep(0.05)
            yield parsed.set(
                drivername="postgresql",
                host=None,
                port=port,
                password=None,
                query={"host": folder},
            ).render_as_string(hide_password=False)
        finally:
            process.terminate()
            process.wait()
