"""Which network interface gloo uses between nodes. Imports no torch.

Left alone, gloo advertises the address of this host's name. Debian and its kin give that name 127.0.1.1 in /etc/hosts,
which no other node can reach; and with several networks it need not be in the one that connects the nodes. The way to
MASTER_ADDR is known to work: all ranks have just met there.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from dist_train.ranks.peers import Peer

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # of linux/sockios.h
LOOPBACK = "lo"


def route_to_master() -> tuple[str, str]:
    """Address that MASTER_ADDR has here, and this machine's address on the way there; empty if there is none. Nothing
    is sent: connecting a datagram socket only chooses the way."""
    with suppress(OSError, KeyError, ValueError, OverflowError):  # `rendezvous` says what is wrong with them
        name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        for family, kind, protocol, _, place in socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(place[0]), str(probe.getsockname()[0])
    return "", ""


def interfaces() -> dict[str, list[str]]:
    """Addresses of this machine by interface: all of IPv6, and the first of IPv4, which is the one that gloo takes."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for name, addresses in found.items():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):  # no IPv6
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, *_, name = line.split()
            found.setdefault(name, []).append(str(IPv6Address(int(digits, 16))))
    return found


def loops(address: str) -> bool:
    """Whether this is an address by which a machine reaches only itself."""
    return bool(address) and ip_address(_plain(address)).is_loopback


def unreachable(peers: Sequence[Peer]) -> str:
    """Complaint about a MASTER_ADDR that one machine alone can reach, although there are several; "" if there is none.

    Ranks on several machines cannot all have met at a loopback address unless something forwards it, which gloo's own
    connections would lack. Several nodes that are one machine (those of the tests' cluster, and containers that share a
    network) may: they have one kernel, and so one boot id. A node whose own name is 127.0.1.1 to itself alone is
    harmless.
    """
    if len({peer.boot for peer in peers}) > 1 and all(loops(peer.master) for peer in peers):
        return no_master(peers[0].master)
    return ""


def no_master(address: str) -> str:
    """Sentence for a MASTER_ADDR with this address, or without one, that does not lead to rank 0."""
    if not address:
        name = os.environ.get("MASTER_ADDR", "")
        return (
            f"MASTER_ADDR is {name}, a name without an address here: set it to the name or the address of rank 0's node"
        )
    return (
        f"MASTER_ADDR is {address} here, an address that no other node can reach: set it to the name or the address "
        f"that rank 0's node has in the network between the nodes"
    )


def interface(mine: Peer, peers: Sequence[Peer], addresses: Mapping[str, Sequence[str]]) -> str:
    """Interface that holds this rank's address on the way to MASTER_ADDR; "" to leave the choice to gloo, which is
    right on one node.

    On the master's own node that way may be the loopback device: if its name is 127.0.1.1 there. The address is then
    the one that the name has for others.

    Args:
        addresses: of this machine, by interface.
    """
    ways = {peer.local for peer in peers if not loops(peer.local)}  # containers may share a name, and have one kernel
    if len({peer.machine for peer in peers}) == 1 and len(ways) < 2:
        return ""
    wanted = [mine.local] if not loops(mine.local) else [peer.master for peer in peers if not loops(peer.master)]
    held = {_plain(address): name for name, those in addresses.items() for address in those if name != LOOPBACK}
    return next((held[_plain(address)] for address in wanted if _plain(address) in held), "")


def disconnected(error: Exception) -> str:
    """Sentence for a group of ranks that could not be formed."""
    chosen = os.environ.get(VARIABLE)
    over = f"over {chosen}" if chosen else "over the interface of each host's name"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"the ranks cannot connect to each other {over} ({said}): set {VARIABLE} to the interface by which the nodes "
        f"reach each other"
    )


def _plain(address: str) -> str:
    """One spelling: without the zone of a link-local address, IPv4 as such."""
    if not address:
        return ""
    found = ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)
