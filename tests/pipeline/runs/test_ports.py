import socket
from pathlib import Path

from pipeline.runs import ports


def test_a_port_that_is_taken_is_passed_over_and_no_other_program_is_given_one(monkeypatch):
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert ports.LOWEST > 1024 and lowest >= ports.LOWEST + ports.PORTS
    with socket.socket() as listener:
        taken = ports.free_port()
        listener.bind(("127.0.0.1", taken))
        monkeypatch.setattr(ports, "LOWEST", taken)
        monkeypatch.setattr(ports, "PORTS", 2)
        assert {ports.free_port() for _ in range(5)} == {taken + 1}
