"""Ceph's S3 gateway on this machine: a monitor, a store in memory and `radosgw`, of Debian's packages, in a folder."""

import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.launcher import free_port

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PATIENCE_S = 240.0
KEYS = {"AWS_ACCESS_KEY_ID": "gateway-key", "AWS_SECRET_ACCESS_KEY": "gateway-secret"}


def is_installed() -> bool:
    return all(map(shutil.which, PROGRAMS))


@contextmanager
def ceph_gateway(folder: Path) -> Iterator[dict[str, str]]:
    """Run it; yields the environment that finds it. All of it listens on loopback alone."""
    cluster, port = str(uuid.uuid4()), free_port()
    config = folder / "ceph.conf"
    config.write_text(
        f"""[global]
fsid = {cluster}
mon host = v1:127.0.0.1:{free_port()}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {folder}/mon
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw enable usage log = false
debug mon = 0
debug osd = 0
debug rgw = 1
"""
    )
    address = next(line.split("v1:")[1] for line in config.read_text().splitlines() if line.startswith("mon host"))

    def run(*command: str) -> str:
        done = subprocess.run([command[0], "-c", str(config), *command[1:]], capture_output=True, timeout=PATIENCE_S)
        assert not done.returncode, (command, done.stderr.decode()[-2000:])
        return done.stdout.decode()

    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    monitors = str(folder / "monmap")
    run("monmaptool", "--create", "--clobber", "--fsid", cluster, "--addv", "a", f"[v1:{address}]", monitors)
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monitors)
    with ExitStack() as stack:

        def start(*command: str) -> None:
            arguments = [command[0], "-c", str(config), "-f", *command[1:]]
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait, 60)
            stack.callback(process.kill)

        start("ceph-mon", "-i", "a")
        store = str(uuid.uuid4())
        run("ceph", "--connect-timeout", "60", "osd", "create", store, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        start("ceph-osd", "-i", "0")
        keys = ["--access-key", KEYS["AWS_ACCESS_KEY_ID"], "--secret", KEYS["AWS_SECRET_ACCESS_KEY"]]
        run("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests", *keys)
        # After it: both would make the same pools.
        start("radosgw", "-n", "client.rgw")
        until = time.monotonic() + PATIENCE_S
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **KEYS}
        while not _answers(port):
            assert time.monotonic() < until, (folder / "client.rgw.log").read_text()[-2000:]
            time.sleep(0.2)
        yield environment


def _answers(port: int) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status == 200)
    except URLError:
        return False
