#!/bin/sh
# ray 2.60.0: a second process can't connect to the cluster that ray.init() started, by the very address it printed.
#
# Guess: while a process that called ray.init() lives, another one of the same user can call ray.init(address=ADDRESS)
# with its gcs_address, or run with RAY_ADDRESS, as it always could.
# Seen: ray.init() of a new cluster sets RAY_AUTH_MODE=token for itself and its children, and writes a token to
# ~/.ray/auth_token where there is none; a driver that is given an address never turns the mode on. It tries for 20
# seconds and raises ConnectionError, which says nothing of tokens. With RAY_AUTH_MODE=token it connects, by the file.
# Also: _node_ip_address="127.0.0.1" is taken for the machine's address, so the cluster is open to the network.
# Remedy: set RAY_AUTH_MODE=token, and a RAY_AUTH_TOKEN of one's own, for both.
# Fails where that changes. Installs about 0.3 GB.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "ray==2.60.0" 2>/dev/null
unset RAY_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
export HOME="$folder/home" RAY_USAGE_STATS_ENABLED=0
mkdir "$HOME"
cat > "$folder/first.py" <<'PY'
import os
import subprocess
import sys

import ray

context = ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
address = context.address_info["gcs_address"]
print("cluster at", address, "token file:", os.path.exists(os.path.expanduser("~/.ray/auth_token")))
assert os.path.exists(os.path.expanduser("~/.ray/auth_token"))
own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
code = f"import ray; ray.init(address={address!r}, logging_level='ERROR', log_to_driver=False); print('connected')"
for added, connects in (({}, False), ({"RAY_AUTH_MODE": "token"}, True)):
    done = subprocess.run([sys.executable, "-c", code], env=own | added, capture_output=True, text=True)
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    print(f"second process with {added or 'nothing set'}: {last}")
    assert ("connected" in done.stdout) == connects
    assert connects or "token" not in last.lower()
PY
"$folder/venv/bin/python" "$folder/first.py" 2>"$folder/log" || { cat "$folder/log" >&2; exit 1; }
