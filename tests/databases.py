"""Databases for tests of studies: a SQLite file, and a PostgreSQL server of one's own on the loopback interface."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("initdb", "pg_ctl", "postgres")


def postgres_programs() -> dict[str, str] | None:
    """Where the server's programs are, newest version first; None if one is missing."""
    folders = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    path = os.pathsep.join([*folders, "/usr/local/bin", os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    return {name: str(Path(place).resolve()) for name, place in found.items() if place} if all(found.values()) else None


def missing() -> str:
    """Why no server can be started, or ""."""
    if postgres_programs() is None:
        return f"needs PostgreSQL's {', '.join(PROGRAMS)}"
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return "needs psycopg2"
    if os.geteuid() == 0 and "nobody" not in {entry.pw_name for entry in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user nobody"
    return ""


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of an empty database on a server that ends with the block. As root the server runs as nobody: it refuses to run as root."""
    programs = postgres_programs()
    assert programs is not None
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="qprune-postgres-") as text:
        folder = Path(text)
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def run(*words: str) -> None:
            with (folder.parent / f"{folder.name}.log").open("wb") as log:
                done = subprocess.run(words, user=user, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
            printed = Path(log.name).read_text()
            Path(log.name).unlink()
            assert done.returncode == 0, printed

        run(programs["initdb"], "-D", f"{folder}/data", "-U", "study", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
        run(programs["pg_ctl"], "-D", f"{folder}/data", "-l", f"{folder}/server.log", "-o", options, "-w", "-t", "30", "start")
        try:
            yield f"postgresql://study@127.0.0.1:{port}/postgres"
        finally:
            run(programs["pg_ctl"], "-D", f"{folder}/data", "-m", "immediate", "-w", "stop")
