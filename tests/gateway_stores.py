"""Stores to test with: a SQLite file, and a private PostgreSQL server where its programs are installed."""

import os
import shutil
import subprocess
import tempfile
import uuid
from contextlib import contextmanager
from functools import partial
from glob import glob
from pathlib import Path

PROGRAMS = next(iter(sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)), None)
KINDS = ("sqlite", "postgres")


def missing():
    """Why there is no PostgreSQL here; None if there is."""
    try:
        import psycopg  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError:
        return "SQLAlchemy and psycopg are not installed"
    return None if PROGRAMS else "no PostgreSQL in /usr/lib/postgresql"


@contextmanager
def server():
    """A server of our own behind a Unix socket; yields a function that makes an empty database and gives its URL, with
    functions `stop`, as a crash would, and `start`, again.
    """
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short path: sockets allow 107 bytes
    as_user = {"user": "nobody"} if os.geteuid() == 0 else {}  # the server refuses to be run by root
    if as_user:
        shutil.chown(folder, "nobody")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}

    def run(program, *arguments):
        subprocess.run([f"{PROGRAMS}/{program}", *map(str, arguments)], check=True, timeout=120, **quiet)

    try:
        run("initdb", "-D", folder / "data", "-U", "test", "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = f"-k {folder} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB -c max_connections=60"
        begin = ("pg_ctl", "-D", folder / "data", "-w", "-o", settings, "-l", folder / "log", "start")
        end = ("pg_ctl", "-D", folder / "data", "-w", "-m", "immediate", "stop")
        run(*begin)

        def database():
            name = f"t{uuid.uuid4().hex}"
            run("createdb", "-h", folder, "-U", "test", name)
            return f"postgresql://test@/{name}?host={folder}"

        database.stop, database.start = partial(run, *end), partial(run, *begin)
        try:
            yield database
        finally:
            run(*end)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
