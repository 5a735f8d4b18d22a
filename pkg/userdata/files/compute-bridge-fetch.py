"""Fetches the guest binary by its digest; with the argument "failed", ends the machine."""
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

ROOT = os.environ.get("COMPUTE_BRIDGE_ROOT", "")
PATIENCE = float(os.environ.get("COMPUTE_BRIDGE_PATIENCE", "300"))
STATE = ROOT + "/var/lib/compute-bridge"
RUN = ROOT + "/run/compute-bridge"


class Refused(Exception):
    """An answer that another try won't change."""


def load(name):
    with open(ROOT + "/etc/compute-bridge/" + name) as f:
        return json.load(f)


def good(path, want):
    try:
        with open(path, "rb") as f:
            digest = hashlib.sha256()
            for chunk in iter(lambda: f.read(1 << 20), b""):
                digest.update(chunk)
            return digest.hexdigest() == want
    except FileNotFoundError:
        return False


def attempt(spec, path):
    """Errors never name the URL, which may be signed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    try:
        with urllib.request.urlopen(spec["url"], timeout=30) as answer, open(part, "wb") as f:
            left = 256 << 20
            for chunk in iter(lambda: answer.read(1 << 20), b""):
                left -= len(chunk)
                if left < 0:
                    raise Refused("is too large")
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
    except urllib.error.HTTPError as e:
        if e.code in (400, 401, 403, 404, 410):
            raise Refused("answer %d" % e.code)
        raise OSError("answer %d" % e.code)
    if not good(part, spec["sha256"]):
        raise OSError("another digest")
    os.chmod(part, 0o755)
    os.rename(part, path)


def fetch():
    spec = load("fetch.json")
    path = ROOT + spec["path"]
    give_up, pause = time.monotonic() + PATIENCE, 0.5
    while not good(path, spec["sha256"]):
        try:
            attempt(spec, path)
        except Exception as e:
            reason = getattr(e, "reason", e)
            print("compute-bridge guest: the guest binary can't be fetched:", reason, flush=True)
            if isinstance(e, Refused) or time.monotonic() + pause > give_up:
                say("the guest binary can't be fetched: %s" % reason)
                sys.exit(1)
            time.sleep(pause)
            pause = min(pause * 2, 10)


def say(message):
    """Prints the verdict, unless there is one."""
    os.makedirs(RUN, exist_ok=True)
    try:
        os.close(os.open(RUN + "/verdict", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    machine = load("machine.json")
    line = "compute-bridge-verdict: " + json.dumps({
        "grant": machine["grant_id"], "attempt": machine["attempt"], "phase": "failed",
        "reason": "HOST_UNFIT", "message": message[:512]})
    fd = os.open(ROOT + "/dev/console", os.O_WRONLY | os.O_NOCTTY)
    os.write(fd, ("\r\n" + line + "\r\n").encode("ascii"))
    os.close(fd)


def failed():
    try:
        say("the image could not be run; the journal says why")
    finally:
        os.makedirs(STATE, exist_ok=True)
        open(STATE + "/ended", "w").close()
        if load("fetch.json")["power_off"]:
            subprocess.run(["systemctl", "--no-block", "poweroff"], check=True)


if sys.argv[1:] == ["failed"]:
    failed()
else:
    fetch()
