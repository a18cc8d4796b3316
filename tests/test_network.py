"""The interface that gloo uses between nodes: the one by which the others reach this node."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_train.ranks import network
from dist_train.ranks.peers import Peer
from dist_train.ranks.world import join
from pipelines.errors import UserError

HEAD = {"lo": ["127.0.0.1", "::1"], "eth0": ["203.0.113.7"], "ib0": ["10.1.0.1", "fd00::1", "fe80::1"]}
NODE = {"lo": ["127.0.0.1", "::1"], "ens3": ["203.0.113.8"], "ib0": ["10.1.0.2", "fd00::2", "fe80::2"]}


def peers(head: tuple[str, str], node: tuple[str, str], boots: str = "ab") -> list[Peer]:
    """Two ranks on each of two nodes, with (address of the master, own address on the way there)."""
    first = Peer("head", boots[0], master=head[0], local=head[1])
    second = Peer("node", boots[1], master=node[0], local=node[1])
    return [first, first, second, second]


@pytest.mark.parametrize(
    ("head", "node"),
    [
        (("10.1.0.1", "10.1.0.1"), ("10.1.0.1", "10.1.0.2")),
        # a head whose /etc/hosts gives its name to itself alone, as Debian's does
        (("127.0.1.1", "127.0.0.1"), ("10.1.0.1", "10.1.0.2")),
        (("::1", "::1"), ("fd00::1", "fd00::2")),
        (("fd00::1", "fd00::1"), ("fd00::1", "fd00::2")),
        (("fe80::1%ib0", "fe80::1%4"), ("fe80::1%ib0", "fe80::2%ib0")),
        (("::ffff:10.1.0.1", "::ffff:10.1.0.1"), ("::ffff:10.1.0.1", "::ffff:10.1.0.2")),
        (("fd00:0::0001", "FD00::1"), ("10.1.0.1", "10.1.0.2")),
    ],
)
def test_the_interface_of_the_way_to_the_master(head: tuple[str, str], node: tuple[str, str]) -> None:
    ranks = peers(head, node)
    assert network.unreachable(ranks) == ""
    assert network.interface(ranks[0], ranks, HEAD) == "ib0"
    assert network.interface(ranks[3], ranks, NODE) == "ib0"


def test_the_choice_is_left_to_gloo() -> None:
    """On one node, or where no interface holds the address, as behind a translation."""
    ranks = peers(("10.1.0.1", "10.1.0.1"), ("10.1.0.1", "10.1.0.2"))
    assert network.interface(ranks[0], ranks[:2], HEAD) == ""
    assert network.interface(ranks[0], ranks, {"lo": ["127.0.0.1"], "eth0": ["172.17.0.2"]}) == ""
    silent = [Peer("head"), Peer("node")]
    assert network.interface(silent[0], silent, HEAD) == ""
    assert network.unreachable(silent) == ""


def test_a_master_that_only_one_machine_can_reach() -> None:
    """Two machines cannot both have come to 127.0.0.1, unless through a tunnel. Two nodes of one machine can."""
    said = network.unreachable(peers(("127.0.0.1", "127.0.0.1"), ("::1", "::1")))
    assert said.startswith("MASTER_ADDR is 127.0.0.1 here, an address that no other node can reach: set it to ")
    on_one_machine = peers(("127.0.1.1", "127.0.0.1"), ("127.0.1.1", "127.0.0.1"), boots="aa")
    assert network.unreachable(on_one_machine) == ""
    assert network.interface(on_one_machine[3], on_one_machine, NODE) == ""


def test_nobody_answers_at_a_master_of_127(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank of another node meets: within minutes, not an hour, one sentence."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    variables = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    for name, value in {**variables, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dist_train.ranks.world.NEAR", timedelta(seconds=1))
    with pytest.raises(UserError, match=r"MASTER_ADDR is (127\.0\.0\.1|::1) here, an address that no other node"):
        join("cpu")


def test_a_mesh_that_fails_names_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.VARIABLE, "nosuch0")
    with pytest.raises(RuntimeError, match=r"connect to each other over nosuch0 \(.+\): set GLOO_SOCKET_IFNAME to "):
        join("cpu")
    assert not dist.is_initialized()
    monkeypatch.delenv(network.VARIABLE)
    assert "over the interface of each host's name (no route): " in network.disconnected(RuntimeError("no route\n2"))


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interfaces that it has, and the way to one of its addresses."""
    found = network.interfaces()
    assert "127.0.0.1" in found["lo"]
    assert all(not network.loops(address) for name, those in found.items() if name != "lo" for address in those)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert network.route_to_master() == ("127.0.0.1", "127.0.0.1")
    monkeypatch.setenv("MASTER_ADDR", "no such name")
    assert network.route_to_master() == ("", "")


def test_containers_of_one_name_and_kernel_are_several_nodes_if_their_ways_differ() -> None:
    first, second = (
        Peer("app", "k", master="10.1.0.1", local="10.1.0.1"),
        Peer("app", "k", "1", "", "10.1.0.1", "10.1.0.2"),
    )
    assert network.interface(second, [first, second], NODE) == "ib0"
    assert network.interface(first, [first, first], HEAD) == ""


@pytest.mark.integration
def test_a_master_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.ranks.world.NEAR", timedelta(seconds=2))
    where = {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
    for name, value in {**where, "MASTER_ADDR": "nosuch.invalid", "MASTER_PORT": "29611"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR is nosuch.invalid, a name without an address here"):
        join("cpu")
