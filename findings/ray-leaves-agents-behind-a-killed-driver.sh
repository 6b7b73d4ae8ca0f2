#!/bin/sh
# ray 2.60.0: of a cluster that ray.init() started, two agents outlive a driver that gets SIGKILL, and its folder stays.
#
# Guess: all processes of the cluster end with the driver, however it ends: on Linux they ask for it (PR_SET_PDEATHSIG).
# Seen: GCS, raylet, monitors and workers are gone within seconds. The raylet's own children, DashboardAgent (also with
# include_dashboard=False) and RuntimeEnvAgent, 0.2 GB together, are still there 20 seconds later and end within some
# minutes: they look every two seconds whether their parent lives, five times, and then try to tell the dead GCS.
# The session's folder is left in the temporary directory for good.
# Remedy: start the cluster in a process that outlives the driver, notices its end and calls ray.shutdown().
# Fails where that changes. Installs about 0.3 GB.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "ray==2.60.0" 2>/dev/null
unset RAY_ADDRESS
export HOME="$folder" RAY_USAGE_STATS_ENABLED=0
cat > "$folder/driver.py" <<'PY'
import sys

import ray

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", _temp_dir=sys.argv[1])
print(ray.get(ray.remote(lambda: "worked").remote()), flush=True)
sys.stdin.read()
PY
cat > "$folder/try.py" <<'PY'
import os
import subprocess
import sys
import time

folder = sys.argv[1]
temp = folder + "/r"
driver = subprocess.Popen(
    [sys.executable, folder + "/driver.py", temp], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)


def ours():
    """Names of living processes that inherited this run's HOME, without this one and the driver."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = open(f"/proc/{pid}/environ", "rb").read()
            name = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")[0].decode().rpartition("/")[2]
        except OSError:
            continue
        if f"HOME={folder}\0".encode() in environment and int(pid) not in (os.getpid(), driver.pid) and name:
            found[int(pid)] = name
    return {pid: name for pid, name in found.items() if name != "sh"}


assert driver.stdout.readline() == "worked\n"
print("before:", sorted(ours().values()))
driver.kill()
driver.wait()
killed = time.monotonic()
time.sleep(20)
left = sorted(ours().values())
print("20 s after SIGKILL of the driver:", left, "folder:", os.listdir(temp))
assert left == ["ray::DashboardAgent", "ray::RuntimeEnvAgent"] and os.listdir(temp)
while ours():
    time.sleep(1)
print(f"gone after {time.monotonic() - killed:.0f} s; folder: {os.listdir(temp)}")
assert os.listdir(temp)
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/log" || { cat "$folder/log" >&2; exit 1; }
