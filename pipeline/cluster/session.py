"""The stage's connection to a Ray cluster: what every worker reserves of a node, and which nodes may answer.

A worker's resources are reserved as a placement group before anything starts, and kept until the session ends. So a
cluster that is too small is an error at once, where an actor would wait for ever, and no other job takes a dead
worker's place before its successor does. Where its node is gone, Ray moves the group to another one, if there is room.
"""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipeline.cluster.actor import START_SECONDS, Actor
from pipeline.cluster.host import Facts, Failure
from pipeline.cluster.local_cluster import LocalCluster
from pipeline.cluster.same_software import software
from pipeline.errors import EngineFailed, RequestError
from pipeline.params import RayParams

RESERVE_SECONDS = 60.0  # for all workers, at the start
MOVE_SECONDS = 20.0  # for a dead worker's successor where the node is gone
# Variables that the stage's user sets for engines; others are a node's own, and those of NCCL differ by node.
_PASSED_ON = ("REFCACHE_", "VLLM_", "HF_")


class Need(NamedTuple):
    """What a section of params.yaml asks for. name: of its key for `workers`; gpus: a worker's, where there are any."""

    section: str
    name: str
    workers: int
    gpus: int
    ray: RayParams


class RaySession:
    """A context manager; `actor` and `check` may be called by several threads at once."""

    def __init__(self, need: Need, model: Path, expected: dict[str, str]) -> None:
        """expected: digests of "weights" and "config" that `model` must have on every node.

        Starts a cluster of this machine where RAY_ADDRESS names none; `__enter__` waits for it.
        """
        self._need, self._model, self._expected = need, model.absolute(), expected
        if find_spec("ray") is None:
            raise RequestError(
                f"{need.section}.workers is ray, which is not installed. Run `pip install -e .[ray]`, here and on all "
                f"nodes, or set {need.section}.workers to local."
            )
        address = os.environ.get("RAY_ADDRESS", "")
        if address.startswith("ray://"):
            raise RequestError(
                f"RAY_ADDRESS is {address}, the address of a Ray Client server. This stage must run on a node of the "
                "cluster (the head, or by `ray job submit`): set RAY_ADDRESS to auto there, or to HOST:6379."
            )
        self._mine = not _connected()
        self._local = LocalCluster() if self._mine and not address else None
        self._address = address
        self._groups: list[Any] = []
        self._sound: set[tuple[str, tuple[tuple[str, int, int], ...]]] = set()  # nodes with what they hold
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self._connect()
            self._reserve()
        except BaseException:
            self.close()
            raise
        return self

    def _connect(self) -> None:
        import signal

        import ray
        from ray.exceptions import RayError

        if not self._mine:
            return
        ours = signal.getsignal(signal.SIGTERM)
        address = self._local.address if self._local else self._address
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (OSError, RuntimeError, ValueError, RayError) as error:  # not there, other versions, another token
            raise RequestError(
                f"No Ray cluster can be used at {address} (RAY_ADDRESS): {error}. Is it running, are Ray and Python of "
                "one version there and here, and are RAY_AUTH_MODE and the token the same? `ray status` needs them too."
            ) from None
        with suppress(ValueError):  # not the main thread, where Ray sets no handler either
            signal.signal(signal.SIGTERM, ours)  # Ray's would end the stage without a word to its engines

    def _reserve(self) -> None:
        from ray.util.placement_group import placement_group

        bundle = self._bundle()
        self._groups = [placement_group([bundle]) for _ in range(self._need.workers)]
        ready = [group.wait(RESERVE_SECONDS if not index else 1) for index, group in enumerate(self._groups)]
        if not all(ready):
            raise RequestError(
                f"{_told(bundle)} for each of {self._need.workers} {self._need.name}: the cluster has that, but only "
                f"{sum(ready)} got theirs within {RESERVE_SECONDS:.0f} s, so other jobs hold the rest (`ray status` "
                f"shows it). Wait for them, or set {self._need.section}.{self._need.name} to {max(1, sum(ready))}."
            )

    def _bundle(self) -> dict[str, float]:
        """What a worker reserves; raises RequestError where the cluster has not so much for all."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = self._need.ray.gpus
        if wanted is None:
            wanted = self._need.gpus if any(node.get("GPU") for node in nodes) else 0
        bundle = {"CPU": float(self._need.ray.cpus), "GPU": float(wanted)}
        bundle = {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}  # Ray wants something
        room = sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items()) for node in nodes)
        if room < self._need.workers:
            section, totals = self._need.section, {n: sum(node.get(n, 0) for node in nodes) for n in ("CPU", "GPU")}
            least = f"{section}.{self._need.name} to {room}" if room else "less for each"
            raise RequestError(
                f"{section}.{self._need.name} is {self._need.workers}, and each needs {_told(bundle)} of one node "
                f"({section}.ray.cpus, {section}.ray.gpus). Found {_told(totals)} on {len(nodes)} nodes, which is room "
                f"for {room}. They would wait for ever: set {least}, or start more nodes first."
            )
        return bundle

    def actor(self, index: int) -> Actor:
        """A process on the node where worker `index` has its resources, which it waits for.

        Raises EngineFailed where there is no room for it any more.
        """
        group = self._groups[index]
        if not group.wait(MOVE_SECONDS):
            raise EngineFailed(
                f"The cluster has shrunk: no node has {_told(group.bundle_specs[0])} for number {index + 1} of "
                f"{self._need.workers} {self._need.name} any more."
            )
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        return Actor(group, variables)

    def check(self, actor: Actor) -> Facts:
        """Refuse a node that would compute something else, before its first row.

        Raises RequestError that names the node and what differs, EngineFailed where the actor did not start.
        """
        facts: Facts = actor.ask("facts", self._model, silence=START_SECONDS)
        actor.where = f"node {facts.host}"
        ours = software()
        if facts.software != ours:
            differences = [
                f"{name} {facts.software.get(name)} there, {version} here"
                for name, version in ours.items()
                if facts.software.get(name) != version
            ]
            raise RequestError(
                f"Node {facts.host} has other software: {'; '.join(differences)}. Its log-probs would pass for those "
                "of this one. Install the same on all nodes (a shared folder, or one container image). Rows finished "
                "before are kept."
            )
        with self._lock_of(facts.host):
            if (facts.host, facts.signature) not in self._sound:
                self._check_digests(actor, facts)
                self._sound.add((facts.host, facts.signature))
        return facts

    def _check_digests(self, actor: Actor, facts: Facts) -> None:
        answer = actor.outcome("digests", self._model, silence=None)
        if isinstance(answer, Failure):
            raise RequestError(
                f"Node {facts.host} has no such model as this one: {answer.message} {self._model} must hold the same "
                "files on every node (a shared folder, or a copy in the same place). Rows finished before are kept."
            )
        for name, found in answer.items():
            if found != self._expected[name]:
                raise RequestError(
                    f"Node {facts.host} has another {self._model}: its {name} hash to {found[:12]}, here to "
                    f"{self._expected[name][:12]}. Its log-probs would be of another model. Copy the files again, or "
                    "name a folder that all nodes share. Rows finished before are kept."
                )

    def _lock_of(self, host: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(host, threading.Lock())

    def close(self) -> None:
        """End every actor, and the cluster if it is this session's."""
        try:
            if _connected():
                import ray
                from ray.util.placement_group import remove_placement_group

                for group in self._groups:
                    with suppress(Exception):  # a cluster that is gone has removed them itself
                        remove_placement_group(group)  # and with it the actors in it
                if self._mine:
                    ray.shutdown()
        finally:
            if self._local is not None:
                self._local.__exit__(*sys.exc_info())

    def __exit__(self, *raised: object) -> None:
        self.close()


def _connected() -> bool:
    """Whether this process is; somebody else's connection is used, and left open."""
    if "ray" not in sys.modules:  # it reads its environment when it is imported, and that is not complete yet
        return False
    import ray

    return bool(ray.is_initialized())


def _told(bundle: dict[str, float]) -> str:
    parts: Sequence[str] = [f"{amount:g} {name}s" for name, amount in bundle.items() if amount] or ["nothing"]
    return " and ".join(parts)
